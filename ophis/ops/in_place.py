"""What the ops of a single step share: they change their state, which no gradient survives."""

from __future__ import annotations

import torch
from torch import Tensor


def check_in_place(name: str, state: Tensor, *inputs: Tensor | None) -> None:
    """Raises unless the op `name`, the step of the op without "_step", may write `state` without a trace."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (state, *inputs)):
        raise RuntimeError(
            f"{name}: it changes its state in place and has no gradient, but an input requires one; "
            f"use {name.removesuffix('_step')}, or call it under torch.no_grad()"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(state.shape, state.stride(), strict=True)):
        raise ValueError(
            f"{name}: state has strides {state.stride()} for shape {tuple(state.shape)}: its rows share memory, "
            f"expected one that can be written in place"
        )
