"""The short convolution's forward pass in CUDA C++; backward it is Triton's, which is as fast as memory there.

b batch  l length  d channels  w width
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util

import torch
from torch import Tensor

from ophis.ops.causal_conv import causal_conv
from ophis.ops.cuda import runtime
from ophis.ops.cuda.plans import addresses
from ophis.ops.library import causal_conv as library

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FURTHEST = 2**24  # numbers between neighbouring positions: the kernel takes up to RUN of them with offsets of 32 bits
WIDEST = 4
HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked once: torch.compile does not trace it
RUN, WARPS = 16, 2  # positions of a thread; warps of a block


def why_not(call) -> str | None:
    x = call["x"]
    if not x.is_cuda:
        return f"x is on {x.device.type}, not on an NVIDIA GPU"
    return runtime.why_not_on(x.device) or why_not_these(call)


def why_not_these(call) -> str | None:
    """Tensors that the kernel is not for."""
    if reason := library.why_not(call):
        return reason
    x, w = call["x"], call["weight"].shape[1]
    if not 2 <= w <= WIDEST:
        return f"its kernel is for widths from 2 to {WIDEST}, and here w={w}"
    if not HAS_TRITON:
        return "the package triton is missing, whose kernel goes back"
    # Where x starts is not asked here, since calls are told apart by their shapes and strides alone: `in_fours`.
    if x.stride(2) != 1 or any(size % 4 for size in (x.shape[2], x.stride(0), x.stride(1))):
        return "the channels of x cannot be read four at a time"
    if x.stride(1) > FURTHEST:
        return "neighbouring positions lie more than 2^24 numbers apart in memory"
    return None


@runtime.on_its_device
def forward(x, weight, bias, initial_state, cu_seqlens, silu):
    b, l, d = x.shape
    w = weight.shape[1]
    sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
    x, weight, bias = in_fours(x), in_fours(weight.contiguous()), None if bias is None else in_fours(bias)
    y = x.new_empty((b, l, d))
    final_state = x.new_empty((sequences, w - 1, d), dtype=torch.float32)
    kernel = convolve(
        x.dtype, weight.dtype, None if bias is None else bias.dtype,
        None if initial_state is None else initial_state.dtype, w, silu, cu_seqlens is not None, x.device,
    )  # fmt: skip
    runs = -(-l // (RUN * WARPS))
    tensors = addresses(x, weight, bias, initial_state, cu_seqlens, y, final_state)
    strides = (0, 0, 0) if initial_state is None else initial_state.stride()
    sizes = (*x.stride()[:2], *strides, b, l, d, sequences, runs)
    blocks = -(-d // 128) * runs * b + -(-sequences * d // 4 // kernel.threads)
    arguments = parameters(sizes, len(tensors)).filled(*tensors)
    kernel(blocks, ctypes.addressof(arguments), runtime.stream())
    return y, final_state


def in_fours(t: Tensor) -> Tensor:
    """A parameter may begin anywhere in a larger one: copied, it begins where four numbers can be read at once."""
    return t if t.data_ptr() % (4 * t.element_size()) == 0 and t.stride(-1) == 1 else t.contiguous().clone()


def backward(*tensors):
    from ophis.ops.triton.causal_conv import backward

    return backward(*tensors)


parameters = functools.lru_cache(maxsize=1024)(runtime.Parameters)


@functools.cache
def convolve(x, weight, bias, initial, w: int, silu: bool, packed: bool, device: torch.device) -> runtime.Kernel:
    """For these dtypes; None for what is not there."""
    macros = (
        ("X_KIND", KINDS[x]),
        ("WEIGHT_KIND", KINDS[weight]),
        ("BIAS_KIND", KINDS[bias or x]),
        ("INITIAL_KIND", KINDS[initial or x]),
        ("W", w),
        ("SILU", int(silu)),
        ("HAS_BIAS", int(bias is not None)),
        ("HAS_INITIAL", int(initial is not None)),
        ("PACKED", int(packed)),
        ("RUN", RUN),
        ("WARPS", WARPS),
    )
    return runtime.Kernel(runtime.load("causal_conv.cu", macros, device), "convolve", 32 * WARPS, 0)


causal_conv.register("cuda", why_not)(library.custom_op("cuda", library.Kernels(forward, backward)))
