"""Mamba-2's state space duality.   b batch  l length  h heads  p head width  g groups of heads  n state width"""

from __future__ import annotations

import torch
from torch import Tensor

from ophis.ops._op import op
from ophis.ops.in_place import check_in_place
from ophis.ops.selective_scan import finish, state_dtype
from ophis.ops.step_size import step_size


@op(
    x="b l h p", dt="b l h", A="h", B="b l g n", C="b l g n",
    D="h | h p", z="b l h p", dt_bias="h", initial_state="b h p n",
    divides={"g": "h"},
)  # fmt: skip
def ssd(
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
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of Mamba-2, one p x n state and one decay for each head:

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
        y_t = h_t C_t + D x_t, times silu(z_t) where a gate is given

    which is also the product of x with the semiseparable matrix L ∘ (C B^T) (Dao and Gu 2024, sections 3 and 5).

    Args:
        x: (b, l, h, p).
        dt: (b, l, h), the step size Δ, before dt_bias, softplus and dt_limit. A position with step 0 (-inf before
            softplus) and x = 0 leaves the state as it was: that is padding. A lower limit above 0 allows no such step.
        A: (h,), negative.
        B, C: (b, l, g, n), each for h/g neighbouring heads.
        D: (h,) or (h, p), the skip.
        z: (b, l, h, p), the gate.
        dt_bias: (h,), added to dt.
        dt_softplus: dt = softplus(dt + dt_bias).
        dt_limit: dt is clamped to it, after softplus.
        initial_state: (b, h, p, n); zeros when None. With cu_seqlens, one row a sequence.
        cu_seqlens: (sequences + 1,), int32 offsets 0..l of sequences packed in a batch of 1.
        backend: the implementation, by name; the fastest that can run the call when None.

    Returns:
        y: (b, l, h, p), in x's dtype.
        final_state: (b, h, p, n), float32 or wider. Differentiable, as all inputs are.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    u, dt = x.to(wide), step_size(dt.to(wide), dt_bias, dt_softplus, dt_limit)
    heads = x.shape[2] // B.shape[2]  # heads a group
    B, C = B.to(wide).repeat_interleave(heads, 2), C.to(wide).repeat_interleave(heads, 2)
    h = initial_state if initial_state is not None else u.new_zeros(*u[:, 0].shape, B.shape[-1])
    ys = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1))
    return finish(torch.stack(ys, 1), u, per_head(D), z).to(x.dtype), h


@op(
    x="b h p", dt="b h", A="h", B="b g n", C="b g n", state="b h p n", D="h | h p", z="b h p", dt_bias="h",
    divides={"g": "h"},
)  # fmt: skip
def ssd_step(
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
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    backend: str | None = None,
) -> Tensor:
    """One position of `ssd`, for decoding: `state` is changed in place, as replaying a CUDA graph wants it.

    Not differentiable.

    Args:
        x, z: (b, h, p), the present position.
        dt: (b, h).
        B, C: (b, g, n), each for h/g neighbouring heads.
        state: (b, h, p, n), what `ssd` returned, in its dtype or a narrower one; the arithmetic is float32 or wider.
        A, D, dt_bias, dt_softplus, dt_limit, backend: as in `ssd`.

    Returns:
        (b, h, p), in x's dtype.
    """
    check_in_place("ssd_step", state, x, dt, A, B, C, D, z, dt_bias)
    y, after = ssd.reference(
        x[:, None], dt[:, None], A, B[:, None], C[:, None], D=D, z=None if z is None else z[:, None], dt_bias=dt_bias,
        dt_softplus=dt_softplus, dt_limit=dt_limit, initial_state=state.to(state_dtype(x, state)),
    )  # fmt: skip
    state.copy_(after)
    return y[:, 0]


def per_head(D: Tensor | None) -> Tensor | None:
    """D per head, or per head and channel, so that it broadcasts over (b, l, h, p)."""
    return D[:, None] if D is not None and D.ndim == 1 else D
