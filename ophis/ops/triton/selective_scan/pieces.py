"""What the kernels share.   d channels, BD of them in a tile  n state size, N the same padded to a power of two"""

from __future__ import annotations

import triton
import triton.language as tl

from ophis.ops.triton.elementary import exp2, softplus

LN_2 = tl.constexpr(0.6931471805599453)
LANES = tl.constexpr(32)  # see `blocked`


@triton.jit
def step_size(raw, valid, SOFTPLUS: tl.constexpr):
    """The step of a raw dt to which the bias was added, 0 where not valid."""
    step = softplus(raw) if SOFTPLUS else raw
    return tl.where(valid, step, 0.0)


@triton.jit
def place(tiles_a_row, tiles_a_group, segments, segment_length):
    """This program's row, group, tile within the group, segment, and the segment's first position."""
    program = tl.program_id(0)
    tile = program % tiles_a_row
    segment = program // tiles_a_row % segments
    row = tl.cast(program // tiles_a_row // segments, tl.int64)
    group = tl.cast(tile // tiles_a_group, tl.int64)
    return row, group, tile % tiles_a_group, segment, segment * segment_length


@triton.jit
def channels_of(tile, group, d, groups, BD: tl.constexpr):
    """The channels of a tile, and which of them there are: none is of two groups."""
    within = tl.cast(tile * BD + tl.arange(0, BD), tl.int64)
    return group * (d // groups) + within, within < d // groups


@triton.jit
def before(t, end, zeros):
    """Whether t < end, as a mask of a block of zeros' shape: the interpreter turns masks of scalars into integers."""
    return zeros + t < end


@triton.jit
def read(pointers, t, stride, mask):
    """The row at position t as it lies in memory, with an offset of 64 bits."""
    return tl.load(pointers + tl.cast(t, tl.int64) * stride, mask=mask, other=0.0)


@triton.jit
def rows(pointers, first, end, stride, zeros, inside, COUNT: tl.constexpr):
    """COUNT rows from position `first` on, or from 0 where that is negative; none of no tensor."""
    found = ()
    if pointers is not None:
        for u in tl.static_range(COUNT):
            t = tl.maximum(first, 0) + u
            found = found + (read(pointers, t, stride, inside & before(t, end, zeros)),)
    return found


@triton.jit
def matrix_row(pointers, t, end, stride, state, n: tl.constexpr):
    """B or C at position t, or at 0 where that is negative."""
    t = tl.maximum(t, 0)
    return read(pointers, t, stride, (state < n) & before(t, end, state * 0))


@triton.jit
def parameter(pointer, channel, inside):
    """One number a channel, 0 where there is none."""
    if pointer is None:
        return tl.zeros(channel.shape, tl.float32)
    else:
        return tl.load(pointer + channel, mask=inside, other=0.0)


@triton.jit
def pointers(states, of_channel, of_state, nought, BD: tl.constexpr):
    """Pointers (N, BD) into states, which neighbouring threads are to read at neighbouring channels, one channel each.

    Triton lays a tile out as it is loaded and stored: along the axis that is contiguous in memory, and with as many
    neighbours to a thread as are aligned. It is told that channels are contiguous, be they or not, and `nought`, which
    is 0 but might be anything, hides that they are aligned. Then sums over n stay within a thread.
    """
    return states + tl.max_contiguous(of_channel + nought, BD)[None, :] + of_state[:, None]


@triton.jit
def scattered(state):
    """The same numbers, but Triton does not see that they are consecutive."""
    return state * 3 - state * 2


@triton.jit
def plain(states, row, d, channel, state, nought, n: tl.constexpr, BD: tl.constexpr):
    """Pointers into states (.., d, n)."""
    return pointers(states, (tl.cast(row, tl.int64) * d + channel) * n, scattered(state), nought, BD)


@triton.jit
def read_state(states, row, d, channel, state, mask, nought, n: tl.constexpr, BD: tl.constexpr):
    """(N, BD) from states (.., d, n), or zeros."""
    if states is None:
        return tl.zeros(mask.shape, tl.float32)
    else:
        return tl.load(plain(states, row, d, channel, state, nought, n, BD), mask=mask, other=0.0)


@triton.jit
def blocked(states, index, d, channel, state, nought, n: tl.constexpr, BD: tl.constexpr):
    """Pointers into states (.., d / LANES, n, LANES), which the kernels keep for themselves.

    The channels of a warp are neighbours, and the places of a thread are constants apart: their 64-bit offsets need no
    registers, where those of (n, d) would need as many as the state itself.
    """
    block = tl.cast(index, tl.int64) * tl.cdiv(d, LANES) + channel // LANES
    return pointers(states, block * (n * LANES) + channel % LANES, state * LANES, nought, BD)


@triton.jit
def pass_on(
    h, A, ends, steps, index, d, channel, state, mask, inside, nought, n: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """A segment's effect on the state, or the gradient, that came to it. A sum of infinity lets nothing through."""
    total = tl.load(steps + index * d + channel, mask=inside, other=0.0)[None, :]
    own = tl.load(blocked(ends, index, d, channel, state, nought, n, BD), mask=mask, other=0.0)
    cut = total == float("inf")
    return tl.where(cut, 0.0, exp2(A * tl.where(cut, 0.0, total))) * h + own


@triton.jit
def sequence_at(cu_seqlens, t, sequences):
    """The sequence that position t is in: the last one that starts there or before."""
    low = sequences * 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) <= t:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def sequence_and_start(cu_seqlens, t, sequences):
    sequence = sequence_at(cu_seqlens, t, sequences)
    return sequence, tl.load(cu_seqlens + sequence)


@triton.jit
def sequence_and_end(cu_seqlens, t, sequences):
    sequence = sequence_at(cu_seqlens, t, sequences)
    return sequence, tl.load(cu_seqlens + sequence + 1)
