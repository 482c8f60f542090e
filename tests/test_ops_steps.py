"""The ops of a single position: token by token they are the op on the sequence, and write the state they are given.

Run once more under Triton's interpreter by test_ops_triton.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ophis import ops
from ophis.ops import OPS
from ophis.testing import STEPS, Case, assert_close, backends, is_differentiable, widened

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
CALLS = [
    pytest.param(name, case, backend, dtype, id=f"{name}-{case.name}-{backend}-{dtype}")
    for name, cases in STEPS.items()
    for case in cases
    for dtype in DTYPES
    for backend in backends(OPS[name], case.inputs(dtype=dtype))
]
SIGNALS = ("x", "dt", "B", "C", "z")  # what comes anew with every position
LENGTH = 6  # past every window but the widest


def with_gaps(t: Tensor) -> tuple[Tensor, Tensor]:
    """A copy with a gap after every entry, and all of its memory, which is NaN in the gaps."""
    memory = t.new_full([2 * size for size in t.shape], torch.nan)
    part = memory[tuple(slice(None, None, 2) for _ in t.shape)]
    part.copy_(t)
    return part, memory


def as_sequence(tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """The steps' calls as one of the op on sequences."""
    call = {k: torch.stack([token[k] for token in tokens], 1) if k in SIGNALS else v for k, v in tokens[0].items()}
    call["initial_state"] = call.pop("state")
    return call


@pytest.mark.parametrize(("name", "case", "backend", "dtype"), CALLS)
def test_token_by_token_is_the_sequence(name: str, case: Case, backend: str, dtype: torch.dtype):
    first = case.inputs(dtype=dtype)
    tokens = [{**first, **{k: v for k, v in case.inputs(dtype=dtype, seed=i).items() if k in SIGNALS}}
              for i in range(LENGTH)]  # fmt: skip
    whole, sequence = OPS[name.removesuffix("_step")], as_sequence(tokens)
    expected, final = whole(**widened(sequence), backend="reference")
    plain, plain_final = whole(**sequence, backend="reference")
    state, memory = with_gaps(first["state"])
    ys = [OPS[name](**{**token, "state": state}, backend=backend) for token in tokens]
    assert {y.dtype for y in ys} == {dtype}
    assert_close(torch.stack(ys, 1), expected, plain, dtype=dtype)
    assert_close(state, final, plain_final, dtype=dtype)
    assert memory.isnan().sum() == memory.numel() - state.numel(), "it wrote beside the state"


@pytest.mark.parametrize(("name", "case", "backend", "dtype"), CALLS)
def test_inputs_may_lie_anywhere_and_stay_as_they_were(name: str, case: Case, backend: str, dtype: torch.dtype):
    inputs = case.inputs(dtype=dtype)
    y = OPS[name](**{**inputs, "state": inputs["state"].clone()}, backend=backend)
    strided = {k: with_gaps(v)[0] if is_differentiable(v) else v for k, v in inputs.items()}
    assert_close(OPS[name](**strided, backend=backend), y)
    for key, tensor in inputs.items():
        if key != "state" and isinstance(tensor, Tensor):
            assert torch.equal(strided[key], tensor), f"it wrote into {key}"


@pytest.mark.parametrize(
    ("name", "case", "backend"),
    [(name, cases[1], backend) for name, cases in STEPS.items()
     for backend in backends(OPS[name], cases[1].inputs(dtype=torch.bfloat16))],
)  # fmt: skip
def test_a_state_may_be_narrow(name: str, case: Case, backend: str):
    inputs = case.inputs(dtype=torch.bfloat16)
    narrow, wide = inputs["state"].bfloat16(), inputs["state"].bfloat16().float()
    y = OPS[name](**{**inputs, "state": narrow}, backend=backend)
    expected = OPS[name](**{**inputs, "state": wide}, backend="reference")
    assert narrow.dtype == torch.bfloat16
    assert_close(y, expected)
    assert_close(narrow, wide, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", STEPS)
def test_there_is_no_gradient_and_it_says_so(name: str):
    inputs = STEPS[name][0].inputs()
    message = (
        f"{name}: it changes its state in place and has no gradient, but an input requires one; "
        f"use {name.removesuffix('_step')}, or call it under torch.no_grad()"
    )
    for backend in backends(OPS[name], inputs):
        for key in ("x", "state"):
            before = inputs["state"].clone()
            with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
                OPS[name](**{**inputs, key: inputs[key].clone().requires_grad_()}, backend=backend)
            assert torch.equal(inputs["state"], before)
        with torch.no_grad():
            OPS[name](**{**inputs, "x": inputs["x"].clone().requires_grad_()}, backend=backend)


@pytest.mark.parametrize("name", STEPS)
def test_a_state_that_shares_its_memory_is_refused(name: str):
    inputs = STEPS[name][0].inputs()
    shape = tuple(inputs["state"].shape)
    shared = inputs["state"][:1].expand(shape)
    message = f"{name}: state has strides {shared.stride()} for shape {shape}: its rows share memory, "
    for backend in backends(OPS[name], inputs):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}expected one that can be written in place$"):
            OPS[name](**{**inputs, "state": shared}, backend=backend)


def test_causal_conv_step_refuses_what_does_not_fit():
    inputs = STEPS["causal_conv_step"][0].inputs()
    for backend in (None, *backends(OPS["causal_conv_step"], inputs)):
        with pytest.raises(
            ValueError, match=r"^causal_conv_step: state has shape \(2, 4, 6\), expected \(b=2, w-1, d=6"
        ):
            ops.causal_conv_step(**{**inputs, "state": torch.zeros(2, 4, 6)}, backend=backend)
        with pytest.raises(ValueError, match="^causal_conv: activation is 'relu', expected None or 'silu'$"):
            ops.causal_conv_step(**{**inputs, "activation": "relu"}, backend=backend)
