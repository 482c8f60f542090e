"""Causal attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ophis import layers
from ophis.compat.mamba_ssm.utils.generation import InferenceParams
from ophis.layers import AttentionState


class MHA(layers.Attention):
    """`ophis.layers.Attention` with the original's constructor, call and cache; the parameters have the same names.

    `causal` must be True, which is not the default. `layer_idx` is the key of its cache in
    `InferenceParams.key_value_memory_dict`: keys and values (b, max_seqlen, 2, heads, p), and (b, c, w), the last
    inputs of the convolution, or None.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        if not causal or mlp_dim or rotary_emb_interleaved:
            raise NotImplementedError(
                "MHA: attention here is causal, has no MLP beside it and turns its channels in halves; expected "
                f"causal=True, mlp_dim=0 and rotary_emb_interleaved=False, got {causal}, {mlp_dim} and "
                f"{rotary_emb_interleaved}"
            )
        super().__init__(
            embed_dim,
            num_heads=num_heads,
            num_heads_kv=num_heads_kv,
            head_dim=head_dim,
            rotary_emb_dim=rotary_emb_dim,
            rotary_emb_base=rotary_emb_base,
            d_conv=d_conv,
            softmax_scale=softmax_scale,
            qkv_proj_bias=qkv_proj_bias,
            out_proj_bias=out_proj_bias,
            device=device,
            dtype=dtype,
        )
        self.embed_dim, self.layer_idx, self.d_conv, self.causal, self.mlp_dim = embed_dim, layer_idx, d_conv, True, 0

    def forward(self, x: Tensor, inference_params: InferenceParams | None = None) -> Tensor:  # type: ignore[override]
        """(b, l, embed_dim) -> (b, l, embed_dim), after the cached positions where seqlen_offset is above 0."""
        if inference_params is None:
            return super().forward(x)[0]
        if self.layer_idx is None:
            raise ValueError("MHA: to decode it needs a layer_idx, its key in the cache; it has none")
        if inference_params.lengths_per_sample is not None or inference_params.batch_size_offset:
            raise NotImplementedError("MHA: lengths_per_sample and batch_size_offset are not read; leave them out")
        memory = inference_params.key_value_memory_dict
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(x.shape[0], inference_params.max_seqlen, x.dtype)
        kv, window = memory[self.layer_idx]
        (batch, length), past = x.shape[:2], inference_params.seqlen_offset
        if batch > kv.shape[0] or past + length > kv.shape[1]:
            raise ValueError(
                f"MHA: the cache holds {kv.shape[1]} positions of {kv.shape[0]} sequences, expected room for "
                f"{past + length} of {batch}"
            )
        state = None
        if past:
            lengths = torch.full((batch,), past, device=x.device)
            inputs = self.initial_state(batch).conv if window is None else window[:batch, :, 1:].transpose(1, 2)
            state = AttentionState(kv[:batch, :past, 0], kv[:batch, :past, 1], lengths, inputs)
        y, state = super().forward(x, state)
        with torch.no_grad():
            kv[:batch, past : past + length, 0] = state.k[:, past:]
            kv[:batch, past : past + length, 1] = state.v[:, past:]
            if window is not None:
                # The original keeps one input more than is read.
                oldest = window[:batch, :, length : length + 1] if past else torch.zeros_like(window[:batch, :, :1])
                if length >= self.d_conv:
                    oldest = self.in_proj(x[:, -self.d_conv])[..., None]
                window[:batch] = torch.cat([oldest, state.conv.transpose(1, 2).to(window.dtype)], -1)
        return y

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Room for max_seqlen positions, in the parameters' dtype or the one given."""
        weight = self.out_proj.weight
        zeros = partial(torch.zeros, device=weight.device, dtype=dtype or weight.dtype)
        window = zeros(batch_size, self.qkv_dim, self.d_conv) if self.d_conv else None
        return zeros(batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim), window
