"""The forward pass: of a segment of positions, of its end alone, of a single position."""

from __future__ import annotations

import triton
import triton.language as tl

from ophis.ops.triton.elementary import LOG2_E, exp2
from ophis.ops.triton.selective_scan.pieces import (
    before,
    blocked,
    channels_of,
    matrix_row,
    parameter,
    pass_on,
    place,
    plain,
    read_state,
    rows,
    sequence_and_end,
    step_size,
)  # fmt: skip


# t_sb, t_sl, t_sd, t_sg, t_sn are strides of tensor t along b, l, d, g, n; tensors that have none are contiguous. What
# varies with the length is not specialised: a multiple of 16 would be another kernel than the rest.
@triton.jit(do_not_specialize=["l", "segments", "segment_length", "sequences", "nought", "x_sb", "dt_sb", "z_sb"])
def forward_kernel(
    x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens, y, final, kept, ends, steps,
    l, d, tiles_a_row, tiles_a_group, segments, segment_length, sequences, nought,
    x_sb, x_sl, x_sd, dt_sb, dt_sl, dt_sd, B_sb, B_sl, B_sg, B_sn, C_sb, C_sl, C_sg, C_sn, z_sb, z_sl, z_sd,
    n: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """The scan of a segment; with ENDS, of all segments but the last, and only what `pass_on` needs."""
    row, group, tile, segment, first = place(
        tiles_a_row, tiles_a_group, segments - 1 if ENDS else segments, segment_length
    )
    last = tl.minimum(first + segment_length, l)
    channel, inside = channels_of(tile, group, d, tiles_a_row // tiles_a_group, BD)
    zeros = tl.zeros([BD], tl.int32)
    state = tl.arange(0, N)
    mask = (state < n)[:, None] & inside[None, :]
    x += row * x_sb + channel * x_sd
    dt += row * dt_sb + channel * dt_sd
    B += row * B_sb + group * B_sg + state * B_sn
    if not ENDS:
        C += row * C_sb + group * C_sg + state * C_sn
        y += row * l * d + channel
        if z is not None:
            z += row * z_sb + channel * z_sd
    rates = read_state(A, 0, d, channel, state, mask, nought, n, BD) * LOG2_E
    bias = parameter(dt_bias, channel, inside)
    skip = parameter(D, channel, inside)
    sequence = tl.cast(row, tl.int32)
    following = l  # where the next sequence starts
    if cu_seqlens is not None:
        sequence, following = sequence_and_end(cu_seqlens, first, sequences)

    h = read_state(initial, sequence, d, channel, state, mask & before(segment, 1, zeros)[None, :], nought, n, BD)
    if not ENDS:
        for i in range(segment):
            h = pass_on(h, rates, ends, steps, row * (segments - 1) + i, d, channel, state, mask, inside, nought, n, BD)
    total = tl.zeros([BD], tl.float32)

    next_x = rows(x, first, last, x_sl, zeros, inside, AHEAD)
    next_dt = rows(dt, first, last, dt_sl, zeros, inside, AHEAD)
    next_z = rows(z, first, last, z_sl, zeros, inside, AHEAD)
    next_B = matrix_row(B, first, last, B_sl, state, n)
    if not ENDS:
        next_C = matrix_row(C, first, last, C_sl, state, n)
    for t in range(first, last, AHEAD):
        if kept is not None:
            if t % CHUNK == 0:
                index = row * tl.cdiv(l, CHUNK) + t // CHUNK
                tl.store(blocked(kept, index, d, channel, state, nought, n, BD), h, mask=mask)
        xs, dts, zs = next_x, next_dt, next_z
        next_x = rows(x, t + AHEAD, last, x_sl, zeros, inside, AHEAD)
        next_dt = rows(dt, t + AHEAD, last, dt_sl, zeros, inside, AHEAD)
        next_z = rows(z, t + AHEAD, last, z_sl, zeros, inside, AHEAD)
        for u in tl.static_range(AHEAD):
            B_t = next_B.to(tl.float32)
            next_B = matrix_row(B, t + u + 1, last, B_sl, state, n)
            valid = before(t + u, last, zeros)
            x_t = xs[u].to(tl.float32)
            step = step_size(dts[u].to(tl.float32) + bias, valid, SOFTPLUS)
            h = exp2(rates * step[None, :]) * h + (step * x_t)[None, :] * B_t[:, None]
            if ENDS:
                total += step
            else:
                C_t = next_C.to(tl.float32)
                next_C = matrix_row(C, t + u + 1, last, C_sl, state, n)
                y_t = tl.sum(h * C_t[:, None], 0) + skip * x_t
                if z is not None:
                    z_t = zs[u].to(tl.float32)
                    y_t *= z_t * tl.sigmoid(z_t)
                tl.store(y + tl.cast(t + u, tl.int64) * d, y_t, mask=inside & valid)
            if cu_seqlens is not None:
                if t + u + 1 == following:
                    if not ENDS:
                        tl.store(plain(final, sequence, d, channel, state, nought, n, BD), h, mask=mask)
                    total += float("inf")
                    if following < l:
                        sequence, following = sequence_and_end(cu_seqlens, following, sequences)
                    h = read_state(initial, sequence, d, channel, state, mask, nought, n, BD)

    if ENDS:
        index = row * (segments - 1) + segment
        tl.store(blocked(ends, index, d, channel, state, nought, n, BD), h, mask=mask)
        tl.store(steps + index * d + channel, total, mask=inside)
    elif cu_seqlens is None:
        if last == l:
            tl.store(plain(final, row, d, channel, state, nought, n, BD), h, mask=mask)


@triton.jit
def step_kernel(
    x, dt, A, B, C, D, z, dt_bias, old, y, new,
    d, tiles_a_row, tiles_a_group,
    x_sb, x_sd, dt_sb, dt_sd, A_sd, A_sn, B_sb, B_sg, B_sn, C_sb, C_sg, C_sn, D_sd, z_sb, z_sd, dt_bias_sd,
    old_sb, old_sd, old_sn, new_sb, new_sd, new_sn,
    n: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One position. Reading and writing the states is all there is to it: here n goes along the threads."""
    row, group, tile, _, _ = place(tiles_a_row, tiles_a_group, 1, 1)
    channel, inside = channels_of(tile, group, d, tiles_a_row // tiles_a_group, BD)
    state = tl.arange(0, N)
    exists = state < n
    mask = inside[:, None] & exists[None, :]
    rates = tl.load(A + channel[:, None] * A_sd + state[None, :] * A_sn, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    B_t = tl.load(B + row * B_sb + group * B_sg + state * B_sn, mask=exists, other=0.0).to(tl.float32)
    C_t = tl.load(C + row * C_sb + group * C_sg + state * C_sn, mask=exists, other=0.0).to(tl.float32)
    x_t = tl.load(x + row * x_sb + channel * x_sd, mask=inside, other=0.0).to(tl.float32)
    raw = tl.load(dt + row * dt_sb + channel * dt_sd, mask=inside, other=0.0).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + channel * dt_bias_sd, mask=inside, other=0.0).to(tl.float32)
    step = step_size(raw, inside, SOFTPLUS)
    h = (step * x_t)[:, None] * B_t[None, :]
    if old is not None:
        of_row = old + row * old_sb + channel[:, None] * old_sd + state[None, :] * old_sn
        h += exp2(rates * step[:, None]) * tl.load(of_row, mask=mask, other=0.0).to(tl.float32)
    tl.store(new + row * new_sb + channel[:, None] * new_sd + state[None, :] * new_sn, h, mask=mask)
    y_t = tl.sum(h * C_t[None, :], 1)
    if D is not None:
        y_t += tl.load(D + channel * D_sd, mask=inside, other=0.0).to(tl.float32) * x_t
    if z is not None:
        z_t = tl.load(z + row * z_sb + channel * z_sd, mask=inside, other=0.0).to(tl.float32)
        y_t *= z_t * tl.sigmoid(z_t)
    tl.store(y + row * d + channel, y_t, mask=inside)
