"""The backward pass: of a segment of positions, and of its beginning alone.

`flow` is the gradient of the state after the present position, so far as it comes from the positions that follow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ophis.ops.triton.elementary import LOG2_E, exp2
from ophis.ops.triton.selective_scan.pieces import (
    LN_2,
    before,
    blocked,
    channels_of,
    matrix_row,
    parameter,
    pass_on,
    place,
    plain,
    pointers,
    read_state,
    rows,
    sequence_and_end,
    sequence_and_start,
    step_size,
)  # fmt: skip


@triton.jit(do_not_specialize=["l", "segments", "segment_length", "sequences", "nought", "dy_sb", "dt_sb", "z_sb"])
def backward_ends_kernel(
    dy, d_final, dt, A, C, z, dt_bias, cu_seqlens, ends, steps,
    l, d, tiles_a_row, tiles_a_group, segments, segment_length, sequences, nought,
    dy_sb, dy_sl, dy_sd, dt_sb, dt_sl, dt_sd, C_sb, C_sl, C_sg, C_sn, z_sb, z_sl, z_sd,
    n: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """What comes out of a segment's beginning if nothing enters its end: of all segments but the first."""
    row, group, tile, previous, first = place(tiles_a_row, tiles_a_group, segments - 1, segment_length)
    first += segment_length
    last = tl.minimum(first + segment_length, l)
    channel, inside = channels_of(tile, group, d, tiles_a_row // tiles_a_group, BD)
    zeros = tl.zeros([BD], tl.int32)
    state = tl.arange(0, N)
    mask = (state < n)[:, None] & inside[None, :]
    dy += row * dy_sb + channel * dy_sd
    dt += row * dt_sb + channel * dt_sd
    C += row * C_sb + group * C_sg + state * C_sn
    if z is not None:
        z += row * z_sb + channel * z_sd
    rates = read_state(A, 0, d, channel, state, mask, nought, n, BD) * LOG2_E
    bias = parameter(dt_bias, channel, inside)
    sequence = tl.cast(row, tl.int32)
    start = first * 0 - 1  # of the sequence that the present position is in
    if cu_seqlens is not None:
        sequence, start = sequence_and_start(cu_seqlens, last - 1, sequences)

    flow = read_state(d_final, sequence, d, channel, state, mask & before(l - 1, last, zeros)[None, :], nought, n, BD)
    total = tl.zeros([BD], tl.float32)
    blocks = tl.cdiv(last - first, AHEAD)
    t = first + (blocks - 1) * AHEAD
    next_dy = rows(dy, t, last, dy_sl, zeros, inside, AHEAD)
    next_dt = rows(dt, t, last, dt_sl, zeros, inside, AHEAD)
    next_z = rows(z, t, last, z_sl, zeros, inside, AHEAD)
    next_C = matrix_row(C, t + AHEAD - 1, last, C_sl, state, n)
    for block in range(blocks):
        t = first + (blocks - 1 - block) * AHEAD
        dys, dts, zs = next_dy, next_dt, next_z
        next_dy = rows(dy, t - AHEAD, last, dy_sl, zeros, inside, AHEAD)
        next_dt = rows(dt, t - AHEAD, last, dt_sl, zeros, inside, AHEAD)
        next_z = rows(z, t - AHEAD, last, z_sl, zeros, inside, AHEAD)
        for u in tl.static_range(AHEAD - 1, -1, -1):
            C_t = next_C.to(tl.float32)
            next_C = matrix_row(C, t + u - 1, last, C_sl, state, n)
            ds = dys[u].to(tl.float32)
            if z is not None:
                z_t = zs[u].to(tl.float32)
                ds *= z_t * tl.sigmoid(z_t)
            step = step_size(dts[u].to(tl.float32) + bias, before(t + u, last, zeros), SOFTPLUS)
            flow = exp2(rates * step[None, :]) * (flow + ds[None, :] * C_t[:, None])
            total += step
            if cu_seqlens is not None:
                if t + u == start:
                    total += float("inf")
                    if start > 0:
                        sequence, start = sequence_and_start(cu_seqlens, start - 1, sequences)
                    flow = read_state(d_final, sequence, d, channel, state, mask, nought, n, BD)

    index = row * (segments - 1) + previous
    tl.store(blocked(ends, index, d, channel, state, nought, n, BD), flow, mask=mask)
    tl.store(steps + index * d + channel, total, mask=inside)


@triton.jit
def advance(h, t, x_t, raw, following, rates, B, B_sl, initial, cu_seqlens, d, l, end, sequences, channel, state, zeros,
            mask, nought, n: tl.constexpr, BD: tl.constexpr, SOFTPLUS: tl.constexpr):  # fmt: skip
    """The state before position t + 1, and where the sequence after that one's starts."""
    B_t = matrix_row(B, t, end, B_sl, state, n).to(tl.float32)
    step = step_size(raw, before(t, end, zeros), SOFTPLUS)
    h = exp2(rates * step[None, :]) * h + (step * x_t.to(tl.float32))[None, :] * B_t[:, None]
    if cu_seqlens is not None:
        if t + 1 == following:
            if following < l:
                sequence, following = sequence_and_end(cu_seqlens, following, sequences)
                h = read_state(initial, sequence, d, channel, state, mask, nought, n, BD)
    return h, following


@triton.jit(
    do_not_specialize=["b", "l", "segments", "segment_length", "sequences", "nought", "dy_sb", "x_sb", "dt_sb", "z_sb"]
)
def backward_kernel(
    dy, d_final, x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens, kept, ends, steps, scratch,
    dx, d_dt, dz, d_initial, partial_BC, partial_A, partial_bias,
    b, l, d, tiles_a_row, tiles_a_group, segments, segment_length, sequences, nought,
    dy_sb, dy_sl, dy_sd, x_sb, x_sl, x_sd, dt_sb, dt_sl, dt_sd, B_sb, B_sl, B_sg, B_sn, C_sb, C_sl, C_sg, C_sn,
    z_sb, z_sl, z_sd,
    n: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr, REPEATS: tl.constexpr,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """All gradients of a segment, for REPEATS tiles of channels one after the other.

    Partial sums: partial_BC is (tiles_a_group, 2, b, l, g, n), partial_A (b segments, n + 1, d) with D's as the last of
    n + 1, partial_bias (b segments, 1, d).
    """
    row, group, tiles, segment, first = place(tiles_a_row, tiles_a_group, segments, segment_length)
    last = tl.minimum(first + segment_length, l)
    groups = tiles_a_row // tiles_a_group
    state = tl.arange(0, N)
    zeros = tl.zeros([BD], tl.int32)
    B += row * B_sb + group * B_sg + state * B_sn
    C += row * C_sb + group * C_sg + state * C_sn
    to_C = tl.cast(b, tl.int64) * l * groups * n
    partial_BC += tiles * 2 * to_C + (row * l * groups + group) * n + state
    scratch += tl.cast(tl.program_id(0), tl.int64) * (CHUNK // AHEAD * N * BD)
    scratch = pointers(scratch, tl.arange(0, BD), state * BD, nought, BD)

    for repeat in range(tl.minimum(REPEATS, tl.cdiv(d // groups - tiles * REPEATS * BD, BD))):
        channel, inside = channels_of(tiles * REPEATS + repeat, group, d, groups, BD)
        mask = (state < n)[:, None] & inside[None, :]
        dy_c = dy + row * dy_sb + channel * dy_sd
        x_c = x + row * x_sb + channel * x_sd
        dt_c = dt + row * dt_sb + channel * dt_sd
        z_c = z
        if z is not None:
            z_c = z + row * z_sb + channel * z_sd
        written = row * l * d + channel
        rates = read_state(A, 0, d, channel, state, mask, nought, n, BD) * LOG2_E
        bias = parameter(dt_bias, channel, inside)
        skip = parameter(D, channel, inside)
        sequence = tl.cast(row, tl.int32)
        start = first * 0 - 1  # of the sequence that the present position is in, where there are several
        if cu_seqlens is not None:
            sequence, start = sequence_and_start(cu_seqlens, last - 1, sequences)

        of_last = mask & before(l - 1, last, zeros)[None, :]
        flow = read_state(d_final, sequence, d, channel, state, of_last, nought, n, BD)
        for i in range(segments - 1 - segment):
            index = row * (segments - 1) + segments - 2 - i
            flow = pass_on(flow, rates, ends, steps, index, d, channel, state, mask, inside, nought, n, BD)
        dA = tl.zeros([N, BD], tl.float32)
        dD = tl.zeros([BD], tl.float32)
        d_bias = tl.zeros([BD], tl.float32)

        chunks = tl.cdiv(last - first, CHUNK)
        for i in range(chunks):
            chunk = first + (chunks - 1 - i) * CHUNK
            end = tl.minimum(chunk + CHUNK, last)
            blocks = tl.cdiv(end - chunk, AHEAD)
            t = chunk + (blocks - 1) * AHEAD
            next_x = rows(x_c, t, end, x_sl, zeros, inside, AHEAD)
            next_dt = rows(dt_c, t, end, dt_sl, zeros, inside, AHEAD)
            next_dy = rows(dy_c, t, end, dy_sl, zeros, inside, AHEAD)
            next_z = rows(z_c, t, end, z_sl, zeros, inside, AHEAD)

            # Forward through the chunk: the states before every AHEAD-th position.
            index = row * tl.cdiv(l, CHUNK) + chunk // CHUNK
            h = tl.load(blocked(kept, index, d, channel, state, nought, n, BD), mask=mask, other=0.0)
            tl.store(scratch, h)
            following = l
            if cu_seqlens is not None:
                _, following = sequence_and_end(cu_seqlens, chunk, sequences)
            soon_x = rows(x_c, chunk, end, x_sl, zeros, inside, AHEAD)
            soon_dt = rows(dt_c, chunk, end, dt_sl, zeros, inside, AHEAD)
            for block in range(1, blocks):
                s = chunk + (block - 1) * AHEAD
                xs, dts = soon_x, soon_dt
                soon_x = rows(x_c, s + AHEAD, end, x_sl, zeros, inside, AHEAD)
                soon_dt = rows(dt_c, s + AHEAD, end, dt_sl, zeros, inside, AHEAD)
                for u in tl.static_range(AHEAD):
                    h, following = advance(
                        h, s + u, xs[u], dts[u].to(tl.float32) + bias, following, rates, B, B_sl,
                        initial, cu_seqlens, d, l, end, sequences, channel, state, zeros, mask, nought, n, BD, SOFTPLUS,
                    )  # fmt: skip
                tl.store(scratch + block * (N * BD), h)
            tl.debug_barrier()  # a thread may read what another one wrote

            next_C = matrix_row(C, t + AHEAD - 1, end, C_sl, state, n)
            for j in range(blocks):
                t = chunk + (blocks - 1 - j) * AHEAD
                h = tl.load(scratch + (blocks - 1 - j) * (N * BD))
                xs, dts, dys, zs = next_x, next_dt, next_dy, next_z
                next_x = rows(x_c, t - AHEAD, end, x_sl, zeros, inside, AHEAD)
                next_dt = rows(dt_c, t - AHEAD, end, dt_sl, zeros, inside, AHEAD)
                next_dy = rows(dy_c, t - AHEAD, end, dy_sl, zeros, inside, AHEAD)
                next_z = rows(z_c, t - AHEAD, end, z_sl, zeros, inside, AHEAD)
                following = l
                if cu_seqlens is not None:
                    following = start  # that of the block's last position; only within the block is there another one
                    if start > t:
                        _, following = sequence_and_end(cu_seqlens, t, sequences)

                hs = (h,)  # the states before the block's positions
                for u in tl.static_range(AHEAD - 1):
                    h, following = advance(
                        h, t + u, xs[u], dts[u].to(tl.float32) + bias, following, rates, B, B_sl,
                        initial, cu_seqlens, d, l, end, sequences, channel, state, zeros, mask, nought, n, BD, SOFTPLUS,
                    )  # fmt: skip
                    hs = hs + (h,)

                for u in tl.static_range(AHEAD - 1, -1, -1):
                    now = t + u
                    valid = before(now, end, zeros)
                    here = tl.cast(now, tl.int64) * d + written
                    of_BC = partial_BC + tl.cast(now, tl.int64) * (groups * n)
                    mask_BC = (state < n) & before(now, end, state * 0)
                    so_far = mask_BC & before(0, repeat, state * 0)
                    dB = tl.load(of_BC, mask=so_far, other=0.0)
                    dC = tl.load(of_BC + to_C, mask=so_far, other=0.0)
                    B_t = matrix_row(B, now, end, B_sl, state, n).to(tl.float32)
                    C_t = next_C.to(tl.float32)
                    next_C = matrix_row(C, now - 1, end, C_sl, state, n)

                    x_t = xs[u].to(tl.float32)
                    raw = dts[u].to(tl.float32) + bias
                    step = step_size(raw, valid, SOFTPLUS)
                    inflow = step * x_t
                    decay = exp2(rates * step[None, :])
                    h = decay * hs[u] + inflow[None, :] * B_t[:, None]
                    ds = dys[u].to(tl.float32)  # the gradient before the gate
                    if z is not None:
                        s_t = tl.sum(h * C_t[:, None], 0) + skip * x_t
                        z_t = zs[u].to(tl.float32)
                        gate = tl.sigmoid(z_t)
                        tl.store(dz + here, ds * s_t * gate * (1.0 + z_t * (1.0 - gate)), mask=inside & valid)
                        ds *= z_t * gate
                    dC += tl.sum(h * ds[None, :], 1)
                    flow += ds[None, :] * C_t[:, None]
                    dB += tl.sum(flow * inflow[None, :], 1)
                    d_inflow = tl.sum(flow * B_t[:, None], 0)
                    flow *= decay
                    d_exponent = flow * hs[u]  # of step A
                    dA += step[None, :] * d_exponent
                    d_raw = d_inflow * x_t + LN_2 * tl.sum(rates * d_exponent, 0)
                    if SOFTPLUS:
                        d_raw *= tl.sigmoid(raw)
                    d_raw = tl.where(valid, d_raw, 0.0)
                    d_bias += d_raw
                    dD += ds * x_t
                    tl.store(dx + here, d_inflow * step + ds * skip, mask=inside & valid)
                    tl.store(d_dt + here, d_raw, mask=inside & valid)
                    tl.store(of_BC, dB, mask=mask_BC)
                    tl.store(of_BC + to_C, dC, mask=mask_BC)
                    if cu_seqlens is not None:
                        if now == start:
                            if d_initial is not None:
                                tl.store(plain(d_initial, sequence, d, channel, state, nought, n, BD), flow, mask=mask)
                            if start > 0:
                                sequence, start = sequence_and_start(cu_seqlens, start - 1, sequences)
                            flow = read_state(d_final, sequence, d, channel, state, mask, nought, n, BD)
            tl.debug_barrier()

        if cu_seqlens is None:
            if d_initial is not None:
                of_row = plain(d_initial, row, d, channel, state, nought, n, BD)
                tl.store(of_row, flow, mask=mask & before(segment, 1, zeros)[None, :])
        index = row * segments + segment
        of_row = partial_A + index * (n + 1) * d
        tl.store(pointers(of_row, channel, state * d, nought, BD), dA, mask=mask)
        tl.store(of_row + tl.cast(d, tl.int64) * n + channel, dD, mask=inside)
        tl.store(partial_bias + index * d + channel, d_bias, mask=inside)
