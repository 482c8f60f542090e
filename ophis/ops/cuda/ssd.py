"""SSD in CUDA C++: which kernels, in which sizes, on which memory.

b batch  l length  h heads  p head width  g groups of heads  n state width

The algorithm is told in docs/kernels.md, the kernels are in the .cu files of this folder.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ophis.ops.cuda import runtime
from ophis.ops.cuda.plans import KINDS, Launch, Plan, Scratch, Signal, addresses, empty_like, facts, signals
from ophis.ops.cuda.runtime import Parameters
from ophis.ops.library import dense, recorded
from ophis.ops.library.ssd import DIFFERENTIABLE, Kernels, custom_op
from ophis.ops.library.ssd import why_not as why_no_kernel
from ophis.ops.ssd import ssd

CHUNK, TILE = 64, 64  # positions; channels of a head
THREADS = 256
SIZES = (64, 128, 256)  # n
SLICE = 128  # states that the backward kernels take at once: outputs, and so all gradients, are sums over states
FORWARD_BLOCKS, STATES_BLOCKS = 1, 2  # on a multiprocessor: rows are cut into segments to have so many
BACKWARD_BLOCKS = 4  # likewise, where the heads of a group are shared out; these wait for each other


def why_not(call) -> str | None:
    x = call["x"]
    if not x.is_cuda:
        return f"x is on {x.device.type}, not on an NVIDIA GPU"
    return runtime.why_not_on(x.device) or why_not_these(call)


def why_not_these(call) -> str | None:
    """Tensors that the kernels are not for."""
    if reason := why_no_kernel(call):
        return reason
    x, D, n = call["x"], call["D"], call["B"].shape[-1]
    training = recorded(*(call[name] for name in DIFFERENTIABLE))
    if x.shape[1] == 1:
        return "x has length 1, and its kernels are for longer ones; Triton has one for a single position"
    for name in ("x", "B", "C"):
        t = call[name]
        if t.dtype != torch.bfloat16:
            return f"{name} is {str(t.dtype).removeprefix('torch.')}, and its kernels are for bfloat16"
        if not _in_eights(t):
            return f"{name} cannot be read by 16 bytes: its last axis has gaps, or its rows begin between two multiples"
    if x.shape[3] % TILE:
        return f"its kernels take heads by {TILE} channels, and here p={x.shape[3]}"
    if n not in SIZES:
        return f"its kernels are for n={', '.join(map(str, SIZES))}, and here n={n}"
    if call["z"] is not None:
        return "there is a gate z, which its kernels leave to the norm"
    if D is not None and D.ndim == 2 and training:
        return "D is one number a channel, and its backward pass has one a head"
    return None


@runtime.on_its_device
def forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit):
    x, B, C, initial_state = map(aligned, (x, B, C, initial_state))
    plan = forward_plan(*description(x, dt, B, C, None, D, dt_bias, cu_seqlens, dt_softplus, dt_limit))
    y, final_state = empty_like(x), edges(A, x, B, cu_seqlens, initial_state)
    _memory, parts = plan.scratch.allocate(A)
    plan.run(addresses(x, B, C, dt, A, dt_bias, D, initial_state, cu_seqlens, y, final_state), parts)
    return y, final_state


@runtime.on_its_device
def backward(
    dy, d_final, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit,
    d_x=None, d_B=None, d_C=None,
):  # fmt: skip
    dy = dy if _in_eights(dy) else dy.contiguous()
    x, B, C, dy = map(aligned, (x, B, C, dy))
    A, dt_bias = dense(A, dt_bias)
    dx, dB, dC = (empty_like(t) if room is None else room for t, room in ((x, d_x), (B, d_B), (C, d_C)))
    d_dt, dA, d_bias, dD = (None if t is None else empty_like(t) for t in (dt, A, dt_bias, D))
    of_gradients = facts(dx, dB, dC)
    plans = backward_plan(of_gradients, *description(x, dt, B, C, dy, D, dt_bias, cu_seqlens, dt_softplus, dt_limit))
    _memory, parts = plans[0].scratch.allocate(A)
    found = []
    for plan, (b, c, db, dc, initial, d_end) in zip(plans, slices(B, C, dB, dC, initial_state, d_final), strict=True):
        initial, d_end = map(aligned, dense(initial, d_end))
        d_initial = None if initial is None else edges(A, x, b, cu_seqlens, d_end)
        given = addresses(x, b, c, dt, A, dt_bias, D, initial, cu_seqlens)
        plan.run([*given, 0, 0, *addresses(dy, d_end, dx, d_dt, dA, d_bias, dD, db, dc, d_initial)], parts)
        found.append(d_initial)
    d_initial = found[0] if len(found) == 1 or found[0] is None else torch.cat(found, -1)
    return dx, d_dt, dA, dB, dC, dD, None, d_bias, d_initial


def edges(A: Tensor, x: Tensor, B: Tensor, cu_seqlens: Tensor | None, begun: Tensor | None) -> Tensor:
    """Memory for the states where sequences end, or begin. That of an empty sequence is where it began."""
    if cu_seqlens is None:
        return A.new_empty(x.shape[0], *x.shape[2:], B.shape[-1])
    if begun is None:
        return A.new_zeros(len(cu_seqlens) - 1, *x.shape[2:], B.shape[-1])
    return begun.clone(memory_format=torch.contiguous_format)


def slices(B: Tensor, *more: Tensor | None) -> list[tuple[Any, ...]]:
    """The states that the backward kernels take at once, and then the next ones."""
    n, tensors = B.shape[-1], (B, *more)
    if n <= SLICE:
        return [tensors]
    return [tuple(None if t is None else t[..., i : i + SLICE] for t in tensors) for i in range(0, n, SLICE)]


# What calls have in common


# What `Params` of ssd.cuh begins with: tensors, some of which the forward pass needs, and scratch memory.
TENSORS, OF_FORWARD = 21, 11
PARTS = (
    *("decays", "passed", "totals", "states", "flows", "partial_B", "partial_C"),
    *("between", "sums", "of_chunks", "partial_A"),
)


class Segments(NamedTuple):
    """Of a row."""

    length: int  # in chunks
    count: int
    taken: int  # by a block, one after the other

    @property
    def blocks(self) -> int:
        return -(-self.count // self.taken)

    @property
    def ends(self) -> int:
        """How many come before the last block's: what they leave, others are entered with."""
        return (self.blocks - 1) * self.taken


