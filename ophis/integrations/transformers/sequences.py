"""The sequences within a batch that is padded or packed.   b batch  l length  s sequences  t real positions"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sequences(NamedTuple):
    """Where they lie; `pack` puts them one after another, without what lies between them.

    A row of the batch goes on from its cached state with its first sequence and leaves the state of its last one. The
    others begin from zeros.
    """

    rows: int
    length: int
    places: Tensor | None  # (t,) int64, the real positions in the flattened batch; None where all of them are real
    cu_seqlens: Tensor  # (s + 1,) int32
    first: Tensor | None  # (b,) int64, the sequence that a row begins with; None where a row is a sequence
    last: Tensor | None  # (b,) int64, the one that it ends with

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None, seq_idx: Tensor | None) -> Sequences | None:
        """None where every row of x (b, l, ...) is one sequence, all of it real.

        Args:
            x: (b, l, ...).
            mask: (b, l), zero at padding; of one that is longer, as it is beside a cache, the end counts.
            seq_idx: (b, l), the same number for all positions of a sequence; neighbours have different ones.
        """
        b, l = x.shape[:2]
        if mask is not None and (mask.ndim != 2 or mask.shape[0] != b or mask.shape[1] < l):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, expected {(b, l)}, or longer beside a cache"
            )
        padded = None if mask is None else padding_of(mask, l)
        if seq_idx is None:
            return padded
        if padded is not None:
            raise ValueError("attention_mask has zeros beside seq_idx: padding among packed sequences; expected either")
        return packing_of(checked(seq_idx, b, l), l)

    def pack(self, x: Tensor) -> Tensor:
        """(b, l, ...) -> (1, t, ...)."""
        x = x.flatten(0, 1)
        return (x if self.places is None else x.index_select(0, self.places)).unsqueeze(0)

    def unpack(self, y: Tensor) -> Tensor:
        """(1, t, ...) -> (b, l, ...), zero at padding."""
        y = y[0]
        if self.places is not None:
            y = y.new_zeros(self.rows * self.length, *y.shape[1:]).index_copy(0, self.places, y)
        return y.unflatten(0, (self.rows, self.length))

    def begin(self, states: Tensor | None) -> Tensor | None:
        """The rows' states (b, ...) as the sequences' (s, ...)."""
        if states is None or self.first is None:
            return states
        return states.new_zeros(len(self.cu_seqlens) - 1, *states.shape[1:]).index_copy(0, self.first, states)

    def end(self, states: Tensor) -> Tensor:
        """The sequences' states (s, ...) as the rows' (b, ...)."""
        return states if self.last is None else states.index_select(0, self.last)


def checked(seq_idx: Tensor, b: int, l: int) -> Tensor:
    if seq_idx.shape != (b, l):
        raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}, expected {(b, l)}")
    return seq_idx


class Remembered:
    """A function of a tensor and a length that keeps its latest result: each layer of a model asks for the same one.

    Asking costs a wait for the device, where a layer would be launched meanwhile.
    """

    def __init__(self, function: Callable[[Tensor, int], Sequences | None]):
        self.function = function
        self.latest: tuple[Any, ...] = (lambda: None,)

    def __call__(self, tensor: Tensor, l: int) -> Sequences | None:
        if tensor.is_inference():  # without a count of its changes
            return self.function(tensor, l)
        key = (tensor._version, l)
        latest = self.latest
        if latest[0]() is tensor and latest[1] == key:
            return latest[2]
        found = self.function(tensor, l)
        self.latest = (weakref.ref(tensor), key, found)
        return found


@Remembered
def padding_of(mask: Tensor, l: int) -> Sequences | None:
    real = mask[:, -l:] != 0
    if bool(real.all()):
        return None
    offsets = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return Sequences(real.shape[0], l, real.flatten().nonzero().squeeze(1), offsets, None, None)


@Remembered
def packing_of(seq_idx: Tensor, l: int) -> Sequences | None:
    b = seq_idx.shape[0]
    begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
    starts = begins.flatten().nonzero().squeeze(1)
    if len(starts) == b:
        return None
    offsets = F.pad(starts, (0, 1), value=b * l).to(torch.int32)
    last = begins.sum(1).cumsum(0) - 1
    return Sequences(b, l, None, offsets, F.pad(last[:-1] + 1, (1, 0)), last)
