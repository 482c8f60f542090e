"""A residual block: a mixer along the length and, optionally, an MLP along the width, each behind a norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ophis.layers.norm import RMSNorm


class Block(nn.Module):
    """x = x + mixer(norm(x)), then x = x + mlp(norm2(x)) where there is an MLP.

    Args:
        d_model: the width.
        mixer: any layer (b, l, d_model), state -> (y, state).
        mlp: any module (b, l, d_model) -> (b, l, d_model), or None.
        eps: of the norms.
        residual_in_fp32: x, the residual stream, is kept in float32 whatever the parameters are.
    """

    def __init__(
        self,
        d_model: int,
        mixer: nn.Module,
        mlp: nn.Module | None = None,
        *,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.norm = RMSNorm(d_model, eps=eps, device=device, dtype=dtype)
        self.mixer = mixer
        self.norm2 = RMSNorm(d_model, eps=eps, device=device, dtype=dtype) if mlp is not None else None
        self.mlp = mlp

    def initial_state(self, batch: int) -> Any:
        return self.mixer.initial_state(batch)  # type: ignore[operator]

    def forward(self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        if self.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        y, _ = self.norm(x)
        y, state = self.mixer(y, state, cu_seqlens=cu_seqlens)
        if self.mlp is None or self.norm2 is None:
            return x + y.to(x.dtype), state
        y, x = self.norm2(y, x)
        return x + self.mlp(y).to(x.dtype), state
