"""The Mamba layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ophis import layers
from ophis.compat.inference_cache import CachedMixer
from ophis.compat.mamba_ssm.modules import block
from ophis.compat.mamba_ssm.utils.generation import InferenceParams


class Mamba(CachedMixer, layers.Mamba):
    """`ophis.layers.Mamba` with the original's constructor, call and cache; the parameters have the same names.

    The arguments are the layer's; `use_fast_path` is taken and not used. `layer_idx` is the key of its states in
    `InferenceParams.key_value_memory_dict`: (b, d, w) the last inputs of the convolution and (b, d, n).
    """

    run = layers.Mamba.forward

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init=dt_init,
            dt_scale=dt_scale,
            dt_init_floor=dt_init_floor,
            conv_bias=conv_bias,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.d_conv, self.expand, self.use_fast_path, self.layer_idx = d_conv, expand, use_fast_path, layer_idx
        self.activation, self.act = "silu", nn.SiLU()
        self.conv_inputs = slice(0, self.d_inner)
        self.mark_parameters()

    def mark_parameters(self) -> None:
        super().mark_parameters()
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, inference_params: InferenceParams | None = None) -> Tensor:  # type: ignore[override]
        """(b, l, d_model) -> (b, l, d_model); from the cached states where seqlen_offset is above 0."""
        if inference_params is None:
            return self.run(hidden_states)[0]
        states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        return self.advance(hidden_states, *states, begin=inference_params.seqlen_offset == 0)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """(batch_size, d, w) and (batch_size, d, n), zeros, in the parameters' dtype or the one given."""
        zeros = partial(torch.zeros, device=self.D.device, dtype=dtype or self.conv1d.weight.dtype)
        return (
            zeros(batch_size, self.d_inner, self.d_conv),
            zeros(batch_size, self.d_inner, self.d_state),
        )


class Block(block.Block):
    """`Block` as it was in version 1, where it stood in this module and had no MLP."""

    def __init__(self, dim, mixer_cls, norm_cls: Any = nn.LayerNorm, fused_add_norm=False, residual_in_fp32=False):
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)
