"""The second half of a sum over positions: each program of a backward kernel has left its share, here they are added.

In a fixed order, unlike atomic additions, so that the same call gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BD, ROWS, WARPS = 32, 64, 4


@triton.jit(do_not_specialize=["rows"])
def partial_sums_kernel(partial, first, last, rows, d, K: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    program = tl.program_id(0)
    blocks = tl.cdiv(d, BD)
    k = program // blocks
    channel = program % blocks * BD + tl.arange(0, BD)
    inside = channel < d
    parts = tl.zeros([ROWS, BD], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        at = (row[:, None].to(tl.int64) * (tl.num_programs(0) // blocks) + k) * d + channel[None, :]
        parts += tl.load(partial + at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    total = tl.sum(parts, 0)
    tl.store(first + channel * K + k, total, mask=channel < tl.where(k < K, d, 0))
    if last is not None:
        tl.store(last + channel, total, mask=channel < tl.where(k == K, d, 0))


def add_up(partial: Tensor, first: Tensor, last: Tensor | None = None) -> None:
    """Adds partial (programs, k or k+1, d) over the programs, into first (d, k) and last (d,), which are contiguous."""
    rows, k, d = partial.shape
    partial_sums_kernel[(k * triton.cdiv(d, BD),)](
        partial, first, last, rows, d, K=first.numel() // d, BD=BD, ROWS=ROWS, num_warps=WARPS
    )
