"""The backward pass of chunks, from the states before them and the gradients of the states after them.

h heads  p head width  n state width, see pieces.py. Both kernels take a chunk through the heads of a group, or a part
of them, one tile of a head's width after the other: what B and C get from all heads is added up in registers. There are
two because one would hold more than a multiprocessor has registers for.

For each tile and position they leave four sums, and for each chunk one, from which `d_steps_kernel` makes the gradient
of dt. Flows through decays are kept apart by where they begin and end: a flow from s to t passes the decays after s up
to t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ophis.ops.triton.elementary import exp2
from ophis.ops.triton.packing import place
from ophis.ops.triton.ssd.pieces import decays, rows, state_within, steps_of

ENDING, PASSING, ENTERING, DIRECT = (tl.constexpr(i) for i in range(4))  # see below; where each lies in `sums`


@triton.jit
def chunk_of(groups, splits, cu_seqlens, l, chunks_a_row, sequences, Q: tl.constexpr):
    """This program's split, group, chunk, and the chunk's row, start and end."""
    program = tl.program_id(0)
    chunk = program // splits // groups
    row, _, _, end, start = place(chunk, cu_seqlens, l, Q, chunks_a_row, sequences)
    return program % splits, program // splits % groups, tl.cast(chunk, tl.int64), tl.cast(row, tl.int64), start, end


@triton.jit
def tiles_of(split, splits, heads, p: tl.constexpr, P: tl.constexpr):
    """The first head of a split, and how many tiles it has."""
    each = tl.cdiv(heads, splits)
    return split * each, tl.minimum(each, heads - split * each) * ((p + P - 1) // P)


@triton.jit(do_not_specialize=["l", "chunks_a_row", "sequences", "splits"])
def of_inputs_kernel(
    dy, x, step, since, B, C, D, z, cu_seqlens, flows, dx, dB, dC_within, sums, partial_D,
    l, h, groups, chunks_a_row, sequences, splits, split_stride,
    dy_sb, dy_sl, dy_sh, dy_sp, x_sb, x_sl, x_sh, x_sp, B_sb, B_sl, B_sg, B_sn, C_sb, C_sl, C_sg, C_sn,
    D_sh, D_sp, z_sb, z_sl, z_sh, z_sp,
    p: tl.constexpr, P: tl.constexpr, n: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of x and B, and that of C through the scores.

    Matrices between positions are (s, t), the earlier ones as rows. The sums: PASSING, of the flows between the chunk's
    positions those that end at a position less those that begin there; ENTERING, what goes from it into the state after
    the chunk; DIRECT, the derivative by the step as a factor of x.
    """
    split, group, chunk, row, start, end = chunk_of(groups, splits, cu_seqlens, l, chunks_a_row, sequences, Q)
    state = tl.arange(0, N)
    has_state = state < n
    i = tl.arange(0, Q)
    t = start + i
    B += row * B_sb + tl.cast(group, tl.int64) * B_sg
    C += row * C_sb + tl.cast(group, tl.int64) * C_sg
    B_s = rows(B, start, end, B_sl, state, B_sn, has_state, Q).to(DTYPE)
    C_t = rows(C, start, end, C_sl, state, C_sn, has_state, Q).to(DTYPE)
    scores = tl.dot(B_s, tl.trans(C_t), input_precision=PRECISION)
    d_scores = tl.zeros([Q, Q], tl.float32)
    d_B = tl.zeros([Q, N], tl.float32)

    parts: tl.constexpr = (p + P - 1) // P
    first_head, tiles = tiles_of(split, splits, h // groups, p, P)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        head = tl.cast(group * (h // groups) + first_head + tile // parts, tl.int64)
        part = tile % parts
        column = part * P + tl.arange(0, P)
        has_column = column < p
        mask = has_state[:, None] & has_column[None, :]
        x_s = rows(x + row * x_sb + head * x_sh, start, end, x_sl, column, x_sp, has_column, Q).to(DTYPE)
        dy_t = rows(dy + row * dy_sb + head * dy_sh, start, end, dy_sl, column, dy_sp, has_column, Q)
        if z is not None:
            gate = rows(z + row * z_sb + head * z_sh, start, end, z_sl, column, z_sp, has_column, Q).to(tl.float32)
            dy_t = dy_t.to(tl.float32) * (gate * tl.sigmoid(gate))
        dy_t = dy_t.to(DTYPE)
        flow = tl.load(state_within(flows, chunk, h, head, column, state, p, n), mask=mask, other=0.0)
        size, log, total = steps_of(step, since, chunk * h + head, Q)
        to_end = exp2((total - log).to(tl.float32))
        at_tile = (chunk * h + head) * parts + part
        sum_at = sums + at_tile * (4 * Q) + i

        # Through the state after: h' = exp(sum of a) h + sum_s exp(sum of a after s) dt_s B_s x_s^T
        wide_x = x_s.to(tl.float32)
        scaled = (wide_x * (size * to_end)[:, None]).to(DTYPE)
        d_B = tl.dot(scaled, tl.trans(flow), d_B, input_precision=PRECISION)
        d_u = tl.dot(B_s, flow, input_precision=PRECISION) * to_end[:, None]
        through_state = tl.sum(d_u * wide_x, 1)
        tl.store(sum_at + ENTERING * Q, through_state * size)

        # Through the scores: y_t = sum_s exp(sum of a from s to t) (C_t B_s) dt_s x_s
        kept = decays(log, Q, True)
        d_kept = tl.dot(x_s, tl.trans(dy_t), input_precision=PRECISION) * kept
        d_scores += d_kept * size[:, None]
        flows_between = d_kept * scores
        passing = tl.where(i[:, None] < i[None, :], flows_between, 0.0).to(sums.dtype.element_ty)
        ending = tl.sum(passing * size[:, None], 0)
        tl.store(sum_at + PASSING * Q, ending - tl.sum(passing, 1) * size)
        # From float32 factors: the sum over p of d_u x would have those that were rounded for the next product.
        tl.store(sum_at + DIRECT * Q, tl.sum(flows_between, 1) + through_state)
        within = tl.dot((scores * kept).to(DTYPE), dy_t, input_precision=PRECISION)
        # Added as it is, the sum would become the product's initial value and make a chain of two products, for which
        # Triton gives all warps to the rows: of 64 rows half the warps would repeat what the others do.
        d_u += tl.where((t < end)[:, None], within, 0.0)

        d_x = d_u * size[:, None]
        if D is not None:
            wide_dy = dy_t.to(tl.float32)
            d_x += tl.load(D + head * D_sh + column * D_sp, mask=has_column, other=0.0)[None, :] * wide_dy
            at = (chunk * h + head) * p + column
            tl.store(partial_D + at, tl.sum(wide_dy * wide_x, 0), mask=has_column)
        out = (row * l * h + head) * p + t.to(tl.int64)[:, None] * (h * p) + column[None, :]
        tl.store(dx + out, d_x, mask=(t < end)[:, None] & has_column[None, :])

    d_scores = d_scores.to(DTYPE)
    d_B = tl.dot(d_scores, C_t, d_B, input_precision=PRECISION)
    d_C = tl.dot(tl.trans(d_scores), B_s, input_precision=PRECISION)
    at = split * split_stride + (row * l * groups + group) * n + t.to(tl.int64)[:, None] * (groups * n) + state[None, :]
    mask = (t < end)[:, None] & has_state[None, :]
    tl.store(dB + at, d_B, mask=mask)
    tl.store(dC_within + at, d_C, mask=mask)


@triton.jit(do_not_specialize=["l", "chunks_a_row", "sequences", "splits"])
def of_outputs_kernel(
    dy, x, step, since, B, C, D, z, cu_seqlens, states, flows, dz, dC_within, dC, sums, of_chunks,
    l, h, groups, chunks_a_row, sequences, splits, split_stride,
    dy_sb, dy_sl, dy_sh, dy_sp, x_sb, x_sl, x_sh, x_sp, B_sb, B_sl, B_sg, B_sn, C_sb, C_sl, C_sg, C_sn,
    D_sh, D_sp, z_sb, z_sl, z_sh, z_sp,
    p: tl.constexpr, P: tl.constexpr, n: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of C, beside that through the scores, and of z.

    The sum ENDING: what flows from the state before the chunk into the output at a position; of the chunk: what flows
    from the state before it into the one after it.
    """
    split, group, chunk, row, start, end = chunk_of(groups, splits, cu_seqlens, l, chunks_a_row, sequences, Q)
    state = tl.arange(0, N)
    has_state = state < n
    i = tl.arange(0, Q)
    t = start + i
    C += row * C_sb + tl.cast(group, tl.int64) * C_sg
    C_t = rows(C, start, end, C_sl, state, C_sn, has_state, Q).to(DTYPE)
    if z is not None:
        B += row * B_sb + tl.cast(group, tl.int64) * B_sg
        B_s = rows(B, start, end, B_sl, state, B_sn, has_state, Q).to(DTYPE)
        scores = tl.dot(C_t, tl.trans(B_s), input_precision=PRECISION)
    at = split * split_stride + (row * l * groups + group) * n + t.to(tl.int64)[:, None] * (groups * n) + state[None, :]
    mask_C = (t < end)[:, None] & has_state[None, :]
    d_C = tl.load(dC_within + at, mask=mask_C, other=0.0)

    parts: tl.constexpr = (p + P - 1) // P
    first_head, tiles = tiles_of(split, splits, h // groups, p, P)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        head = tl.cast(group * (h // groups) + first_head + tile // parts, tl.int64)
        part = tile % parts
        column = part * P + tl.arange(0, P)
        has_column = column < p
        mask = has_state[:, None] & has_column[None, :]
        dy_t = rows(dy + row * dy_sb + head * dy_sh, start, end, dy_sl, column, dy_sp, has_column, Q).to(tl.float32)
        before = tl.load(state_within(states, chunk, h, head, column, state, p, n), mask=mask, other=0.0)
        flow = tl.load(state_within(flows, chunk, h, head, column, state, p, n), mask=mask, other=0.0)
        size, log, total = steps_of(step, since, chunk * h + head, Q)
        from_start = exp2(log.to(tl.float32))
        at_tile = (chunk * h + head) * parts + part
        whole = tl.sum(tl.sum(before.to(tl.float32) * flow.to(tl.float32), 1), 0)
        tl.store(of_chunks + at_tile, whole * exp2(total.to(tl.float32)))

        if z is not None:
            gate = rows(z + row * z_sb + head * z_sh, start, end, z_sl, column, z_sp, has_column, Q).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            d_gate = dy_t * sigmoid * (1 + gate * (1 - sigmoid))
            dy_t *= gate * sigmoid
        # Through the output of the state before: y_t = exp(sum of a up to t) h C_t. This product first: one whose sums
        # wait for the next tile is left running by Triton (3.6) while `before` is overwritten for that tile. The other
        # one is awaited where it is used, and with it all that came before.
        scaled = (dy_t * from_start[:, None]).to(DTYPE)
        d_C = tl.dot(scaled, tl.trans(before), d_C, input_precision=PRECISION)
        out = tl.dot(C_t, before, input_precision=PRECISION) * from_start[:, None]
        tl.store(sums + at_tile * (4 * Q) + ENDING * Q + i, tl.sum(out * dy_t, 1))
        if z is not None:
            x_s = rows(x + row * x_sb + head * x_sh, start, end, x_sl, column, x_sp, has_column, Q).to(DTYPE)
            within = (scores * decays(log, Q, False) * size[None, :]).to(DTYPE)
            y = tl.dot(within, x_s, input_precision=PRECISION) + out
            if D is not None:
                y += tl.load(D + head * D_sh + column * D_sp, mask=has_column, other=0.0)[None, :] * x_s.to(tl.float32)
            at_z = (row * l * h + head) * p + t.to(tl.int64)[:, None] * (h * p) + column[None, :]
            tl.store(dz + at_z, d_gate * y, mask=(t < end)[:, None] & has_column[None, :])

    tl.store(dC + at, d_C, mask=mask_C)
