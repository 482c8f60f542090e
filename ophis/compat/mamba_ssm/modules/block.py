"""The residual block, whose sum is taken at the start of the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ophis.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn
from ophis.compat.mamba_ssm.utils.generation import InferenceParams


class Block(nn.Module):
    """residual += hidden_states;  hidden_states = mixer(norm(residual)), then the same with an MLP where there is one.

    Args:
        dim: the width.
        mixer_cls, mlp_cls, norm_cls: called with it; mlp_cls is nn.Identity for none.
        fused_add_norm: taken for its check only: the norm is then an nn.LayerNorm or an RMSNorm.
        residual_in_fp32: the residual stream is float32 whatever the parameters are.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Any = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ):
        super().__init__()
        self.fused_add_norm, self.residual_in_fp32 = fused_add_norm, residual_in_fp32
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            raise TypeError(
                f"Block: with fused_add_norm the norm is nn.LayerNorm or RMSNorm, got {type(self.norm).__name__}"
            )

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        **mixer_kwargs,
    ) -> tuple[Tensor, Tensor]:
        """(b, l, dim), the stream before it is added or None -> what is to be added next, the stream."""
        hidden_states, residual = add_and_norm(self.norm, hidden_states, residual, self.residual_in_fp32)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = add_and_norm(self.norm2, hidden_states, residual, self.residual_in_fp32)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> Any:
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # type: ignore[operator]


def add_and_norm(norm: Any, x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> tuple[Tensor, Tensor]:
    """norm(residual + x), residual + x."""
    if isinstance(norm, nn.LayerNorm | RMSNorm):
        return layer_norm_fn(
            x, norm.weight, norm.bias, residual=residual, eps=norm.eps, prenorm=True,
            residual_in_fp32=residual_in_fp32, is_rms_norm=isinstance(norm, RMSNorm),
        )  # fmt: skip
    total = x if residual is None else x + residual
    y = norm(total.to(norm.weight.dtype))
    return y, total.to(torch.promote_types(total.dtype, torch.float32)) if residual_in_fp32 else total
