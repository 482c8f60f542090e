"""Mamba's selective scan (S6).   b batch  l length  d channels  n state size  g groups of channels"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ophis.ops._op import op
from ophis.ops.in_place import check_in_place
from ophis.ops.step_size import step_size


@op(
    x="b l d", dt="b l d", A="d n", B="b l n | b l g n | d n", C="b l n | b l g n | d n",
    D="d", z="b l d", dt_bias="d", initial_state="b d n",
    complex="A B C initial_state", divides={"g": "d"},
)  # fmt: skip
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of Mamba, one state of size n for each channel:

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t
        y_t = C_t h_t + D x_t, times silu(z_t) where a gate is given

    A is discretised by zero-order hold and B by Euler's rule, as in the published code (Gu and Dao 2023, section 2
    and algorithm 2). With complex A the state stands for one half of conjugate pairs, and y_t = 2 Re(C_t h_t).

    Args:
        x: (b, l, d), the input u of the paper.
        dt: (b, l, d), the step size Δ, before dt_bias and softplus. A position with step 0 (-inf before softplus)
            and x = 0 leaves the state as it was: that is padding.
        A: (d, n), negative real part. May be complex, as may B, C and initial_state.
        B, C: (b, l, n) for all channels; (b, l, g, n), each for d/g neighbouring channels; or (d, n), constant.
        D: (d,), the skip.
        z: (b, l, d), the gate.
        dt_bias: (d,), added to dt.
        dt_softplus: dt = softplus(dt + dt_bias).
        initial_state: (b, d, n); zeros when None. With cu_seqlens, one row a sequence.
        cu_seqlens: (sequences + 1,), int32 offsets 0..l of sequences packed in a batch of 1.
        backend: the implementation, by name; the fastest that can run the call when None.

    Returns:
        y: (b, l, d), in x's dtype.
        final_state: (b, d, n), float32 or wider, complex if A, B or initial_state is. Both are differentiable in all
            inputs.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    u, dt = x.to(wide), step_size(dt.to(wide), dt_bias, dt_softplus)
    B, C = per_channel(B, x), per_channel(C, x)
    h = initial_state if initial_state is not None else x.new_zeros(x.shape[0], *A.shape, dtype=state_dtype(x, A, B))
    ys = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t]
        ys.append(readout(C[:, t] * h, A).sum(-1))
    return finish(torch.stack(ys, 1), u, D, z).to(x.dtype), h


@op(
    x="b d", dt="b d", A="d n", B="b n | b g n", C="b n | b g n", state="b d n", D="d", z="b d", dt_bias="d",
    complex="A B C state", divides={"g": "d"},
)  # fmt: skip
def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    backend: str | None = None,
) -> Tensor:
    """One position of `selective_scan`, for decoding: `state` is changed in place, as replaying a CUDA graph wants it.

    Not differentiable.

    Args:
        x, dt, z: (b, d), the present position.
        B, C: (b, n), or (b, g, n), each for d/g neighbouring channels.
        state: (b, d, n), what the scan returned, in its dtype or a narrower one; the arithmetic is float32 or wider.
        A, D, dt_bias, dt_softplus, backend: as in `selective_scan`.

    Returns:
        (b, d), in x's dtype.
    """
    check_in_place("selective_scan_step", state, x, dt, A, B, C, D, z, dt_bias)
    before = state.to(state_dtype(x, A, B, state))
    B, C = B[:, None], C[:, None]
    y, after = selective_scan.reference(
        x[:, None], dt[:, None], A, B, C, D=D, z=None if z is None else z[:, None], dt_bias=dt_bias,
        dt_softplus=dt_softplus, initial_state=before,
    )  # fmt: skip
    state.copy_(after)
    return y[:, 0]


def state_dtype(x: Tensor, *matrices: Tensor) -> torch.dtype:
    """float32 or wider, complex where a matrix is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    for matrix in matrices:
        dtype = torch.promote_types(dtype, matrix.dtype)
    return dtype


def per_channel(B: Tensor, x: Tensor) -> Tensor:
    """B or C in any of its three shapes, as a view or copy of shape (b, l, d, n)."""
    b, l, d = x.shape
    if B.ndim == 2:
        return B.expand(b, l, *B.shape)
    if B.ndim == 3:
        return B[:, :, None].expand(b, l, d, B.shape[-1])
    return B.repeat_interleave(d // B.shape[2], dim=2)


def readout(y: Tensor, A: Tensor) -> Tensor:
    """Complex A holds one of each pair of conjugate modes: the pair's sum is twice the real part."""
    if A.is_complex():
        return 2 * y.real
    return y.real if y.is_complex() else y


def finish(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """The skip and the gate, in y's dtype."""
    if D is not None:
        y = y + D.to(y.dtype) * x
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y
