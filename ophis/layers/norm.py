"""The two normalisations of the published models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ophis import ops


class RMSNorm(nn.Module):
    """Root-mean-square normalisation. Its output has the weight's dtype: a float32 stream enters a bfloat16 layer."""

    def __init__(self, d_model: int, *, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(residual + x), residual + x), each (..., d_model)."""
        y, residual = ops.rms_norm(x, self.weight, residual=residual, eps=self.eps)
        return y.to(self.weight.dtype), residual

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedRMSNorm(nn.Module):
    """norm(x silu(z)), or norm(x) silu(z) with `norm_before_gate`; over each of `groups` parts of the width."""

    def __init__(
        self,
        d_model: int,
        *,
        eps: float = 1e-5,
        groups: int = 1,
        norm_before_gate: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.eps, self.groups, self.norm_before_gate = eps, groups, norm_before_gate
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return ops.gated_rms_norm(
            x, z, self.weight, eps=self.eps, groups=self.groups, norm_before_gate=self.norm_before_gate
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, groups={self.groups}, norm_before_gate={self.norm_before_gate}"
