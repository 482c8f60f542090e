"""One position of the selective scan or of SSD.   b batch  h heads  p head width or channels  n state size  g groups"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ophis import ops


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """state = exp(dt A) state + dt B x;  y = C state + D x, times silu(z). The state changes in place; no gradient.

    Args:
        state: (b, p, n), or (b, h, p, n), of any dtype; the arithmetic is float32 or wider.
        x, dt, z: (b, p), or (b, h, p).
        A: (p, n), or (h, p, n).
        B, C: (b, n), or (b, g, n), each for h/g neighbouring heads.
        D, dt_bias: (p,), or (h, p).
        dt_softplus: dt = softplus(dt + dt_bias).
        state_batch_indices: (b,), the rows of a larger state that are meant.

    Returns:
        Like x.
    """
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, None)


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`selective_state_update` by its formula."""
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, None, "reference")


@torch.no_grad()
def _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, backend) -> Tensor:
    heads = state.ndim == 4

    def joined(t: Any, start: int = 1) -> Any:  # heads and their channels as one axis
        return t.flatten(start, start + 1) if heads and t is not None else t

    rows = state if state_batch_indices is None else state[state_batch_indices]
    own = joined(rows)
    y = ops.selective_scan_step(
        joined(x),
        joined(dt),
        joined(A, 0),
        B,
        C,
        own,
        D=joined(D, 0),
        z=joined(z),
        dt_bias=joined(dt_bias, 0),
        dt_softplus=dt_softplus,
        backend=backend,
    )
    if state_batch_indices is not None:
        state[state_batch_indices] = own.view_as(rows)
    elif own.data_ptr() != state.data_ptr():  # heads and channels do not join without a copy
        state.copy_(own.view_as(state))
    return y.view_as(x)
