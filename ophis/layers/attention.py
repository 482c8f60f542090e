"""Causal attention of the hybrid models.

b batch  l length  m past length  q query heads  k key-value heads  p head width  w conv width
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ophis.layers.conv import CausalConv
from ophis.layers.ssm_parameters import check_input


class AttentionState(NamedTuple):
    k: Tensor  # (b, m, k, p), rotated; the last `length` entries of a row are real, the ones before them are filling
    v: Tensor  # (b, m, k, p), likewise
    length: Tensor  # (b,) int64
    conv: Tensor  # (b, w-1, (q + 2 k) p), the last inputs of the convolution; w = 1 without one


class Attention(nn.Module):
    """softmax(q k^T scale) v under a causal mask, with grouped queries and rotary positions.

    Args:
        d_model: width of input and output.
        num_heads: query heads.
        num_heads_kv: key-value heads, a divisor of it; num_heads when None.
        head_dim: p; d_model / num_heads when None.
        rotary_emb_dim: how many of the p channels turn with the position (Su et al. 2021, in halves); 0 for none.
        rotary_emb_base: the slowest turn has about this wavelength / 2 pi.
        d_conv: width of a short causal convolution over q, k and v; 0 for none.
        softmax_scale: 1 / sqrt(p) when None.
        qkv_proj_bias, out_proj_bias: whether the projections have biases.

    The kernel is PyTorch's `scaled_dot_product_attention`. Parameter names are the published hybrid's.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        d_conv: int = 0,
        softmax_scale: float | None = None,
        qkv_proj_bias: bool = False,
        out_proj_bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.d_model, self.num_heads = d_model, num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % self.num_heads_kv:
            raise ValueError(f"Attention: num_heads_kv={num_heads_kv} must divide num_heads={num_heads}")
        if head_dim is None and d_model % num_heads:
            raise ValueError(f"Attention: num_heads={num_heads} must divide d_model={d_model}, or head_dim be given")
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        if not 0 <= rotary_emb_dim <= self.head_dim or rotary_emb_dim % 2:
            raise ValueError(f"Attention: rotary_emb_dim={rotary_emb_dim} must be even and at most {self.head_dim}")
        self.rotary_emb_dim, self.rotary_emb_base, self.softmax_scale = rotary_emb_dim, rotary_emb_base, softmax_scale
        factory = {"device": device, "dtype": dtype}
        self.qkv_dim = (num_heads + 2 * self.num_heads_kv) * self.head_dim
        self.in_proj = nn.Linear(d_model, self.qkv_dim, bias=qkv_proj_bias, **factory)
        self.conv1d = None
        if d_conv:
            self.conv1d = CausalConv(self.qkv_dim, d_conv, activation=None, device=device, dtype=dtype)
        self.out_proj = nn.Linear(num_heads * self.head_dim, d_model, bias=out_proj_bias, **factory)

    def initial_state(self, batch: int) -> AttentionState:
        state = self._nothing(batch, next(self.parameters()).device)  # in_proj may be wrapped, or quantised
        return state if self.conv1d is None else state._replace(conv=self.conv1d.initial_state(batch))

    def _nothing(self, batch: int, device: torch.device) -> AttentionState:
        """The state before the first position, but for the convolution's window."""
        nothing = torch.zeros(batch, 0, self.num_heads_kv, self.head_dim, device=device)
        length = torch.zeros(batch, dtype=torch.int64, device=device)
        return AttentionState(nothing, nothing, length, torch.zeros(batch, 0, self.qkv_dim, device=device))

    def forward(
        self, x: Tensor, state: AttentionState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """(b, l, d_model), after `state` or from nothing -> (b, l, d_model), the state after it."""
        check_input(self, x, self.d_model)
        sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        first = state is None
        if state is None:
            state = self._nothing(sequences, x.device)
        elif len(state.length) != sequences:
            raise ValueError(f"Attention: the state is of {len(state.length)} sequences, x of {sequences}")
        qkv, window = self.in_proj(x), state.conv
        if self.conv1d is not None:
            qkv, window = self.conv1d(qkv, None if first else window, cu_seqlens=cu_seqlens)
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.num_heads, self.num_heads_kv, self.num_heads_kv], 2)
        if cu_seqlens is None:
            y, k, v = self._attend(q, k, v, state.k, state.v, state.length)
            length = state.length + x.shape[1]
        else:
            y, k, v, length = self._attend_packed(q, k, v, state, cu_seqlens)
        return self.out_proj(y.flatten(2)), AttentionState(k, v, length, window)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        l, m = q.shape[1], past_k.shape[1]
        position = length[:, None] + torch.arange(l, device=q.device)
        q, k = self._rotate(q, position), self._rotate(k, position)
        mask = None
        if not m:
            k, v = k.clone(), v.clone()  # views would keep the queries in memory for as long as the state lives
        else:
            k, v = torch.cat([past_k.to(k.dtype), k], 1), torch.cat([past_v.to(v.dtype), v], 1)
            key = torch.arange(m + l, device=q.device)
            real = key >= m - length[:, None]  # b m+l
            past = key <= m + torch.arange(l, device=q.device)[:, None]  # l m+l
            mask = (real[:, None] & past)[:, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=self.num_heads_kv != self.num_heads,
        )
        return y.transpose(1, 2), k, v

    def _attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sequence by sequence: a block-diagonal mask would cost memory quadratic in the packed length."""
        outputs, keys, values = [], [], []
        past = state.length.tolist()
        for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            row, here = slice(i, i + 1), slice(start, end)
            filling = state.k.shape[1] - past[i]
            past_k, past_v = state.k[row, filling:], state.v[row, filling:]
            y, k_i, v_i = self._attend(q[:, here], k[:, here], v[:, here], past_k, past_v, state.length[row])
            outputs.append(y)
            keys.append(k_i)
            values.append(v_i)
        longest = max(k_i.shape[1] for k_i in keys)
        filled = [torch.cat([F.pad(t, (0, 0, 0, 0, longest - t.shape[1], 0)) for t in ts]) for ts in (keys, values)]
        return torch.cat(outputs, 1), filled[0], filled[1], state.length + cu_seqlens.diff()

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """x (b, l, heads, p), position (b, l)."""
        half = self.rotary_emb_dim // 2
        if not half:
            return x
        wide = torch.promote_types(x.dtype, torch.float32)
        frequency = self.rotary_emb_base ** (torch.arange(half, device=x.device, dtype=wide) / -half)
        angle = (position[..., None] * frequency)[:, :, None]
        cos, sin = angle.cos(), angle.sin()
        first, second, rest = x.split([half, half, self.head_dim - 2 * half], -1)
        first, second = first.to(wide), second.to(wide)
        turned = torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)
        return torch.cat([turned, rest], -1)
