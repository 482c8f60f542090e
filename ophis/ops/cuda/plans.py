"""What calls with the same sizes, strides and dtypes have in common, worked out once for all of them.

An op describes a call in a tuple that can be looked up, and finds a plan for it: the kernels, their blocks, and the
parameters but for the addresses of tensors. A GPU is through with a short row sooner than Python with one call's sums.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ophis.ops.cuda import runtime

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # `Kind` of numbers.cuh
Launch = tuple[runtime.Kernel, int]  # and its blocks


class Signal(NamedTuple):
    """How a tensor lies in memory."""

    dtype: torch.dtype
    strides: tuple[int, ...]

    def in_fours(self, size: int, beyond: int) -> bool:
        """Whether four neighbours on the last axis, of this size, can be read at once, wherever one starts: the tensor
        begins so many bytes beyond a multiple of 16."""
        *strides, last = self.strides
        if last != 1 or size % 4 or beyond % (4 * self.dtype.itemsize):
            return False
        return not any(stride % 4 for stride in strides)


def facts(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What makes a `Signal` of each, in tuples: these are made and looked up at every call, in half the time."""
    return tuple([None if t is None else (t.dtype, t.stride()) for t in tensors])


def signals(facts: tuple[Any, ...]) -> list[Any]:
    return [None if of_one is None else Signal(*of_one) for of_one in facts]


def addresses(*tensors: Tensor | None) -> list[int]:
    """Null of what is not there."""
    return [0 if t is None else t.data_ptr() for t in tensors]


class Scratch:
    """Memory for as long as a call's kernels run, in parts of so many numbers of float32."""

    def __init__(self, *sizes: int):
        self.sizes = sizes
        # Each part begins at a multiple of 128 bytes, as loads like it.
        *starts, self.numbers = itertools.accumulate((-(-size // 32) * 32 for size in sizes), initial=0)
        self.offsets = [4 * start if size else None for start, size in zip(starts, sizes, strict=True)]

    def allocate(self, like: Tensor) -> tuple[Any, Sequence[int]]:
        """What is to be kept until the kernels are launched, and each part's address: null where it has no size."""
        if not self.numbers:
            return None, ()
        memory = like.new_empty(self.numbers, dtype=torch.float32)
        start = memory.data_ptr()
        return memory, [0 if offset is None else start + offset for offset in self.offsets]


class Plan(NamedTuple):
    """Kernels, one after the other, what they are launched with, and the memory that they need."""

    parameters: runtime.Parameters
    launches: tuple[Launch, ...]
    scratch: Scratch

    def run(self, tensors: Sequence[int], parts: Sequence[int]) -> None:
        """With the addresses of all tensors that the parameters are for, in their order, and of scratch memory."""
        parameters = self.parameters.filled(*tensors, *parts)
        arguments, stream = ctypes.addressof(parameters), runtime.stream()
        for kernel, blocks in self.launches:
            kernel(blocks, arguments, stream)


# Without the gaps that a tensor may have. `t.new_empty(t.shape)` takes PyTorch twice as long; a backward pass has ten.
empty_like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
