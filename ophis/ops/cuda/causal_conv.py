"""The short convolution in CUDA C++: which kernels, in which sizes, on which memory.

b batch  l length  d channels  w width
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ophis.ops.causal_conv import causal_conv
from ophis.ops.cuda import runtime
from ophis.ops.cuda.plans import KINDS, Plan, Scratch, Signal, addresses, empty_like, facts, signals
from ophis.ops.library import causal_conv as library

FURTHEST = 2**24  # numbers between neighbouring positions: `convolve` takes up to RUN of them with offsets of 32 bits
WIDEST = 4
RUN, WARPS = 16, 2  # of `convolve`: positions of a thread; warps of a block
# Of `convolve_back`: positions on their way, by width, twice as many of 16 bits; warps of a block, and of a
# multiprocessor, whose registers are given out accordingly. A warp takes so many positions, within bounds, that all
# multiprocessors have that many warps. Each leaves w + 1 rows of sums to be added up.
AHEAD = {2: 4, 3: 3, 4: 4}
BACK_WARPS, RESIDENT = 4, 16
SHORTEST, LONGEST = 32, 256
ADDING = 256  # threads of a block of `add_up`, two for each number


def why_not(call) -> str | None:
    x = call["x"]
    if not x.is_cuda:
        return f"x is on {x.device.type}, not on an NVIDIA GPU"
    return runtime.why_not_on(x.device) or why_not_these(call)


def why_not_these(call) -> str | None:
    """Tensors that the kernels are not for."""
    if reason := library.why_not(call):
        return reason
    x, w = call["x"], call["weight"].shape[1]
    if not 2 <= w <= WIDEST:
        return f"its kernels are for widths from 2 to {WIDEST}, and here w={w}"
    # Where x starts is not asked here, since calls are told apart by their shapes and strides alone: `in_fours`.
    if x.stride(2) != 1 or any(size % 4 for size in (x.shape[2], x.stride(0), x.stride(1))):
        return "the channels of x cannot be read four at a time"
    if x.stride(1) > FURTHEST:
        return "neighbouring positions lie more than 2^24 numbers apart in memory"
    return None


@runtime.on_its_device
def forward(x, weight, bias, initial_state, cu_seqlens, silu):
    x, weight, bias = in_fours(x), of_parameter(weight), None if bias is None else of_parameter(bias)
    plan = forward_plan(*description(x, weight, bias, initial_state, None, None, None, cu_seqlens, silu))
    y = empty_like(x)
    rows = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
    final_state = x.new_empty((rows, weight.shape[1] - 1, x.shape[2]), dtype=torch.float32)
    plan.run(addresses(x, weight, bias, initial_state, cu_seqlens, y, final_state), ())
    return y, final_state


@runtime.on_its_device
def backward(dy, d_final, x, weight, bias, initial_state, cu_seqlens, silu, d_x=None):
    dy, x, weight = in_fours(dy), in_fours(x), of_parameter(weight)
    bias = None if bias is None else of_parameter(bias)
    inputs = (x, weight, bias, initial_state)
    gradients = [empty_like(x) if d_x is None else d_x, *(None if t is None else empty_like(t) for t in inputs[1:])]
    plan = backward_plan(*description(*inputs, dy, d_final, gradients[0], cu_seqlens, silu))
    _memory, parts = plan.scratch.allocate(x)
    plan.run(addresses(*inputs, cu_seqlens, None, None, dy, d_final, *gradients), parts)
    return gradients


def in_fours(t: Tensor) -> Tensor:
    """A signal whose channels can be read four at a time wherever a position is: itself, or a copy."""
    strides = t.stride()
    if strides[2] == 1 and not (t.data_ptr() % (4 * t.element_size()) or strides[0] % 4 or strides[1] % 4):
        return t
    return t.contiguous().clone()


def of_parameter(t: Tensor) -> Tensor:
    """One may begin anywhere in a larger one: copied, it begins where four numbers can be read at once."""
    return t if t.is_contiguous() and t.data_ptr() % (4 * t.element_size()) == 0 else t.contiguous().clone()


# What calls have in common


class Described(NamedTuple):
    """A call, but for its numbers: what its kernels and their parameters follow from."""

    x: Signal
    weight: Signal
    bias: Signal | None
    initial_state: Signal | None
    dy: Signal | None
    d_final: Signal | None
    dx: Signal | None
    shape: tuple[int, int, int]  # b, l, d
    w: int
    silu: bool
    sequences: int  # 0: not packed
    device: torch.device

    @property
    def macros(self) -> runtime.Macros:
        return (
            ("X_KIND", KINDS[self.x.dtype]),
            ("WEIGHT_KIND", KINDS[self.weight.dtype]),
            ("BIAS_KIND", KINDS[(self.bias or self.x).dtype]),
            ("INITIAL_KIND", KINDS[(self.initial_state or self.x).dtype]),
            ("W", self.w),
            ("SILU", int(self.silu)),
            ("HAS_BIAS", int(self.bias is not None)),
            ("HAS_INITIAL", int(self.initial_state is not None)),
            ("PACKED", int(self.sequences > 0)),
        )


def description(x, weight, bias, initial_state, dy, d_final, dx, cu_seqlens, silu) -> tuple[Any, ...]:
    """What makes a `Described`."""
    sequences = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    of_tensors = facts(x, weight, bias, initial_state, dy, d_final, dx)
    return of_tensors, x.shape, weight.shape[1], silu, sequences, x.device


# What `Params` of causal_conv.cuh begins with: tensors, of which the forward pass needs the first.
TENSORS, OF_FORWARD = 13, 7


@functools.lru_cache(maxsize=1024)
def forward_plan(of_tensors: tuple[Any, ...], *more: Any) -> Plan:
    call = Described(*signals(of_tensors), *more)
    b, l, d = call.shape
    kernel = forward_kernel(call.macros, call.device)
    runs = -(-l // (RUN * WARPS))
    windows = -(-(call.sequences or b) * d // 4 // kernel.threads)
    parameters = parameters_of(call, OF_FORWARD, runs, RUN, 0)
    return Plan(parameters, ((kernel, warps_across(d) * runs * b + windows),), Scratch())


@functools.lru_cache(maxsize=1024)
def backward_plan(of_tensors: tuple[Any, ...], *more: Any) -> Plan:
    call = Described(*signals(of_tensors), *more)
    b, l, d = call.shape
    ahead, across = AHEAD[call.w] * (4 // call.x.dtype.itemsize), warps_across(d)
    run = -(-b * l * across // (RESIDENT * runtime.multiprocessors(call.device)))
    run = -(-max(SHORTEST, min(run, LONGEST)) // ahead) * ahead
    runs = -(-l // run)
    chunks = l // run + call.sequences if call.sequences else b * runs
    macros = (*call.macros, ("HAS_D_FINAL", int(call.d_final is not None)), ("AHEAD", ahead))
    kernel, adding = backward_kernels(macros, call.device)
    launches = (kernel, -(-chunks * across // BACK_WARPS)), (adding, -(-(call.w + 1) * d // (ADDING // 2)))
    return Plan(parameters_of(call, TENSORS, runs, run, chunks), launches, Scratch(chunks * (call.w + 1) * d))


def parameters_of(call: Described, count: int, runs: int, run: int, chunks: int) -> runtime.Parameters:
    """`Params` of causal_conv.cuh."""
    tensors = (call.x, call.initial_state, call.dy, call.d_final, call.dx)
    of_x, of_initial, of_dy, of_final, of_dx = ((0, 0, 0) if t is None else t.strides for t in tensors)
    b, l, d = call.shape
    sizes = (b, l, d, call.sequences or b, runs, run, chunks)
    numbers = [*of_x[:2], *of_initial, *of_dy[:2], *of_final, *of_dx[:2], *sizes]
    parts = int(count == TENSORS)
    return runtime.Parameters(numbers, count, TENSORS + 1 - count - parts, parts)


def warps_across(d: int) -> int:
    """How many warps the channels take, 128 each."""
    return -(-d // 128)


@functools.cache
def forward_kernel(macros: runtime.Macros, device: torch.device) -> runtime.Kernel:
    module = runtime.load("causal_conv_forward.cu", (*macros, ("RUN", RUN), ("WARPS", WARPS)), device)
    return runtime.Kernel(module, "convolve", 32 * WARPS, 0)


@functools.cache
def backward_kernels(macros: runtime.Macros, device: torch.device) -> tuple[runtime.Kernel, runtime.Kernel]:
    sizes = (("WARPS", BACK_WARPS), ("BLOCKS", RESIDENT // BACK_WARPS))
    module = runtime.load("causal_conv_backward.cu", (*macros, *sizes), device)
    return runtime.Kernel(module, "convolve_back", 32 * BACK_WARPS, 0), runtime.Kernel(module, "add_up", ADDING, 0)


causal_conv.register("cuda", why_not)(library.custom_op("cuda", library.Kernels(forward, backward)))
