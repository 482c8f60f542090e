"""How well a model predicts a text, in one pass with a carried state or in sliding windows.

Every token of the text counts, the first too: before it the model reads the token that begins or ends a text, as
training does and as lm-eval does. What is measured of a text is the sum of -log p over its tokens; per byte it does not
depend on the tokenizer, so it is what models of different vocabularies can be compared by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ophis.generation import check_vocabulary
from ophis.models import LanguageModel
from ophis.models.state import CACHE

CHUNK = 1024  # positions a call: the logits of so many, of a vocabulary of 50288 in float32, are 200 MB


@dataclass(frozen=True)
class TextScore:
    """What a model makes of a text, or of several (`+`)."""

    nats: float  # -log of the text's probability
    tokens: int
    bytes: int  # as UTF-8

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / math.log(2)

    @property
    def nats_per_byte(self) -> float:
        return self.nats / self.bytes

    @property
    def bits_per_byte(self) -> float:
        return self.nats_per_byte / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp of the nats per token."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    def __add__(self, other: TextScore) -> TextScore:
        return TextScore(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


def score_text(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], object] = lambda counted, tokens: None,
) -> TextScore:
    """-log p of a text, from a state carried through it: each token given all before it, in time linear in the length.

    Args:
        model, tokenizer: of one model, in evaluation mode.
        text: not empty.
        window: read it in windows of so many tokens instead, each from nothing, as a model of bounded context has to.
        stride: tokens from one window to the next; each is counted in the first window that has it, given at least
            window - stride tokens before it, or all there are. Half the window when None; the window itself gives
            disjoint ones.
        batch_size: windows at a time.
        progress: called now and then with how many tokens have been counted, and how many there are.
    """
    check_vocabulary(model, tokenizer)
    if window is None and stride is not None:
        raise ValueError("a stride is for windows: give a window, too")
    if window is not None and window < 1:
        raise ValueError(f"the window is {window} tokens, expected at least 1")
    stride = max(1, (window or 0) // 2) if stride is None else stride
    if window is not None and not 1 <= stride <= window:
        raise ValueError(f"the stride is {stride} tokens, expected 1 to the window's {window}")
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}, expected at least 1")
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ValueError("the tokenizer has no token that begins or ends a text; give it one (bos_token or eos_token)")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not tokens:
        raise ValueError("the text is empty")
    ids = torch.tensor([first, *tokens], device=model.device)
    losses = carried(model, ids) if window is None else windowed(model, ids, window, stride, batch_size)
    nats, counted = 0.0, 0
    with torch.inference_mode():
        for loss in losses:
            nats += loss.cpu().double().sum().item()  # not every device has float64
            counted += len(loss)
            progress(counted, len(tokens))
    return TextScore(nats, len(tokens), len(text.encode()))


def carried(model: LanguageModel, ids: Tensor) -> Iterator[Tensor]:
    """-log p of each of ids[1:], some at a time, from a state carried on."""
    state = None
    for start in range(0, len(ids) - 1, CHUNK):
        part = ids[start : start + CHUNK + 1]
        output = model(part[None, :-1], past_key_values=state, use_cache=True)
        state = output[CACHE]
        yield surprise(output.logits[0], part[1:])


def windowed(model: LanguageModel, ids: Tensor, window: int, stride: int, batch_size: int) -> Iterator[Tensor]:
    """The same in windows of equal length, each from nothing."""
    window = min(window, len(ids) - 1)
    ends = [*range(window, len(ids) - 1, stride), len(ids) - 1]
    counts = [end - before for before, end in zip([0, *ends], ends, strict=False)]
    for i in range(0, len(ends), batch_size):
        here = slice(i, i + batch_size)
        rows = torch.stack([ids[end - window : end] for end in ends[here]])
        logits = model(rows, use_cache=False, logits_to_keep=max(counts[here])).logits
        for row, end, count in zip(logits, ends[here], counts[here], strict=True):
            yield surprise(row[-count:], ids[end + 1 - count : end + 1])


def surprise(logits: Tensor, targets: Tensor) -> Tensor:
    """(l, v), (l,) -> (l,), in float32 or wider."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
