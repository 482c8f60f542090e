"""State space duality, with and without what surrounds it in a Mamba-2 block.

b batch  l length  h heads  p head width  g groups of heads  n state width  w conv width
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ophis import ops
from ophis.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn
from ophis.compat.packing import Runs


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t, times silu(z_t).

    Args:
        x, z: (b, l, h, p).
        dt: (b, l, h).
        A: (h,), negative.
        B, C: (b, l, g, n).
        chunk_size: taken and not used; the backend has its own.
        D: (h,) or (h, p).
        dt_bias, dt_softplus, dt_limit: dt is dt + dt_bias, then its softplus, then clamped.
        initial_states: (b, h, p, n). With seq_idx, each row's sequence number 0 begins with it, and no other.
        seq_idx: (b, l) integers: each run of equal ones is a sequence of its own.
        cu_seqlens: (sequences + 1,) offsets, batch 1; read with return_varlen_states only, as in the original. Where
            seq_idx is not given they also keep the sequences apart. Positions after the last are padding.
        return_final_states: also return the state after each row's last position.
        return_varlen_states: also return the state after each of cu_seqlens.

    Returns:
        y (b, l, h, p) in x's dtype; or (y, final states (b, h, p, n)); or (y, states (sequences, h, p, n)); or
        (y, final, states). States are float32 or wider, and differentiable.
    """
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("mamba_chunk_scan_combined: return_varlen_states needs cu_seqlens")
    cuts = cu_seqlens if return_varlen_states else None
    options: dict[str, Any] = dict(D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit)
    if seq_idx is None and cuts is None:
        y, final = ops.ssd(x, dt, A, B, C, z=z, initial_state=initial_states, **options)
        return (y, final) if return_final_states else y
    if seq_idx is None:
        seq_idx = torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
    elif initial_states is not None:
        initial_states = initial_states.masked_fill((seq_idx[:, 0] != 0)[:, None, None, None], 0)
    runs = Runs.of(seq_idx, cuts)
    y, states = ops.ssd(
        runs.pack(x),
        runs.pack(dt),
        A,
        runs.pack(B),
        runs.pack(C),
        z=None if z is None else runs.pack(z),
        initial_state=runs.begin_with(initial_states),
        cu_seqlens=runs.cu_seqlens,
        **options,
    )
    y = runs.unpack(y)
    results = [y]
    if return_final_states:
        results.append(states.index_select(0, runs.last))
    if cuts is not None:
        results.append(runs.ends_at(states, cuts))
    return tuple(results) if len(results) > 1 else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Any:
    """A Mamba-2 block from behind its input projection: convolution, SSD, gated norm, output projection.

    Args:
        zxbcdt: (b, l, 2 m + 2 h p + 2 g n + h), in this order: gate and value of an MLP of width m, which may be 0; z;
            x, B and C; dt.
        conv1d_weight, conv1d_bias: (h p + 2 g n, w); (h p + 2 g n,).
        dt_bias, A: (h,).
        D: (h,), with headdim; or (h, p).
        chunk_size: taken and not used.
        initial_states, seq_idx, dt_limit, return_final_states: as in `mamba_chunk_scan_combined`.
        activation: of the convolution; None, "silu" or "swish".
        rmsnorm_weight, rmsnorm_eps: (h p,) of the gated norm, over each of the g groups; without it, y silu(z).
        outproj_weight, outproj_bias: (d_model, m + h p); (d_model,).
        headdim: p, where D does not tell.
        norm_before_gate: norm(y) silu(z) rather than norm(y silu(z)).

    Returns:
        (b, l, d_model), or (b, l, m + h p) without outproj_weight; with return_final_states (that, (b, h, p, n)).
    """
    if D.ndim == 1 and headdim is None:
        raise ValueError("mamba_split_conv1d_scan_combined: D has one number a head, so headdim must be given")
    if outproj_weight is None and outproj_bias is not None:
        raise ValueError("mamba_split_conv1d_scan_combined: outproj_bias without outproj_weight")
    heads, headdim = len(D), D.shape[1] if D.ndim == 2 else headdim or 0
    width, conv_width = heads * headdim, conv1d_weight.shape[0]
    matrices = (conv_width - width) // 2  # g n
    mlp = (zxbcdt.shape[-1] - width - conv_width - heads) // 2
    sizes = [mlp, mlp, width, conv_width, heads]
    if min(mlp, matrices) < 0 or sum(sizes) != zxbcdt.shape[-1]:
        raise ValueError(
            f"mamba_split_conv1d_scan_combined: zxbcdt has width {zxbcdt.shape[-1]}, expected {width} + {conv_width} + "
            f"{heads} for z, the convolution's channels and dt, and twice the width of an MLP if there is one"
        )
    mlp_gate, value, z, xBC, dt = zxbcdt.split(sizes, -1)
    xBC = causal_conv1d_fn(
        xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx=seq_idx, activation=activation
    ).transpose(1, 2)
    x, B, C = xBC.split([width, matrices, matrices], -1)
    y, final = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, headdim)) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y = y.flatten(2)
    if rmsnorm_weight is not None:
        y = ops.gated_rms_norm(y, z, rmsnorm_weight, eps=rmsnorm_eps, groups=ngroups, norm_before_gate=norm_before_gate)
    if mlp:
        y = torch.cat([F.silu(mlp_gate) * value, y], -1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, final) if return_final_states else y
