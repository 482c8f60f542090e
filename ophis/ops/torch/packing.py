"""Packed sequences (`cu_seqlens`) without reading their lengths back from the device."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_of(cu_seqlens: Tensor, l: int) -> Tensor:
    """(l,) int64: the sequence that each position belongs to."""
    return torch.searchsorted(cu_seqlens[1:], torch.arange(l, device=cu_seqlens.device), right=True)
