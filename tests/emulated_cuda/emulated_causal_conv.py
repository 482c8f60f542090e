"""The convolution's CUDA kernel on a CPU (see emulation.py). Backward is the reference's; on a GPU, Triton's."""

from __future__ import annotations

import itertools
from typing import Any

import emulation  # noqa: F401 (puts itself in the place of the GPU's packages)
import pytest
import torch

from ophis.ops.causal_conv import causal_conv
from ophis.ops.cuda import causal_conv as convolution
from ophis.ops.library import causal_conv as conv_library
from ophis.testing import CASES, check


def conv_backward(dy, d_final, x, weight, bias, initial_state, cu_seqlens, silu):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, initial_state)]
    with torch.enable_grad():
        names = ("x", "weight", "bias", "initial_state")
        call = dict(zip(names, leaves, strict=True), cu_seqlens=cu_seqlens, activation="silu" if silu else None)
        outputs = causal_conv.run_reference(**call)
    wanted = [t for t in leaves if t is not None]
    weights = [dy, torch.zeros_like(outputs[1]) if d_final is None else d_final]
    found = iter(torch.autograd.grad(outputs, wanted, weights, allow_unused=True, materialize_grads=True))
    return tuple(None if t is None else next(found) for t in leaves)


causal_conv.register("emulated", convolution.why_not_these)(
    conv_library.custom_op("emulated", conv_library.Kernels(convolution.forward, conv_backward))
)
CONV = [case for case in CASES["causal_conv"] if causal_conv.explain(**case.inputs(length=4, d=24))["emulated"] is None]


def test_there_are_cases_of_the_convolution():
    assert {case.name for case in CONV} >= {"everything", "packed"}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("length", (2, 70))
@pytest.mark.parametrize("case", CONV, ids=lambda case: case.name)
def test_convolution(case: Any, length: int, dtype: torch.dtype):
    check(causal_conv, case.inputs(dtype=dtype, length=length, d=24), "emulated")


@pytest.mark.parametrize("lengths", [(1, 1, 0, 2, 5, 40, 0, 1, 3), (32, 16, 0, 17)], ids=str)
def test_convolution_of_short_sequences(lengths: tuple[int, ...]):
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    inputs = next(case for case in CONV if case.name == "packed").inputs(length=int(offsets[-1]), d=20)
    inputs["initial_state"] = torch.randn(len(lengths), *inputs["initial_state"].shape[1:])
    check(causal_conv, {**inputs, "cu_seqlens": offsets}, "emulated")


def test_convolution_of_a_slice():
    inputs = next(case for case in CONV if case.name == "everything").inputs(length=40, b=2, d=20)
    for offset in (1, 4):
        wide = torch.full((2, 40, 48), torch.nan)
        inputs["x"] = wide[..., offset : offset + 20].copy_(inputs["x"])
        check(causal_conv, inputs, "emulated")
