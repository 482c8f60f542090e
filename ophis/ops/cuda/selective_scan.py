"""The selective scan in CUDA C++: which kernels, in which sizes, on which memory.

b batch  l length  d channels  n state size  g groups of channels

The algorithm is told in docs/kernels.md, the kernels are in the .cu files of this folder.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ophis.ops.cuda import runtime
from ophis.ops.library.selective_scan import Kernels, custom_op
from ophis.ops.library.selective_scan import why_not as why_no_kernel
from ophis.ops.selective_scan import selective_scan

KEEP_EVERY = 32  # positions from one kept state to the next, as in selective_scan.cuh
FURTHEST = 2**24  # numbers between neighbouring positions: the kernels take up to 64 of them with offsets of 32 bits
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Shape(NamedTuple):
    """How a block of the forward kernel, and of the carry's, is laid out: the macros of selective_scan_forward.cu."""

    lanes: int  # keepers that share their channels
    states: int  # of a channel in a keeper
    per: int  # channels of a keeper
    channels: int  # of a block
    preparers: int
    steps: int  # positions prepared at once
    unroll: int  # positions that the compiler may schedule together
    blocks: int  # that fit on a multiprocessor; registers are given out accordingly

    @property
    def keepers(self) -> int:
        return self.channels // self.per * self.lanes

    @property
    def shared(self) -> int:
        """Bytes of `Shared`."""
        vectors = max(1, 2 * self.states // 4)
        chunk = self.steps * (2 * self.channels + 4 * vectors * self.lanes + 1) + 4
        row = self.channels // self.per + (4 if self.per == 1 else 0)
        return 4 * 2 * (chunk + self.steps * self.lanes * self.per // 4 * row * 4)

    @property
    def macros(self) -> runtime.Macros:
        names = ("LANES", "S", "PER", "CHANNELS", "PREPARERS", "STEPS", "UNROLL", "BLOCKS")
        return tuple(zip(names, self, strict=True))


class Relay(NamedTuple):
    """How selective_scan_relay.cu, the forward kernel for n = 16, is laid out: its macros."""

    runners: int  # warps that share 16 channels and run 8 positions in turn; 1: a warp has them to itself
    soloists: int  # in that case, warps of a block
    blocks: int  # that fit on a multiprocessor; registers are given out accordingly

    @property
    def macros(self) -> runtime.Macros:
        return tuple(zip(("RUNNERS", "SOLOISTS", "BLOCKS"), self, strict=True))

    @property
    def warps(self) -> int:
        return self.soloists if self.runners == 1 else self.runners

    def shared(self, *, X_KIND, DT_KIND, Z_KIND, BC_KIND, HAS_Z, **_) -> int:
        """Bytes of `Shared`."""
        x, dt, z, bc = (4 if kind == 0 else 2 for kind in (X_KIND, DT_KIND, Z_KIND, BC_KIND))
        coming = 128 * (x + dt + 2 * bc + (z if HAS_Z else 0)) + (0 if HAS_Z else 16)
        stages, sides = (4, 2) if self.runners == 1 else (2, 1)
        return self.warps * (stages * coming + sides * (1024 + 512) + 8 * 16 * 4 + 2 * 4 * 16 + 1024 + 16)


# By the state size, rounded up.
SHAPES = {
    8: Shape(4, 2, 2, 64, 128, 16, 1, 3),
    16: Shape(4, 4, 2, 64, 128, 16, 1, 3),
    32: Shape(8, 4, 2, 32, 128, 16, 1, 3),
    64: Shape(8, 8, 2, 32, 128, 16, 1, 2),
    128: Shape(16, 8, 2, 16, 128, 16, 1, 2),
    256: Shape(16, 16, 2, 16, 128, 8, 1, 1),
}
# For n = 16 where batch and channels are few: fewer states a keeper, and a multiprocessor for 16 channels. With it one
# sequence of 2048 channels fills the machine in one pass, where in segments almost every exponential is taken twice. Up
# to some thousand positions it is the faster one: 0.064 ms against 0.068 at 2048, 0.93 against 0.83 at 32768.
NARROW = Shape(8, 2, 1, 16, 256, 64, 4, 1)
NARROW_LONGEST = 4096
WARPS, BLOCKS = 4, 2  # of the backward kernel: warps of a block, 16 channels each; blocks on a multiprocessor
# Segments make up to so many blocks for each multiprocessor, none of them shorter than SHORTEST positions.
FORWARD_BLOCKS, BACKWARD_BLOCKS = 3, 2
SHORTEST = 4 * KEEP_EVERY


def shape_for(x: Tensor, size: int) -> Shape:
    b, l, d = x.shape
    blocks, processors = b * -(-d // NARROW.channels), runtime.multiprocessors(x.device)
    narrow = size == 16 and l <= NARROW_LONGEST and processors / 2 <= blocks <= processors
    return NARROW if narrow else SHAPES[size]


def relay_for(x: Tensor, size: int) -> Relay | None:
    return Relay(1, 4, 4) if size == 16 else None


def segments_for(x: Tensor, channels: int, wanted: int) -> int:
    blocks = x.shape[0] * -(-x.shape[2] // channels)
    return max(1, min(wanted * runtime.multiprocessors(x.device) // blocks, -(-x.shape[1] // SHORTEST)))


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


def forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, keep):
    call = Launches(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus)
    b = x.shape[0]
    y, kept = x.new_empty(x.shape), A.new_empty(kept_shape(x, A, cu_seqlens) if keep else 0)
    final_state = A.new_empty(b if cu_seqlens is None else len(cu_seqlens) - 1, *A.shape)
    if cu_seqlens is not None:  # what an empty sequence ends with
        final_state.copy_(initial_state) if initial_state is not None else final_state.zero_()
    shape, relay = shape_for(x, call.N), relay_for(x, call.N)
    call.split(1 if shape is NARROW or relay else segments_for(x, shape.channels, FORWARD_BLOCKS))
    call.set(y=y, final_state=final_state, kept=kept)
    with runtime.on_device_of(x):
        if call.segments > 1:
            call.carry("states", "pass_states", shape)
        if relay is None:
            call.launch("outputs", shape, keep)
        else:
            call.launch_relay(relay, keep)
    return y, final_state, kept


def backward(dy, d_final, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, kept):
    dy = dy if dy.stride(1) <= FURTHEST else dy.contiguous()
    call = Launches(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dy)
    b, l, d = x.shape
    n, N = A.shape[1], call.N
    d_final = None if d_final is None else d_final.contiguous()
    dx, ddt, dB, dC = (t.new_empty(t.shape) for t in (x, dt, B, C))
    dz, d_initial = (None if t is None else t.new_empty(t.shape) for t in (z, initial_state))
    if d_initial is not None and cu_seqlens is not None:  # an empty sequence hands on what it is given
        d_initial.copy_(d_final) if d_final is not None else d_initial.zero_()
    call.split(segments_for(x, 16 * WARPS, BACKWARD_BLOCKS))
    rows = b * call.segments
    d_rates, d_skip, d_bias = A.new_empty(rows, d, N), A.new_empty(rows, d), A.new_empty(rows, d)
    d_bc = A.new_empty(-(-d // (16 * WARPS)), b, l, 2, N)
    call.set(kept=kept, d_final=d_final, dx=dx, ddt=ddt, dz=dz, d_initial=d_initial)
    call.set(d_bc=d_bc, d_rates=d_rates, d_skip=d_skip, d_bias=d_bias)
    with runtime.on_device_of(x):
        if call.segments > 1:
            call.carry("gradients", "pass_gradients", SHAPES[N])
        elif N > 16:
            call.set(carry=A.new_empty(rows, d, N))  # where the kernel keeps a tile's flow between chunks
        call.launch_backward(dB, dC, d_bc)
    if rows > 1:
        d_rates, d_skip, d_bias = d_rates.sum(0, keepdim=True), d_skip.sum(0, keepdim=True), d_bias.sum(0, keepdim=True)
    return dx, ddt, d_rates[0, :, :n].contiguous(), dB, dC, d_skip[0], dz, d_bias[0], d_initial


def kept_shape(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Of float32, or of pairs of bfloat16: see `kept_at` in selective_scan.cuh."""
    b, l, d = x.shape
    states = -(-d // 16) * 16 * -(-A.shape[1] // 16) * 16
    return b, -(-l // KEEP_EVERY), states // 2 if x.dtype == torch.bfloat16 else states


# The fields of `Params` in selective_scan.cuh, all of 64 bits.
POINTERS = (
    "x", "dt", "B", "C", "z", "A", "D", "bias", "initial", "offsets", "y", "final_state", "kept", "carry", "span",
    "dy", "d_final", "dx", "ddt", "dz", "d_initial", "d_bc", "d_rates", "d_skip", "d_bias",
)  # fmt: skip
STRIDED = ("x", "dt", "z", "dy", "B", "C")


class Launches:
    """One call's parameters, and its kernels."""

    def __init__(self, x, dt, A: Tensor, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dy=None):
        # Parameters are small: copies where they are not contiguous cost nothing.
        A = A.contiguous()
        D, dt_bias, initial_state = (None if t is None else t.contiguous() for t in (D, dt_bias, initial_state))
        self.tensors = dict(
            x=x, dt=dt, B=B, C=C, z=z, A=A, D=D, bias=dt_bias, initial=initial_state, offsets=cu_seqlens, dy=dy
        )
        self.x, self.A, self.N = x, A, padded(A.shape[1])
        self.groups = B.shape[2]
        self.sequences = 0 if cu_seqlens is None else len(cu_seqlens) - 1
        signals = [t for t in (x, dt, z, dy, B, C) if t is not None]
        self.macros = (
            ("N", self.N),
            ("X_KIND", KINDS[x.dtype]),
            ("DT_KIND", KINDS[dt.dtype]),
            ("BC_KIND", KINDS[B.dtype]),
            ("Z_KIND", KINDS[x.dtype if z is None else z.dtype]),
            ("HAS_Z", z is not None),
            ("HAS_D", D is not None),
            ("HAS_BIAS", dt_bias is not None),
            ("SOFTPLUS", dt_softplus),
            ("PACKED", cu_seqlens is not None),
            ("WHOLE", all(map(_in_fours, signals))),
        )
        self.macros = tuple((name, int(value)) for name, value in self.macros)

    def split(self, segments: int) -> None:
        """The length in so many segments, or fewer: each but the last is a multiple of KEEP_EVERY."""
        l = self.x.shape[1]
        self.segment = -(-l // segments // KEEP_EVERY) * KEEP_EVERY
        self.segments = -(-l // self.segment)

    def set(self, **tensors: Tensor | None) -> None:
        self.tensors.update(tensors)

    def parameters(self):
        """`Params` of selective_scan.cuh."""
        values = [0 if (t := self.tensors.get(name)) is None else t.data_ptr() for name in POINTERS]
        for name in STRIDED:
            t = self.tensors[name]
            values += (0, 0, 0) if t is None else t.stride()[:3]
        b, l, d = self.x.shape
        n = self.A.shape[1]
        return runtime.pack([*values, b, l, d, n, self.groups, self.sequences, self.segment, self.segments])

    def carry(self, ends: str, passing: str, shape: Shape) -> None:
        """What comes into each segment: first what each adds by itself, then the sum of what is passed on."""
        A, (b, _, d) = self.A, self.x.shape
        self.set(carry=A.new_empty(b, self.segments, d, self.N), span=A.new_empty(b, self.segments, d))
        self.launch(ends, shape, keep=False)
        self.launch(passing, shape, keep=False)

    def launch(self, name: str, shape: Shape, keep: bool) -> None:
        b, _, d = self.x.shape
        kernel = _forward_kernel(name, shape, (*self.macros, ("KEEP", int(keep))), self.x.device)
        if name.startswith("pass"):
            blocks = -(-b * d * self.N // kernel.threads)
        else:
            blocks = b * -(-d // shape.channels) * (self.segments if name == "outputs" else self.segments - 1)
        kernel(blocks, self.parameters(), runtime.stream())

    def launch_relay(self, relay: Relay, keep: bool) -> None:
        b, _, d = self.x.shape
        kernel = _relay_kernel(relay, (*self.macros, ("KEEP", int(keep))), self.x.device)
        teams = b * -(-d // 16) * self.segments
        kernel(-(-teams // relay.soloists) if relay.runners == 1 else teams, self.parameters(), runtime.stream())

    def launch_backward(self, dB: Tensor, dC: Tensor, d_bc: Tensor) -> None:
        b, l, d = self.x.shape
        stream = runtime.stream()
        kernel, gather = _backward_kernels(self.macros, self.x.device)
        blocks = -(-d // (16 * WARPS))
        kernel(blocks * self.segments * b, self.parameters(), stream)
        size = b * l * 2 * self.N * self.groups
        n = self.A.shape[1]
        values = [d_bc.data_ptr(), dB.data_ptr(), dC.data_ptr(), b, l, self.groups, blocks // self.groups, n]
        gather(-(-size // gather.threads), runtime.pack(values), stream)


def _in_fours(t: Tensor) -> bool:
    """Whether four neighbours on the last axis can be read at once, wherever one starts."""
    *strides, last = t.stride()
    if last != 1 or t.shape[-1] % 4 or t.data_ptr() % (4 * t.element_size()):
        return False
    return not any(stride % 4 for stride in strides)


@functools.cache
def _forward_kernel(name: str, shape: Shape, macros: runtime.Macros, device: torch.device) -> runtime.Kernel:
    module = runtime.load("selective_scan_forward.cu", (*macros, *shape.macros), device)
    if name.startswith("pass"):
        return runtime.Kernel(module, name, 256, 0)
    return runtime.Kernel(module, name, shape.keepers + shape.preparers, shape.shared)


@functools.cache
def _relay_kernel(relay: Relay, macros: runtime.Macros, device: torch.device) -> runtime.Kernel:
    module = runtime.load("selective_scan_relay.cu", (*macros, *relay.macros), device)
    return runtime.Kernel(module, "relay", 32 * relay.warps, relay.shared(**dict(macros)))


@functools.cache
def _backward_kernels(macros: runtime.Macros, device: torch.device) -> tuple[runtime.Kernel, runtime.Kernel]:
    shared = _backward_shared(**dict(macros))
    # Two blocks on a multiprocessor where their memory fits; registers are given out accordingly.
    blocks = max(1, min(BLOCKS, 228 * 1024 // (shared + 1024)))
    module = runtime.load("selective_scan_backward.cu", (*macros, ("WARPS", WARPS), ("BLOCKS", blocks)), device)
    return runtime.Kernel(module, "backward", 32 * WARPS, shared), runtime.Kernel(module, "gather", 256, 0)


def _backward_shared(*, N, X_KIND, DT_KIND, Z_KIND, BC_KIND, HAS_Z, PACKED, **_) -> int:
    """Bytes of `Shared` in selective_scan_backward.cu."""
    chunk, channels, part, threads = KEEP_EVERY, 16 * WARPS, 4, 32 * WARPS
    x, dt, z, bc = (4 if kind == 0 else 2 for kind in (X_KIND, DT_KIND, Z_KIND, BC_KIND))
    kept = 2 if X_KIND == KINDS[torch.bfloat16] else 4
    coming = (
        chunk * channels * (2 * x + dt + (z if HAS_Z else 0)) + (0 if HAS_Z else 16) + chunk * 32 * bc + threads * 8 * kept
    )
    signals = chunk * (2 * (channels + 2) + channels + 16) + chunk * 2 * 16
    states = chunk // part * 2 * threads * 4
    sums = WARPS * (4 * 3 * 2 * 32 + chunk * 2 * 16)
    tiles = 3 * chunk * channels if N > 16 else 3
    return coming + 4 * (signals + states + sums + tiles + (2 * chunk if PACKED else 2)) + 32


selective_scan.register("cuda", why_not=why_not)(custom_op("cuda", Kernels(forward, backward, kept_shape)))
