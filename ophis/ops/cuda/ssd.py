"""SSD in CUDA C++: which kernels, in which sizes, on which memory.

b batch  l length  h heads  p head width  g groups of heads  n state width

The algorithm is told in docs/kernels.md, the kernels are in the .cu files of this folder.
"""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from ophis.ops.cuda import runtime
from ophis.ops.library import recorded
from ophis.ops.library.ssd import DIFFERENTIABLE, Kernels, custom_op
from ophis.ops.library.ssd import why_not as why_no_kernel
from ophis.ops.ssd import ssd

CHUNK, TILE = 64, 64  # positions; channels of a head
THREADS = 256
SIZES = (64, 128, 256)  # n
WIDEST_BACKWARD = 128
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
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
    if n > WIDEST_BACKWARD and training:
        return f"its backward pass holds states of up to n={WIDEST_BACKWARD}, and here n={n}"
    if call["z"] is not None:
        return "there is a gate z, which its kernels leave to the norm"
    if D is not None and D.ndim == 2 and training:
        return "D is one number a channel, and its backward pass has one a head"
    return None


def forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit):
    x, B, C = map(aligned, (x, B, C))
    call = Launches(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_state = call.edges(initial_state)
    call.set(y=y, final_state=final_state)
    call.split(FORWARD_BLOCKS)
    with runtime.on_device_of(x):
        call.steps()
        if call.segments > 1:
            call.carry("ends", "pass_states")
        call.launch("outputs")
    return y, final_state


def backward(dy, d_final, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit):
    dy = dy if _in_eights(dy) else dy.contiguous()
    x, B, C, dy = map(aligned, (x, B, C, dy))
    call = Launches(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit, dy)
    b, _, h, p = x.shape
    g, n = B.shape[2:]
    chunks, parts = b * call.chunks, p // TILE
    d_final = None if d_final is None else d_final.contiguous()
    dx, d_dt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
    d_initial = None if initial_state is None else call.edges(d_final)
    states, flows = x.new_empty(chunks, h, p, n), x.new_empty(chunks, h, p, n)
    call.splits = max(1, min(BACKWARD_BLOCKS * runtime.multiprocessors(x.device) // (chunks * g), h // g))
    partial_B, partial_C = A.new_empty(2, call.splits, *B.shape) if call.splits > 1 else (None, None)
    sums, of_chunks = A.new_empty(chunks, h, parts, 4, CHUNK), A.new_empty(chunks, h, parts, 2)
    partial_A = A.new_empty(chunks, 2, h)
    call.set(d_final=d_final, d_initial=d_initial, states=states, flows=flows, dx=dx, d_dt=d_dt, dB=dB, dC=dC)
    call.set(partial_B=partial_B, partial_C=partial_C, sums=sums, of_chunks=of_chunks, partial_A=partial_A)
    call.split(STATES_BLOCKS)
    with runtime.on_device_of(x):
        call.steps()
        for ends, passing, states_of in (("ends", "pass_states", "states"), ("flow_ends", "pass_flows", "flows")):
            if call.segments > 1:
                call.carry(ends, passing)
            call.launch(states_of)
        call.launch("backward")
        call.launch("d_steps")
    if partial_B is not None and partial_C is not None:
        dB, dC = (t.sum(0).to(B.dtype) for t in (partial_B, partial_C))
    dA, d_bias = partial_A.sum(0)
    dD = None if D is None else of_chunks[..., 1].sum((0, 2))
    return dx, d_dt, dA, dB, dC, dD, None, d_bias, d_initial


# The fields of `Params` in ssd.cuh, all of 64 bits but the last two.
POINTERS = (
    "x", "B", "C", "dy", "dt", "A", "bias", "D", "initial", "d_final", "offsets", "decays", "y", "final_state",
    "d_initial", "passed", "totals", "states", "flows", "dx", "dB", "dC", "d_dt", "partial_B", "partial_C", "sums",
    "of_chunks", "partial_A",
)  # fmt: skip
STRIDED = ("x", "B", "C", "dy", "dt")


class Launches:
    """One call's parameters, and its kernels."""

    splits = 1

    def __init__(
        self, x, dt, A: Tensor, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit, dy=None
    ):  # fmt: skip
        # Parameters and states are small: copies where they are not contiguous cost little.
        A = A.contiguous()
        dt_bias, initial = (None if t is None else t.contiguous() for t in (dt_bias, initial_state))
        self.tensors: dict[str, Tensor | None] = dict(
            x=x, B=B, C=C, dy=dy, dt=dt, A=A, D=D, bias=dt_bias, initial=initial, offsets=cu_seqlens
        )
        self.x, self.A, self.n, self.limit = x, A, B.shape[-1], dt_limit
        self.batch, self.length, self.heads, self.width = x.shape
        self.groups = B.shape[2]
        self.sequences = self.batch if cu_seqlens is None else len(cu_seqlens) - 1
        self.packed = cu_seqlens is not None
        self.chunks = self.length // CHUNK + self.sequences if self.packed else -(-self.length // CHUNK)
        self.macros = (("N", self.n), ("PARTS", self.width // TILE), ("PACKED", int(self.packed)))
        limited = tuple(dt_limit) != (0.0, float("inf"))
        kinds = (("DT_KIND", KINDS[dt.dtype]), ("HAS_BIAS", dt_bias is not None))
        options = (("SOFTPLUS", dt_softplus), ("LIMITED", limited))
        self.step_macros = (*self.macros, *((name, int(value)) for name, value in (*kinds, *options)))

    @property
    def pairs(self) -> int:
        """Of tiles, in all groups: two take B and C together."""
        return self.groups * -(-(self.heads // self.groups * self.width // TILE) // 2)

    def split(self, blocks: int) -> None:
        """Rows into segments, so that there are so many blocks for each multiprocessor."""
        wanted = blocks * runtime.multiprocessors(self.x.device) // (self.batch * self.pairs)
        self.segment = -(-self.chunks // max(1, min(wanted, self.chunks)))
        self.segments = -(-self.chunks // self.segment)

    def set(self, **tensors: Tensor | None) -> None:
        self.tensors.update(tensors)

    def edges(self, begun: Tensor | None) -> Tensor:
        """Memory for the states where sequences end, or begin. That of an empty sequence is where it began."""
        shape = (self.sequences, self.heads, self.width, self.n)
        if not self.packed:
            return self.A.new_empty(shape)
        return self.A.new_zeros(shape) if begun is None else begun.clone(memory_format=torch.contiguous_format)

    def parameters(self):
        """`Params` of ssd.cuh."""
        values = [0 if (t := self.tensors.get(name)) is None else t.data_ptr() for name in POINTERS]
        for name in STRIDED:
            t = self.tensors[name]
            values += (0, 0, 0) if t is None else t.stride()[:3]
        D = self.tensors["D"]
        values += (0, 0) if D is None else (D.stride(0), D.stride(1) if D.ndim == 2 else 0)
        values += (self.batch, self.length, self.heads, self.width, self.groups, self.sequences)
        values += (self.chunks, self.segment, self.segments, self.splits)
        return runtime.pack([*values, struct.unpack("q", struct.pack("2f", *self.limit))[0]])

    def steps(self) -> None:
        """The decays of all chunks."""
        self.set(decays=self.A.new_empty(self.batch * self.chunks, self.heads, 4, CHUNK))
        self.launch("steps")

    def carry(self, ends: str, passing: str) -> None:
        """What comes into each segment: first what each adds by itself, then the sum of what is passed on."""
        shape = (self.batch, self.segments, self.heads)
        self.set(passed=self.A.new_empty(*shape, self.width, self.n), totals=self.A.new_empty(shape))
        self.launch(ends)
        self.launch(passing)

    def launch(self, name: str) -> None:
        kernel = _kernel(name, self.step_macros if name.endswith("steps") else self.macros, self.x.device)
        of_chunks = self.batch * self.chunks
        if name.endswith("steps"):  # a warp for each chunk of a head
            blocks = -(-of_chunks * self.heads * 32 // kernel.threads)
        elif name.startswith("pass"):  # a thread for each state
            blocks = -(-self.batch * self.heads * self.width * self.n // kernel.threads)
        elif name == "backward":
            blocks = of_chunks * self.groups * self.splits
        else:
            blocks = self.batch * self.pairs * (self.segments - 1 if name.endswith("ends") else self.segments)
        kernel(blocks, self.parameters(), runtime.stream())


def _in_eights(t: Tensor) -> bool:
    """Whether eight neighbours on the last axis can be read at once, wherever eight begin."""
    *strides, last = t.stride()
    return last == 1 and not any(stride % 8 for stride, size in zip(strides, t.shape, strict=False) if size > 1)


def aligned(t: Tensor) -> Tensor:
    """A copy of a tensor that does not begin at a multiple of 16 bytes. A choice of backends cannot ask for that: where
    it is traced, tensors have no place yet. Slices of projections begin where eight numbers do, if sizes are even."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


@functools.cache
def _kernel(name: str, macros: runtime.Macros, device: torch.device) -> runtime.Kernel:
    file = {"steps": "ssd_steps.cu", "d_steps": "ssd_steps.cu", "backward": "ssd_backward.cu"}.get(name)
    module = runtime.load(file or "ssd_forward.cu", macros, device)
    n = dict(macros)["N"]
    signal, matrix, decays = 2 * CHUNK * TILE, 2 * CHUNK * n, 4 * 4 * CHUNK
    shared = 0  # bytes of `Shared`
    if name == "outputs":
        stages = 3 if n <= 128 else 2
        shared = stages * (2 * matrix + 2 * signal + 2 * decays) + 2 * signal
    elif name == "backward":
        shared = 2 * (2 * signal + 2 * matrix + decays) + 2 * matrix + signal + 16 * CHUNK // 8 * 128 + 2048
    elif name in ("states", "ends", "flows", "flow_ends"):
        shared = 2 * (matrix + 1024 + 2 * signal + 2 * decays) + 2 * matrix
    return runtime.Kernel(module, name, THREADS, shared)


ssd.register("cuda", why_not=why_not)(custom_op("cuda", Kernels(forward, backward)))
