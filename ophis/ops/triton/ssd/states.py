"""The states, and their gradients, at the chunks' bounds: the recurrence over chunks without its outputs.

A state h goes forward in time, its gradient backward, by the same recurrence (a is the log of a step's decay):

    h  <- exp(sum of a) h  + sum_s exp(sum of a after s)  dt_s B_s x_s^T
    dh <- exp(sum of a) dh + sum_t exp(sum of a up to t)  C_t dy_t^T

h heads  p head width  n state width, see pieces.py
"""

from __future__ import annotations

import triton
import triton.language as tl

from ophis.ops.triton.elementary import exp2
from ophis.ops.triton.packing import bounds, sequence_of
from ophis.ops.triton.ssd.pieces import (
    follow,
    place,
    read_state,
    rows,
    state_at,
    state_within,
    steps_of,
)


@triton.jit(
    do_not_specialize=[
        "l", "chunks_a_row", "segments", "segment_length", "sequences",
    ]
)  # fmt: skip
def states_kernel(
    value, gate, matrix, step, since, edge, cu_seqlens, passed, totals, states, far_edge,
    l, h, heads_a_group, chunks_a_row, segments, segment_length, sequences,
    value_sb, value_sl, value_sh, value_sp, gate_sb, gate_sl, gate_sh, gate_sp,
    matrix_sb, matrix_sl, matrix_sg, matrix_sn,
    p: tl.constexpr, P: tl.constexpr, n: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """A segment of a row: x and B forward in time or, with REVERSE, dy and C backward.

    `edge` has the sequences' states where the way begins, `far_edge` gets those where it ends. Every chunk's, as it is
    entered, goes into `states`. With `totals` there is no other output than what `pass_on_kernel` needs: of every
    segment but the last, the end of a way from zeros, and the log2 of what is left of the state it was entered with.
    Without, `passed` has the states that the segments are entered with, where there are several.
    """
    ENDS: tl.constexpr = totals is not None
    row, head, part, segment, first, last = place(
        h, segments - 1 if ENDS else segments, chunks_a_row, segment_length, ENDS and REVERSE, p, P
    )
    row = tl.cast(row, tl.int64)
    group = head // heads_a_group
    column, state = part * P + tl.arange(0, P), tl.arange(0, N)
    has_column, has_state = column < p, state < n
    mask = has_state[:, None] & has_column[None, :]
    value += row * value_sb + tl.cast(head, tl.int64) * value_sh
    if gate is not None:
        gate += row * gate_sb + tl.cast(head, tl.int64) * gate_sh
    matrix += row * matrix_sb + tl.cast(group, tl.int64) * matrix_sg

    hidden = tl.zeros([N, P], tl.float32)
    if not ENDS:
        if passed is not None:
            hidden = read_state(passed, row * segments + segment, h, head, column, state, mask, p, n)
        elif cu_seqlens is None:
            hidden = read_state(edge, row, h, head, column, state, mask, p, n)
    passing = tl.zeros([1], tl.float32)
    sequence = sequences * 0
    if cu_seqlens is not None:
        sequence = sequence_of(last - 1 if REVERSE else first, cu_seqlens, Q, sequences)
    end = l
    for i in tl.range(first, last, num_stages=STAGES):
        chunk = last - 1 - (i - first) if REVERSE else i
        start = chunk * Q
        if cu_seqlens is not None:
            sequence = follow(sequence, chunk, cu_seqlens, Q, REVERSE)
            begin, end, start = bounds(chunk, sequence, cu_seqlens, Q)
            enters = (start < end) & (start + Q >= end) if REVERSE else start == begin
            if enters:
                hidden = read_state(edge, sequence, h, head, column, state, mask, p, n)
                passing += float("-inf")
        matrix_t = rows(matrix, start, end, matrix_sl, state, matrix_sn, has_state, Q).to(DTYPE)
        value_t = rows(value, start, end, value_sl, column, value_sp, has_column, Q).to(tl.float32)
        if gate is not None:
            gate_t = rows(gate, start, end, gate_sl, column, gate_sp, has_column, Q).to(tl.float32)
            value_t *= gate_t * tl.sigmoid(gate_t)
        size, log, total = steps_of(step, since, (row * chunks_a_row + chunk) * h + head, Q)
        if REVERSE:
            weight = exp2(log.to(tl.float32))
        else:
            weight = size * exp2((total - log).to(tl.float32))
        total = total.to(tl.float32)
        if ENDS:
            passing += total
        else:
            index = row * chunks_a_row + chunk
            tl.store(state_within(states, index, h, head, column, state, p, n), hidden, mask=mask)
        hidden *= exp2(total)
        inflow = (value_t * weight[:, None]).to(DTYPE)
        hidden = tl.dot(tl.trans(matrix_t), inflow, hidden, input_precision=PRECISION)
        if cu_seqlens is not None:
            if far_edge is not None:
                leaves = (start < end) & (start == begin) if REVERSE else (start < end) & (start + Q >= end)
                if leaves:
                    tl.store(state_at(far_edge, sequence, h, head, column, state, p, n), hidden, mask=mask)
    if ENDS:
        index = row * segments + segment + (-1 if REVERSE else 1)
        tl.store(state_at(passed, index, h, head, column, state, p, n), hidden, mask=mask)
        tl.store(totals + index * h + head + tl.arange(0, 1), passing)
    elif far_edge is not None:
        if cu_seqlens is None:
            if (first == 0) if REVERSE else (last == chunks_a_row):
                tl.store(state_at(far_edge, row, h, head, column, state, p, n), hidden, mask=mask)


@triton.jit
def after(decay, own, next_decay, next_own):
    """Two steps of a recurrence x <- decay x + own as one."""
    return decay * next_decay, own * next_decay + next_own


@triton.jit(do_not_specialize=["segments"])
def pass_on_kernel(
    passed, totals, edge, segments, h, size,
    REVERSE: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Turns the ends of segments, each from zeros, into the states that the segments are entered with, in place.

    What `states_kernel` left of a segment lies where the next one is entered. ENTRIES of a head's `size` = p n are
    taken along all segments, ROWS of these at a time.
    """
    blocks = tl.cdiv(size, ENTRIES)
    program = tl.program_id(0)
    head = program // blocks % h
    row = tl.cast(program // blocks // h, tl.int64)
    entry = program % blocks * ENTRIES + tl.arange(0, ENTRIES)
    exists = entry < size
    if edge is None:
        carried = tl.zeros([ENTRIES], tl.float32)
    else:
        carried = tl.load(edge + (row * h + head) * size + entry, mask=exists, other=0.0).to(tl.float32)
    i = tl.arange(0, ROWS)
    for first in range(0, segments, ROWS):
        place = first + i
        known = (place > 0) & (place < segments)
        place = tl.where(REVERSE, segments - 1 - place, place)
        index = (row * segments + place) * h + head
        at = passed + index[:, None] * size + entry[None, :]
        mask = (first + i < segments)[:, None] & exists[None, :]
        own = tl.load(at, mask=known[:, None] & exists[None, :], other=0.0)
        decay = exp2(tl.load(totals + index, mask=known, other=0.0))
        decays, owns = tl.associative_scan((tl.broadcast_to(decay[:, None], own.shape), own), 0, after)
        states = owns + decays * carried[None, :]
        tl.store(at, states, mask=mask)
        carried = tl.sum(tl.where((i == ROWS - 1)[:, None], states, 0.0), 0)
