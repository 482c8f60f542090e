"""SSD in chunks of Q positions, which the matrix units take at once.

b batch  l length  h heads  p head width  g groups of heads  n state width

Forward, a program takes a head through a segment of a row, chunk after chunk: within a chunk the quadratic form, whose
(Q, Q) scores stay in registers, and from chunk to chunk the state, which stays there too. Nothing but the inputs is
read and nothing but the outputs written, as long as batch and heads fill the machine. Where they do not, rows are cut
into segments that run side by side, after a kernel that finds the states which they are entered with.

Backward, the states before all chunks and the gradients of those after them are written to memory, in the signals'
dtype, by that same kernel; then all chunks are independent. A program takes one chunk through the heads of a group, so
that what B and C get from all heads is added up in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ophis.ops.library import dense
from ophis.ops.library import ssd as library
from ophis.ops.ssd import ssd, ssd_step
from ophis.ops.triton import multiprocessors, on_device_of, why_not_here
from ophis.ops.triton.partial_sums import add_up
from ophis.ops.triton.ssd.backward import of_inputs_kernel, of_outputs_kernel
from ophis.ops.triton.ssd.forward import forward_kernel, step_kernel
from ophis.ops.triton.ssd.states import pass_on_kernel, states_kernel
from ophis.ops.triton.ssd.steps import d_steps_kernel, steps_kernel


class Launch(NamedTuple):
    warps: int
    stages: int  # of loads that are on their way


class Tile(NamedTuple):
    positions: int  # Q
    columns: int  # P at most: a wider head is taken in parts
    forward: Launch
    states: Launch
    of_inputs: Launch
    of_outputs: Launch


# By bytes of an operand and n, padded to a power of two. What a program holds is mostly a state (n, P) in float32.
TILES = {
    (2, 64): Tile(64, 64, Launch(4, 2), Launch(4, 3), Launch(8, 2), Launch(4, 2)),
    (2, 128): Tile(64, 64, Launch(4, 2), Launch(4, 3), Launch(8, 2), Launch(4, 2)),
    (2, 256): Tile(64, 64, Launch(8, 2), Launch(8, 2), Launch(8, 1), Launch(8, 2)),
    (4, 64): Tile(32, 32, Launch(4, 1), Launch(4, 1), Launch(8, 1), Launch(8, 1)),
    (4, 128): Tile(32, 32, Launch(4, 1), Launch(4, 1), Launch(8, 1), Launch(8, 1)),
    (4, 256): Tile(32, 16, Launch(8, 1), Launch(8, 1), Launch(8, 1), Launch(8, 1)),
}
FORWARD_PROGRAMS, STATES_PROGRAMS = 2, 4  # for each multiprocessor, where rows are cut into segments to have so many
BACKWARD_PROGRAMS = 4  # likewise, where the heads of a group are shared out
STEP_ENTRIES, STEP_WARPS = 1024, 1  # of a state, to a program
PASS_ROWS, PASS_ENTRIES, PASS_WARPS = 16, 128, 4
STEPS_HEADS, STEPS_WARPS = 16, 4


class Plan(NamedTuple):
    """How a call is shared out."""

    tile: Tile
    sizes: dict[str, Any]  # what kernels are compiled for
    narrow: bool  # products in bfloat16
    wide: torch.dtype  # of what is added up along a chunk and subtracted again
    parts: int  # tiles of a head's width
    chunks_a_row: int
    sequences: int

    @classmethod
    def of(cls, x: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None) -> Plan:
        b, l, _, p = x.shape
        n = B.shape[-1]
        dtypes = {x.dtype, B.dtype, C.dtype}
        narrow = dtypes == {torch.bfloat16}
        # float16 has too few exponents for a state: what comes in it is multiplied in tf32, which has its precision.
        precision = "tf32"
        if torch.float32 in dtypes:
            precision = "ieee" if torch.version.hip else "tf32x3"
        N = max(16, triton.next_power_of_2(n))
        tile = TILES[2 if narrow else 4, max(64, N)]
        P = min(tile.columns, max(16, triton.next_power_of_2(p)))
        sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
        chunks = triton.cdiv(l, tile.positions) if cu_seqlens is None else l // tile.positions + sequences
        dtype = tl.bfloat16 if narrow else tl.float32
        sizes = dict(p=p, P=P, n=n, N=N, Q=tile.positions, DTYPE=dtype, PRECISION=precision)
        wide = torch.float32 if narrow else torch.float64
        return cls(tile, sizes, narrow, wide, triton.cdiv(p, P), chunks, sequences)

    def segments(self, x: Tensor, programs: int) -> tuple[int, int]:
        """Of a row, and the chunks of one."""
        tiles = x.shape[0] * x.shape[2] * self.parts
        segments = max(1, min(programs * multiprocessors(x.device) // tiles, self.chunks_a_row))
        length = triton.cdiv(self.chunks_a_row, segments)
        return triton.cdiv(self.chunks_a_row, length), length


def strides(t: Tensor | None, axes: int) -> tuple[int, ...]:
    return (0,) * axes if t is None else t.stride()


def skip_strides(D: Tensor | None) -> tuple[int, int]:
    """Along heads and their width."""
    return (0, 0) if D is None else (D.stride(0), 0 if D.ndim == 1 else D.stride(1))


def launch(how: Launch) -> dict[str, int]:
    return dict(num_warps=how.warps, STAGES=how.stages)


def of_steps(dt: Tensor, dt_softplus: bool, dt_limit: Sequence[float], plan: Plan) -> dict[str, Any]:
    """What the kernels of steps are compiled for."""
    limited = tuple(dt_limit) != (0.0, float("inf"))
    return dict(
        Q=plan.tile.positions, HEADS=STEPS_HEADS, SOFTPLUS=dt_softplus, LIMITED=limited, num_warps=STEPS_WARPS
    )  # fmt: skip


def decays_of(dt, A, dt_bias, cu_seqlens, dt_softplus, dt_limit, plan: Plan) -> tuple[Tensor, Tensor]:
    """The steps, (chunks, h, Q), and log2 of the decay since the chunk's start."""
    b, l, h = dt.shape
    step = A.new_empty(b * plan.chunks_a_row, h, plan.tile.positions)
    since = step.new_empty(step.shape, dtype=plan.wide)
    steps_kernel[(len(step) * triton.cdiv(h, STEPS_HEADS),)](
        dt, A, dt_bias, cu_seqlens, step, since,
        l, h, plan.chunks_a_row, plan.sequences, *dt_limit, *dt.stride(),
        **of_steps(dt, dt_softplus, dt_limit, plan),
    )  # fmt: skip
    return step, since


