"""Normalisation beside a gate, over groups of channels.   d width  g groups"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ophis import ops


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """(norm(x) weight + bias) silu(z), or norm(x silu(z)) weight + bias without `norm_before_gate`.

    Args:
        x, z: (..., d); z may be None.
        weight, bias: (d,); bias may be None.
        eps: added to the variance, or the mean square.
        group_size: the statistics are over so many neighbouring channels; over all when None.
        norm_before_gate: the order of the two.
        is_rms_norm: divide by the root mean square, without subtracting the mean.

    Returns:
        (..., d), in x's dtype.
    """
    width = x.shape[-1]
    size = width if group_size is None else group_size
    if width % size:
        raise ValueError(f"layernorm_fn: group_size={size} must divide the width d={width}")
    if is_rms_norm and bias is None and z is not None:
        return ops.gated_rms_norm(x, z, weight, eps=eps, groups=width // size, norm_before_gate=norm_before_gate)
    wide = torch.promote_types(x.dtype, torch.float32)
    y, gate = x.to(wide), None if z is None else F.silu(z.to(wide))
    if gate is not None and not norm_before_gate:
        y = y * gate
    y = y.unflatten(-1, (-1, size))
    y = F.rms_norm(y, (size,), eps=eps) if is_rms_norm else F.layer_norm(y, (size,), eps=eps)
    y = y.flatten(-2) * weight
    if bias is not None:
        y = y + bias
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """`layernorm_fn` with is_rms_norm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class LayerNorm(nn.Module):
    """Layer normalisation and a gate, over each of d / group_size parts of the width."""

    is_rms_norm = False
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        bias = None if self.is_rms_norm else nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", bias)

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return layernorm_fn(
            x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate, self.is_rms_norm
        )


class RMSNorm(LayerNorm):
    """The same without subtracting the mean, and without a bias. `RMSNormGated` is what most call it."""

    is_rms_norm = True


RMSNormGated = RMSNorm
