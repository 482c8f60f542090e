"""S4D, the diagonal time-invariant state space.   b batch  l length  d channels  n modes"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ophis.ops._op import op


@op(x="b l d", dt="d", A="d n", B="d n", C="d n", D="d", initial_state="b d n", complex="A B C initial_state")
def s4d(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    discretization: str = "zoh",
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = dA h_{t-1} + dB x_t ;  y_t = C h_t + D x_t, with (dA, dB) = `discretize`(dt, A, B)

    (Gu et al. 2022, "On the parameterization and initialization of diagonal state space models"). Complex A holds one
    of each pair of conjugate modes: y_t = 2 Re(C h_t). The reference is the recurrence; the backend "torch" a
    convolution by FFT. They are the same numbers.

    Args:
        x: (b, l, d).
        dt: (d,), positive step sizes.
        A: (d, n), negative real part; complex, or real.
        B, C: (d, n), complex or real.
        D: (d,), the skip.
        discretization: "zoh" (zero-order hold) or "bilinear".
        initial_state: (b, d, n); zeros when None. With cu_seqlens, one row a sequence.
        cu_seqlens: (sequences + 1,), int32 offsets 0..l of sequences packed in a batch of 1.
        backend: the implementation, by name; the fastest that can run the call when None.

    Returns:
        y: (b, l, d), in x's dtype.
        final_state: (b, d, n), float32 or wider, complex if A or B is.
    """
    u = x.to(torch.promote_types(x.dtype, torch.float32))
    dA, dB = discretize(dt, A, B, discretization)
    h = initial_state if initial_state is not None else torch.zeros_like(dA * dB).expand(x.shape[0], *A.shape)
    ys = []
    for t in range(x.shape[1]):
        h = dA * h + dB * u[:, t, :, None]
        ys.append(fold_modes(C * h, A))
    y = torch.stack(ys, 1)
    return (y if D is None else y + D * u).to(x.dtype), h


@op(dt="d", A="d n", B="d n", C="d n", complex="A B C")
def s4d_kernel(
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    length: int,
    *,
    discretization: str = "zoh",
    backend: str | None = None,
) -> Tensor:
    """The kernel of the convolution that S4D is: K_t = sum_n C dA^t dB, twice its real part where A is complex.

    Args:
        dt, A, B, C, discretization: as for `s4d`.
        length: how much of the kernel.
        backend: the implementation, by name; the fastest that can run the call when None.

    Returns:
        (d, length), real.
    """
    dA, dB = discretize(dt, A, B, discretization)
    powers = [torch.ones_like(dA)]
    for _ in range(length - 1):
        powers.append(powers[-1] * dA)
    return torch.stack([fold_modes(C * dB * power, A) for power in powers], -1)


def discretize(dt: Tensor, A: Tensor, B: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """(dA, dB), each (d, n), of the continuous h' = A h + B x held over steps of dt.

    zoh:      dA = exp(dt A),                     dB = (exp(dt A) - 1) / A B
    bilinear: dA = (1 + dt A/2) / (1 - dt A/2),   dB = dt B / (1 - dt A/2)
    """
    step = dt[:, None] * A
    if rule == "zoh":
        return torch.exp(step), torch.expm1(step) / A * B
    if rule == "bilinear":
        return (1 + step / 2) / (1 - step / 2), dt[:, None] * B / (1 - step / 2)
    raise ValueError(f"s4d: discretization is {rule!r}, expected 'zoh' or 'bilinear'")


def fold_modes(modes: Tensor, A: Tensor) -> Tensor:
    """Sum over the modes (the last axis); those of complex A come in conjugate pairs of which one is held."""
    y = modes.sum(-1)
    if A.is_complex():
        return 2 * y.real
    return y.real if y.is_complex() else y


def s4d_init(kind: str, n: int) -> tuple[Tensor, Tensor]:
    """Initial (A, B) of a channel with state size n.

    kind: "lin" A = -1/2 + i pi k; "inv" A = -1/2 + i (n/pi) (n/(2k+1) - 1); "legs" the diagonal of the normal part of
    HiPPO-LegS, and its B; each (n/2,) complex64, one of each conjugate pair. "real" A = -(k+1), (n,) float32.
    (Gu et al. 2022, section 4; B is 1 but for "legs".)
    """
    if kind == "real":
        return -torch.arange(1, n + 1, dtype=torch.float32), torch.ones(n)
    if kind not in ("lin", "inv", "legs"):
        raise ValueError(f"s4d_init: kind is {kind!r}, expected 'lin', 'inv', 'legs' or 'real'")
    if n % 2:
        raise ValueError(f"s4d_init: state size n={n} of conjugate pairs must be even")
    if kind == "legs":
        return _legs(n)
    k = torch.arange(n // 2, dtype=torch.float64)
    imag = math.pi * k if kind == "lin" else n / math.pi * (n / (2 * k + 1) - 1)
    return torch.complex(torch.full_like(imag, -0.5), imag).to(torch.complex64), torch.ones(
        n // 2, dtype=torch.complex64
    )


def _legs(n: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS is normal plus rank one: A = S - 1/2 - P P^T with S skew, P_k = sqrt(k + 1/2), B_k = sqrt(2k + 1)."""
    k = torch.arange(n, dtype=torch.float64)
    B = (2 * k + 1).sqrt()
    A = -torch.outer(B, B).tril(-1) - torch.diag(k + 1)
    P = (k + 0.5).sqrt()
    skew = A + torch.outer(P, P) + 0.5 * torch.eye(n, dtype=torch.float64)
    # eigh of the Hermitian -i S: exact real eigenvalues, which are the imaginary parts, in ascending order.
    imag, V = torch.linalg.eigh(-1j * skew)
    imag, V = imag[n // 2 :], V[:, n // 2 :]
    projected = V.mH @ B.to(V.dtype)
    return torch.complex(torch.full_like(imag, -0.5), imag).to(torch.complex64), projected.to(torch.complex64)
