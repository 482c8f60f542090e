"""Normalisation behind dropout and a residual sum.   d width"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ophis import ops


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """norm(s) weight + bias with s = residual + dropout(x rowscale) + dropout(x1).

    Args:
        x, residual, x1: (..., d).
        weight, bias: (d,); bias may be None.
        weight1, bias1: (d,), of a second norm of the same s.
        eps: added to the variance, or the mean square.
        dropout_p: the share of x, and of x1, that is dropped. It is drawn at every call: whether the model trains is
            the caller's to know.
        rowscale: (...), not with x1.
        prenorm: also return s, the residual stream.
        residual_in_fp32: s is float32 where there is no residual whose dtype it takes.
        is_rms_norm: divide by the root mean square, without subtracting the mean.
        return_dropout_mask: also return what was kept of x, and of x1, as booleans; None for what does not apply.

    Returns:
        y (..., d) in x's dtype; or a tuple: y, the second norm's with weight1, s with prenorm, then the two masks.
    """
    if x1 is not None and rowscale is not None:
        raise ValueError("layer_norm_fn: rowscale scales x alone and cannot be given with x1")
    plain = dropout_p == 0 and rowscale is None and x1 is None
    if plain and is_rms_norm and bias is None and weight1 is None and not return_dropout_mask:
        if residual is None and residual_in_fp32:
            y, s = ops.rms_norm(x, weight, eps=eps)[0], x.float()
        else:
            y, s = ops.rms_norm(x, weight, residual=residual, eps=eps)
        return (y, s) if prenorm else y
    s = x.to(torch.promote_types(x.dtype, torch.float32))
    if rowscale is not None:
        s = s * rowscale[..., None]
    s, mask = _dropout(s, dropout_p)
    mask1 = None
    if x1 is not None:
        other, mask1 = _dropout(x1.to(s.dtype), dropout_p)
        s = s + other
    if residual is not None:
        s = s + residual
    results = [_norm(s, weight, bias, eps, is_rms_norm).to(x.dtype)]
    if weight1 is not None:
        results.append(_norm(s, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        narrow = torch.float32 if residual_in_fp32 else x.dtype
        results.append(s.to(narrow if residual is None else residual.dtype))
    if return_dropout_mask:
        results += [mask, mask1]
    return tuple(results) if len(results) > 1 else results[0]


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """`layer_norm_fn` with is_rms_norm."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True,
        return_dropout_mask,
    )  # fmt: skip


class RMSNorm(nn.Module):
    """norm(residual + dropout(x)) weight; with `prenorm` the sum is returned beside it."""

    bias: None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def _dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    if p == 0:
        return x, None
    kept = torch.rand_like(x) >= p
    return x * kept / (1 - p), kept


def _norm(s: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Any:
    if not is_rms_norm:
        return F.layer_norm(s, s.shape[-1:], weight.to(s.dtype), None if bias is None else bias.to(s.dtype), eps)
    y, _ = ops.rms_norm(s, weight, eps=eps)
    return y if bias is None else y + bias
