"""A padded batch as packed sequences: padding is then not computed, and nothing downstream needs a mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Ragged(NamedTuple):
    """Rows of unequal length, padded on either side."""

    rows: int
    length: int
    places: Tensor  # (real positions,) int64, into the flattened batch
    cu_seqlens: Tensor  # (rows + 1,) int32

    @classmethod
    def of(cls, mask: Tensor) -> Ragged | None:
        """From a mask (b, l), zero at padding; None where nothing is padded."""
        real = mask != 0
        if bool(real.all()):
            return None
        offsets = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return cls(mask.shape[0], mask.shape[1], real.flatten().nonzero().squeeze(1), offsets)

    def pack(self, x: Tensor) -> Tensor:
        """(b, l, ...) -> (1, real positions, ...)."""
        return x.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """(1, real positions, ...) -> (b, l, ...), zero at padding."""
        batch = x.new_zeros(self.rows * self.length, *x.shape[2:]).index_copy(0, self.places, x[0])
        return batch.unflatten(0, (self.rows, self.length))
