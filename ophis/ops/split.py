"""Slices of a row, as a projection makes them, whose gradients are written side by side."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ophis.ops.library import recorded, traced

LARGE = 2**24  # numbers, below which copying gradients takes a GPU less time than it takes Python to spare it
ALIGNED = 16  # bytes: what a kernel writes at once


def split(row: Tensor, *shapes: int | tuple[int, ...]) -> tuple[Tensor, ...]:
    """Neighbours on the last axis of `row`, (..., w), as views: `torch.split`, and `unflatten` for those given a tuple.

    Going backward, the gradients of all slices become one of the row. PyTorch copies them into it, a pass over all of
    them that reads and writes. The operators' CUDA kernels write theirs into it in the first place, where they are
    called with these very tensors; other gradients are copied.

    Args:
        row: what a projection gave.
        shapes: of each slice, its size or last axes; these sizes add up to w.

    Returns:
        Of each, (..., size) or (..., *axes), views of `row`.

    Raises:
        ValueError: they do not.
    """
    last = [shape if isinstance(shape, tuple) else (shape,) for shape in shapes]
    sizes = [math.prod(shape) for shape in last]
    if sum(sizes) != row.shape[-1]:
        given = ", ".join(map(str, shapes))
        raise ValueError(f"split: slices of {given} make {sum(sizes)}, and the row has {row.shape[-1]}")
    if not _pays(row, sizes):
        parts = zip(row.split(sizes, -1), last, strict=True)
        return tuple(t.unflatten(-1, shape) if len(shape) > 1 else t for t, shape in parts)
    gradient = Row(row, sizes, last)
    slices = Split.apply(row, gradient)
    for i, t in enumerate(slices):
        t._place = Place(gradient, i)  # type: ignore[attr-defined]
    return slices


def places_of(*tensors: Tensor | None) -> list[Place | None]:
    """Where the gradients of these belong, if they are slices. Asked where an op is called: what autograd keeps of a
    tensor does not know."""
    return [getattr(t, "_place", None) for t in tensors]


def taken(places: list[Place | None]) -> list[Tensor | None]:
    """Memory there, for a backward pass to write to, or None."""
    return [None if place is None else place.row.take(place.index) for place in places]


class Place(NamedTuple):
    """Of a slice's gradient."""

    row: Row
    index: int


class Row:
    """The gradient of a row, of which slices are given out to be written."""

    def __init__(self, like: Tensor, sizes: list[int], shapes: list[tuple[int, ...]]):
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.sizes, self.shapes = sizes, shapes
        self.memory: Tensor | None = None
        self.taken: set[int] = set()
        self.backward_pass: int | None = None  # that these are of

    def begin(self) -> None:
        """Memory is of one backward pass: one that asked for gradients of slices alone has left them with somebody."""
        now = torch._C._current_graph_task_id()
        if now != self.backward_pass:
            self.backward_pass, self.memory = now, None
            self.taken.clear()

    def slices(self, row: Tensor) -> list[Tensor]:
        lead = row.shape[:-1]
        return [t.view(*lead, *shape) for t, shape in zip(row.split(self.sizes, -1), self.shapes, strict=True)]

    def take(self, index: int) -> Tensor | None:
        """Memory for the gradient of a slice. None for a second one of the same slice: autograd adds them up."""
        self.begin()
        if index in self.taken:
            return None
        self.taken.add(index)
        if self.memory is None:
            self.memory = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.slices(self.memory)[index]

    def filled(self, gradients: tuple[Tensor | None, ...]) -> Tensor:
        """The row's gradient, with what was not written into it."""
        self.begin()
        row, self.memory = self.memory, None
        if row is None:
            row = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for place, gradient in zip(self.slices(row), gradients, strict=True):
            if gradient is None:
                place.zero_()
            elif (gradient.data_ptr(), gradient.stride()) != (place.data_ptr(), place.stride()):
                place.copy_(gradient)
        return row


class Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: Tensor, gradient: Row) -> tuple[Tensor, ...]:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return tuple(gradient.slices(row))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        row = ctx.gradient
        # create_graph=True: the gradient has one of its own; or there is no memory, but something that follows it.
        if torch.is_grad_enabled() or any(g is not None and traced(g) for g in gradients):
            lead = row.shape[:-1]
            flat = [
                torch.zeros(*lead, size, dtype=row.dtype, device=row.device) if g is None else g.reshape(*lead, size)
                for g, size in zip(gradients, row.sizes, strict=True)
            ]
            return torch.cat(flat, -1), None
        return row.filled(gradients), None


def _pays(row: Tensor, sizes: list[int]) -> bool:
    if traced(row) or not row.is_cuda or row.numel() < LARGE or not recorded(row):
        return False
    return not any(size * row.element_size() % ALIGNED for size in sizes)
