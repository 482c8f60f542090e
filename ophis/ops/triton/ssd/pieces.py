"""What the kernels share.

p head width, P of it in a tile  n state width, N the same padded to a power of two  Q positions of a chunk (t, s two)
"""

from __future__ import annotations

import triton
import triton.language as tl

from ophis.ops.triton.elementary import exp2


@triton.jit
def place(h, segments, chunks_a_row, segment_length, skipped, p: tl.constexpr, P: tl.constexpr):
    """This program's row, head, tile of the head's width, segment, and the segment's first chunk and its end.

    Programs are for `segments` of a row's segments, from the one numbered `skipped` on.
    """
    program = tl.program_id(0)
    tiles = h * ((p + P - 1) // P)
    tile = program % tiles
    segment = program // tiles % segments + skipped
    row = program // tiles // segments
    first = segment * segment_length
    return (
        row,
        tile // (tiles // h),
        tile % (tiles // h),
        segment,
        first,
        tl.minimum(first + segment_length, chunks_a_row),
    )


@triton.jit
def rows(pointer, start, end, stride, column, column_stride, exists, Q: tl.constexpr):
    """(Q, columns) of the positions from `start` on, 0 from `end` on. Offsets have 64 bits."""
    t = start + tl.arange(0, Q)
    at = t.to(tl.int64)[:, None] * stride + column.to(tl.int64)[None, :] * column_stride
    return tl.load(pointer + at, mask=(t < end)[:, None] & exists[None, :], other=0.0)


@triton.jit
def steps_of(step, since, index, Q: tl.constexpr):
    """Of a chunk and head: the steps, and log2 of the decay since the chunk's start, up to each and up to the last."""
    at = tl.cast(index, tl.int64) * Q + tl.arange(0, Q)
    return tl.load(step + at), tl.load(since + at), tl.load(since + tl.cast(index, tl.int64) * Q + Q - 1)


@triton.jit
def decays(since, Q: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(Q, Q): what is left at t of s, 0 where s is after t. Rows are t and columns s, or the other way round."""
    i = tl.arange(0, Q)
    if TRANSPOSED:
        log = since[None, :] - since[:, None]
        ordered = i[:, None] <= i[None, :]
    else:
        log = since[:, None] - since[None, :]
        ordered = i[:, None] >= i[None, :]
    return exp2(tl.where(ordered, log.to(tl.float32), float("-inf")))


@triton.jit
def state_at(states, index, h, head, column, state, p: tl.constexpr, n: tl.constexpr):
    """Pointers (N, P) into states (.., h, p, n)."""
    at = (tl.cast(index, tl.int64) * h + head) * p
    return states + (at + column[None, :]) * n + state[:, None]


@triton.jit
def state_within(states, chunk, h, head, column, state, p: tl.constexpr, n: tl.constexpr):
    """Pointers (N, P) into the states of chunks (.., h, n, p), laid out as the matrix units hand them over."""
    at = (tl.cast(chunk, tl.int64) * h + head) * n
    return states + (at + state[:, None]) * p + column[None, :]


@triton.jit
def read_state(states, index, h, head, column, state, mask, p: tl.constexpr, n: tl.constexpr):
    """(N, P) in float32, or zeros."""
    if states is None:
        return tl.zeros(mask.shape, tl.float32)
    else:
        return tl.load(state_at(states, index, h, head, column, state, p, n), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def follow(sequence, chunk, cu_seqlens, Q: tl.constexpr, REVERSE: tl.constexpr):
    """The packed sequence of a chunk, from that of the chunk before it on the way."""
    if REVERSE:
        while tl.load(cu_seqlens + sequence) // Q + sequence > chunk:
            sequence -= 1
    else:
        while tl.load(cu_seqlens + sequence + 1) // Q + sequence + 1 <= chunk:
            sequence += 1
    return sequence
