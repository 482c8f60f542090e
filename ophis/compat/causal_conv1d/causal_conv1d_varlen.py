"""The last inputs of packed sequences, for the convolution's cache."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """(positions, d), offsets (sequences + 1,) -> (sequences, d, state_len): each one's last inputs, zeros before."""
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    places = ends + torch.arange(-state_len, 0, device=x.device)  # (sequences, state_len)
    found = x[places.clamp(min=0)].masked_fill((places < starts)[..., None], 0)
    return found.transpose(1, 2)
