"""Slices of a row, and the row's gradient made of theirs."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from ophis.ops import split

module: Any = sys.modules["ophis.ops.split"]


@pytest.fixture(params=[False, True], ids=["PyTorch's", "side by side"], autouse=True)
def side_by_side(request, monkeypatch) -> bool:
    """On a CPU it never pays."""
    if request.param:
        monkeypatch.setattr(module, "_pays", lambda row, sizes: torch.is_grad_enabled() and row.requires_grad)
    return request.param


def row_of(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_views_in_the_shapes_asked_for():
    row = row_of(2, 3, 20)
    x, heads, nothing, rest = split(row, 4, (2, 6), 0, 4)
    assert [tuple(t.shape) for t in (x, heads, nothing, rest)] == [(2, 3, 4), (2, 3, 2, 6), (2, 3, 0), (2, 3, 4)]
    assert torch.equal(heads.flatten(2), row[..., 4:16])
    assert torch.equal(rest, row[..., 16:])
    assert rest.data_ptr() == row[..., 16:].data_ptr()
    with pytest.raises(ValueError, match=r"split: slices of 4, \(2, 6\) make 16, and the row has 20"):
        split(row, 4, (2, 6))


def test_gradients():
    assert torch.autograd.gradcheck(lambda row: split(row, 2, (2, 2), 1), row_of(2, 7))
    assert torch.autograd.gradgradcheck(lambda row: [t**3 for t in split(row, 2, (2, 2), 1)], row_of(2, 7))


def test_a_slice_that_nobody_used():
    row = row_of(2, 7)
    x, _, y = split(row, 2, 3, 2)
    (x.sum() + 2 * y.sum()).backward()
    assert torch.equal(row.grad, torch.tensor([1.0, 1, 0, 0, 0, 2, 2], dtype=torch.float64).expand(2, 7))


def test_without_a_gradient_it_is_plain():
    with torch.no_grad():
        assert all(t.grad_fn is None and not hasattr(t, "_place") for t in split(row_of(2, 7), 2, 5))


class Writes(torch.autograd.Function):
    """2 x, with the gradient written to where it belongs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.places = module.places_of(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (room,) = module.taken(ctx.places)
        return 2 * dy if room is None else torch.mul(dy, 2, out=room)


def in_place(monkeypatch) -> list[list[bool]]:
    """For each row whose gradient is asked for, whether those of its slices, of which there are any, lie in it."""
    seen: list[list[bool]] = []
    filled = module.Row.filled

    def look(self, gradients):
        if self.memory is not None:
            pairs = zip(gradients, self.slices(self.memory), strict=True)
            seen.append([gradient.data_ptr() == place.data_ptr() for gradient, place in pairs if gradient is not None])
        return filled(self, gradients)

    monkeypatch.setattr(module.Row, "filled", look)
    return seen


def test_written_in_place_or_copied(monkeypatch, side_by_side: bool):
    seen = in_place(monkeypatch)
    row = row_of(2, 7)
    x, y, z = split(row, 2, 3, 2)
    loss = (Writes.apply(x) * 3).sum() + (y * 5).sum() + (Writes.apply(z) * 7).sum()
    loss.backward(retain_graph=True)
    expected = torch.tensor([6.0, 6, 5, 5, 5, 14, 14], dtype=torch.float64).expand(2, 7)
    assert torch.equal(row.grad, expected)
    kept = row.grad
    loss.backward()  # the first one's memory is not this one's
    assert torch.equal(row.grad, 2 * expected)
    assert kept is row.grad
    assert seen == [[True, False, True]] * (2 if side_by_side else 0)


def test_the_same_slice_twice(monkeypatch):
    """Its second gradient is not written over the first: they are added up."""
    row = row_of(2, 7)
    x, _ = split(row, 2, 5)
    ((Writes.apply(x) * 3).sum() + (Writes.apply(x) * 4).sum()).backward()
    assert torch.equal(row.grad, torch.tensor([14.0, 14, 0, 0, 0, 0, 0], dtype=torch.float64).expand(2, 7))


def test_a_gradient_of_a_slice_alone_can_be_kept(monkeypatch, side_by_side: bool):
    """Its pass never asks for the row's; the memory it took is no later pass's."""
    seen = in_place(monkeypatch)
    row = row_of(2, 7)
    x, y = split(row, 2, 5)
    loss = (Writes.apply(x) * 3).sum() + (Writes.apply(y) * 4).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (10 * loss).backward()
    assert torch.equal(first, torch.full_like(first, 6))
    assert torch.equal(row.grad[:, :2], torch.full_like(first, 60))
    assert torch.equal(row.grad[:, 2:], torch.full_like(row.grad[:, 2:], 80))
    assert seen == [[True, True]] * side_by_side


def test_large_rows_on_a_gpu_alone(monkeypatch, side_by_side: bool):
    if side_by_side:
        pytest.skip("what decides is replaced")
    row = torch.randn(2, 8, requires_grad=True)
    assert not module._pays(row, [4, 4])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert not module._pays(row, [4, 4])
    monkeypatch.setattr(module, "LARGE", 16)
    assert module._pays(row, [4, 4])
    assert not module._pays(row, [3, 5])  # a kernel writes 16 bytes at once
    assert not module._pays(row.detach(), [4, 4])
