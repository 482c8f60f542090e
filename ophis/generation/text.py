"""Text in, text out: the prompt in one pass, then a token at a time from the recurrent state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from ophis.models import LanguageModel
from ophis.models.gguf_file import is_gguf, open_gguf
from ophis.models.gguf_tokenizer import tokenizer_from_gguf
from ophis.models.hub import local_folder


def load_tokenizer(name_or_folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in a model's folder or GGUF file, or that of a name on the hub.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there is, but damaged.
    """
    folder = local_folder(name_or_folder, weights=False)
    if is_gguf(folder):
        return tokenizer_from_gguf(open_gguf(folder).keys)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{name_or_folder} has no tokenizer.json, so its model's tokens cannot be read as text; name a tokenizer "
            "by --tokenizer, EleutherAI/gpt-neox-20b for one of the state-spaces models"
        )
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"{path} is damaged: {error}") from error


def check_vocabulary(model: LanguageModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ValueError where the tokenizer has more tokens than the model has rows for."""
    rows = model.config.vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {rows} rows for them; it is another model's"
        )


def generate_text(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str = "",
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    write: Callable[[str], object] | None = None,
) -> str:
    """What the model makes of a prompt: the text that follows it, up to the end-of-text token.

    Args:
        model, tokenizer: as loaded from one folder.
        prompt: when empty, a text is begun, after an end-of-text token.
        max_new_tokens: the most there are of them.
        temperature: divides the logits; below 1 the likely becomes likelier, and 0 always takes the likeliest.
        top_p: draws from the smallest set of tokens that has this probability.
        seed: the same gives the same text, on one machine. It sets PyTorch's global generator.
        write: called with each piece of the text as soon as it is decoded.
    """
    if temperature < 0:
        raise ValueError(f"the temperature is {temperature}, expected 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top-p is {top_p}, expected more than 0 and at most 1")
    if max_new_tokens < 1:
        raise ValueError(f"the number of new tokens is {max_new_tokens}, expected at least 1")
    check_vocabulary(model, tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
    if seed is not None:
        torch.manual_seed(seed)
    sampling = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0) if temperature else {}
    prompt_ids = torch.tensor([ids], device=model.device)
    streamer = TextStreamer(tokenizer, write or (lambda text: None))
    model.generate(  # type: ignore[misc] (transformers types its mixin too narrowly)
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **sampling,
    )
    return streamer.text


class TextStreamer(BaseStreamer):
    """For `generate(streamer=...)`: hands on text as it is decoded, the prompt left out.

    A character may take several tokens; bytes are held back until they make one, or the text ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, write: Callable[[str], object]):
        self.tokenizer, self.write = tokenizer, write
        self.stream = DecodeStream(skip_special_tokens=True)
        self.text = ""
        self.held: list[int] = []
        self.in_prompt = True

    def put(self, value: Tensor) -> None:
        pieces = [self._decode(token) for token in value.flatten().tolist()]
        if self.in_prompt:  # decoded all the same: some tokenizers write a token differently after another
            self.in_prompt, self.held = False, []
            return
        self._hand_on("".join(pieces))

    def end(self) -> None:
        self._hand_on(self.tokenizer.backend_tokenizer.decode(self.held, skip_special_tokens=True))

    def _decode(self, token: int) -> str:
        self.held.append(token)
        piece = self.stream.step(self.tokenizer.backend_tokenizer, token)
        if piece is None:
            return ""
        self.held = []
        return piece

    def _hand_on(self, text: str) -> None:
        if text:
            self.text += text
            self.write(text)
