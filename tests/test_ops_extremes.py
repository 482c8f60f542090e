"""Strong decays and long sequences: nothing overflows, nothing cancels, however the length falls into chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor

from ophis import ops
from ophis.ops import OPS
from ophis.testing import CASES, Case, assert_close, backends, check, evaluate

STRONG = [
    pytest.param(name, case, id=f"{name}-{case.name}") for name in ("selective_scan", "ssd") for case in CASES[name]
]


def strong(case: Case, dtype: torch.dtype, length: int) -> dict[str, Any]:
    """Decay rates of 0.01 to 1000 and steps of 0.0001 to 100, log-uniform: a log decay between two positions is
    anything from -1e-6 to -1e5, and its running sum passes 1e6. Two rates and two steps in a row are the very ends.

    x is small where steps and rates are large, so that float16 holds the gradients (up to 65504).
    """
    inputs = case.inputs(dtype=dtype, length=length)
    generator = torch.Generator().manual_seed(2)

    def log_uniform(like: Tensor, low: float, high: float) -> Tensor:
        powers = torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low
        powers.view(-1)[: 2 if like.numel() > 1 else 1] = torch.tensor([high, low])[: min(2, like.numel())]
        return 10**powers

    A, dt = inputs["A"], inputs["dt"]
    rates = -log_uniform(A.real, -2, 3)
    inputs["A"] = torch.complex(rates, A.imag.double()).to(A.dtype) if A.is_complex() else rates.to(A.dtype)
    steps = log_uniform(dt, -4, 2)
    if "dt_bias" in inputs:  # what softplus makes steps of
        steps = steps + torch.log(-torch.expm1(-steps)) - inputs["dt_bias"].double()
    inputs["dt"] = steps.to(dt.dtype)
    inputs["x"] = inputs["x"] / 64
    return inputs


# Not in float64, where a chunked SSD has no wider dtype for its running sums: at 1e6 they leave ten digits.
@pytest.mark.parametrize("length", (1, 63, 65, 130))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(("name", "case"), STRONG)
def test_strong_decay_is_finite_and_accurate(name: str, case: Case, dtype: torch.dtype, length: int, device: str):
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in strong(case, dtype, length).items()}
    for backend in backends(OPS[name], inputs):
        if backend == "reference":  # is what float32 gives; a complex one loses a phase of 1600 rad
            assert all(t.isfinite().all() for t in evaluate(OPS[name], inputs, "reference").values())
        else:
            check(OPS[name], inputs, backend)  # no NaN or infinity is within a tolerance


@pytest.mark.parametrize("decay", (-1e3, -1e5, -1e8))
@pytest.mark.parametrize("name", ("selective_scan", "ssd"))
def test_after_a_reset_the_past_is_gone_and_the_rest_is_exact(name: str, decay: float, device: str):
    """One position decays all before it to nothing. The ones after it must not feel that: a difference of running sums
    of float32 would, 1e8 having no digits left for 0.01."""
    for backend in backends(OPS[name], CASES[name][0].inputs(device)):
        inputs = CASES[name][0].inputs(device, length=100)
        inputs["A"] = torch.full_like(inputs["A"], -1.0)
        inputs["dt"][:, 40] = -decay
        y, state = OPS[name](**inputs, backend=backend)
        fresh = {k: v[:, 40:] if v.ndim > 2 else v for k, v in inputs.items()}
        expected = evaluate(OPS[name], {k: v.double() for k, v in fresh.items()}, "reference")
        assert_close(y[:, 41:].double(), expected["y"][:, 1:], dtype=torch.float32)
        assert_close(state.double(), expected["state"], dtype=torch.float32)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing_inside_an_op(name: str, dtype: torch.dtype):
    """An op chooses its own precision: under autocast it gives the bits that it gives without, states in float32."""

    def under_autocast(**inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return OPS[name](**inputs)

    for case in CASES[name]:
        inputs = case.inputs(dtype=dtype, length=70)
        for backend in backends(OPS[name], inputs):
            expected = evaluate(OPS[name], inputs, backend)
            for key, tensor in evaluate(under_autocast, inputs, backend).items():
                assert torch.equal(tensor, expected[key]), f"{case.name}, {backend}: {key}"


def recurrence(inputs: dict[str, Any], bounds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """SSD in NumPy, one position at a time; batch 1, no options but the initial state."""
    x, dt, A, B, C, states = (inputs[k].numpy() for k in ("x", "dt", "A", "B", "C", "initial_state"))
    heads = x.shape[2] // B.shape[2]
    B, C = np.repeat(B, heads, 2), np.repeat(C, heads, 2)
    y, finals = np.empty(x.shape), []
    for i, start in enumerate(bounds[:-1]):
        h = states[i]
        for t in range(start, bounds[i + 1]):
            h = np.exp(dt[0, t] * A)[:, None, None] * h + (dt[0, t, :, None] * x[0, t])[..., None] * B[0, t, :, None]
            y[0, t] = (h * C[0, t, :, None]).sum(-1)
        finals.append(h)
    return y, np.stack(finals)


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 5000],
        [0, 4097, 5000],
        [0, 1, 2, 4161, 4162, 5003],
        [0, *range(1, 64), 4000, *range(4000, 5000, 3), 9000, 9000, 9100],
    ],
    ids=lambda bounds: f"{len(bounds) - 1} of {bounds[-1]}",
)
def test_ssd_past_64_chunks(bounds: list[int]):
    """More chunks than one matrix product passes states along: blocks of them, with sequences ending in and across."""
    l, sequences = bounds[-1], len(bounds) - 1
    inputs = CASES["ssd"][1].inputs(dtype=torch.float64, length=l, b=1, h=2, p=1, n=2, g=1)
    inputs = {k: inputs[k] for k in ("x", "A", "B", "C")}
    inputs["dt"] = torch.rand(1, l, 2, dtype=torch.float64) * 2e-3  # a memory of some thousand positions
    inputs["initial_state"] = torch.randn(sequences, 2, 1, 2, dtype=torch.float64)
    offsets = torch.tensor(bounds, dtype=torch.int32)
    y, states = ops.ssd(**inputs, cu_seqlens=offsets if sequences > 1 else None, backend="torch")
    expected, finals = recurrence(inputs, bounds)
    assert_close(y, torch.from_numpy(expected))
    assert_close(states, torch.from_numpy(finals))


def test_ssd_gradients_past_64_chunks():
    offsets = torch.tensor([0, 3, 4200, 4250], dtype=torch.int32)
    inputs = CASES["ssd"][0].inputs(length=4250, b=1, h=1, p=1, n=1)
    check(ops.ssd, {**inputs, "cu_seqlens": offsets}, "torch")


def test_ssd_of_a_quarter_million_positions():
    """Blocks of blocks of chunks: 64 x 64 x 64 positions and some. With a constant step it is SciPy's filter, in long
    double: the last bit of a decay in float64, to the power of the 30,000 positions it remembers, would show."""
    l, dt, A, h = 270_001, 1e-3, -0.03, 2.0
    rng = np.random.default_rng(0)
    x, B, C = rng.standard_normal((3, l))
    decay = np.exp(np.longdouble(dt) * np.longdouble(A))
    inflow = (dt * x * B).astype(np.longdouble)
    states, last = scipy.signal.lfilter(np.ones(1, decay.dtype), np.array([1, -decay]), inflow, zi=[decay * h])

    def tensor(values: np.ndarray, *axes: int) -> Tensor:
        return torch.from_numpy(values).view(1, l, *axes)

    y, state = ops.ssd(
        tensor(x, 1, 1),
        torch.full((1, l, 1), dt, dtype=torch.float64),
        torch.tensor([A], dtype=torch.float64),
        tensor(B, 1, 1),
        tensor(C, 1, 1),
        initial_state=torch.full((1, 1, 1, 1), h, dtype=torch.float64),
        backend="torch",
    )
    assert_close(y.flatten(), torch.from_numpy((C * states).astype(float)))
    assert_close(state.flatten(), torch.from_numpy((last / decay).astype(float)))
