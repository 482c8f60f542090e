"""Rows of positions in chunks that end where sequences end."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence_of(chunk, cu_seqlens, run, sequences):
    """The packed sequence of a chunk: of those that begin there or before, the last.

    Sequence i has the chunks from cu_seqlens[i] // run + i on. That is at least as many as it needs, and a chunk too
    many begins past its end; so nobody has to add up the lengths first.
    """
    low = sequences * 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // run + middle <= chunk:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def bounds(chunk, sequence, cu_seqlens, run):
    """Where a packed sequence begins and ends, and where this chunk of it begins."""
    start = tl.load(cu_seqlens + sequence)
    return start, tl.load(cu_seqlens + sequence + 1), start + (chunk - start // run - sequence) * run


@triton.jit
def place(chunk, cu_seqlens, l, run, of_a_row, sequences):
    """A chunk's batch row, its sequence, where in the row that begins and ends, and where the chunk begins."""
    if cu_seqlens is None:
        row = chunk // of_a_row
        return row, row, 0, l, (chunk - row * of_a_row) * run
    else:
        sequence = sequence_of(chunk, cu_seqlens, run, sequences)
        start, end, first = bounds(chunk, sequence, cu_seqlens, run)
        return 0, sequence, start, end, first
