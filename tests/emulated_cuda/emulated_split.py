"""Gradients that the CUDA kernels write into a row's, instead of into memory of their own (see emulation.py)."""

from __future__ import annotations

import sys
from typing import Any

import emulated_causal_conv
import emulated_selective_scan
import emulated_ssd
import emulation
import pytest
import torch
from test_ops_split import in_place
from torch import Tensor

from ophis import ops
from ophis.ops import library
from ophis.testing import CASES

module: Any = sys.modules["ophis.ops.split"]
KERNELS = (emulated_causal_conv.convolution, emulated_selective_scan.selective_scan, emulated_ssd.ssd)


def inputs_of(name: str, case: str, **options: Any) -> dict[str, Any]:
    if name == "ssd":
        return emulated_ssd.inputs_of(case, **options)
    return next(c for c in CASES[name] if c.name == case).inputs(**options)


def gradients(name: str, inputs: dict[str, Any], of_row: tuple[str, ...], row: Tensor | None) -> tuple[Tensor, ...]:
    """Of the row, or of the tensors that it consists of, one after the other; and of all other inputs."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if library_takes(v)}
    if row is not None:
        row = row.detach().requires_grad_()
        _, *slices, _ = ops.split(row, 8, *(tuple(inputs[k].shape[2:]) for k in of_row), 16)
        leaves.update(zip(of_row, slices, strict=True))
    y, *_ = ops.OPS[name](**{**inputs, **leaves}, backend="emulated")
    torch.manual_seed(0)
    others = [leaves[k] for k in leaves if k not in of_row]
    wanted = [row] if row is not None else [leaves[k] for k in of_row]
    found = torch.autograd.grad(y, [*wanted, *others], torch.randn_like(y))
    if row is not None:
        return found
    b, l = inputs["x"].shape[:2]
    ours = [t.flatten(2) for t in found[: len(of_row)]]
    return torch.cat([ours[0].new_zeros(b, l, 8), *ours, ours[0].new_zeros(b, l, 16)], -1), *found[len(of_row) :]


def library_takes(v: Any) -> bool:
    return isinstance(v, Tensor) and v.is_floating_point()


@pytest.mark.parametrize(
    ("name", "case", "of_row", "options"),
    [
        ("causal_conv", "everything", ("x",), dict(b=2, length=70, d=24)),
        ("causal_conv", "packed", ("x",), dict(length=70, d=24)),
        ("selective_scan", "everything", ("z",), dict(b=2, length=70, d=24, n=16)),
        ("selective_scan", "everything", ("z",), dict(b=1, length=300, d=24, n=24)),
        ("ssd", "everything", ("x", "B", "C"), dict(b=2, length=70, p=64, n=64, h=2)),
        ("ssd", "plain", ("x", "B", "C"), dict(b=1, length=70, p=64, n=64, h=6, g=2)),
        ("ssd", "plain", ("x", "B", "C"), dict(b=1, length=70, p=64, n=256, h=2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("processors", (1, 40), ids=str)
def test_side_by_side(
    name: str, case: str, of_row: tuple[str, ...], options: dict[str, Any], processors: int, monkeypatch
):
    """The same bits, in place: among them splits of heads, whose sums are added up, and two slices of states."""
    monkeypatch.setattr(emulation.runtime, "multiprocessors", lambda device: processors)
    for kernels in KERNELS:
        kernels.forward_plan.cache_clear()
        kernels.backward_plan.cache_clear()
    monkeypatch.setattr(module, "_pays", lambda row, sizes: library.recorded(row))
    seen = in_place(monkeypatch)
    inputs = inputs_of(name, case, **options)
    expected = gradients(name, inputs, of_row, None)
    b, l = inputs["x"].shape[:2]
    parts = [inputs[k].flatten(2) for k in of_row]
    row = torch.cat([parts[0].new_full((b, l, 8), torch.nan), *parts, parts[0].new_zeros(b, l, 16)], -1)
    actual = gradients(name, inputs, of_row, row)
    assert seen == [[True] * len(of_row)]
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
