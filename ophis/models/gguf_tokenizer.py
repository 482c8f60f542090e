"""The tokenizer in a GGUF file, to and from a tokenizer.json: byte-level BPE with GPT-2's rule for splitting text.

GPT-NeoX's is one, which the published Mamba models have, and so are `ophis train`'s bytes. llama.cpp knows the rules of
other tokenizers by name; one with another rule is refused, for it would load and read text differently.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ophis.models.gguf_format import gguf_package

MODEL = "gpt2"  # llama.cpp's name for byte-level BPE
RULES = ("gpt-2", "mpt", "olmo")  # its names for GPT-2's splitting rule
# The converter finds a name for the rule by what a sample text becomes, which depends on the tokens too. It is this for
# GPT-NeoX's (the digest of its 50254 tokens before the added ones); of most others it finds none, and gives up.
GPT_NEOX, GPT_NEOX_RULE = "243911422e5b689f04800d01121da2e14882d12b7565bb1b7396128714cbc4c2", "olmo"
# Without merges every byte is a token of its own. A GGUF list is never empty, so one merge stands there, of two bytes
# (0xC0 and 0xC1 in byte-level BPE's letters) that no text in UTF-8 has.
NO_MERGE = "À Á"
ADVICE = "name another by --tokenizer; that of the state-spaces models is EleutherAI/gpt-neox-20b"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens


def read_tokenizer_json(folder: Path) -> dict[str, Any] | None:
    """The contents of a folder's tokenizer.json; None where there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(contents["model"], dict) or not isinstance(contents["added_tokens"], list):
            raise TypeError("its model and added_tokens are of other types")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or not a file of the tokenizers library: {error}") from error
    return contents


def check_vocabulary(folder: Path, rows: int) -> None:
    """That a model with so many rows in its embedding has one for each token of the folder's tokenizer.

    Raises:
        ValueError: it has not; both numbers are named.
    """
    contents = read_tokenizer_json(folder)
    if contents is None or not isinstance(contents["model"].get("vocab"), dict):  # a list of (token, score), perhaps
        return
    last = max([*contents["model"]["vocab"].values(), *(token["id"] for token in contents["added_tokens"])], default=-1)
    if last >= rows:
        raise ValueError(
            f"{folder / 'tokenizer.json'} has tokens up to number {last}, the model rows for 0 to {rows - 1}; "
            "it is the tokenizer of another model"
        )


def write_tokenizer(writer: Any, folder: Path, rows: int) -> None:
    """Gives a `gguf.GGUFWriter` the tokenizer in a folder, in which config.json may name the special tokens' numbers.

    Raises:
        ValueError: says why it cannot be written.
    """
    gguf = gguf_package()
    contents = read_tokenizer_json(folder)
    if contents is None:
        raise ValueError(f"the model has no tokenizer.json, and a GGUF file holds its tokenizer: {ADVICE}")
    check_vocabulary(folder, rows)
    reason = _why_not(contents)
    if reason is not None:
        raise ValueError(
            f"its tokenizer {reason}, and only byte-level BPE that splits text as GPT-2's can be written: {ADVICE}"
        )
    vocabulary = contents["model"]["vocab"]
    tokens = {number: (token, NORMAL) for token, number in vocabulary.items()}
    for added in contents["added_tokens"]:
        text = added["content"]
        control = added["special"] or (text.startswith("<|") and text.endswith("|>"))
        tokens[added["id"]] = (text, CONTROL if control else USER_DEFINED)
    listed = [tokens.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    writer.add_tokenizer_model(MODEL)
    writer.add_tokenizer_pre(GPT_NEOX_RULE if _digest(vocabulary) == GPT_NEOX else RULES[0])
    writer.add_token_list([text for text, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    merges = bool(contents["model"].get("merges"))
    gguf.SpecialVocab(folder, load_merges=merges, n_vocab=rows).add_to_gguf(writer, quiet=True)
    if not merges:
        writer.add_token_merges([NO_MERGE])


def tokenizer_from_gguf(keys: dict[str, Any]) -> PreTrainedTokenizerFast:
    """From a file's keys.

    Raises:
        ValueError: says why not.
    """
    model, rule = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.pre")
    if model != MODEL or rule not in RULES:
        raise ValueError(
            f"its tokenizer is of kind {model!r} {rule!r}, and {MODEL!r} {RULES[0]!r} can be read: {ADVICE}"
        )
    try:
        return _tokenizer(keys)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"its tokenizer is damaged ({error}): {ADVICE}") from error


def _tokenizer(keys: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in keys["tokenizer.ggml.merges"] if merge != NO_MERGE]
    vocabulary = {text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    tokenizer.decoder = decoders.ByteLevel()
    for text, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            token = AddedToken(text, special=kind == CONTROL, normalized=False)
            (tokenizer.add_special_tokens if kind == CONTROL else tokenizer.add_tokens)([token])
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special = {name: keys.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=keys.get("tokenizer.chat_template"),
        **{name: tokens[number] for name, number in special.items() if number is not None},
    )


def _why_not(contents: dict[str, Any]) -> str | None:
    """What llama.cpp's byte-level BPE would read differently; None if nothing."""
    model, before, normalizer = contents["model"], contents.get("pre_tokenizer"), contents.get("normalizer")
    if model.get("type", "BPE") != "BPE":
        return f"is a {model['type']} model"
    for option in ("ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            return f"has {option}"
    if before and before["type"] == "Sequence" and len(before["pretokenizers"]) == 1:
        before = before["pretokenizers"][0]
    if not before or before["type"] != "ByteLevel":
        return f"splits text by {before['type'] if before else 'nothing'}"
    if before.get("add_prefix_space"):
        return "puts a space before a text"
    if not before.get("use_regex", True) and model.get("merges"):
        return "does not split text"
    if normalizer and normalizer["type"] != "NFC":  # GPT-NeoX's, which changes hardly any text, and the converter drops
        return f"changes text by {normalizer['type']}"
    return None


def _digest(vocabulary: dict[str, int]) -> str:
    return hashlib.sha256("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)).encode()).hexdigest()
