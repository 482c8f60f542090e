"""The selective scan's CUDA kernels on a CPU: see emulation.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from emulation import runtime

from ophis import ops
from ophis.ops.cuda import selective_scan
from ophis.ops.library.selective_scan import Kernels, custom_op
from ophis.testing import CASES, check

kernels = Kernels(selective_scan.forward, selective_scan.backward, selective_scan.kept_shape, in_groups=False)
ops.selective_scan.register("emulated", selective_scan.why_not_these)(custom_op("emulated", kernels))


@pytest.fixture(autouse=True)
def no_plans():
    """Tests change what they depend on."""
    selective_scan.forward_plan.cache_clear()
    selective_scan.backward_plan.cache_clear()


SIZES = dict(d=24, n=16)  # groups of 8 channels are Triton's; the others are all here
RUN = [
    case
    for case in CASES["selective_scan"]
    if "channel" not in case.name and ops.selective_scan.explain(**case.inputs(length=4, **SIZES))["emulated"] is None
]


def test_there_are_cases():
    assert {case.name for case in RUN} >= {"plain", "everything", "packed"}


@pytest.mark.parametrize("case", RUN, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("dtype", "length"), [(torch.float32, 3), (torch.float32, 70), (torch.bfloat16, 70), (torch.float16, 33)], ids=str
)
def test_cases(case: Any, dtype: torch.dtype, length: int):
    check(ops.selective_scan, case.inputs(dtype=dtype, length=length, **SIZES), "emulated")


@pytest.mark.parametrize("n", (1, 8, 24, 40, 64, 72, 128, 136, 256))
def test_state_sizes(n: int):
    case = next(case for case in RUN if case.name == "everything")
    check(ops.selective_scan, case.inputs(length=40, b=1, d=20, n=n), "emulated")


@pytest.mark.parametrize("name", ("everything", "packed"))
@pytest.mark.parametrize("n", (16, 32))
def test_segments(name: str, n: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: 100)
    monkeypatch.setattr(selective_scan, "SHORTEST", 32)
    case = next(case for case in RUN if case.name == name)
    check(ops.selective_scan, case.inputs(length=150, b=1, d=20, n=n), "emulated")


@pytest.fixture
def relayed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selective_scan, "relay_pays", lambda b, d, device: True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("everything", "packed"))
@pytest.mark.usefixtures("relayed")
def test_relay(name: str, dtype: torch.dtype):
    case = next(case for case in RUN if case.name == name)
    check(ops.selective_scan, case.inputs(dtype=dtype, length=300, b=1, d=20, n=16), "emulated")


@pytest.mark.parametrize("lengths", [(1, 1, 0, 2, 5, 40, 0, 1, 90), (8, 120, 8, 0, 0, 3)], ids=str)
@pytest.mark.usefixtures("relayed")
def test_relay_of_short_sequences(lengths: tuple[int, ...]):
    """Several that start and end in one leg, and some that are empty."""
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    inputs = next(case for case in RUN if case.name == "packed").inputs(length=int(offsets[-1]), d=20, n=16)
    inputs["initial_state"] = torch.randn(len(lengths), *inputs["initial_state"].shape[1:])
    check(ops.selective_scan, {**inputs, "cu_seqlens": offsets}, "emulated")


@pytest.mark.parametrize("relay", (False, True))
def test_what_is_not_finite_stays_in_its_sequence(relay: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selective_scan, "relay_pays", lambda b, d, device: relay)
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: 100)
    monkeypatch.setattr(selective_scan, "SHORTEST", 32)
    inputs = next(case for case in RUN if case.name == "packed").inputs(length=150, d=20, n=16)
    inputs["cu_seqlens"] = offsets = torch.tensor([0, 60, 63, 150], dtype=torch.int32)
    inputs["initial_state"] = torch.randn(3, *inputs["initial_state"].shape[1:])
    y, state = ops.selective_scan(**inputs, backend="emulated")
    inputs["x"] = inputs["x"].clone()
    inputs["x"][:, 40] = torch.nan
    y_nan, state_nan = ops.selective_scan(**inputs, backend="emulated")
    assert y_nan[:, 40:60].isnan().all()
    assert state_nan[0].isnan().all()
    assert torch.equal(y_nan[:, :40], y[:, :40])
    assert torch.equal(y_nan[:, offsets[1] :], y[:, offsets[1] :])
    assert torch.equal(state_nan[1:], state[1:])


@pytest.mark.parametrize("name", ("everything", "packed"))
def test_eight_warps(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selective_scan, "warps_for", lambda *sizes: 8)
    case = next(case for case in RUN if case.name == name)
    check(ops.selective_scan, case.inputs(dtype=torch.bfloat16, length=70, b=1, d=150, n=16), "emulated")


def test_groups_of_channels():
    case = next(case for case in CASES["selective_scan"] if case.name == "groups")
    check(ops.selective_scan, case.inputs(length=40, d=192, n=16), "emulated")


def test_slices_of_projections():
    """Neighbours that can and that cannot be read four at a time."""
    case = next(case for case in RUN if case.name == "everything")
    for offset in (1, 4):
        inputs = case.inputs(length=40, b=2, d=20, n=16)
        for key in ("x", "dt", "z", "B", "C"):
            wide = torch.full((*inputs[key].shape[:-1], 2 * inputs[key].shape[-1] + 4), torch.nan)
            part = wide[..., offset : offset + inputs[key].shape[-1]]
            inputs[key] = part.copy_(inputs[key])
        check(ops.selective_scan, inputs, "emulated")
