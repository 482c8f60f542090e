"""The selective scan in CUDA C++: which kernels, in which sizes, on which memory.

b batch  l length  d channels  n state size  g groups of channels

The algorithm is told in docs/kernels.md, the kernels are in the .cu files of this folder. With its plan looked up a
call takes Python some 20 us, without 100.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ophis.ops.cuda import runtime
from ophis.ops.cuda.plans import KINDS, Launch, Plan, Scratch, Signal, addresses, empty_like, facts, signals
from ophis.ops.cuda.runtime import Parameters
from ophis.ops.library import dense
from ophis.ops.library.selective_scan import Kernels, custom_op
from ophis.ops.library.selective_scan import why_not as why_no_kernel
from ophis.ops.selective_scan import selective_scan

KEEP_EVERY = 32  # positions from one kept state to the next, as in selective_scan.cuh
FURTHEST = 2**24  # numbers between neighbouring positions: the kernels take up to 64 of them with offsets of 32 bits


class Shape(NamedTuple):
    """How a block of the forward kernel, and of the carry's, is laid out: the macros of selective_scan_forward.cu."""

    lanes: int  # keepers that share two channels
    states: int  # of a channel in a keeper
    channels: int  # of a block
    preparers: int
    steps: int  # positions prepared at once
    unroll: int  # positions that the compiler may schedule together
    blocks: int  # that fit on a multiprocessor; registers are given out accordingly

    @property
    def threads(self) -> int:
        return self.channels // 2 * self.lanes + self.preparers

    @property
    def shared(self) -> int:
        """Bytes of `Shared`."""
        vectors = max(1, 2 * self.states // 4)
        chunk = self.steps * (2 * self.channels + 4 * vectors * self.lanes + 1) + 4
        return 4 * 2 * (chunk + self.steps * self.lanes // 2 * self.channels // 2 * 4)

    @property
    def macros(self) -> runtime.Macros:
        names = ("LANES", "S", "CHANNELS", "PREPARERS", "STEPS", "UNROLL", "BLOCKS")
        return tuple(zip(names, self, strict=True))


# By the state size, rounded up.
SHAPES = {
    8: Shape(4, 2, 64, 128, 16, 1, 3),
    16: Shape(4, 4, 64, 128, 16, 1, 3),
    32: Shape(8, 4, 32, 128, 16, 1, 3),
    64: Shape(8, 8, 32, 128, 16, 1, 2),
    128: Shape(16, 8, 16, 128, 16, 1, 2),
    256: Shape(16, 16, 16, 128, 8, 1, 1),
}
RUNNERS = 16  # of selective_scan_relay.cu: warps that share 16 channels
# Segments make up to so many blocks for each multiprocessor, none of them shorter than SHORTEST positions.
FORWARD_BLOCKS, BACKWARD_BLOCKS = 3, 2
SHORTEST = 4 * KEEP_EVERY


def relay_pays(b: int, d: int, device: torch.device) -> bool:
    """Whether a relay, which takes 16 channels a multiprocessor through time, beats blocks of 64 channels.

    It does where these would have to be cut into segments to fill the machine, and then take almost every exponential
    twice (1 x 32768 x 2048 channels: 0.64 ms against 0.85), unless the channels are so few, or so little more than the
    multiprocessors have room for, that segments fill it much better.
    """
    processors = runtime.multiprocessors(device)
    teams, blocks = b * -(-d // 16), b * -(-d // 64)
    return blocks < 1.5 * processors and 0.75 * processors * -(-teams // processors) < teams


def segments_for(b: int, l: int, d: int, channels: int, wanted: int, device: torch.device) -> int:
    """In how many parts blocks of so many channels take the length."""
    blocks = b * -(-d // channels)
    most = max(1, min(wanted * runtime.multiprocessors(device) // blocks, -(-l // SHORTEST)))
    return -(-l // segment_of(l, most))


def segment_of(l: int, segments: int) -> int:
    """How long each part but the last is: a multiple of KEEP_EVERY."""
    return -(-l // segments // KEEP_EVERY) * KEEP_EVERY


def warps_for(b: int, l: int, d: int, groups: int, macros: dict[str, int]) -> int:
    """Of a block of the backward kernel, 16 channels each. Eight leave half the partial sums that four do, and are as
    fast where there is enough to do."""
    fit = d // groups % 128 == 0 and backward_shared(8, **macros) <= 227 * 1024
    return 8 if fit and b * l * d >= 2**24 else 4


def padded(n: int) -> int:
    return next(size for size in SHAPES if n <= size)


def why_not(call) -> str | None:
    x = call["x"]
    if not x.is_cuda:
        return f"x is on {x.device.type}, not on an NVIDIA GPU"
    return runtime.why_not_on(x.device) or why_not_these(call)


def why_not_these(call) -> str | None:
    """Tensors that the kernels are not for."""
    if reason := why_no_kernel(call):
        return reason
    x, B = call["x"], call["B"]
    if x.shape[1] == 1:
        return "x has length 1, and its kernels are for longer ones; Triton has one for a single position"
    if B.ndim == 4 and (x.shape[2] // B.shape[2]) % 64 and B.shape[2] > 1:
        return f"a group has {x.shape[2] // B.shape[2]} channels, and its kernels take them by 64"
    if any(t is not None and t.stride(1) > FURTHEST for t in (x, call["dt"], call["z"], B, call["C"])):
        return "neighbouring positions lie more than 2^24 numbers apart in memory"
    if B.dtype != call["C"].dtype:
        return "B and C have different dtypes"
    for name in ("B", "C"):
        if call[name].stride(-1) != 1 and call[name].shape[-1] > 1:
            return f"the states of {name} do not lie side by side in memory"
    return None


@runtime.on_its_device
def forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, keep):
    given = addresses(x, dt, B, C, z, A, D, dt_bias, initial_state, cu_seqlens)
    plan, shape = forward_plan(keep, *description(given, 0, x, dt, B, C, z, None, D, dt_bias, cu_seqlens, dt_softplus))
    y, final_state = empty_like(x), A.new_empty(len(x) if cu_seqlens is None else len(cu_seqlens) - 1, *A.shape)
    kept = A.new_empty(shape) if keep else None
    if cu_seqlens is not None:  # what an empty sequence ends with
        final_state.copy_(initial_state) if initial_state is not None else final_state.zero_()
    _memory, parts = plan.scratch.allocate(A)
    plan.run([*given, *addresses(kept, y, final_state)], parts)
    return y, final_state, kept


@runtime.on_its_device
def backward(dy, d_final, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, kept, d_z=None):
    dy = dy if dy.stride(1) <= FURTHEST else dy.contiguous()
    A, D, dt_bias, initial_state, d_final = dense(A, D, dt_bias, initial_state, d_final)
    given = addresses(x, dt, B, C, z, A, D, dt_bias, initial_state, cu_seqlens)
    at_dy = dy.data_ptr()
    d_z = empty_like(z) if d_z is None and z is not None else d_z
    of_z = None if d_z is None else d_z.stride()
    plan = backward_plan(of_z, *description(given, at_dy, x, dt, B, C, z, dy, D, dt_bias, cu_seqlens, dt_softplus))
    gradients = [None if t is None else empty_like(t) for t in (x, dt, A, B, C, D)]
    d_bias, d_initial = (None if t is None else empty_like(t) for t in (dt_bias, initial_state))
    gradients += [d_z, d_bias, d_initial]
    if d_initial is not None and cu_seqlens is not None:  # an empty sequence hands on what it is given
        d_initial.copy_(d_final) if d_final is not None else d_initial.zero_()
    _memory, parts = plan.scratch.allocate(A)
    plan.run([*given, kept.data_ptr(), 0, 0, at_dy, *addresses(d_final, *gradients)], parts)
    return gradients


def kept_shape(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Of float32, or of pairs of bfloat16: see `kept_at` in selective_scan.cuh."""
    return kept_for(x.shape, x.dtype, A.shape[1])


def kept_for(shape: tuple[int, ...], dtype: torch.dtype, n: int) -> tuple[int, int, int]:
    b, l, d = shape
    states = -(-d // 16) * 16 * -(-padded(n) // 16) * 16
    return b, -(-l // KEEP_EVERY), states // 2 if dtype == torch.bfloat16 else states


# What calls have in common


class Described(NamedTuple):
    """A call, but for its numbers: what its kernels and most of their parameters follow from."""

    x: Signal
    dt: Signal
    B: Signal
    C: Signal
    z: Signal | None
    dy: Signal | None
    shape: tuple[int, int, int]  # b, l, d
    groups: int
    n: int
    beyond: int  # bytes from a multiple of 16 to where one of the signals starts, or several, by `|`
    has_skip: bool
    has_bias: bool
    softplus: bool
    sequences: int  # 0: not packed
    device: torch.device

    @property
    def macros(self) -> dict[str, int]:
        of_channels = [t for t in (self.x, self.dt, self.z, self.dy) if t is not None]
        sizes = [*((t, self.shape[2]) for t in of_channels), (self.B, self.n), (self.C, self.n)]
        return {
            "N": padded(self.n),
            "X_KIND": KINDS[self.x.dtype],
            "DT_KIND": KINDS[self.dt.dtype],
            "BC_KIND": KINDS[self.B.dtype],
            "Z_KIND": KINDS[(self.z or self.x).dtype],
            "HAS_Z": int(self.z is not None),
            "HAS_D": int(self.has_skip),
            "HAS_BIAS": int(self.has_bias),
            "SOFTPLUS": int(self.softplus),
            "PACKED": int(self.sequences > 0),
            "WHOLE": int(all(t.in_fours(size, self.beyond) for t, size in sizes)),
        }


def description(given, at_dy, x, dt, B, C, z, dy, D, dt_bias, cu_seqlens, dt_softplus) -> tuple[Any, ...]:
    """What makes a `Described`; `given` begins with the addresses of x, dt, B, C and z, and `at_dy` is that of dy."""
    beyond = (given[0] | given[1] | given[2] | given[3] | given[4] | at_dy) % 16
    sequences = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    options = (D is not None, dt_bias is not None, dt_softplus, sequences, x.device)
    return facts(x, dt, B, C, z, dy), x.shape, B.shape[2] if B.ndim == 4 else 1, B.shape[-1], beyond, *options


# What `Params` of selective_scan.cuh begins with: tensors, some of which the forward pass needs, and scratch memory.
TENSORS, OF_FORWARD = 24, 13
PARTS = ("carry", "span", "d_bc", "d_rates", "d_skip", "d_bias")


@functools.lru_cache(maxsize=1024)
def forward_plan(keep: bool, of_tensors: tuple[Any, ...], *more: Any) -> tuple[Plan, tuple[int, ...]]:
    """And the shape of what is kept."""
    call = Described(*signals(of_tensors), *more)
    b, l, d = call.shape
    macros, device = call.macros, call.device
    N, shape = macros["N"], SHAPES[macros["N"]]
    if N == 16 and relay_pays(b, d, device):
        kernel = relay_kernel(items(macros, KEEP=keep), device)
        return planned(call, OF_FORWARD, [(kernel, b * -(-d // 16))], {}, 1), kept_for(call.shape, call.x.dtype, call.n)
    segments = segments_for(b, l, d, shape.channels, FORWARD_BLOCKS, device)
    kernel, blocks = forward_kernel("outputs", shape, items(macros, KEEP=keep), device), b * -(-d // shape.channels)
    launches, scratch = carry_of(call, "states", "pass_states", segments) if segments > 1 else ([], {})
    launches += [(kernel, blocks * segments)]
    return planned(call, OF_FORWARD, launches, scratch, segments), kept_for(call.shape, call.x.dtype, call.n)


@functools.lru_cache(maxsize=1024)
def backward_plan(of_z: tuple[int, ...] | None, of_tensors: tuple[Any, ...], *more: Any) -> Plan:
    """`of_z`: the strides of its gradient."""
    call = Described(*signals(of_tensors), *more)
    b, l, d = call.shape
    macros, device = call.macros, call.device
    N, warps = macros["N"], warps_for(b, l, d, call.groups, call.macros)
    shared = backward_shared(warps, **macros)
    # Eight warps on a multiprocessor where their memory fits; registers are given out accordingly.
    resident = max(1, min(8 // warps, 228 * 1024 // (shared + 1024)))
    segments = segments_for(b, l, d, 16 * warps, BACKWARD_BLOCKS * 4 // warps, device)
    launches, scratch = carry_of(call, "gradients", "pass_gradients", segments) if segments > 1 else ([], {})
    if segments == 1 and N > 16:
        scratch = {"carry": b * d * N}  # where the kernel keeps a tile's flow between chunks
    blocks, rows = -(-d // (16 * warps)), b * segments
    kernel, gather = backward_kernels(warps, shared, items(macros, WARPS=warps, BLOCKS=resident), device)
    scratch.update(d_bc=blocks * b * l * 2 * N, d_rates=rows * d * N, d_skip=rows * d, d_bias=rows * d)
    results = b * l * 2 * N * call.groups + d * (N + 2)
    launches = [*launches, (kernel, blocks * rows), (gather, -(-results // gather.threads))]
    return planned(call, TENSORS, launches, scratch, segments, blocks // call.groups, of_z)


def planned(
    call: Described,
    tensors: int,
    launches: list[Launch],
    scratch: dict[str, int],
    segments: int,
    blocks: int = 0,
    of_z: tuple[int, ...] | None = None,
) -> Plan:
    """With `Params` of selective_scan.cuh."""
    b, l, d = call.shape
    strides = [(0, 0, 0) if t is None else t.strides for t in (call.x, call.dt, call.z, call.dy)]
    strides += [t.strides[:3] if len(t.strides) == 4 else (*t.strides[:2], 0) for t in (call.B, call.C)]
    strides += [of_z or (0, 0, 0)]
    sizes = [b, l, d, call.n, call.groups, call.sequences, segment_of(l, segments), segments, blocks]
    parts = len(PARTS) if scratch else 0
    parameters = Parameters(
        [*itertools.chain(*strides), *sizes], tensors, left_out=TENSORS - tensors + len(PARTS) - parts, parts=parts
    )
    return Plan(parameters, tuple(launches), Scratch(*(scratch.get(name, 0) for name in PARTS)))


def carry_of(call: Described, ends: str, passing: str, segments: int) -> tuple[list[Launch], dict[str, int]]:
    """What comes into each segment: first what each adds by itself, then the sum of what is passed on."""
    b, _, d = call.shape
    macros = call.macros
    N, shape = macros["N"], SHAPES[macros["N"]]
    kernels = [forward_kernel(name, shape, items(macros, KEEP=False), call.device) for name in (ends, passing)]
    blocks = b * -(-d // shape.channels) * (segments - 1), -(-b * d * N // kernels[1].threads)
    return list(zip(kernels, blocks, strict=True)), {"carry": b * segments * d * N, "span": b * segments * d}


def items(macros: dict[str, int], **more: int) -> runtime.Macros:
    return (*macros.items(), *((name, int(value)) for name, value in more.items()))


@functools.cache
def forward_kernel(name: str, shape: Shape, macros: runtime.Macros, device: torch.device) -> runtime.Kernel:
    module = runtime.load("selective_scan_forward.cu", (*macros, *shape.macros), device)
    if name.startswith("pass"):
        return runtime.Kernel(module, name, 256, 0)
    return runtime.Kernel(module, name, shape.threads, shape.shared)


@functools.cache
def relay_kernel(macros: runtime.Macros, device: torch.device) -> runtime.Kernel:
    module = runtime.load("selective_scan_relay.cu", (*macros, ("RUNNERS", RUNNERS)), device)
    return runtime.Kernel(module, "relay", 32 * RUNNERS, relay_shared(**dict(macros)))


@functools.cache
def backward_kernels(
    warps: int, shared: int, macros: runtime.Macros, device: torch.device
) -> tuple[runtime.Kernel, runtime.Kernel]:
    module = runtime.load("selective_scan_backward.cu", macros, device)
    return runtime.Kernel(module, "backward", 32 * warps, shared), runtime.Kernel(module, "gather", 256, 0)


# Bytes of `Shared` in the .cu files


def relay_shared(*, X_KIND, DT_KIND, Z_KIND, BC_KIND, HAS_Z, **_) -> int:
    x, dt, z, bc = (4 if kind == 0 else 2 for kind in (X_KIND, DT_KIND, Z_KIND, BC_KIND))
    coming = 128 * (x + dt + 2 * bc + (z if HAS_Z else 0)) + (0 if HAS_Z else 16)
    return RUNNERS * (3 * coming + 1024 + 512 + 8 * 16 * 4 + 2 * 4 * 16 + 3 * 1024 + 16)


def backward_shared(warps: int, *, N, X_KIND, DT_KIND, Z_KIND, BC_KIND, HAS_Z, PACKED, **_) -> int:
    chunk, channels, part, threads = KEEP_EVERY, 16 * warps, 4, 32 * warps
    x, dt, z, bc = (4 if kind == 0 else 2 for kind in (X_KIND, DT_KIND, Z_KIND, BC_KIND))
    kept = 2 if KINDS[torch.bfloat16] == X_KIND else 4
    coming = chunk * channels * (2 * x + dt + (z if HAS_Z else 0)) + (0 if HAS_Z else 16)
    coming += chunk * 32 * bc + threads * 8 * kept
    signals = chunk * (2 * (channels + 2) + channels + 16) + chunk * 2 * 16
    states = chunk // part * 2 * threads * 4
    sums = warps * (4 * 3 * 2 * 32 + chunk * 2 * 16)
    tiles = 3 * chunk * channels if N > 16 else 3
    return coming + 4 * (signals + states + sums + tiles + (2 * chunk if PACKED else 2)) + 32


selective_scan.register("cuda", why_not=why_not)(
    custom_op("cuda", Kernels(forward, backward, kept_shape, in_groups=False))
)
