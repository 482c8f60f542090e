"""The norms through PyTorch's own: one call where the reference makes six."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ophis.ops.norm import check_groups, gated_rms_norm, rms_norm


@rms_norm.register("torch")
def rms(x, weight, *, residual, eps):
    s = x if residual is None else residual + x.to(residual.dtype)
    wide = torch.promote_types(s.dtype, torch.float32)
    return F.rms_norm(s.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype), s


@gated_rms_norm.register("torch")
def gated_rms(x, z, weight, *, eps, groups, norm_before_gate):
    check_groups(x, groups)
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, s, weight = F.silu(z.to(wide)), x.to(wide), weight.to(wide)
    if not norm_before_gate:
        s = s * gate
    if groups == 1:
        y = F.rms_norm(s, weight.shape, weight, eps)
    else:
        grouped = s.unflatten(-1, (groups, -1))
        y = F.rms_norm(grouped, grouped.shape[-1:], None, eps).flatten(-2) * weight
    return (y * gate if norm_before_gate else y).to(x.dtype)
