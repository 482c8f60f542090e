"""Where inputs lie in memory changes nothing, and the scan never holds a state for every position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ophis import ops
from ophis.ops import OPS
from ophis.testing import CASES, Case, assert_close, backends, evaluate, is_differentiable

CALLS = [
    pytest.param(name, case, backend, id=f"{name}-{case.name}-{backend}")
    for name, cases in CASES.items()
    for case in cases
    for backend in backends(OPS[name], case.inputs(dtype=torch.float64))
]


def slice_of_something_wider(t: Tensor) -> Tensor:
    """As `projection(x).split(...)` gives it. What lies around it is NaN, so that reading there shows."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 3), torch.nan)
    part = wide[..., 1 : 1 + t.shape[-1]]
    return part.copy_(t)


def reversed_axes(t: Tensor) -> Tensor:
    """The first axis is the densest one in memory, the last the widest."""
    axes = tuple(reversed(range(t.ndim)))
    return t.permute(axes).contiguous().permute(axes)


def every_second(t: Tensor) -> Tensor:
    """Every axis has a gap after each entry."""
    spread = t.new_full([2 * size for size in t.shape], torch.nan)
    part = spread[tuple(slice(None, None, 2) for _ in t.shape)]
    return part.copy_(t)


@pytest.mark.parametrize("length", (1, 70))
@pytest.mark.parametrize("layout", (slice_of_something_wider, reversed_axes, every_second), ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "case", "backend"), CALLS)
def test_strides(name: str, case: Case, backend: str, layout: Callable[[Tensor], Tensor], length: int):
    inputs = case.inputs(dtype=torch.float64, length=length)
    expected = evaluate(OPS[name], inputs, backend)
    strided = {k: layout(v) if is_differentiable(v) else v for k, v in inputs.items()}
    for key, tensor in evaluate(OPS[name], strided, backend).items():
        assert_close(tensor, expected[key], name=key)


def sum_and_gradients(name: str, inputs: dict[str, Any], backend: str) -> list[Tensor]:
    """The outputs, and the gradient of their sum: one number for all entries, with stride 0."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if is_differentiable(v)}
    outputs = OPS[name](**{**inputs, **leaves}, backend=backend)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    total = torch.stack([y.real.sum() for y in outputs]).sum()
    return [*outputs, *torch.autograd.grad(total, list(leaves.values()))]


@pytest.mark.parametrize("length", (1, 70))
@pytest.mark.parametrize(
    ("name", "case", "backend"),
    [call for call in CALLS if call.values[0] != "s4d_kernel"],  # the sum of a kernel hardly depends on its step size
)
def test_expanded_inputs_and_gradients(name: str, case: Case, backend: str, length: int):
    """The first position, or channel, for all of them."""
    inputs = case.inputs(dtype=torch.float64, length=length)
    for key, t in inputs.items():
        if is_differentiable(t):
            inputs[key] = t[:, :1].expand_as(t) if t.ndim > 1 else t[:1].expand_as(t)
    dense = {
        k: v.clone(memory_format=torch.contiguous_format) if is_differentiable(v) else v for k, v in inputs.items()
    }
    expected = sum_and_gradients(name, dense, backend)
    for actual, same in zip(sum_and_gradients(name, inputs, backend), expected, strict=True):
        assert_close(actual, same)


def test_selective_scan_never_holds_a_state_for_every_position():
    b, l, d, n = 2, 512, 32, 16
    inputs = CASES["selective_scan"][1].inputs(length=l, b=b, d=d, n=n)
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if is_differentiable(v)}
    saved = []

    def count(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(count, lambda t: t),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        y, state = ops.selective_scan(**{**inputs, **leaves}, backend="torch")
        (y.sum() + state.sum()).backward()
    assert max(saved) <= b * l * d  # a signal; the states kept, one for 32 positions, are half of that here
    largest = max(event.self_cpu_memory_usage for event in profile.events() or ())
    assert largest >= 4 * b * l * d, "the profiler saw no allocation as large as a signal"
    assert largest <= 4 * b * l * d * n / 8


@pytest.mark.parametrize("name", ("selective_scan", "ssd", "causal_conv", "s4d"))
def test_inputs_are_left_as_they_were(name: str):
    for case in CASES[name]:
        for length in (1, 70):
            inputs = case.inputs(length=length)
            before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
            for backend in backends(OPS[name], inputs):
                evaluate(OPS[name], inputs, backend)
                for key, tensor in before.items():
                    assert torch.equal(inputs[key], tensor), f"{backend} wrote into {key}"
