"""The state of a whole model between two calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


@dataclass(frozen=True)
class ModelState:
    """What the layers remember, one entry each, after `length` positions (padding counted).

    A value: a call never changes the state it is given, so a state that was kept is a snapshot to return to, and two
    continuations may start from one state. It is what transformers' `generate` carries as `past_key_values`.
    """

    layers: tuple[Any, ...] | None = None  # None: before the first position
    length: int = 0

    # The part of transformers' cache protocol that `generate` calls.
    is_compileable = False
    is_croppable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def map(self, function: Any) -> ModelState:
        """The same with `function` applied to every tensor."""
        return ModelState(pytree.tree_map_only(Tensor, function, self.layers), self.length)

    def to(self, *args: Any, **kwargs: Any) -> ModelState:
        return self.map(lambda t: t.to(*args, **kwargs))

    def detach(self) -> ModelState:
        """Cuts the graph: truncated backpropagation through time."""
        return self.map(lambda t: t.detach())

    def select(self, rows: Tensor) -> ModelState:
        """Those rows of the batch, in that order."""
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))
