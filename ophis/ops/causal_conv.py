"""The short causal convolution before the scan.   b batch  l length  d channels  w width"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ophis.ops._op import op
from ophis.ops.in_place import check_in_place


@op(x="b l d", weight="d w", bias="d", initial_state="b w-1 d")
def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over the length, of any width:

        y_t = act(bias + sum_k weight[:, k] x_{t - (w-1) + k})

    Args:
        x: (b, l, d).
        weight: (d, w); its last column meets the present input, as in `nn.Conv1d`.
        bias: (d,).
        activation: None or "silu".
        initial_state: (b, w-1, d), the inputs before the first; zeros when None. With cu_seqlens, one row a sequence.
        cu_seqlens: (sequences + 1,), int32 offsets 0..l of sequences packed in a batch of 1.
        backend: the implementation, by name; the fastest that can run the call when None.

    Returns:
        y: (b, l, d), in x's dtype.
        final_state: (b, w-1, d), the last w-1 inputs (zeros or the initial window's where x is shorter), float32 or
            wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    b, l, d = x.shape
    w = weight.shape[1]
    window = x.new_zeros(b, w - 1, d, dtype=wide) if initial_state is None else initial_state.to(wide)
    inputs = torch.cat([window, x.to(wide)], 1)
    y = sum(weight[:, k].to(wide) * inputs[:, k : k + l] for k in range(w))
    return activate(y, bias, activation).to(x.dtype), inputs[:, l:].clone()


@op(x="b d", weight="d w", bias="d", state="b w-1 d")
def causal_conv_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """One position of `causal_conv`, for decoding: `state` is changed in place, so that a CUDA graph can be replayed.

    Not differentiable.

    Args:
        x: (b, d), the present input.
        state: (b, w-1, d), the inputs before it, float32 or in x's dtype. The oldest leaves, x is appended.
        weight, bias, activation, backend: as in `causal_conv`.

    Returns:
        (b, d), in x's dtype.
    """
    check_in_place("causal_conv_step", state, x, weight, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs = torch.cat([state.to(wide), x.to(wide)[:, None]], 1)
    y = activate((inputs * weight.t().to(wide)).sum(1), bias, activation).to(x.dtype)
    state.copy_(inputs[:, 1:])
    return y


def activate(y, bias: Tensor | None, activation: str | None) -> Tensor:
    """The bias, then the activation, in y's dtype."""
    check_activation(activation)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return F.silu(y) if activation else y


def check_activation(activation: str | None) -> None:
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv: activation is {activation!r}, expected None or 'silu'")
