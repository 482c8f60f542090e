"""The gated MLP of the published models."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLE = 128  # the default hidden width is rounded up to one


class GatedMLP(nn.Module):
    """fc2(y silu(gate)) with y, gate = fc1(x): SwiGLU. The hidden width is 8/3 of the model's unless given."""

    def __init__(self, d_model: int, *, d_hidden: int | None = None, bias: bool = False, device=None, dtype=None):
        super().__init__()
        hidden = d_hidden or -(-int(8 * d_model / 3) // MULTIPLE) * MULTIPLE
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(y * F.silu(gate))
