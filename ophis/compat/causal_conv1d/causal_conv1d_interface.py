"""The short convolution with channels first.   b batch  d channels  l length  w width  s state length"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ophis import ops
from ophis.compat.packing import Runs


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """Depthwise causal convolution over the length.

    Args:
        x: (b, d, l), in any layout in memory.
        weight, bias: (d, w), any width; (d,).
        seq_idx: (b, l) integers: each run of equal ones is a sequence of its own. Below 0 is padding, where y is 0.
        initial_states: (b, d, w-1), the inputs before the first; with seq_idx, of each row's first sequence.
        return_final_states: also return the last w-1 inputs; not with seq_idx.
        final_states_out: (b, d, w-1), to be written to and returned as them.
        activation: None, "silu" or "swish", which is the same.

    Returns:
        (b, d, l) in x's dtype and layout; with return_final_states (that, (b, d, w-1) in x's dtype).
    """
    y, state = _conv(x, weight, bias, seq_idx, initial_states, return_final_states, activation, None)
    return _with_state(x, y, state, return_final_states, final_states_out)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
) -> Any:
    """`causal_conv1d_fn` by the defining sum, in any dtype; mind the order of its arguments."""
    y, state = _conv(x, weight, bias, seq_idx, initial_states, return_final_states, activation, "reference")
    return _with_state(x, y, state, return_final_states, final_states_out)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    return_final_states: bool,
    activation: str | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    if seq_idx is not None and return_final_states:
        raise ValueError("causal_conv1d_fn: with seq_idx there is no one final state; leave out return_final_states")
    inputs = x.transpose(1, 2)
    window = None if initial_states is None else initial_states.transpose(1, 2)
    act = _activation(activation)
    if seq_idx is None:
        return ops.causal_conv(inputs, weight, bias, activation=act, initial_state=window, backend=backend)
    runs = Runs.of(seq_idx)
    y, state = ops.causal_conv(
        runs.pack(inputs),
        weight,
        bias,
        activation=act,
        initial_state=runs.begin_with(window),
        cu_seqlens=runs.cu_seqlens,
        backend=backend,
    )
    return runs.unpack(y).masked_fill((seq_idx < 0)[..., None], 0), state


def _with_state(x: Tensor, y: Tensor, state: Tensor, return_final_states: bool, final_states_out: Tensor | None) -> Any:
    y = y.transpose(1, 2)
    if x.stride(1) != 1 or x.stride(2) == 1:  # what follows may view it in x's layout
        y = y.contiguous()
    if not return_final_states:
        return y
    state = state.transpose(1, 2).to(x.dtype)
    return y, state if final_states_out is None else final_states_out.copy_(state)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next positions, from the inputs before them, which are kept in place. No gradient.

    Args:
        x: (b, d), or (b, d, l).
        conv_state: (b, d, s), s >= w-1, the last s inputs; x is appended and as many leave.
        weight, bias, activation: as in `causal_conv1d_fn`.
        cache_seqlens: (b,), how many inputs there were: conv_state is then a ring, where input i stands at i mod s.
        conv_state_indices: (b,), the rows of a larger conv_state that are meant; below 0 is padding, where y is 0.

    Returns:
        Like x.
    """
    return _update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, None)


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` by the defining sum."""
    return _update(x, conv_state, weight, bias, activation, cache_seqlens, None, "reference")


@torch.no_grad()
def _update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    backend: str | None,
) -> Tensor:
    inputs = x[..., None] if x.ndim == 2 else x
    l, w, s = inputs.shape[-1], weight.shape[1], conv_state.shape[-1]
    if s < w - 1:
        raise ValueError(f"causal_conv1d_update: conv_state holds {s} inputs, expected at least w-1={w - 1}")
    rows = conv_state if conv_state_indices is None else conv_state[conv_state_indices.clamp(min=0)]
    if cache_seqlens is None:
        window = rows[..., s - (w - 1) :]
        after = torch.cat([rows, inputs.to(rows.dtype)], -1)[..., l:]
    else:
        window = rows.gather(2, _places(cache_seqlens, 1 - w, 0, rows))
        kept = inputs[..., -s:].to(rows.dtype)  # more than the ring holds would write a place twice
        after = rows.scatter(2, _places(cache_seqlens, l - kept.shape[-1], l, rows), kept)
    y, _ = ops.causal_conv(
        inputs.transpose(1, 2),
        weight,
        bias,
        activation=_activation(activation),
        initial_state=window.transpose(1, 2),
        backend=backend,
    )
    y = y.transpose(1, 2)
    if conv_state_indices is None:
        conv_state.copy_(after)
    else:
        real = conv_state_indices >= 0
        conv_state[conv_state_indices[real]] = after[real]
        y = y.masked_fill(~real[:, None, None], 0)
    return y.squeeze(-1) if x.ndim == 2 else y


def _places(cache_seqlens: Tensor, start: int, end: int, rows: Tensor) -> Tensor:
    """(b, d, end - start): where the inputs `start` to `end` after those there were stand in the ring."""
    offsets = torch.arange(start, end, device=rows.device)
    places = (cache_seqlens.to(rows.device).long()[:, None] + offsets) % rows.shape[-1]
    return places[:, None].expand(-1, rows.shape[1], -1)


def _activation(name: str | None) -> str | None:
    return "silu" if name == "swish" else name  # the op refuses what it does not know
