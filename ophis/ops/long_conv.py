"""Convolution with a kernel as long as the sequence.   b batch  l length  d channels  k kernel length"""

from __future__ import annotations

import torch
from torch import Tensor

from ophis.ops._op import op


@op(x="b l d", kernel="d k", D="d")
def long_conv(x: Tensor, kernel: Tensor, *, D: Tensor | None = None, backend: str | None = None) -> Tensor:
    """y_t = sum_{s <= t} kernel[:, t - s] x_s + D x_t: causal, one kernel for each channel.

    Args:
        x: (b, l, d).
        kernel: (d, k); its first column meets the present input. Taken as zero beyond k, cut at l.
        D: (d,), the skip.
        backend: the implementation, by name; the fastest that can run the call when None.

    Returns:
        (b, l, d), in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    u, kernel = x.to(wide), kernel.to(wide)
    l = x.shape[1]
    y = torch.zeros_like(u)
    for s in range(min(l, kernel.shape[1])):
        y = y + torch.nn.functional.pad(u[:, : l - s], (0, 0, s, 0)) * kernel[:, s]
    return (y if D is None else y + D.to(wide) * u).to(x.dtype)
