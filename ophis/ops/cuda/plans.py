"""What calls with the same sizes, strides and dtypes have in common, worked out once for all of them.

An op describes a call in a tuple that can be looked up, and finds a plan for it: the kernels, their blocks, and the
parameters but for the addresses of tensors. A GPU is through with a short row sooner than Python with one call's sums.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ophis.ops.cuda import runtime

Launch = tuple[runtime.Kernel, int]  # and its blocks
Sizes = tuple[tuple[str, int], ...]  # names, and how many numbers of float32 each has


class Signal(NamedTuple):
    """A tensor, but for its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    beyond: int  # bytes from a multiple of 16 to where it starts

    @property
    def in_fours(self) -> bool:
        """Whether four neighbours on the last axis can be read at once, wherever one starts."""
        *strides, last = self.strides
        if last != 1 or self.shape[-1] % 4 or self.beyond % (4 * self.dtype.itemsize):
            return False
        return not any(stride % 4 for stride in strides)


def facts(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What makes a `Signal` of each, in tuples: these are made and looked up at every call, in half the time."""
    return tuple([None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for t in tensors])


def signals(facts: tuple[Any, ...]) -> list[Any]:
    return [None if of_one is None else Signal(*of_one) for of_one in facts]


class Scratch:
    """Memory for as long as a call's kernels run, by name. Each begins at a multiple of 128 bytes, as loads like it."""

    def __init__(self, like: Tensor, sizes: Sizes):
        numbers, offsets = _layout(sizes)
        self.memory = like.new_empty(numbers) if sizes else None  # alive while this is
        start = self.memory.data_ptr() if self.memory is not None else 0
        self.addresses = {name: start + offset for name, offset in offsets}


@functools.lru_cache(maxsize=1024)
def _layout(sizes: Sizes) -> tuple[int, Sizes]:
    """How many numbers there are in all, and the byte at which each name's begin."""
    numbers, offsets = 0, []
    for name, size in sizes:
        offsets.append((name, 4 * numbers))
        numbers += -(-size // 32) * 32
    return numbers, tuple(offsets)


class Parameters:
    """A struct of pointers, which a call brings, and numbers after them, which are the same for many."""

    def __init__(self, pointers: tuple[str, ...], numbers: list[int]):
        self.nowhere, self.in_order = dict.fromkeys(pointers, 0), operator.itemgetter(*pointers)
        self.form = struct.Struct(f"{len(pointers)}q")
        self.template = bytes(self.form.size) + struct.pack(f"{len(numbers)}q", *numbers)
        self.type = ctypes.c_char * len(self.template)

    def filled(self, scratch: Scratch, tensors: dict[str, Tensor | None]) -> ctypes.Array[ctypes.c_char]:
        memory = self.type.from_buffer_copy(self.template)
        addresses = {**self.nowhere, **scratch.addresses}
        for name, t in tensors.items():
            if t is not None:
                addresses[name] = t.data_ptr()
        self.form.pack_into(memory, 0, *self.in_order(addresses))
        return memory


class Plan(NamedTuple):
    """Kernels, one after the other, and what they are launched with."""

    parameters: Parameters
    launches: tuple[Launch, ...]
    scratch: Sizes = ()  # what they need, unless it is shared

    def run(self, scratch: Scratch, **tensors: Tensor | None) -> None:
        parameters, stream = self.parameters.filled(scratch, tensors), runtime.stream()
        for kernel, blocks in self.launches:
            kernel(blocks, parameters, stream)


def empty_like(t: Tensor) -> Tensor:
    """Without the gaps that t may have. `t.new_empty(t.shape)` takes PyTorch twice as long; a backward pass has ten."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def dense(*tensors: Tensor | None) -> list[Any]:
    """Parameters and states are small: copies where they are not contiguous cost little."""
    return [None if t is None else t.contiguous() for t in tensors]
