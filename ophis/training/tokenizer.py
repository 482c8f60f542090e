"""Text to token ids: bytes by default, or any tokenizer of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"  # follows every document

# The library keeps some 200 bytes a token while it encodes, so long documents are encoded in pieces.
_PIECE = 64 * 1024  # characters


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, its id the byte's value, and 256 for the end of a text. It reads and writes any text."""
    vocabulary = {character: byte for byte, character in enumerate(_visible_bytes())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """From a file that the `tokenizers` library saved. It is given an end-of-text token if it has none of that name."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file {path}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a file of the tokenizers library: {error}") from error
    return _wrap(tokenizer)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """(tokens,) int32 ids of a document, without its end."""
    if is_bytes(tokenizer):  # a thousand times faster, and it counts
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).int()
    pieces = [tokenizer(piece, add_special_tokens=False, verbose=False).input_ids for piece in _pieces(text)]
    return torch.cat([torch.tensor(ids, dtype=torch.int32) for ids in pieces])


def is_bytes(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether it is `byte_tokenizer`, however it was loaded."""
    return len(tokenizer) == 257 and tokenizer.backend_tokenizer.to_str() == byte_tokenizer().backend_tokenizer.to_str()


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,  # which would change the text
    )


def _visible_bytes() -> list[str]:
    """The character that stands for each byte in `tokenizers`' byte-level files (GPT-2's choice): itself if visible."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def _pieces(text: str) -> Iterator[str]:
    """Cut at the ends of lines, where most tokenizers would cut too; within a line only where it is that long."""
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            line = text.rfind("\n", start + 1, end)
            end = line if line > 0 else end
        yield text[start:end]
        start = end
