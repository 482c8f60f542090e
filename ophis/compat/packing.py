"""`seq_idx` (b, l), the sequence that each position belongs to, as sequences packed one after another."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Runs(NamedTuple):
    """Runs of equal numbers along the rows of a batch; each is a sequence."""

    shape: tuple[int, int]  # b, l
    cu_seqlens: Tensor  # (runs + 1,) int32 offsets into the rows one after another
    first: Tensor  # (b,) int64, the run that a row begins with
    last: Tensor  # (b,) the one it ends with

    @classmethod
    def of(cls, seq_idx: Tensor, cu_seqlens: Tensor | None = None) -> Runs:
        """A run ends where the number changes, where the row ends, and at each of `cu_seqlens` (of a single row)."""
        if seq_idx.ndim != 2 or seq_idx.is_floating_point():
            raise ValueError(
                f"seq_idx has shape {tuple(seq_idx.shape)} and dtype {seq_idx.dtype}, expected integers (batch, length)"
            )
        b, l = seq_idx.shape
        starts = torch.ones(b, l, dtype=torch.bool, device=seq_idx.device)
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        if cu_seqlens is not None:
            if b != 1:
                raise ValueError(f"cu_seqlens are offsets into one row, got a batch of {b}")
            cuts = cu_seqlens.to(seq_idx.device).long()
            starts[0, torch.where(cuts < l, cuts, 0)] = True  # position 0 starts one anyway
        offsets = F.pad(starts.flatten().nonzero().squeeze(1), (0, 1), value=b * l)
        ends = starts.sum(1).cumsum(0)
        return cls((b, l), offsets.to(torch.int32), ends - starts.sum(1), ends - 1)

    def pack(self, x: Tensor) -> Tensor:
        """(b, l, ...) -> (1, b l, ...)."""
        if tuple(x.shape[:2]) != self.shape:
            raise ValueError(f"seq_idx has shape {self.shape}, but the input (batch, length) {tuple(x.shape[:2])}")
        return x.flatten(0, 1).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """(1, b l, ...) -> (b, l, ...)."""
        return x.squeeze(0).unflatten(0, self.shape)

    def begin_with(self, states: Tensor | None) -> Tensor | None:
        """(b, ...), the state before each row -> (runs, ...), zeros before the runs that do not begin one."""
        if states is None:
            return None
        empty = states.new_zeros(len(self.cu_seqlens) - 1, *states.shape[1:])
        return empty.index_copy(0, self.first, states)

    def ends_at(self, states: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(runs, ...) -> (sequences, ...): the state at the end of each of `cu_seqlens`, zeros after an empty one."""
        ends = cu_seqlens[1:].to(states.device)
        run = torch.searchsorted(self.cu_seqlens[1:].contiguous(), ends.to(torch.int32).contiguous())
        found = states.index_select(0, run.clamp(max=len(states) - 1))
        empty = (cu_seqlens.diff() == 0).to(states.device)
        return found.masked_fill(empty.view(-1, *[1] * (states.ndim - 1)), 0)
