"""Every op, case, backend, dtype and length against the reference in float64, by the rule in `ophis.testing`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ophis.ops import OPS
from ophis.testing import CASES, STEPS, Case, assert_close, backends, check, evaluate, is_differentiable

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (1, 3, 63, 64, 65, 200)
CALLS = [pytest.param(name, case, id=f"{name}-{case.name}") for name, cases in CASES.items() for case in cases]
# The reference is a loop in Python: a thousand positions take it seconds, so only some cases see them.
LONG = [pytest.param(name, case, id=f"{name}-{case.name}") for name, cases in CASES.items() for case in cases[:2]]

# Shapes of models, for a GPU. Chosen so that the reference's float64 states of all positions fit into 24 GB.
REAL = {
    "selective_scan": dict(length=1000, b=2, d=1536, n=16),
    "ssd": dict(length=1000, b=1, h=24, p=64, n=128),
    "causal_conv": dict(length=2048, b=4, d=1792),
    "rms_norm": dict(length=2048, b=4, d=2560),
    "gated_rms_norm": dict(length=2048, b=4, d=1536),
    "s4d": dict(length=1000, b=4, d=256, n=32),
    "s4d_kernel": dict(length=1000, d=256, n=32),
    "long_conv": dict(length=1000, b=1, d=64),
}
# The fewest channels that the cases' groups divide, for finite differences.
SMALL = {
    "selective_scan": dict(b=1, d=3, n=2),
    "ssd": dict(b=1, p=1, n=2),
    "causal_conv": dict(b=1, d=2),
    "rms_norm": dict(b=1, d=5),
    "gated_rms_norm": dict(b=1, d=12),
    "s4d": dict(b=1, d=1, n=2),
    "s4d_kernel": dict(d=1, n=2),
    "long_conv": dict(b=1, d=1),
}


def checked(name: str, inputs: dict[str, Any]) -> None:
    """Checks the call on every backend that can run it."""
    could = [backend for backend in backends(OPS[name], inputs) if backend != "reference"]
    assert could, f"nothing but the reference runs this call: {OPS[name].explain(**inputs)}"
    for backend in could:
        check(OPS[name], inputs, backend)


def test_every_op_has_cases():
    assert CASES.keys() | STEPS.keys() == OPS.keys()


def test_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(2).isnan().all()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "case"), CALLS)
def test_backends(name: str, case: Case, dtype: torch.dtype, length: int, device: str):
    checked(name, case.inputs(device, dtype, length))


@pytest.mark.parametrize(("name", "case"), LONG)
def test_backends_at_a_thousand_positions(name: str, case: Case, device: str):
    checked(name, case.inputs(device, torch.float32, 1000))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "case"), LONG)
def test_backends_at_real_shapes(name: str, case: Case, dtype: torch.dtype):
    checked(name, case.inputs("cuda", dtype, **REAL[name]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "case"), CALLS)
def test_reference_in_narrow_dtypes(name: str, case: Case, dtype: torch.dtype, device: str):
    """The reference is plain PyTorch, whose error a backend may double: it must be small itself."""
    check(OPS[name], case.inputs(device, dtype, 65), "reference")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("length", (1, 70))
@pytest.mark.parametrize("name", ("selective_scan", "ssd", "causal_conv", "s4d"))
def test_states_are_float32_whatever_the_inputs_are(name: str, length: int, dtype: torch.dtype):
    for case in CASES[name]:
        inputs = case.inputs(dtype=dtype, length=length)
        for backend in backends(OPS[name], inputs):
            y, state = OPS[name](**inputs, backend=backend)
            assert y.dtype == dtype
            assert state.dtype.to_real() == torch.float32


@pytest.mark.parametrize(("name", "case"), CALLS)
def test_twice_the_same_bits(name: str, case: Case, device: str):
    inputs = case.inputs(device, length=150)
    torch.use_deterministic_algorithms(False)  # PyTorch's choice of algorithms must not be what makes them the same
    try:
        for backend in backends(OPS[name], inputs):
            first, second = (evaluate(OPS[name], inputs, backend) for _ in range(2))
            for key in first:
                assert torch.equal(first[key], second[key]), f"{backend}: {key}"
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def differentiable(name: str, inputs: dict[str, Any], backend: str) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    """The call as a function of its differentiable tensors alone, and these."""
    names = [k for k, v in inputs.items() if is_differentiable(v)]

    def call(*tensors: torch.Tensor) -> Any:
        return OPS[name](**{**inputs, **dict(zip(names, tensors, strict=True))}, backend=backend)

    return call, [inputs[k].requires_grad_() for k in names]


@pytest.mark.parametrize(("name", "case"), CALLS)
def test_gradients_against_finite_differences(name: str, case: Case):
    """Entry by entry at length 3, and along random directions at one that every chunked backend takes in two chunks.

    The reference's gradients are PyTorch's own: random directions do.
    """
    inputs = case.inputs(dtype=torch.float64, length=3, **SMALL[name])
    longer = case.inputs(dtype=torch.float64, length=70)
    for backend in backends(OPS[name], inputs):  # not every kernel takes float64
        assert torch.autograd.gradcheck(*differentiable(name, inputs, backend), fast_mode=backend == "reference")
        assert torch.autograd.gradcheck(*differentiable(name, longer, backend), fast_mode=True)


@pytest.mark.parametrize(("name", "case"), [call for call in CALLS if call.values[0] in ("selective_scan", "ssd")])
def test_second_gradients_against_finite_differences(name: str, case: Case):
    inputs = case.inputs(dtype=torch.float64, length=3, **SMALL[name])
    assert torch.autograd.gradgradcheck(*differentiable(name, inputs, "torch"), fast_mode=True)


def test_selective_scan_of_a_batch_in_parts():
    """States of more than 65536 numbers a position: on the CPU the torch backend takes two rows, then the third."""
    check(OPS["selective_scan"], CASES["selective_scan"][1].inputs(length=34, b=3, d=512, n=64), "torch")


@pytest.mark.parametrize(("name", "case"), [call for call in CALLS if call.values[0] in ("selective_scan", "ssd")])
def test_second_gradients_where_the_inputs_depend_on_each_other(name: str, case: Case):
    """As in a layer, where step sizes, B and C come from x: each path to it counts once."""
    inputs = case.inputs(dtype=torch.float64, length=5, **SMALL[name])
    x = inputs.pop("x").requires_grad_()

    def gradient_of_gradient(backend: str) -> torch.Tensor:
        scale = x.mean().sigmoid()
        dependent = {k: inputs[k] * scale for k in ("dt", "B", "C")}
        y, state = OPS[name](x, **{**inputs, **dependent}, backend=backend)
        (gradient,) = torch.autograd.grad(y.real.square().sum() + state.abs().square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    assert_close(gradient_of_gradient("torch"), gradient_of_gradient("reference"))
