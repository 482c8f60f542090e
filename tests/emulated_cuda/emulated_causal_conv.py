"""The convolution's CUDA kernels on a CPU (see emulation.py)."""

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

causal_conv.register("emulated", convolution.why_not_these)(
    conv_library.custom_op("emulated", conv_library.Kernels(convolution.forward, convolution.backward))
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


@pytest.mark.parametrize("w", (2, 3, 4))
def test_convolution_of_widths(w: int):
    """With more channels than a warp takes, in chunks that end within a run."""
    case = next(case for case in CONV if case.name == "everything")
    check(causal_conv, case.inputs(length=37, b=2, d=148, w=w), "emulated")


@pytest.mark.parametrize("layout", ("slice", "misaligned slice", "channels first", "the same everywhere"))
def test_gradients_that_lie_otherwise(layout: str):
    """Those of the outputs, as autograd hands them on."""
    inputs = next(case for case in CONV if case.name == "everything").inputs(length=20, b=2, d=24)
    dense = torch.randn(2, 20, 24)
    dy = {
        "slice": lambda: torch.nn.functional.pad(dense, (4, 4), value=torch.nan)[..., 4:28],
        "misaligned slice": lambda: torch.nn.functional.pad(dense, (3, 5), value=torch.nan)[..., 3:27],
        "channels first": lambda: dense.mT.contiguous().mT,
        "the same everywhere": lambda: dense[:1, :1, :1].expand(2, 20, 24),
    }[layout]()
    found = []
    for backend, weight in (("emulated", dy), ("reference", dy.contiguous())):
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        y, _ = causal_conv(**{**inputs, **leaves}, backend=backend)
        found.append(torch.autograd.grad(y, list(leaves.values()), weight))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
