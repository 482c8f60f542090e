"""From raw steps to decays, chunk by chunk, and back from gradients: what is done once for a head and position.

h heads  Q positions of a chunk
"""

from __future__ import annotations

import triton
import triton.language as tl

from ophis.ops.triton.elementary import LOG2_E, softplus
from ophis.ops.triton.packing import place
from ophis.ops.triton.ssd.backward import DIRECT, ENDING, ENTERING, PASSING

# A step's log2 of decay below which float32 has only 0. Held to it, the running sums of a chunk stay so small that
# their rounding moves a decay by at most 64 * 160 * 2^-24 ln 2 = 4e-4, a fifth of what bfloat16 resolves.
LOWEST = tl.constexpr(-160.0)


@triton.jit
def step_size(raw, low, high, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr):
    """The step of a raw dt to which the bias was added."""
    step = softplus(raw) if SOFTPLUS else raw
    if LIMITED:
        step = tl.minimum(tl.maximum(step, low), high)
    return step


@triton.jit
def raw_steps(dt, dt_bias, row, t, end, head, exists, dt_sb, dt_sl, dt_sh):
    """(HEADS, Q) of dt + dt_bias in float32, and which of them there are."""
    inside = exists[:, None] & (t < end)[None, :]
    at = t.to(tl.int64)[None, :] * dt_sl + head.to(tl.int64)[:, None] * dt_sh
    raw = tl.load(dt + row * dt_sb + at, mask=inside, other=0.0).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + head, mask=exists, other=0.0)[:, None]
    return raw, inside


@triton.jit(do_not_specialize=["l", "chunks_a_row", "sequences", "dt_sb"])
def steps_kernel(
    dt, A, dt_bias, cu_seqlens, step, since,
    l, h, chunks_a_row, sequences, low, high, dt_sb, dt_sl, dt_sh,
    Q: tl.constexpr, HEADS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """The steps of a chunk, (HEADS, Q), and log2 of the decay from the chunk's start up to each position.

    Beyond a sequence's end a step is 0: there the state stays as it was. A decay between two positions is a difference
    of two of these sums. After one strong decay among them float32 has no digits left for the weak ones behind it:
    `since` is float64 where the signals deserve it, and elsewhere decays are held to what float32 still tells from 0.
    """
    blocks = tl.cdiv(h, HEADS)
    program = tl.program_id(0)
    chunk = program // blocks
    row, _, _, end, start = place(chunk, cu_seqlens, l, Q, chunks_a_row, sequences)
    head = program % blocks * HEADS + tl.arange(0, HEADS)
    exists = head < h
    i = tl.arange(0, Q)
    raw, inside = raw_steps(dt, dt_bias, tl.cast(row, tl.int64), start + i, end, head, exists, dt_sb, dt_sl, dt_sh)
    size = tl.where(inside, step_size(raw, low, high, SOFTPLUS, LIMITED), 0.0)
    log = size * (tl.load(A + head, mask=exists, other=0.0) * LOG2_E)[:, None]
    log = log.to(tl.float64) if since.dtype.element_ty == tl.float64 else tl.maximum(log, LOWEST)
    at = (tl.cast(chunk, tl.int64) * h + head)[:, None] * Q + i[None, :]
    tl.store(step + at, size, mask=exists[:, None])
    tl.store(since + at, tl.cumsum(log, 1), mask=exists[:, None])


@triton.jit(do_not_specialize=["l", "chunks_a_row", "sequences", "dt_sb"])
def d_steps_kernel(
    dt, A, dt_bias, cu_seqlens, step, sums, of_chunks, d_dt, partial,
    l, h, parts, chunks_a_row, sequences, low, high, dt_sb, dt_sl, dt_sh,
    Q: tl.constexpr, HEADS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """From what backward.py leaves to the gradient of dt, and the chunk's share of those of A and dt_bias."""
    blocks = tl.cdiv(h, HEADS)
    program = tl.program_id(0)
    chunk = program // blocks
    row, _, _, end, start = place(chunk, cu_seqlens, l, Q, chunks_a_row, sequences)
    row = tl.cast(row, tl.int64)
    head = program % blocks * HEADS + tl.arange(0, HEADS)
    exists = head < h
    i = tl.arange(0, Q)
    through = tl.zeros([HEADS, Q], sums.dtype.element_ty)
    into = tl.zeros([HEADS, Q], sums.dtype.element_ty)
    direct = tl.zeros([HEADS, Q], sums.dtype.element_ty)
    whole = tl.zeros([HEADS], tl.float32)
    of_heads = tl.cast(chunk, tl.int64) * h + head
    for part in range(parts):
        index = of_heads * parts + part
        at = sums + index[:, None] * (4 * Q) + i[None, :]
        through += tl.load(at + ENDING * Q, mask=exists[:, None], other=0.0)
        through += tl.load(at + PASSING * Q, mask=exists[:, None], other=0.0)
        into += tl.load(at + ENTERING * Q, mask=exists[:, None], other=0.0)
        direct += tl.load(at + DIRECT * Q, mask=exists[:, None], other=0.0)
        whole += tl.load(of_chunks + index, mask=exists, other=0.0)
    # By the logarithm of the decay at t: all that passes it.
    d_log = (tl.cumsum(through, 1, reverse=True) + tl.cumsum(into, 1) - into).to(tl.float32) + whole[:, None]

    t = start + i
    raw, inside = raw_steps(dt, dt_bias, row, t, end, head, exists, dt_sb, dt_sl, dt_sh)
    d_raw = direct.to(tl.float32) + tl.load(A + head, mask=exists, other=0.0)[:, None] * d_log
    if LIMITED:
        free = step_size(raw, low, high, SOFTPLUS, False)
        d_raw = tl.where((free >= low) & (free <= high), d_raw, 0.0)
    if SOFTPLUS:
        d_raw *= tl.sigmoid(raw)
    d_raw = tl.where(inside, d_raw, 0.0)
    tl.store(d_dt + (row * l + t.to(tl.int64))[None, :] * h + head[:, None], d_raw, mask=inside)
    size = tl.load(step + of_heads[:, None] * Q + i[None, :], mask=exists[:, None], other=0.0)
    at = tl.cast(chunk, tl.int64) * 2 * h + head
    tl.store(partial + at, tl.sum(size * d_log, 1), mask=exists)
    tl.store(partial + at + h, tl.sum(d_raw, 1), mask=exists)
