"""The step size Δ (`dt`) of a selective state space, shared by the scan and by SSD."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def step_size(
    dt: Tensor,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """dt + dt_bias, then softplus, then the clamp to `dt_limit`, whose gradient is zero outside.

    dt_bias is per channel, on dt's last axis. PyTorch's softplus is log1p(exp(x)), linear above 20: small steps keep
    their relative precision, and a raw dt of -inf gives a step of exactly 0, which leaves the state as it was.
    """
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    if dt_limit != (0.0, float("inf")):
        dt = dt.clamp(*dt_limit)
    return dt
