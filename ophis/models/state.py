"""The state of a whole model between two calls.   b batch  l length"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import CausalLMOutputWithPast

# What transformers calls it: `cache` from 5.24 on, `past_key_values` before. Our own calls take both names.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"

_MULTIPLIER = 6364136223846793005  # of Knuth's MMIX generator; sums are modulo 2^64, as int64 wraps


@dataclass(frozen=True, eq=False)
class ModelState:
    """What the layers remember, one entry each, after `length` positions (padding counted).

    A value: a call never changes the state it is given, so a state that was kept is a snapshot to return to, and two
    continuations may start from one state. `generate` of transformers carries it, as `past_key_values` or `cache`.

    `generate` is given the whole text, of which the state has read the beginning, as with any cache of transformers;
    `as_prefix` is for giving it only what follows.
    """

    layers: tuple[Any, ...] | None = None  # None: before the first position
    length: int = 0
    fingerprint: Tensor | None = None  # (b,) int64, of the token ids read; None where they are not known

    @classmethod
    def of(cls, past: Any, cache: Any = None) -> ModelState:
        """The state that a call is given to go on from, under either name; the empty one for None.

        Raises:
            TypeError: it is another model's cache.
            ValueError: there is one under each name.
        """
        if past is not None and cache is not None:
            raise ValueError("LanguageModel: past_key_values and cache are two names of the state; give it under one")
        given = past if cache is None else cache
        if given is not None and not isinstance(given, cls):
            raise TypeError(
                f"LanguageModel: past_key_values is a {type(given).__name__}, expected the ModelState of an earlier "
                "call; leave it out to begin anew"
            )
        return cls() if given is None else given

    # The part of transformers' cache protocol that `generate` calls.
    is_compileable = False
    is_croppable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    @property
    def rows(self) -> int | None:
        """Sequences it is of; None before the first position, when it goes with any number."""
        return None if self.layers is None else pytree.tree_leaves(self.layers)[0].shape[0]

    def as_prefix(self) -> ModelState:
        """The same as the past of a new text, whose positions count from 0: `generate` reads all that it is given.

        state = model(chapter).past_key_values
        model.generate(question, past_key_values=state.as_prefix())
        """
        return ModelState(self.layers)

    def map(self, function: Any) -> ModelState:
        """The same with `function` applied to every tensor."""
        layers = pytree.tree_map_only(Tensor, function, self.layers)
        return replace(self, layers=layers, fingerprint=pytree.tree_map_only(Tensor, function, self.fingerprint))

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> ModelState:
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def detach(self) -> ModelState:
        """Cuts the graph: truncated backpropagation through time."""
        return self.map(lambda t: t.detach())

    def select(self, rows: Tensor) -> ModelState:
        """Those rows of the batch, in that order."""
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def repeat(self, times: int) -> ModelState:
        """Every row so often, one behind the other: 0 0 1 1 for two of two."""
        return self.map(lambda t: t.repeat_interleave(times, 0))


def fingerprint(ids: Tensor, before: Tensor | None = None) -> Tensor:
    """(b,) int64 of token ids (b, l), after those that `before` is of. The same however the ids are cut into calls.

    The polynomial sum_i (id_i + 1) m^(l-1-i), modulo 2^64: a few integer operations, and no two texts that differ by
    accident have the same.
    """
    ids = ids.long() + 1
    if ids.shape[1] == 1:  # decoding, where every operation counts
        total, factor = ids[:, 0], _MULTIPLIER
    else:
        powers = torch.full((ids.shape[1] + 1,), _MULTIPLIER, dtype=torch.int64, device=ids.device)
        powers[0] = 1
        powers = powers.cumprod(0)
        total, factor = (ids * powers[:-1].flip(0)).sum(1), powers[-1]
    return total if before is None else total + before * factor
