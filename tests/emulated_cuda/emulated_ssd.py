"""SSD's CUDA kernels on a CPU: see emulation.py.

What nobody sees here is whether a product of the tensor cores was awaited, and how its factors lie in memory to them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulation import runtime
from torch import Tensor

from ophis import ops
from ophis.ops.cuda import ssd
from ophis.ops.library.ssd import Kernels, custom_op
from ophis.testing import CASES, check, error, widened

ops.ssd.register("emulated", ssd.why_not_these)(custom_op("emulated", Kernels(ssd.forward, ssd.backward)))


@pytest.fixture(autouse=True)
def no_plans():
    """Tests change what they depend on."""
    ssd.forward_plan.cache_clear()
    ssd.backward_plan.cache_clear()


NAMES = [case.name for case in CASES["ssd"] if case.name not in ("one of each", "odd sizes")]


def inputs_of(name: str, **options: Any) -> dict[str, Any]:
    """A case of the sizes that there are kernels for, without what they leave to others."""
    case = next(case for case in CASES["ssd"] if case.name == name)
    inputs = case.inputs(dtype=torch.bfloat16, **{"b": 1, "p": 64, "n": 64, **options})
    inputs.pop("z", None)
    if "D" in inputs and inputs["D"].ndim == 2:
        inputs["D"] = inputs["D"][:, 0].contiguous()
    return inputs


@pytest.mark.parametrize("name", NAMES)
def test_cases(name: str):
    check(ops.ssd, inputs_of(name, length=70), "emulated")


@pytest.mark.parametrize("sizes", [dict(n=128, h=3), dict(p=128, h=2), dict(b=2, h=6, g=2)], ids=str)
def test_sizes(sizes: dict[str, int]):
    """A group of an odd number of tiles among them, the last of which is alone in its block."""
    check(ops.ssd, inputs_of("plain", length=65, **sizes), "emulated")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_steps_of_other_dtypes(dtype: torch.dtype):
    inputs = inputs_of("everything", length=40)
    check(ops.ssd, {**inputs, "dt": inputs["dt"].to(dtype)}, "emulated")


@pytest.mark.parametrize("processors", (4, 100))
@pytest.mark.parametrize("name", ("everything", "packed"))
def test_segments(name: str, processors: int, monkeypatch: pytest.MonkeyPatch):
    """Of two chunks each, or one; and the heads of a group shared out."""
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: processors)
    check(ops.ssd, inputs_of(name, length=330), "emulated")


@torch.no_grad()
@pytest.mark.parametrize("name", ("everything", "packed"))
def test_long_segments(name: str, monkeypatch: pytest.MonkeyPatch):
    """Whose ends are found by halves; three segments, the last of which is short."""
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: 3)
    inputs = inputs_of(name, length=24 * 64 + 10, h=2, g=1)
    expected = ops.ssd(**widened(inputs), backend="reference")
    for actual, same in zip(ops.ssd(**inputs, backend="emulated"), expected, strict=True):
        assert error(actual, same) < 2**-7


@pytest.mark.parametrize("bounds", [(0, 0, 3, 4, 4, 130, 150, 150), (0, 64, 128, 150)], ids=str)
def test_packed_sequences(bounds: tuple[int, ...]):
    inputs = inputs_of("packed", length=bounds[-1], h=2, g=1)
    inputs["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    inputs["initial_state"] = torch.randn(len(bounds) - 1, 2, 64, 64)
    check(ops.ssd, inputs, "emulated")


@pytest.mark.parametrize("processors", (1, 100))
@pytest.mark.parametrize("name", ("everything", "packed"))
def test_the_widest_state(name: str, processors: int, monkeypatch: pytest.MonkeyPatch):
    """Whose backward pass takes two slices; in segments and with its heads shared out, too."""
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: processors)
    check(ops.ssd, inputs_of(name, length=130, n=256, h=2, g=1), "emulated")


@pytest.mark.parametrize("processors", (1, 100))
def test_an_initial_state_that_begins_anywhere(processors: int, monkeypatch: pytest.MonkeyPatch):
    """Kernels read several of its numbers at once."""
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: processors)
    inputs = inputs_of("everything", length=130)
    state = inputs["initial_state"]
    inputs["initial_state"] = state.new_empty(state.numel() + 1)[1:].view(state.shape).copy_(state)
    check(ops.ssd, inputs, "emulated")


@pytest.mark.parametrize("first", (8, 3))
def test_slices_of_a_projection(first: int):
    """One that begins where 16 bytes do, and one that does not and is copied."""
    inputs = inputs_of("everything", length=70)
    for key in ("x", "B", "C"):
        t = inputs[key]
        wide = t.new_full((1, 70, t[0, 0].numel() + 24), torch.nan)
        inputs[key] = wide[..., first : first + t[0, 0].numel()].unflatten(-1, t.shape[2:]).copy_(t)
    check(ops.ssd, inputs, "emulated")


def test_strong_decay_and_padding():
    """Rates of -1000, steps from nothing to 30, and padding at both ends: exact zeros, and nothing that overflows."""
    inputs = inputs_of("everything", length=100)
    inputs["A"][0] = -1000
    inputs["dt"][:, 23::7], inputs["dt"][:, 24::9] = -40, 30
    inputs["dt"][:, :20] = inputs["dt"][:, -3:] = -torch.inf
    inputs["x"][:, :20] = inputs["x"][:, -3:] = 0
    check(ops.ssd, inputs, "emulated")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda i: i.update(z=i["x"]), "there is a gate z, which its kernels leave to the norm"),
        (lambda i: i.update(x=i["x"].half()), "x is float16, and its kernels are for bfloat16"),
        (lambda i: i.update(x=i["x"][..., :32]), "its kernels take heads by 64 channels, and here p=32"),
        (
            lambda i: i.update(B=i["B"][..., :32], C=i["C"][..., :32]),
            "its kernels are for n=64, 128, 256, and here n=32",
        ),
        (lambda i: i.update(D=torch.ones(4, 64, requires_grad=True)), "D is one number a channel, and its backward "),
        (
            lambda i: i.update(B=spread(i["B"])),
            "B cannot be read by 16 bytes: its last axis has gaps, or its rows begin ",
        ),
    ],
)
def test_what_they_do_not_take(change: Any, reason: str):
    inputs = inputs_of("plain", length=8)
    change(inputs)
    assert str(ops.ssd.explain(**inputs)["emulated"]).startswith(reason)


def spread(t: Tensor) -> Tensor:
    return t.new_zeros(*t.shape, 2)[..., 0].copy_(t)
