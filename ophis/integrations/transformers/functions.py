"""The functions that transformers' Mamba-family models share, on the ops: the same names, arguments and layouts.

Signals are (b, d, l), states (b, d, n) for Mamba; (b, l, h, p) and (b, h, p, n) for Mamba-2. Windows, (b, d, w) for a
convolution of width w, hold one input more than it reads. Windows and states are written in place.

b batch  l length  d channels  n state size  h heads  p head width  g groups  w width of the convolution
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from ophis import ops
from ophis.integrations.transformers.sequences import Sequences

UNLIMITED = (0.0, float("inf"))


def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **kwargs):
    x = hidden_states.transpose(1, 2)
    sequences = Sequences.of(x, None, kwargs.get("seq_idx"))
    y, _ = convolve(x if sequences is None else sequences.pack(x), weight, bias, activation, None, sequences)
    return (y if sequences is None else sequences.unpack(y)).transpose(1, 2)


def causal_conv1d_fn_of_mamba(hidden_states, weight, bias=None, activation=None, **kwargs):
    """Where Mamba's mixers are transformers' own: they tell the convolution of packed sequences, and not the scan."""
    if kwargs.get("seq_idx") is not None:
        raise ValueError(
            "seq_idx: this model's mixer cannot keep packed sequences apart, since it does not pass them to the scan; "
            "print(ophis.accelerate_transformers()) says why it was left as it is"
        )
    return causal_conv1d_fn(hidden_states, weight, bias, activation)


def causal_conv1d_update(hidden_states, conv_state, weight, bias=None, activation=None):
    l = hidden_states.shape[-1]
    if l == 1 and not torch.is_grad_enabled():
        return convolve_step(hidden_states[..., 0], conv_state, weight, bias, activation)[..., None]
    window = conv_state.clone()
    y, _ = convolve(hidden_states.transpose(1, 2), weight, bias, activation, window, None)
    conv_state.copy_(torch.cat([window, hidden_states], -1)[..., l:])
    return y.transpose(1, 2)


def mamba_selective_scan(
    hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False,
    use_mambapy=False, use_associative_scan=False, **kwargs,
):  # fmt: skip
    x, dt, B, C = (t.transpose(1, 2) for t in (hidden_states, dt, B, C))
    z = None if z is None else z.transpose(1, 2)
    y, state = ops.selective_scan(x, dt, A, B, C, D=D, z=z, dt_bias=delta_bias, dt_softplus=delta_softplus)
    y = y.transpose(1, 2)
    return (y, state) if return_last_state else y


def mamba_selective_state_update(
    state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs
):
    options: Any = dict(D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)
    if not torch.is_grad_enabled():
        return ops.selective_scan_step(hidden_states, dt, A, B, C, state, z=z, **options)
    x, dt, B, C = (t[:, None] for t in (hidden_states, dt, B, C))
    z = None if z is None else z[:, None]
    y, after = ops.selective_scan(x, dt, A, B, C, z=z, initial_state=state.clone(), **options)
    state.copy_(after)
    return y[:, 0]


def mamba_inner_fn(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None,
    D=None, delta_bias=None, delta_softplus=True, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6, **kwargs,
):  # fmt: skip
    """None: the mixer then goes on part by part, through its modules, so that adapters on them count."""
    return None  # noqa: RET501


def mamba2_chunk_scan(
    hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False,
    dt_limit=UNLIMITED, return_final_states=False, **kwargs,
):  # fmt: skip
    x, z, offsets = hidden_states, kwargs.get("z"), None
    if initial_states is not None and torch.is_grad_enabled():
        initial_states = initial_states.clone()  # a cache's, which changes before the backward pass reads it
    sequences = Sequences.of(x, None, kwargs.get("seq_idx"))
    if sequences is not None:
        x, dt, B, C = (sequences.pack(t) for t in (x, dt, B, C))
        z = None if z is None else sequences.pack(z)
        initial_states, offsets = sequences.begin(initial_states), sequences.cu_seqlens
    y, states = ops.ssd(
        x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
        initial_state=initial_states, cu_seqlens=offsets,
    )  # fmt: skip
    if sequences is not None:
        y, states = sequences.unpack(y), sequences.end(states)
    y = y.contiguous()  # Falcon-H1 takes a view of it
    return (y, states) if return_final_states else y


def mamba2_selective_state_update(
    state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs
):
    """dt, A, D and dt_bias are (..., h, p), A (h, p, n) too; the mixers expand them from one number a head."""
    rates = one_each(one_each(A))
    steps, bias = one_each(dt), None if dt_bias is None else one_each(dt_bias)
    if rates is None or steps is None or (bias is None) != (dt_bias is None):  # numbers of its own for each channel
        b, h, p, n = state.shape
        x, dt, z, D, dt_bias = (None if t is None else t.flatten(-2) for t in (hidden_states, dt, z, D, dt_bias))
        y = mamba_selective_state_update(
            state.view(b, h * p, n), x, dt, A.flatten(0, 1), B, C, D, dt_bias, dt_softplus, z
        )
        return y.unflatten(1, (h, p))
    options: Any = dict(D=D, dt_bias=bias, dt_softplus=dt_softplus)
    if not torch.is_grad_enabled():
        return ops.ssd_step(hidden_states, steps, rates, B, C, state, z=z, **options)
    x, steps, B, C = (t[:, None] for t in (hidden_states, steps, B, C))
    z = None if z is None else z[:, None]
    y, after = ops.ssd(x, steps, rates, B, C, z=z, initial_state=state.clone(), **options)
    state.copy_(after)
    return y[:, 0]


def mamba2_split_conv1d_scan_combined(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None, dt_limit=UNLIMITED,
    return_final_states=False, activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None,
    outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True, **kwargs,
):  # fmt: skip
    """None, as `mamba_inner_fn`."""
    return None  # noqa: RET501


def one_each(t: Tensor | None) -> Tensor | None:
    """The numbers that were expanded along the last axis; None where it holds different ones."""
    return t[..., 0] if t is not None and (t.stride(-1) == 0 or t.shape[-1] == 1) else None


# What the mixers share with these functions: the convolution between a cache's windows and the op's.


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, window: Tensor | None,
    sequences: Sequences | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (b, l, d) after what the window holds; y and the last w - 1 inputs (b, w-1, d). Packed if there are sequences.

    Args:
        x: (b, l, d), or (1, t, d) as `sequences` packed it.
        weight: (d, w).
        bias: (d,).
        activation: its name in transformers.
        window: (b, d, w) or more, a row's inputs before x; zeros when None.
        sequences: those of the batch.
    """
    fused = "silu" if activation in ("silu", "swish") else None
    before = None if window is None else inputs_before(window, weight)
    offsets = None
    if sequences is not None:
        before, offsets = sequences.begin(before), sequences.cu_seqlens
    y, last = ops.causal_conv(x, weight, bias, activation=fused, initial_state=before, cu_seqlens=offsets)
    return activated(y, activation, fused), last if sequences is None else sequences.end(last)


def convolve_step(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """One position (b, d) of it, in the window's own memory."""
    fused = "silu" if activation in ("silu", "swish") else None
    window[..., :1] = window[..., 1:2] if window.shape[-1] > 1 else x[..., None]  # not read here; for whoever looks
    y = ops.causal_conv_step(x, inputs_before(window, weight), weight, bias, activation=fused)
    return activated(y, activation, fused)


def inputs_before(window: Tensor, weight: Tensor) -> Tensor:
    """The end of a window (b, d, w or more) as the op's state, a view (b, w-1, d)."""
    return window[..., window.shape[-1] - weight.shape[-1] + 1 :].transpose(1, 2)


def activated(y: Tensor, activation: str | None, fused: str | None) -> Tensor:
    return y if activation is None or fused else ACT2FN[activation](y)
