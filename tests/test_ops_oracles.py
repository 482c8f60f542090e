"""The ops against what is not ours: NumPy and SciPy in float64, closed forms, PyTorch's own convolution.

Every backend is held to them, the reference too. An oracle that is a closed form over all pairs of positions shares
nothing with a recurrence, chunked or not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F

from ophis import ops, testing
from ophis.testing import CASES, Case, assert_close


def backends(name: str) -> list[str]:
    return testing.backends(ops.OPS[name], CASES[name][0].inputs(dtype=torch.float64))


def float64_calls(name: str):
    """Every backend with every case in which sequences are not packed, at a length past one chunk."""
    return pytest.mark.parametrize(
        ("backend", "case"),
        [
            pytest.param(backend, case, id=f"{backend}-{case.name}")
            for backend in backends(name)
            for case in CASES[name]
            if "packed" not in case.name
        ],
    )


def arrays(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def assert_same(actual: torch.Tensor, expected: np.ndarray) -> None:
    assert_close(actual, torch.from_numpy(np.ascontiguousarray(expected)))


def steps(dt, dt_bias=0.0, dt_softplus=False, dt_limit=(0.0, np.inf), **_):
    dt = dt + dt_bias
    return np.clip(np.logaddexp(0, dt) if dt_softplus else dt, *dt_limit)


def silu(z: np.ndarray) -> np.ndarray:
    return z / (1 + np.exp(-z))


@float64_calls("selective_scan")
def test_selective_scan_is_a_sum_over_pairs_of_positions(backend: str, case: Case):
    """y_t = sum_{s <= t} C_t exp(A (dt_{s+1} + ... + dt_t)) dt_s B_s x_s, and the state's own decay beside it."""
    inputs = case.inputs(dtype=torch.float64, length=70)
    y, state = ops.selective_scan(**inputs, backend=backend)
    a = arrays(inputs)
    x, A, dt = a["x"], a["A"], steps(**a)
    b, l, d = x.shape

    def of_channels(B: np.ndarray) -> np.ndarray:
        """(b, l, d, n) from any of B's three shapes."""
        if B.ndim == 2:
            return np.broadcast_to(B, (b, l, *B.shape))
        if B.ndim == 3:
            B = B[:, :, None]
        return np.repeat(B, d // B.shape[2], 2)

    B, C = of_channels(a["B"]), of_channels(a["C"])
    elapsed = np.cumsum(dt, 1)
    between = elapsed[:, :, None] - elapsed[:, None]  # b t s d
    causal = np.tril(np.ones((l, l)))[:, :, None, None]
    decay = causal * np.exp(np.where(between < 0, 0, between)[..., None] * A)  # b t s d n
    h = np.einsum("btsdn,bsd,bsdn->btdn", decay, dt * x, B)
    if "initial_state" in a:
        h = h + np.exp(elapsed[..., None] * A) * a["initial_state"][:, None]
    expected = np.einsum("btdn,btdn->btd", C, h).real * (2 if np.iscomplexobj(A) else 1)
    expected = (expected + a.get("D", 0) * x) * (silu(a["z"]) if "z" in a else 1)
    assert_same(y, expected)
    assert_same(state, h[:, -1])


@pytest.mark.parametrize("backend", backends("selective_scan"))
def test_selective_scan_of_one_channel_and_constant_steps_is_a_filter(backend: str):
    dt, A, B, C, h = 0.05, -3.0, 0.7, -1.2, 0.4
    x = np.random.default_rng(0).standard_normal(300)
    states, _ = scipy.signal.lfilter([dt * B], [1, -np.exp(dt * A)], x, zi=[np.exp(dt * A) * h])
    t = torch.tensor
    y, state = ops.selective_scan(
        torch.from_numpy(x)[None, :, None],
        torch.full((1, 300, 1), dt, dtype=torch.float64),
        t([[A]], dtype=torch.float64),
        t([[B]], dtype=torch.float64),
        t([[C]], dtype=torch.float64),
        initial_state=t([[[h]]], dtype=torch.float64),
        backend=backend,
    )
    assert_same(y[0, :, 0], C * states)
    assert_same(state[0, 0], states[-1:])


@float64_calls("ssd")
def test_ssd_is_masked_attention(backend: str, case: Case):
    """y = (L ∘ C B^T) (dt x), with L the matrix of decays between two positions (Dao and Gu 2024, section 5)."""
    inputs = case.inputs(dtype=torch.float64, length=70)
    y, state = ops.ssd(**inputs, backend=backend)
    a = arrays(inputs)
    x, A, dt = a["x"], a["A"], steps(**a)
    h = x.shape[2]
    B, C = (np.repeat(a[k], h // a[k].shape[2], 2) for k in "BC")
    logs = np.cumsum(dt * A, 1)  # b l h
    L = np.tril(np.exp(np.minimum(logs.transpose(0, 2, 1)[..., :, None] - logs.transpose(0, 2, 1)[..., None, :], 0)))
    scores = L * np.einsum("bthn,bshn->bhts", C, B)
    u = dt[..., None] * x
    expected = np.einsum("bhts,bshp->bthp", scores, u)
    last = np.einsum("bhs,bshp,bshn->bhpn", L[:, :, -1], u, B)
    if "initial_state" in a:
        since = np.exp(logs)
        expected = expected + np.einsum("bth,bthn,bhpn->bthp", since, C, a["initial_state"])
        last = last + since[:, -1, :, None, None] * a["initial_state"]
    D = a.get("D", np.zeros(h))
    expected = (expected + (D if D.ndim == 2 else D[:, None]) * x) * (silu(a["z"]) if "z" in a else 1)
    assert_same(y, expected)
    assert_same(state, last)


@pytest.mark.parametrize("length", (1, 4, 70))
@float64_calls("causal_conv")
def test_causal_conv_is_a_padded_convolution(backend: str, case: Case, length: int):
    inputs = case.inputs(dtype=torch.float64, length=length)
    y, state = ops.causal_conv(**inputs, backend=backend)
    x, weight = inputs["x"], inputs["weight"]
    d, w = weight.shape
    before = inputs.get("initial_state", x.new_zeros(x.shape[0], w - 1, d))
    fed = torch.cat([before, x], 1)
    expected = F.conv1d(fed.mT, weight[:, None], inputs.get("bias"), groups=d).mT
    if inputs["activation"] == "silu":
        expected = torch.from_numpy(silu(expected.numpy()))
    assert_close(y, expected)
    assert torch.equal(state, fed[:, -(w - 1) :])


@float64_calls("rms_norm")
def test_rms_norm_divides_by_the_root_mean_square(backend: str, case: Case):
    inputs = case.inputs(dtype=torch.float64, length=9)
    y, stream = ops.rms_norm(**inputs, backend=backend)
    a = arrays(inputs)
    expected = a["x"] + a.get("residual", 0)
    assert_same(stream, expected)
    rms = np.sqrt(np.mean(expected**2, -1, keepdims=True) + a.get("eps", 1e-5))
    assert_same(y, expected / rms * a["weight"])


@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_rms_norm_takes_any_leading_axes(backend: str):
    x, weight = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    y, _ = ops.rms_norm(x, weight, backend=backend)
    assert_close(ops.rms_norm(x[1, 2, 3], weight, backend=backend)[0], y[1, 2, 3])


@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_rms_norm_keeps_the_residual_streams_dtype(backend: str):
    x, weight = torch.randn(3, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    y, stream = ops.rms_norm(x, weight, residual=torch.randn(3, 8), backend=backend)
    assert (y.dtype, stream.dtype) == (torch.bfloat16, torch.float32)


@float64_calls("gated_rms_norm")
def test_gated_rms_norm_divides_each_group_by_its_own(backend: str, case: Case):
    inputs = case.inputs(dtype=torch.float64, length=9)
    y = ops.gated_rms_norm(**inputs, backend=backend)
    a = arrays(inputs)
    first = a.get("norm_before_gate", False)
    s = a["x"] if first else a["x"] * silu(a["z"])
    parts = np.split(s, a.get("groups", 1), -1)
    normed = [p / np.sqrt(np.mean(p**2, -1, keepdims=True) + a.get("eps", 1e-5)) for p in parts]
    expected = np.concatenate(normed, -1) * a["weight"]
    assert_same(y, expected * silu(a["z"]) if first else expected)


@pytest.mark.parametrize("length", (1, 2, 70, 333))
@float64_calls("long_conv")
def test_long_conv_is_the_start_of_the_full_convolution(backend: str, case: Case, length: int):
    inputs = case.inputs(dtype=torch.float64, length=length)
    y = ops.long_conv(**inputs, backend=backend)
    a = arrays(inputs)
    b, l, d = a["x"].shape
    expected = np.empty((b, l, d))
    for i in range(b):
        for j in range(d):
            convolve = np.convolve if i == 0 else scipy.signal.fftconvolve
            expected[i, :, j] = convolve(a["x"][i, :, j], a["kernel"][j])[:l]
    assert_same(y, expected + a.get("D", 0) * a["x"])
