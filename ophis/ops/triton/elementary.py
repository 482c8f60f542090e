"""Functions of single numbers that several kernels need."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ophis.ops.triton import INTERPRETED

LOG2_E = tl.constexpr(1.4426950408889634)
NVIDIA = tl.constexpr(torch.version.cuda is not None and not INTERPRETED)


@triton.jit
def exp2(x):
    """2^x, where on NVIDIA's hardware results below 2^-126 are 0: `tl.exp2` spends three instructions more on them."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def softplus(raw):
    """log(1 + exp(raw)), with its relative precision where that is small.

    log1p(u) is 2 artanh(s), s = u / (2 + u) <= 1/3: seven terms leave an error of 1e-8 of it, for small u as well.
    """
    u = tl.exp(-tl.abs(raw))
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13))))))
    return tl.maximum(raw, 0.0) + 2.0 * s * series