class Described(NamedTuple):
    """A call, but for its numbers: what its kernels and most of their parameters follow from."""

    x: Signal
    dt: Signal
    B: Signal
    C: Signal
    dy: Signal | None
    shape: tuple[int, int, int, int]  # b, l, h, p
    groups: int
    n: int
    skip: tuple[int, ...] | None  # D's strides
    has_bias: bool
    softplus: bool
    limit: tuple[float, ...]
    sequences: int  # 0: not packed
    device: torch.device

    @property
    def chunks(self) -> int:
        """Of a row."""
        length = self.shape[1]
        return length // CHUNK + self.sequences if self.sequences else -(-length // CHUNK)

    @property
    def parts(self) -> int:
        """Tiles of a head."""
        return self.shape[3] // TILE

    @property
    def pairs(self) -> int:
        """Of tiles, in all groups and rows: two take B and C together."""
        rows, _, heads, _ = self.shape
        return rows * self.groups * -(-heads // self.groups * self.parts // 2)

    @property
    def of_chunks(self) -> int:
        """Chunks of heads."""
        return self.shape[0] * self.chunks * self.shape[2]

    def segments(self, blocks: int, finer: int = 1) -> Segments:
        """So that there are so many blocks for each multiprocessor. Ends can be those of `finer` segments."""
        processors = runtime.multiprocessors(self.device)
        # Not cut where one block each is nearly enough, though two would hide each other's waiting: ends take longer
        # than that saves (8 x 4096, n = 128, 128 pairs for 132 multiprocessors: 0.80 ms in all for 0.87).
        wanted = 1 if self.pairs >= 0.9 * processors else blocks * processors // self.pairs
        length = -(-self.chunks // max(1, min(wanted, self.chunks)))
        if length == self.chunks or length < 4 * finer:  # of a few chunks, a part of one counts too much
            finer = 1
        length = -(-length // finer)
        return Segments(length, -(-self.chunks // length), finer)

    def macros(self, n: int) -> runtime.Macros:
        return ("N", n), ("PARTS", self.parts), ("PACKED", int(self.sequences > 0))

    def kernel(self, name: str, n: int) -> runtime.Kernel:
        """One for n states."""
        return _kernel(name, self.macros(n), self.device)

    def kernel_of_steps(self, name: str, n: int) -> runtime.Kernel:
        limited = self.limit != (0.0, float("inf"))
        options = dict(DT_KIND=KINDS[self.dt.dtype], HAS_BIAS=self.has_bias, SOFTPLUS=self.softplus, LIMITED=limited)
        macros = tuple((key, int(value)) for key, value in options.items())
        return _kernel(name, (*self.macros(n), *macros), self.device)

    def steps(self, name: str, n: int) -> Launch:
        """A warp for each chunk of a head."""
        kernel = self.kernel_of_steps(name, n)
        return kernel, -(-self.of_chunks // (kernel.threads // 32))

    def walk(self, name: str, ends: str, passing: str, n: int, segments: Segments) -> list[Launch]:
        """Segments side by side, once what comes into each is found: what each adds by itself, and then the sum of what
        is passed on, a thread for four states."""
        walk = self.kernel(name, n), self.pairs * segments.blocks
        if not segments.ends:
            return [walk]
        rows, _, heads, width = self.shape
        pass_on = self.kernel(passing, n)
        blocks = -(-rows * heads * width * n // (4 * pass_on.threads))
        return [(self.kernel(ends, n), self.pairs * segments.ends), (pass_on, blocks), walk]

    def scratch(self, n: int, segments: Segments, **more: int) -> Scratch:
        """Steps and decays, what comes into each segment, and what else has so many numbers."""
        rows, _, heads, width = self.shape
        entered = rows * segments.count * heads if segments.ends else 0
        sizes = dict(decays=self.of_chunks * 4 * CHUNK, passed=entered * width * n, totals=entered, **more)
        return Scratch(*(sizes.get(name, 0) for name in PARTS))

    def parameters(
        self,
        tensors: int,
        segments: Segments,
        gradients: Sequence[Signal | None] = (None,) * 3,
        splits: int = 1,
        of_slice: int = 0,
        slices: int = 1,
    ) -> Parameters:
        """`Params` of ssd.cuh."""
        signals = (self.x, self.B, self.C, self.dy, self.dt, *gradients)
        strides = [(0, 0, 0) if t is None else t.strides[:3] for t in signals]
        skip = (0, 0) if self.skip is None else (*self.skip, 0)[:2]
        sizes = (*self.shape, self.groups, self.sequences or self.shape[0], self.chunks)
        (limit,) = struct.unpack("q", struct.pack("2f", *self.limit))
        cut = (segments.length, segments.count, splits, segments.taken, segments.ends)
        numbers = [*itertools.chain(*strides), *skip, *sizes, *cut, of_slice, slices, limit]
        return Parameters(numbers, tensors, left_out=TENSORS - tensors, parts=len(PARTS))


def description(x, dt, B, C, dy, D, dt_bias, cu_seqlens, dt_softplus, dt_limit) -> tuple[Any, ...]:
    """What makes a `Described`."""
    sequences = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    options = (None if D is None else D.stride(), dt_bias is not None, dt_softplus, tuple(dt_limit))
    return facts(x, dt, B, C, dy), x.shape, *B.shape[2:], *options, sequences, x.device


@functools.lru_cache(maxsize=1024)
def forward_plan(of_tensors: tuple[Any, ...], *more: Any) -> Plan:
    call = Described(*signals(of_tensors), *more)
    n = call.n
    # Ends are found by as many more blocks as fit; of the widest states by no more.
    segments = call.segments(FORWARD_BLOCKS, finer=STATES_BLOCKS // FORWARD_BLOCKS if n <= SLICE else 1)
    launches = [call.steps("steps", n), *call.walk("outputs", "ends", "pass_states", n, segments)]
    return Plan(call.parameters(OF_FORWARD, segments), tuple(launches), call.scratch(n, segments))


@functools.lru_cache(maxsize=1024)
def backward_plan(of_gradients: tuple[Any, ...], of_tensors: tuple[Any, ...], *more: Any) -> tuple[Plan, ...]:
    """One for each slice of states, on the same memory. `of_gradients`: of x, B and C."""
    call = Described(*signals(of_tensors), *more)
    rows, length, heads, width = call.shape
    groups, n = call.groups, call.n
    each = min(n, SLICE)
    count = n // each
    of_groups = rows * call.chunks * groups
    splits = max(1, min(BACKWARD_BLOCKS * runtime.multiprocessors(call.device) // of_groups, heads // groups))
    segments = call.segments(STATES_BLOCKS)
    entries = rows * length * groups * each
    states = call.of_chunks * width * each // 2  # of bfloat16, as `between`
    partial = splits * entries if splits > 1 else 0
    scratch = call.scratch(
        each,
        segments,
        states=states,
        flows=states,
        partial_B=partial,
        partial_C=partial,
        between=of_groups * splits * CHUNK * CHUNK // 2 if count > 1 else 0,
        sums=count * call.of_chunks * call.parts * 4 * CHUNK,
        of_chunks=count * call.of_chunks * call.parts * 2,
        partial_A=call.of_chunks * 2,
    )
    add_chunks = call.kernel_of_steps("add_chunks", each)
    plans = []
    for i in range(count):
        launches = [call.steps("steps", each)] if i == 0 else []
        launches += call.walk("states", "ends", "pass_states", each, segments)
        launches += call.walk("flows", "flow_ends", "pass_flows", each, segments)
        launches += [(call.kernel("backward_later" if i else "backward", each), of_groups * splits)]
        if splits > 1:
            kernel = call.kernel_of_steps("add_splits", each)
            launches += [(kernel, -(-entries // kernel.threads))]  # a thread has two of dB or of dC
        if i == count - 1:
            launches += [call.steps("d_steps", each), (add_chunks, -(-3 * heads * 32 // add_chunks.threads))]
        parameters = call.parameters(TENSORS, segments, signals(of_gradients), splits, i, count)
        plans.append(Plan(parameters, tuple(launches), scratch))
    return tuple(plans)


def _in_eights(t: Tensor) -> bool:
    """Whether eight neighbours on the last axis can be read at once, wherever eight begin."""
    *strides, last = t.stride()
    return last == 1 and not any(stride % 8 for stride, size in zip(strides, t.shape, strict=False) if size > 1)


def aligned(t: Tensor | None) -> Any:
    """A copy of a tensor that does not begin at a multiple of 16 bytes. A choice of backends cannot ask for that: where
    it is traced, tensors have no place yet. Slices of projections begin where eight numbers do, if sizes are even."""
    return t if t is None or t.data_ptr() % 16 == 0 else t.clone()


@functools.cache
def _kernel(name: str, macros: runtime.Macros, device: torch.device) -> runtime.Kernel:
    of_steps = name in ("steps", "d_steps", "add_chunks", "add_splits")
    file = "ssd_steps.cu" if of_steps else "ssd_backward.cu" if name.startswith("backward") else "ssd_forward.cu"
    module = runtime.load(file, macros, device)
    n = dict(macros)["N"]
    signal, matrix, decays = 2 * CHUNK * TILE, 2 * CHUNK * n, 4 * 4 * CHUNK
    shared = 0  # bytes of `Shared`
    if name in ("steps", "d_steps"):
        warps, of_dt = THREADS // 32, 4 if dict(macros)["DT_KIND"] == 0 else 2
        shared = warps * ((CHUNK + 2) * of_dt + 8 + 4)
    elif name == "outputs":
        stages = 3 if n <= 128 else 2
        shared = stages * (2 * matrix + 2 * signal + 2 * decays) + 4 * signal
    elif name.startswith("backward"):
        scores, sums = 16 * CHUNK // 8 * 128, 2048
        shared = 2 * (2 * signal + 2 * matrix + decays) + 2 * matrix + signal + scores + sums
    elif name in ("states", "flows"):
        shared = 2 * (matrix + 1024 + 2 * signal + 2 * decays) + 2 * matrix + 2 * 1024
    elif name in ("ends", "flow_ends"):
        shared = 3 * (matrix + 1024 + 2 * signal + 2 * decays) + 4 * 1024
    threads = THREADS + 128 if name == "outputs" else THREADS  # those that copy
    return runtime.Kernel(module, name, threads, shared)


ssd.register("cuda", why_not=why_not)(custom_op("cuda", Kernels(forward, backward)))
