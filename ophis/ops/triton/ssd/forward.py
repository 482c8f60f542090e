"""The forward pass, and a single position.

b batch  l length  h heads  p head width  n state width, see pieces.py
"""

from __future__ import annotations

import triton
import triton.language as tl

from ophis.ops.triton.elementary import LOG2_E, exp2
from ophis.ops.triton.packing import bounds, sequence_of
from ophis.ops.triton.ssd.pieces import (
    decays,
    follow,
    place,
    read_state,
    rows,
    state_at,
    steps_of,
)
from ophis.ops.triton.ssd.steps import step_size


# t_sb, t_sl, t_sh, t_sp, t_sg, t_sn are strides of tensor t along b, l, h, p, groups, n; tensors that have none are
# contiguous. What varies with the length is not specialised: a multiple of 16 would be another kernel than the rest.
@triton.jit(
    do_not_specialize=[
        "l", "chunks_a_row", "segments", "segment_length", "sequences",
    ]
)  # fmt: skip
def forward_kernel(
    x, step, since, B, C, D, z, initial, cu_seqlens, entering, y, final,
    l, h, heads_a_group, chunks_a_row, segments, segment_length, sequences,
    x_sb, x_sl, x_sh, x_sp, B_sb, B_sl, B_sg, B_sn, C_sb, C_sl, C_sg, C_sn, D_sh, D_sp,
    z_sb, z_sl, z_sh, z_sp,
    p: tl.constexpr, P: tl.constexpr, n: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A segment of a row, chunk after chunk, with a head's state (n, p) in registers."""
    row, head, part, segment, first, last = place(h, segments, chunks_a_row, segment_length, 0, p, P)
    row = tl.cast(row, tl.int64)
    group = head // heads_a_group
    column, state = part * P + tl.arange(0, P), tl.arange(0, N)
    has_column, has_state = column < p, state < n
    mask = has_state[:, None] & has_column[None, :]
    x += row * x_sb + tl.cast(head, tl.int64) * x_sh
    B += row * B_sb + tl.cast(group, tl.int64) * B_sg
    C += row * C_sb + tl.cast(group, tl.int64) * C_sg
    y += (row * l * h + head) * p
    if z is not None:
        z += row * z_sb + tl.cast(head, tl.int64) * z_sh
    if D is not None:
        skip = tl.load(D + head * D_sh + column * D_sp, mask=has_column, other=0.0)

    if entering is not None:
        hidden = read_state(entering, row * segments + segment, h, head, column, state, mask, p, n)
    elif cu_seqlens is None:
        hidden = read_state(initial, row, h, head, column, state, mask, p, n)
    else:
        hidden = tl.zeros([N, P], tl.float32)
    sequence = sequences * 0
    if cu_seqlens is not None:
        sequence = sequence_of(first, cu_seqlens, Q, sequences)
    end = l
    for chunk in tl.range(first, last, num_stages=STAGES):
        start = chunk * Q
        if cu_seqlens is not None:
            sequence = follow(sequence, chunk, cu_seqlens, Q, False)
            begin, end, start = bounds(chunk, sequence, cu_seqlens, Q)
            if start == begin:
                hidden = read_state(initial, sequence, h, head, column, state, mask, p, n)
        t = start + tl.arange(0, Q)
        C_t = rows(C, start, end, C_sl, state, C_sn, has_state, Q).to(DTYPE)
        B_s = rows(B, start, end, B_sl, state, B_sn, has_state, Q).to(DTYPE)
        x_s = rows(x, start, end, x_sl, column, x_sp, has_column, Q)
        size, log, total = steps_of(step, since, (row * chunks_a_row + chunk) * h + head, Q)

        scores = tl.dot(C_t, tl.trans(B_s), input_precision=PRECISION)
        scores *= decays(log, Q, False) * size[None, :]
        out = tl.dot(C_t, hidden.to(DTYPE), input_precision=PRECISION) * exp2(log.to(tl.float32))[:, None]
        out = tl.dot(scores.to(DTYPE), x_s.to(DTYPE), out, input_precision=PRECISION)

        inflow = size * exp2((total - log).to(tl.float32))
        inflow = (x_s.to(tl.float32) * inflow[:, None]).to(DTYPE)
        hidden *= exp2(total.to(tl.float32))
        hidden = tl.dot(tl.trans(B_s), inflow, hidden, input_precision=PRECISION)

        if D is not None:
            out += skip[None, :] * x_s.to(tl.float32)
        if z is not None:
            gate = rows(z, start, end, z_sl, column, z_sp, has_column, Q).to(tl.float32)
            out *= gate * tl.sigmoid(gate)
        at = t.to(tl.int64)[:, None] * (h * p) + column[None, :]
        tl.store(y + at, out, mask=(t < end)[:, None] & has_column[None, :])
        if cu_seqlens is not None:
            if (start < end) & (start + Q >= end):
                tl.store(state_at(final, sequence, h, head, column, state, p, n), hidden, mask=mask)
    if cu_seqlens is None:
        if last == chunks_a_row:
            tl.store(state_at(final, row, h, head, column, state, p, n), hidden, mask=mask)


@triton.jit
def step_kernel(
    x, dt, A, B, C, D, z, dt_bias, old, y, new,
    h, heads_a_group, low, high,
    x_sb, x_sh, x_sp, dt_sb, dt_sh, A_sh, B_sb, B_sg, B_sn, C_sb, C_sg, C_sn, D_sh, D_sp, z_sb, z_sh, z_sp, dt_bias_sh,
    old_sb, old_sh, old_sp, old_sn, new_sb, new_sh, new_sp, new_sn,
    p: tl.constexpr, P: tl.constexpr, n: tl.constexpr, N: tl.constexpr,
    SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """One position. Reading and writing the states is all there is to it: n goes along the threads."""
    row, head, part, _, _, _ = place(h, 1, 1, 1, 0, p, P)
    row, head = tl.cast(row, tl.int64), tl.cast(head, tl.int64)
    group = head // heads_a_group
    column, state = part * P + tl.arange(0, P), tl.arange(0, N)
    has_column, has_state = column < p, state < n
    mask = has_column[:, None] & has_state[None, :]
    raw = tl.load(dt + row * dt_sb + head * dt_sh).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + head * dt_bias_sh).to(tl.float32)
    step = step_size(raw, low, high, SOFTPLUS, LIMITED)
    x_t = tl.load(x + row * x_sb + head * x_sh + column * x_sp, mask=has_column, other=0.0).to(tl.float32)
    B_t = tl.load(B + row * B_sb + group * B_sg + state * B_sn, mask=has_state, other=0.0).to(tl.float32)
    C_t = tl.load(C + row * C_sb + group * C_sg + state * C_sn, mask=has_state, other=0.0).to(tl.float32)
    hidden = (step * x_t)[:, None] * B_t[None, :]
    column, state = column.to(tl.int64)[:, None], state.to(tl.int64)[None, :]
    if old is not None:
        before = tl.load(old + row * old_sb + head * old_sh + column * old_sp + state * old_sn, mask=mask, other=0.0)
        rate = tl.load(A + head * A_sh).to(tl.float32) * LOG2_E
        hidden += exp2(step * rate) * before.to(tl.float32)
    tl.store(new + row * new_sb + head * new_sh + column * new_sp + state * new_sn, hidden, mask=mask)
    out = tl.sum(hidden * C_t[None, :], 1)
    column = part * P + tl.arange(0, P)
    if D is not None:
        out += tl.load(D + head * D_sh + column * D_sp, mask=has_column, other=0.0).to(tl.float32) * x_t
    if z is not None:
        gate = tl.load(z + row * z_sb + head * z_sh + column * z_sp, mask=has_column, other=0.0).to(tl.float32)
        out *= gate * tl.sigmoid(gate)
    tl.store(y + (row * h + head) * p + column, out, mask=has_column)
