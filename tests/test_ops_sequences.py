"""Sequences cut anywhere, packed, or padded are the same sequences: values, states and gradients, in float64.

Each test wraps an op into a function with the op's own arguments that goes the other way about it, and compares the two
with `evaluate`: outputs and the gradient of every input, through the final state too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ophis.ops import OPS
from ophis.ops._op import Op
from ophis.testing import CASES, Case, assert_close, backends, evaluate

STATEFUL = ("selective_scan", "ssd", "causal_conv", "s4d")
CALLS = [
    pytest.param(name, case, backend, id=f"{name}-{case.name}-{backend}")
    for name in STATEFUL
    for case in CASES[name]
    for backend in backends(OPS[name], case.inputs(dtype=torch.float64))
]
PACKED = [call for call in CALLS if "packed" in call.id]
UNPACKED = [call for call in CALLS if "packed" not in call.id]
LENGTH = 70  # past the first chunk of every chunked backend


def part(op: Op, inputs: dict[str, Any], positions: slice) -> dict[str, Any]:
    """The same call on some of its positions: every tensor with a length is cut."""

    def cut(name: str, value: Any) -> Any:
        axes = [
            letters for letters in op.shapes.get(name, ()) if isinstance(value, Tensor) and len(letters) == value.ndim
        ]
        return value[:, positions] if axes and axes[0][:2] == ("b", "l") else value

    return {k: cut(k, v) for k, v in inputs.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert_close(tensor, expected[name], name=name)


def length_of(inputs: dict[str, Any]) -> int:
    return inputs["x"].shape[1]


def in_parts(op: Op, cuts: tuple[int, ...]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(**inputs: Any) -> tuple[Tensor, Tensor]:
        outputs, state = [], inputs.pop("initial_state", None)
        for start, end in itertools.pairwise((0, *cuts, length_of(inputs))):
            y, state = op(**part(op, inputs, slice(start, end)), initial_state=state)
            outputs.append(y)
        assert state is not None
        return torch.cat(outputs, 1), state

    return run


@pytest.mark.parametrize("cuts", [(1,), (5,), (64,), (69,), (1, 2, 3, 34, 65)], ids=str)
@pytest.mark.parametrize(("name", "case", "backend"), UNPACKED)
def test_split_anywhere_and_carry_the_state(name: str, case: Case, backend: str, cuts: tuple[int, ...]):
    op, inputs = OPS[name], case.inputs(dtype=torch.float64, length=LENGTH)
    assert_same(evaluate(in_parts(op, cuts), inputs, backend), evaluate(op, inputs, backend))


@pytest.mark.parametrize(("name", "case", "backend"), UNPACKED)
def test_one_token_at_a_time(name: str, case: Case, backend: str):
    op, inputs = OPS[name], case.inputs(dtype=torch.float64, length=9)
    assert_same(evaluate(in_parts(op, tuple(range(1, 9))), inputs, backend), evaluate(op, inputs, backend))


def one_by_one(op: Op) -> Callable[..., tuple[Tensor, Tensor]]:
    """Packed sequences, each by a call of its own. An empty one leaves its state as it was."""

    def run(*, cu_seqlens: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        initial = inputs.pop("initial_state", None)
        outputs, states = [], []
        for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            own = None if initial is None else initial[i : i + 1]
            if start == end:
                states.append(own)
                continue
            y, state = op(**part(op, inputs, slice(start, end)), initial_state=own)
            outputs.append(y)
            states.append(state)
        some = next(state for state in states if state is not None)
        return torch.cat(outputs, 1), torch.cat([torch.zeros_like(some) if s is None else s for s in states])

    return run


@pytest.mark.parametrize(
    "bounds",
    [(0, 70), (0, 1, 2, 3, 70), (0, 33, 66, 70), (0, 64, 70), (0, 0, 3, 3, 3, 68, 69, 70, 70)],
    ids=lambda bounds: "-".join(map(str, bounds)),
)
@pytest.mark.parametrize(("name", "case", "backend"), PACKED)
def test_packed_equals_separate(name: str, case: Case, backend: str, bounds: tuple[int, ...]):
    op, inputs = OPS[name], case.inputs(dtype=torch.float64, length=LENGTH)
    inputs["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    if "initial_state" in inputs:
        inputs["initial_state"] = torch.randn_like(inputs["initial_state"][:1].repeat_interleave(len(bounds) - 1, 0))
    assert_same(evaluate(op, inputs, backend), evaluate(one_by_one(op), inputs, backend))


def padded(op: Op, left: int, right: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The call with padding on both sides: step 0 and x = 0, beside whatever B, C and z happen to be there."""

    def run(**inputs: Any) -> tuple[Tensor, Tensor]:
        l = length_of(inputs)
        wide = part(op, inputs, slice(0, 1))  # which tensors have a length shows in which ones this cut
        for name, tensor in inputs.items():
            if isinstance(tensor, Tensor) and tensor.shape != wide[name].shape:
                fill = 7.0
                if name == "x":
                    fill = 0.0
                elif name == "dt":
                    fill = -torch.inf if inputs.get("dt_softplus") else 0.0
                shape = list(tensor.shape)
                sides = [tensor.new_full((shape[0], count, *shape[2:]), fill) for count in (left, right)]
                wide[name] = torch.cat([sides[0], tensor, sides[1]], 1)
        y, state = op(**wide)
        return y[:, left : left + l], state

    return run


@pytest.mark.parametrize(("left", "right"), [(1, 0), (63, 0), (70, 0), (0, 1), (0, 64), (13, 59)])
@pytest.mark.parametrize(
    ("name", "case", "backend"),
    # A lower limit of the step sizes above zero makes every position a step, padding too.
    [call for call in UNPACKED if call.values[0] in ("selective_scan", "ssd") and "limits" not in call.id],
)
def test_padding_leaves_values_states_and_gradients(name: str, case: Case, backend: str, left: int, right: int):
    op, inputs = OPS[name], case.inputs(dtype=torch.float64, length=12)
    assert_same(evaluate(padded(op, left, right), inputs, backend), evaluate(op, inputs, backend))


@pytest.mark.parametrize(("name", "case", "backend"), UNPACKED)
def test_no_initial_state_is_zeros(name: str, case: Case, backend: str):
    op, inputs = OPS[name], case.inputs(dtype=torch.float64, length=LENGTH)
    inputs.pop("initial_state", None)
    y, state = op(**inputs, backend=backend)
    from_zeros = op(**inputs, initial_state=torch.zeros_like(state), backend=backend)
    assert_close(from_zeros[0], y)
    assert_close(from_zeros[1], state)
