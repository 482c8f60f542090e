"""S4D as a convolution, with the states at both ends.

Every sum over time is a Vandermonde product, taken in two levels: with l = r q positions, powers up to q within a block
and powers of dA^q over the r blocks, so that no (d, n, l) tensor exists.   b batch  d channels  n modes
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ophis.ops.long_conv import long_conv
from ophis.ops.s4d import discretize, fold_modes, s4d, s4d_kernel


@s4d.register("torch")
def convolution(x, dt, A, B, C, *, D, discretization, initial_state, cu_seqlens):
    if cu_seqlens is not None:
        call = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, discretization=discretization, initial_state=initial_state)
        return s4d.one_by_one(convolution, {**call, "cu_seqlens": cu_seqlens})
    u = x.to(torch.promote_types(x.dtype, torch.float32))
    dA, dB = discretize(dt, A, B, discretization)
    l = x.shape[1]
    if l == 1:
        state = dB * u[:, 0, :, None]
        if initial_state is not None:
            state = state + dA * initial_state
        y = fold_modes(C * state, A)[:, None]
        return (y if D is None else y + D * u).to(x.dtype), state
    y = long_conv(u, vandermonde(dA, C * dB, A, l), D=D)
    state = gather(dA, u) * dB
    if initial_state is not None:
        y = y + vandermonde(dA, C * dA * initial_state, A, l).mT
        state = state + dA**l * initial_state
    return y.to(x.dtype), state


@s4d_kernel.register("torch")
def kernel(dt, A, B, C, length, *, discretization):
    dA, dB = discretize(dt, A, B, discretization)
    return vandermonde(dA, C * dB, A, length)


def powers(dA: Tensor, count: int) -> Tensor:
    """dA^0 ... dA^(count-1), on a new last axis."""
    return dA[..., None] ** torch.arange(count, device=dA.device)


def vandermonde(dA: Tensor, weights: Tensor, A: Tensor, l: int) -> Tensor:
    """sum_n weights dA^t for t < l, folded: dA (d, n), weights (..., d, n) -> (..., d, l)."""
    q = math.isqrt(l - 1) + 1
    r = -(-l // q)
    outer = weights[..., None] * powers(dA**q, r)  # ... d n r
    inner = powers(dA, q).to(outer.dtype)
    y = (outer.mT @ inner).flatten(-2)[..., :l]  # ... d r q
    return fold_modes(y[..., None], A)


def gather(dA: Tensor, x: Tensor) -> Tensor:
    """sum_t dA^(l-1-t) x_t: (d, n), (b, l, d) -> (b, d, n)."""
    l = x.shape[1]
    q = math.isqrt(l - 1) + 1
    r = -(-l // q)
    blocks = torch.nn.functional.pad(x, (0, 0, r * q - l, 0)).view(x.shape[0], r, q, -1).permute(0, 3, 1, 2)
    inner = blocks.to(dA.dtype) @ powers(dA, q).flip(-1).mT  # b d r n
    return (inner * powers(dA**q, r).flip(-1).mT).sum(-2)
