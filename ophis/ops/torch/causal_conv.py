"""The short convolution through PyTorch's own depthwise kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ophis.ops.causal_conv import activate, causal_conv
from ophis.ops.torch.packing import sequence_of


@causal_conv.register("torch")
def conv(x, weight, bias, *, activation, initial_state, cu_seqlens):
    wide = torch.promote_types(x.dtype, torch.float32)
    if initial_state is None:
        rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = x.new_zeros(rows, weight.shape[1] - 1, x.shape[2], dtype=wide)
    else:
        initial_state = initial_state.to(wide)
    x_wide, weight = x.to(wide), weight.to(wide)
    if cu_seqlens is not None:
        y, state = packed(x_wide, weight, initial_state, cu_seqlens)
    else:
        inputs = torch.cat([initial_state, x_wide], 1)
        # A copy: a view would keep the whole sequence in memory for as long as the state lives.
        y, state = depthwise(inputs, weight), inputs[:, x.shape[1] :].clone()
    return activate(y, bias, activation).to(x.dtype), state


def depthwise(inputs: Tensor, weight: Tensor) -> Tensor:
    """(b, l+w-1, d) -> (b, l, d)."""
    if inputs.shape[1] == weight.shape[1]:  # one output: a dot product, without the convolution's set-up
        return (inputs * weight.t()).sum(1, keepdim=True)
    # As an image of height 1 whose channels are last in memory: at 512 x 1536 on 2 cores 1.4 ms forward, against 8.0
    # for conv1d and 2.1 for a sum of shifted products; 6.9, 31 and 15 forward and backward.
    image = inputs.transpose(1, 2).unsqueeze(2)
    return F.conv2d(image, weight[:, None, None], groups=weight.shape[0]).squeeze(2).transpose(1, 2)


def packed(x: Tensor, weight: Tensor, windows: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Every sequence with its window before it, all in one row."""
    l, d = x.shape[1:]
    sequences, reach, _ = windows.shape
    starts = cu_seqlens[:-1] + reach * torch.arange(sequences, device=x.device)  # of the windows in that row
    of_windows = (starts[:, None] + torch.arange(reach, device=x.device)).flatten()
    of_tokens = torch.arange(l, device=x.device) + reach * (sequence_of(cu_seqlens, l) + 1)
    row = x.new_zeros(1, l + sequences * reach, d).index_copy(1, torch.cat([of_windows, of_tokens]),
        torch.cat([windows.reshape(1, -1, d), x], 1))  # fmt: skip
    ends = starts + cu_seqlens.diff()
    of_states = (ends[:, None] + torch.arange(reach, device=x.device)).flatten()
    return (
        depthwise(row, weight).index_select(1, of_tokens - reach),
        row.index_select(1, of_states).view(sequences, reach, d),
    )
