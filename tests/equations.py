"""The papers' equations as loops over positions in float64, in the layouts of mamba_ssm (channels before length)."""

from __future__ import annotations

import torch
from torch import Tensor


def scan_equation(u, delta, A, B, C, D, z) -> tuple[Tensor, Tensor]:
    """u, delta, z (b, d, l), A (d, n), B and C (b, d, n, l), D (d,)."""
    h = torch.zeros(*u.shape[:2], A.shape[1], dtype=A.dtype, device=u.device)
    ys = []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[..., t]
        y = (h * C[..., t]).sum(-1)
        ys.append(2 * y.real if y.is_complex() else y)
    return (torch.stack(ys, 2) + D[:, None] * u) * z * torch.sigmoid(z), h


def conv_equation(x, weight, bias, activation, ids=None, window=None) -> Tensor:
    """x (b, d, l); ids (b, l), the sequence of each position; window (b, d, w-1), inputs of the first."""
    (b, _, l), w = x.shape, weight.shape[1]
    y = torch.zeros_like(x)
    for row in range(b):
        for t in range(l):
            if ids is not None and ids[row, t] < 0:
                continue
            total = bias.clone()
            for k in range(w):
                s = t - (w - 1) + k
                if s >= 0 and (ids is None or ids[row, s] == ids[row, t]):
                    total = total + weight[:, k] * x[row, :, s]
                elif s < 0 and window is not None and (ids is None or ids[row, 0] == ids[row, t]):
                    total = total + weight[:, k] * window[row, :, s]
            y[row, :, t] = total * torch.sigmoid(total) if activation else total
    return y


def ssd_equation(x, dt, A, B, C, D, starts, before) -> tuple[Tensor, Tensor]:
    """x (b, l, h, p), dt (b, l, h) after softplus, B and C (b, l, h, n), D (h, p).

    starts (b, l): what the state is before position t, where it is not the one after t - 1: "zero" or "given".
    Returns y and the states after each position (b, l, h, p, n).
    """
    ys, states = torch.zeros_like(x), []
    h = torch.zeros_like(before)
    for t in range(x.shape[1]):
        for row in range(x.shape[0]):
            if starts[row][t]:
                h = h.clone()
                h[row] = before[row] if starts[row][t] == "given" else 0
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys[:, t] = torch.einsum("bhpn,bhn->bhp", h, C[:, t]) + D * x[:, t]
        states.append(h)
    return ys, torch.stack(states, 1)


def r(*shape: int, device="cpu", dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).to(device)


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    error = (actual.to(expected.dtype) - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < tolerance, f"relative error {error:.1e}"
