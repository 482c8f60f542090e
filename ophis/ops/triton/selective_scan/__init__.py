"""The selective scan as a loop over time with the states in registers.

b batch  l length  d channels  n state size  g groups of channels

A program takes BD channels of a group through a segment of positions. Its states are a tile [N, BD], channels along
the threads of a warp: sums over n stay within a thread, or nearly, and what is done once a channel (softplus, the
gate) is done once. Signals are loaded AHEAD positions before they are needed.

Where batch and channels are too few to fill the machine, the length is cut into segments that run side by side. The
recurrence is linear: a first kernel finds the state that each segment would end with if it began with zeros, and the
sum of its step sizes; exp(A sum) then is what it leaves of the state before it. The same holds backwards in time for
the gradients of states. A packed row is one run like any other, in which the state is replaced where a sequence starts.

The forward pass keeps a state for every CHUNK positions. The backward pass goes through the chunks in reverse: from
the kept state it finds those at every AHEAD-th position, in scratch memory that stays in the cache, and from one of
these the AHEAD states that it holds in registers, last to first.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from ophis.ops.library import dense
from ophis.ops.library import selective_scan as library
from ophis.ops.selective_scan import selective_scan, selective_scan_step
from ophis.ops.triton import multiprocessors, on_device_of, why_not_here
from ophis.ops.triton.partial_sums import add_up
from ophis.ops.triton.selective_scan.backward import backward_ends_kernel, backward_kernel
from ophis.ops.triton.selective_scan.forward import forward_kernel, step_kernel
from ophis.ops.triton.selective_scan.pieces import LANES


class Tile(NamedTuple):
    channels: int  # BD
    ahead: int  # positions
    warps: int = 1  # one does without barriers, of which a step would have several
    repeats: int = 1  # tiles that a program of the backward pass takes one after the other, adding up dB and dC


# By n, padded to a power of two. Forward 1024 states a warp, 32 a thread; backward 512, where `ahead` of each are held
# beside A, its gradient and the flow, which takes all 255 registers. `channels * repeats` is a matter of memory:
# partial sums of dB and dC take 8 n bytes over that a position and channel.
FORWARD = {16: Tile(64, 4), 32: Tile(32, 4), 64: Tile(16, 4), 128: Tile(8, 4), 256: Tile(8, 2, warps=2)}
BACKWARD = {
    16: Tile(32, 2, repeats=2),
    32: Tile(16, 2, repeats=8),
    64: Tile(8, 2, repeats=16),
    128: Tile(8, 2, warps=2, repeats=16),
    256: Tile(8, 2, warps=4, repeats=16),
}
STEP = {16: Tile(32, 1), 32: Tile(16, 1), 64: Tile(8, 1), 128: Tile(4, 1), 256: Tile(2, 1)}
# Positions from one kept state to the next: 4 n / chunk bytes a position and channel, 2 at n=16.
CHUNK = {16: 32, 32: 32, 64: 32, 128: 64, 256: 64}
# Segments make up to so many programs for each multiprocessor: with its registers it runs 8 of the backward pass at a
# time. The first kernel does half of the work of the forward pass again and a fifth of the backward pass's: fewer
# segments than LEAST do not pay.
FORWARD_PROGRAMS, FORWARD_LEAST = 8, 3
BACKWARD_PROGRAMS, BACKWARD_LEAST = 8, 2
MOST_SEGMENTS = 64  # every segment goes through the ends of all before it


def tile_of(table: dict[int, Tile], n: int) -> tuple[int, Tile]:
    """n padded to a power of two, and the tile for it."""
    padded = triton.next_power_of_2(n)
    return padded, table[max(padded, 16)]


def chunk_of(n: int) -> int:
    return CHUNK[max(triton.next_power_of_2(n), 16)]


class Grid(NamedTuple):
    """How b rows of l positions, d channels in g groups are shared out."""

    tiles_a_row: int
    tiles_a_group: int
    segments: int
    segment_length: int

    @classmethod
    def of(cls, x: Tensor, groups: int, channels: int, chunk: int, programs: int, least: int) -> Grid:
        b, l, d = x.shape
        tiles = triton.cdiv(d // groups, channels)
        chunks = triton.cdiv(l, chunk)
        segments = min(programs * multiprocessors(x.device) // (b * groups * tiles), chunks, MOST_SEGMENTS)
        segments = segments if segments >= least else 1
        length = triton.cdiv(chunks, segments)
        return cls(groups * tiles, tiles, triton.cdiv(chunks, length), length * chunk)


def strides(t: Tensor | None, axes: int) -> tuple[int, ...]:
    return (0,) * axes if t is None else t.stride()


def state_shape(A: Tensor) -> tuple[int, int, int]:
    """See `blocked`."""
    d, n = A.shape
    return -(-d // LANES.value), n, LANES.value


def kept_shape(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    n = A.shape[1]
    return x.shape[0], -(-x.shape[1] // chunk_of(n)), *state_shape(A)


def ends_and_steps(A: Tensor, b: int, grid: Grid, instead: Tensor) -> tuple[Tensor, Tensor]:
    """What passes between segments. `instead` is not read: without it a row in one part would need a kernel of its own,
    and seconds to compile that."""
    if grid.segments == 1:
        return instead, instead
    return A.new_empty(b, grid.segments - 1, *state_shape(A)), A.new_empty(b, grid.segments - 1, A.shape[0])


def forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, keep):
    b, l, d = x.shape
    n = A.shape[1]
    if l == 1 and cu_seqlens is None and not keep:
        final = A.new_empty(b, d, n)
        return one_position(x, dt, A, B, C, D, z, dt_bias, initial_state, final, dt_softplus), final, A.new_empty(0)
    padded, tile = tile_of(FORWARD, n)
    chunk = chunk_of(n)
    grid = Grid.of(x, B.shape[2], tile.channels, chunk, FORWARD_PROGRAMS, FORWARD_LEAST)
    sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
    y = x.new_empty(x.shape)
    kept = A.new_empty(kept_shape(x, A, cu_seqlens) if keep else 0)
    if cu_seqlens is None:
        final = A.new_empty(b, d, n)
    elif initial_state is None:  # an empty sequence ends as it began
        final = A.new_zeros(sequences, d, n)
    else:
        final = initial_state.clone()
    ends, steps = ends_and_steps(A, b, grid, instead=final)
    sizes = (l, d, *grid, sequences, 0)
    all_strides = (*x.stride(), *dt.stride(), *B.stride(), *C.stride(), *strides(z, 3))
    options = dict(
        n=n, N=padded, BD=tile.channels, AHEAD=tile.ahead, CHUNK=chunk, SOFTPLUS=dt_softplus, num_warps=tile.warps
    )
    with on_device_of(x):
        if grid.segments > 1:
            forward_kernel[(b * (grid.segments - 1) * grid.tiles_a_row,)](
                x, dt, A, B, None, None, None, dt_bias, initial_state, cu_seqlens, None, None, None, ends, steps,
                *sizes, *all_strides, ENDS=True, **options,
            )  # fmt: skip
        forward_kernel[(b * grid.segments * grid.tiles_a_row,)](
            x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, y, final, kept if keep else None, ends, steps,
            *sizes, *all_strides, ENDS=False, **options,
        )  # fmt: skip
    return y, final, kept


def backward(dy, d_final, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, kept, *_):
    b, l, d = x.shape
    g, n = B.shape[2:]
    A, D, dt_bias, initial_state, d_final = dense(A, D, dt_bias, initial_state, d_final)
    padded, tile = tile_of(BACKWARD, n)
    chunk = chunk_of(n)
    grid = Grid.of(x, g, tile.channels * tile.repeats, chunk, BACKWARD_PROGRAMS, BACKWARD_LEAST)
    sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
    programs = b * grid.segments * grid.tiles_a_row
    dx, d_dt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dz = None if z is None else z.new_empty(z.shape)
    dB, dC = B.new_empty(B.shape), C.new_empty(C.shape)
    dA = A.new_empty(A.shape)
    dD, d_bias = (None if t is None else A.new_empty(d) for t in (D, dt_bias))
    d_initial = None
    if initial_state is not None:
        if cu_seqlens is None:
            d_initial = A.new_empty(b, d, n)
        else:  # an empty sequence hands on what it is given
            d_initial = A.new_zeros(sequences, d, n) if d_final is None else d_final.clone()
    partial_BC = A.new_empty(grid.tiles_a_group, 2, B.numel())
    partial_A, partial_bias = A.new_empty(b * grid.segments, n + 1, d), A.new_empty(b * grid.segments, 1, d)
    scratch = A.new_empty(programs * (chunk // tile.ahead) * padded * tile.channels)
    options = dict(n=n, N=padded, BD=tile.channels, AHEAD=tile.ahead, SOFTPLUS=dt_softplus, num_warps=tile.warps)
    ends, steps = ends_and_steps(A, b, grid, instead=kept)
    with on_device_of(x):
        if grid.segments > 1:
            tiles = triton.cdiv(d // g, tile.channels)
            backward_ends_kernel[(b * (grid.segments - 1) * g * tiles,)](
                dy, d_final, dt, A, C, z, dt_bias, cu_seqlens, ends, steps,
                l, d, g * tiles, tiles, grid.segments, grid.segment_length, sequences, 0,
                *dy.stride(), *dt.stride(), *C.stride(), *strides(z, 3), **options,
            )  # fmt: skip
        backward_kernel[(programs,)](
            dy, d_final, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, kept, ends, steps, scratch,
            dx, d_dt, dz, d_initial, partial_BC, partial_A, partial_bias,
            b, l, d, *grid, sequences, 0,
            *dy.stride(), *x.stride(), *dt.stride(), *B.stride(), *C.stride(), *strides(z, 3),
            REPEATS=tile.repeats, CHUNK=chunk, **options,
        )  # fmt: skip
        add_up(partial_BC, dB, dC)
        add_up(partial_A, dA, dD)
        if d_bias is not None:
            add_up(partial_bias, d_bias)
    return dx, d_dt, dA, dB, dC, dD, dz, d_bias, d_initial


def one_position(x, dt, A, B, C, D, z, dt_bias, old, new, dt_softplus):
    """y, and the state in `new`, which may be `old`. Signals are (b, d) or (b, 1, d), B and C (b, g, n) or likewise."""
    b, d = x.shape[0], x.shape[-1]
    g, n = B.shape[-2:]
    padded, tile = tile_of(STEP, n)
    tiles = triton.cdiv(d // g, tile.channels)
    y = x.new_empty(x.shape)
    with on_device_of(x):
        step_kernel[(b * g * tiles,)](
            x, dt, A, B, C, D, z, dt_bias, old, y, new,
            d, g * tiles, tiles,
            *ends_of(x), *ends_of(dt), *A.stride(), B.stride(0), *B.stride()[-2:], C.stride(0), *C.stride()[-2:],
            *strides(D, 1), *ends_of(z), *strides(dt_bias, 1), *strides(old, 3), *new.stride(),
            n=n, N=padded, BD=tile.channels, SOFTPLUS=dt_softplus, num_warps=tile.warps,
        )  # fmt: skip
    return y


def ends_of(t: Tensor | None) -> tuple[int, int]:
    """Strides along batch and channels."""
    return (0, 0) if t is None else (t.stride(0), t.stride(-1))


def why_not(call):
    return why_not_here(call["x"]) or library.why_not(call)


selective_scan.register("triton", why_not)(library.custom_op("triton", library.Kernels(forward, backward, kept_shape)))
selective_scan_step.register("triton", lambda call: why_not_here(call["x"]) or library.why_not_step(call))(
    library.step_op("triton", one_position)
)
