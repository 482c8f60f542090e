"""S4D against SciPy's linear systems, and its initial spectra against NumPy's eigenvalues and the published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch

from ophis import ops
from ophis.testing import CASES, Case, assert_close

BACKENDS = [b.name for b in ops.s4d.backends]


def real_system(A: np.ndarray, B: np.ndarray, C: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The modes of one channel, each a pair of conjugates where A is complex, as one real system for SciPy.

    h' = a h + b x with h = u + iv is (u, v)' = [[Re a, -Im a], [Im a, Re a]] (u, v) + (Re b, Im b) x, and
    2 Re(c h) = 2 Re(c) u - 2 Im(c) v. Without a conjugate partner (real A) it is Re(c h).
    """
    turn = np.array([[0, -1], [1, 0]])
    blocks = [a.real * np.eye(2) + a.imag * turn for a in A]
    count = 2 if np.iscomplexobj(A) else 1
    inputs = np.stack([B.real, B.imag], 1).reshape(-1, 1)
    return scipy.linalg.block_diag(*blocks), inputs, count * np.stack([C.real, -C.imag], 1).reshape(1, -1)


@pytest.mark.parametrize("length", (1, 2, 65, 200))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [c for c in CASES["s4d"] if "packed" not in c.name], ids=lambda case: case.name)
def test_s4d_is_the_discretised_linear_system(case: Case, backend: str, length: int):
    inputs = case.inputs(dtype=torch.float64, length=length)
    y, state = ops.s4d(**inputs, backend=backend)
    a = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    x = a["x"]
    expected, last = np.empty(x.shape), np.empty(state.shape, complex)
    for channel, dt in enumerate(a["dt"]):
        A, B, C = real_system(a["A"][channel], a["B"][channel], a["C"][channel])
        dA, dB, *_ = scipy.signal.cont2discrete((A, B, C, [[0]]), dt, a.get("discretization", "zoh"))
        for row in range(len(x)):
            start = np.zeros(len(A))
            if "initial_state" in a:
                h = a["initial_state"][row, channel]
                start = np.stack([h.real, h.imag], 1).ravel()
            # SciPy's y_t reads the state before x_t, ours the one after: its states are one step later.
            fed = np.append(x[row, :, channel], 0)
            _, _, states = scipy.signal.dlsim((dA, dB, C, [[0]], dt), fed[:, None], x0=start)
            expected[row, :, channel] = (states[1:] @ C.T)[:, 0]
            last[row, channel] = states[-1, ::2] + 1j * states[-1, 1::2]
    assert_close(y, torch.from_numpy(expected + a.get("D", 0) * x))
    assert_close(state, torch.from_numpy(last if state.is_complex() else last.real))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES["s4d_kernel"], ids=lambda case: case.name)
def test_kernel_is_the_impulse_response(case: Case, backend: str):
    inputs = case.inputs(dtype=torch.float64, length=150)
    kernel = ops.s4d_kernel(**inputs, backend=backend)
    system = {k: v for k, v in inputs.items() if k != "length"}
    impulse = torch.zeros(1, 150, 4, dtype=torch.float64)
    impulse[:, 0] = 1
    y, _ = ops.s4d(impulse, **system, backend="reference")
    assert_close(kernel, y[0].mT)


def test_a_wrong_rule_is_refused():
    inputs = CASES["s4d"][0].inputs(length=4)
    with pytest.raises(ValueError, match=r"s4d: discretization is 'euler', expected 'zoh' or 'bilinear'"):
        ops.s4d(**inputs, discretization="euler")


def test_lin_and_inv_are_their_formulas():
    lin, ones = ops.s4d_init("lin", 8)
    np.testing.assert_allclose(lin, [-0.5 + 1j * math.pi * k for k in range(4)], rtol=1e-6)
    np.testing.assert_array_equal(ones, np.ones(4))
    inv, _ = ops.s4d_init("inv", 64)
    assert len(inv) == 32
    np.testing.assert_array_equal(inv.real, -0.5)
    # Gu et al. 2022, equation 8, at n = 64.
    np.testing.assert_allclose(inv.imag[:3], [1283.4, 414.2, 240.4], atol=0.05)


def test_real_is_minus_one_two_three():
    A, B = ops.s4d_init("real", 5)
    np.testing.assert_array_equal(A, [-1, -2, -3, -4, -5])
    np.testing.assert_array_equal(B, np.ones(5))


@pytest.mark.parametrize("n", (2, 4, 64))
def test_legs_is_the_spectrum_of_hippo_without_its_rank_one_part(n: int):
    k = np.arange(n)
    B = np.sqrt(2 * k + 1)
    hippo = np.where(k[:, None] > k, -np.outer(B, B), 0) - np.diag(k + 1)
    P = np.sqrt(k + 0.5)
    normal = hippo + np.outer(P, P)
    spectrum = np.linalg.eigvals(normal)
    np.testing.assert_allclose(spectrum.real, -0.5, atol=1e-9)
    A, projected = (t.numpy().astype(complex) for t in ops.s4d_init("legs", n))
    np.testing.assert_array_equal(A.real, -0.5)
    np.testing.assert_allclose(A.imag, np.sort(spectrum.imag)[n // 2 :], rtol=1e-5)
    # Eigenvectors have no phase of their own, so B is compared in what it does: B^T (s - A)^-1 B.
    for s in (0.3, 2.0, 10.0, 500.0):
        response = 2 * (abs(projected) ** 2 / (s - A)).sum().real
        np.testing.assert_allclose(response, B @ np.linalg.solve(s * np.eye(n) - normal, B), rtol=1e-5)
    if n == 64:
        np.testing.assert_allclose(A.imag[:-4:-1], [1303.3, 433.0, 258.2], atol=0.05)


def test_inits_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="s4d_init: kind is 'fourier', expected 'lin', 'inv', 'legs' or 'real'"):
        ops.s4d_init("fourier", 4)
    with pytest.raises(ValueError, match="s4d_init: state size n=5 of conjugate pairs must be even"):
        ops.s4d_init("lin", 5)
