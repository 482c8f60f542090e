"""The selective scan with channels first.   b batch  d channels  l length  n state size  g groups of channels"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ophis import ops


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,  y_t = C_t h_t + D u_t, times silu(z_t).

    Args:
        u, delta, z: (b, d, l), in any layout in memory.
        A: (d, n), real or complex.
        B, C: (d, n), or (b, n, l), or (b, g, n, l). With complex A, the last two are real, of length 2 l: real and
            imaginary part of each position in turn.
        D, delta_bias: (d,).
        delta_softplus: delta = softplus(delta + delta_bias).
        return_last_state: also return the state after the last position.

    Returns:
        (b, d, l) in u's dtype, contiguous; with return_last_state (that, (b, d, n) in float32 or wider, complex if A
        is). Both are differentiable.
    """
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, None)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """`selective_scan_fn` step by step, in any dtype."""
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, "reference")


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, backend):
    y, state = ops.selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        _channels_last(B, A),
        _channels_last(C, A),
        D=D,
        z=None if z is None else z.transpose(1, 2),
        dt_bias=delta_bias,
        dt_softplus=bool(delta_softplus),
        backend=backend,
    )
    y = y.transpose(1, 2).contiguous()  # much code views it as (b, groups, d / groups, l)
    return (y, state) if return_last_state else y


def _channels_last(B: Tensor, A: Tensor) -> Tensor:
    """B or C -> (d, n), (b, l, n) or (b, l, g, n)."""
    if B.ndim == 2:
        return B
    if A.is_complex() and not B.is_complex():
        B = torch.view_as_complex(B.to(A.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    return B.transpose(1, 2) if B.ndim == 3 else B.permute(0, 3, 1, 2)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba block from behind its input projection: convolution, projections to delta, B and C, scan, output.

    Args:
        xz: (b, 2 d, l), x and its gate.
        conv1d_weight, conv1d_bias: (d, 1, w); (d,).
        x_proj_weight: (rank + 2 n, d), rows delta, B, C; 4 n instead of 2 n with complex A, the parts in turn.
        delta_proj_weight: (d, rank).
        out_proj_weight, out_proj_bias: (d_model, d); (d_model,).
        A, D, delta_bias, delta_softplus: as in `selective_scan_fn`.
        B, C: as there; None to have them projected from x.
        B_proj_bias, C_proj_bias: (n,), added to what is projected.
        b_rms_weight, c_rms_weight, dt_rms_weight: (n,), (n,), (d,): what is projected is divided by its root mean
            square (+ b_c_dt_rms_eps) and multiplied by them.
        checkpoint_lvl: taken and not used; what the backward pass recomputes is the backend's choice.

    Returns:
        (b, l, d_model).
    """
    return _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus, b_rms_weight, c_rms_weight, dt_rms_weight,
        b_c_dt_rms_eps, None,
    )  # fmt: skip


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` step by step, in any dtype."""
    return _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus, None, None, None, 1e-6, "reference",
    )  # fmt: skip


def _inner(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
    delta_bias, B_proj_bias, C_proj_bias, delta_softplus, b_rms_weight, c_rms_weight, dt_rms_weight, eps, backend,
):  # fmt: skip
    x, z = xz.transpose(1, 2).chunk(2, -1)
    x, _ = ops.causal_conv(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu", backend=backend)
    projected = F.linear(x, x_proj_weight)
    rank, width = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    dt = _normalised(F.linear(projected[..., :rank], delta_proj_weight), dt_rms_weight, eps)

    def matrix(given: Tensor | None, start: int, end: int | None, bias: Tensor | None, rms_weight: Tensor | None):
        if given is not None:
            if rms_weight is not None:
                raise ValueError("mamba_inner_fn: b_rms_weight and c_rms_weight are for a B and C projected from x")
            return _channels_last(given, A)
        part = projected[..., start:end]
        part = part if bias is None else part + bias.to(part.dtype)
        part = _normalised(part, rms_weight, eps)
        if not A.is_complex():
            return part
        return torch.view_as_complex(part.to(A.real.dtype).unflatten(-1, (-1, 2)).contiguous())

    y, _ = ops.selective_scan(
        x,
        dt,
        A,
        matrix(B, rank, rank + width, B_proj_bias, b_rms_weight),
        matrix(C, -width, None, C_proj_bias, c_rms_weight),
        D=D,
        z=z,
        dt_bias=delta_bias,
        dt_softplus=delta_softplus,
        backend=backend,
    )
    return F.linear(y, out_proj_weight, out_proj_bias)


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else ops.rms_norm(x, weight, eps=eps)[0]
