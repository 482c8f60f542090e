"""Root-mean-square normalisation, with the residual add before it or the gate beside it.   d width"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ophis.ops._op import op


@op(x="... d", weight="d", residual="... d")
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y = s / rms(s) * weight with s = residual + x: a pre-norm residual step in one op.

    The statistics are in float32 or wider whatever the inputs are.

    Args:
        x: (..., d).
        weight: (d,).
        residual: (..., d), the residual stream, often float32 beside a narrower x.
        eps: added to the mean square.
        backend: the implementation, by name; the fastest that can run the call when None.

    Returns:
        y: (..., d), in x's dtype.
        s: (..., d), the residual stream with x added, in the residual's dtype; x itself without a residual.
    """
    s = x if residual is None else residual + x.to(residual.dtype)
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return y.to(x.dtype), s


@op(x="... d", z="... d", weight="d")
def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    norm_before_gate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """norm(x silu(z)), or norm(x) silu(z) with norm_before_gate: the output norm of Mamba-2 (Dao and Gu 2024, 7.1).

    Args:
        x, z: (..., d), the signal and its gate.
        weight: (d,).
        eps: added to the mean square.
        groups: the mean square is taken over each of so many equal parts of d.
        norm_before_gate: the order of the two.
        backend: the implementation, by name; the fastest that can run the call when None.

    Returns:
        (..., d), in x's dtype.
    """
    check_groups(x, groups)
    wide = torch.promote_types(x.dtype, torch.float32)
    gate = F.silu(z.to(wide))
    s = x.to(wide) if norm_before_gate else x.to(wide) * gate
    grouped = s.unflatten(-1, (groups, -1))
    y = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(wide)
    return (y * gate if norm_before_gate else y).to(x.dtype)


def check_groups(x: Tensor, groups: int) -> None:
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"gated_rms_norm: groups={groups} must divide the width d={x.shape[-1]}")