def edges(x: Tensor, n: int, sequences: int, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Memory for the states of sequences where a way ends. That of an empty sequence is where it began."""
    shape = (sequences, *x.shape[2:], n)
    if cu_seqlens is None:
        return torch.empty(shape, dtype=torch.float32, device=x.device)
    if initial is None:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    return initial.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def chunk_states(value, gate, matrix, decays, edge, cu_seqlens, far_edge, plan, programs, *, reverse=False):
    """The states that chunks are entered with, (chunks, h, n, p)."""
    b, _, h, p = value.shape
    n = matrix.shape[-1]
    segments = plan.segments(value, programs)
    entering = None
    if segments[0] > 1:
        entering = segment_states(value, gate, matrix, decays, edge, cu_seqlens, plan, segments, reverse=reverse)
    states = value.new_empty((b * plan.chunks_a_row, h, n, p), dtype=torch.bfloat16 if plan.narrow else torch.float32)
    walk(value, gate, matrix, decays, edge, cu_seqlens, entering, None, states, far_edge, plan, segments, reverse)
    return states


def segment_states(value, gate, matrix, decays, edge, cu_seqlens, plan, segments, *, reverse=False):
    """The states that segments are entered with, (b, segments, h, p, n)."""
    b, _, h, p = value.shape
    n = matrix.shape[-1]
    passed = decays[0].new_empty(b, segments[0], h, p, n)
    totals = decays[0].new_empty(b, segments[0], h)
    walk(value, gate, matrix, decays, edge, cu_seqlens, passed, totals, None, None, plan, segments, reverse)
    pass_on_kernel[(b * h * triton.cdiv(p * n, PASS_ENTRIES),)](
        passed, totals, edge if cu_seqlens is None else None, segments[0], h, p * n,
        REVERSE=reverse, ROWS=PASS_ROWS, ENTRIES=PASS_ENTRIES, num_warps=PASS_WARPS,
    )  # fmt: skip
    return passed


def walk(value, gate, matrix, decays, edge, cu_seqlens, passed, totals, states, far_edge, plan, segments, reverse):
    """See `states_kernel`."""
    b, l, h, _ = value.shape
    count = segments[0] if totals is None else segments[0] - 1
    states_kernel[(b * count * h * plan.parts,)](
        value, gate, matrix, *decays, edge, cu_seqlens, passed, totals, states, far_edge,
        l, h, h // matrix.shape[2], plan.chunks_a_row, *segments, plan.sequences,
        *value.stride(), *strides(gate, 4), *matrix.stride(),
        **plan.sizes, **launch(plan.tile.states), REVERSE=reverse,
    )  # fmt: skip


def forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit):
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if l == 1 and cu_seqlens is None:
        final = A.new_empty(b, h, p, n)
        signals = [None if t is None else t[:, 0] for t in (x, dt, B, C, z, y)]
        one_position(*signals, A, D, dt_bias, initial_state, final, dt_softplus, dt_limit)
        return y, final
    plan = Plan.of(x, B, C, cu_seqlens)
    segments = plan.segments(x, FORWARD_PROGRAMS)
    final = edges(x, n, plan.sequences, initial_state, cu_seqlens)
    with on_device_of(x):
        decays = decays_of(dt, A, dt_bias, cu_seqlens, dt_softplus, dt_limit, plan)
        entering = None
        if segments[0] > 1:
            entering = segment_states(x, None, B, decays, initial_state, cu_seqlens, plan, segments)
        forward_kernel[(b * segments[0] * h * plan.parts,)](
            x, *decays, B, C, D, z, initial_state, cu_seqlens, entering, y, final,
            l, h, h // g, plan.chunks_a_row, *segments, plan.sequences,
            *x.stride(), *B.stride(), *C.stride(), *skip_strides(D), *strides(z, 4),
            **plan.sizes, **launch(plan.tile.forward),
        )  # fmt: skip
    return y, final


def backward(dy, d_final, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit, *_):
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    A, dt_bias, initial_state, d_final = dense(A, dt_bias, initial_state, d_final)
    plan = Plan.of(x, B, C, cu_seqlens)
    chunks = b * plan.chunks_a_row
    dx, d_dt, dB, dC, dz = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C, z)
    )
    dA, d_bias = A.new_empty(h), None if dt_bias is None else A.new_empty(h)
    dD = None if D is None else A.new_empty(h, p)
    d_initial = None if initial_state is None else edges(x, n, plan.sequences, d_final, cu_seqlens)
    splits = max(1, min(BACKWARD_PROGRAMS * multiprocessors(x.device) // (chunks * g), h // g))
    partial_BC = A.new_empty(splits, 2, B.numel()) if splits > 1 else None
    sums = A.new_empty(chunks, h, plan.parts, 4, plan.tile.positions, dtype=plan.wide)
    of_chunks = A.new_empty(chunks, h, plan.parts)
    partial_A = A.new_empty(chunks, 2, h)
    partial_D = None if D is None else A.new_empty(chunks, 1, h * p)
    with on_device_of(x):
        decays = decays_of(dt, A, dt_bias, cu_seqlens, dt_softplus, dt_limit, plan)
        states = chunk_states(x, None, B, decays, initial_state, cu_seqlens, None, plan, STATES_PROGRAMS)
        flows = chunk_states(dy, z, C, decays, d_final, cu_seqlens, d_initial, plan, STATES_PROGRAMS, reverse=True)
        grid = (chunks * g * splits,)
        sizes = (l, h, g, plan.chunks_a_row, plan.sequences, splits, 2 * B.numel())
        all_strides = (
            *dy.stride(), *x.stride(), *B.stride(), *C.stride(), *skip_strides(D), *strides(z, 4)
        )  # fmt: skip
        into_B, into_C = (dB, dC) if partial_BC is None else partial_BC.unbind(1)
        within = into_C if partial_BC is not None else A.new_empty(C.shape)
        of_inputs_kernel[grid](
            dy, x, *decays, B, C, D, z, cu_seqlens, flows, dx, into_B, within, sums, partial_D,
            *sizes, *all_strides, **plan.sizes, **launch(plan.tile.of_inputs),
        )  # fmt: skip
        of_outputs_kernel[grid](
            dy, x, *decays, B, C, D, z, cu_seqlens, states, flows, dz, within, into_C, sums, of_chunks,
            *sizes, *all_strides, **plan.sizes, **launch(plan.tile.of_outputs),
        )  # fmt: skip
        d_steps_kernel[(chunks * triton.cdiv(h, STEPS_HEADS),)](
            dt, A, dt_bias, cu_seqlens, decays[0], sums, of_chunks, d_dt, partial_A,
            l, h, plan.parts, plan.chunks_a_row, plan.sequences, *dt_limit, *dt.stride(),
            **of_steps(dt, dt_softplus, dt_limit, plan),
        )  # fmt: skip
        add_up(partial_A, dA, d_bias)
        if partial_BC is not None:
            add_up(partial_BC, dB, dC)
        if D is not None:
            add_up(partial_D, dD.view(-1))
            dD = dD.sum(1) if D.ndim == 1 else dD
    return dx, d_dt, dA, dB, dC, dD, dz, d_bias, d_initial


def one_position(x, dt, B, C, z, y, A, D, dt_bias, old, new, dt_softplus, dt_limit):
    """y, and the state in `new`, which may be `old`. x, z, y are (b, h, p), dt (b, h), B and C (b, g, n)."""
    b, h, p = x.shape
    g, n = B.shape[1:]
    N = triton.next_power_of_2(n)
    P = min(triton.next_power_of_2(p), max(1, STEP_ENTRIES // N))
    limited = tuple(dt_limit) != (0.0, float("inf"))
    with on_device_of(x):
        step_kernel[(b * h * triton.cdiv(p, P),)](
            x, dt, A, B, C, D, z, dt_bias, old, y, new,
            h, h // g, *dt_limit,
            *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(), *skip_strides(D), *strides(z, 3),
            *strides(dt_bias, 1), *strides(old, 4), *new.stride(),
            p=p, P=P, n=n, N=N, SOFTPLUS=dt_softplus, LIMITED=limited, num_warps=STEP_WARPS,
        )  # fmt: skip


def step(x, dt, A, B, C, D, z, dt_bias, state, dt_softplus, dt_limit):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    one_position(x, dt, B, C, z, y, A, D, dt_bias, state, state, dt_softplus, dt_limit)
    return y


def why_not(call):
    return why_not_here(call["x"]) or library.why_not(call)


ssd.register("triton", why_not)(library.custom_op("triton", library.Kernels(forward, backward)))
ssd_step.register("triton", why_not)(library.step_op("triton", step))
