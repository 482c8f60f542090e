"""The same work by others, where they are installed: mamba-ssm's scan and SSD, causal-conv1d's convolution.

Some have the length last: their inputs are copied into that layout before the clock runs. Beside SSD stand what it is
meant to beat: this library's scan on the same numbers, and attention on other ones, of the same width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


class Peer(NamedTuple):
    name: str  # in the table
    package: str
    function: str  # module:name
    prepare: Callable[[Callable[..., Any], dict[str, Any]], tuple[Callable[..., Any], dict[str, Any]]]
    # (the function, an op's inputs) -> (a function of the tensors that it has in their layout, these tensors)
    same_work: bool = True  # whether it computes the same numbers
    length_last: bool = False  # whether its outputs are (b, d, l)
    longest: int | None = None  # positions


def peers_of(op: str) -> tuple[list[tuple[Peer, Callable[..., Any]]], list[str]]:
    """Those that can be imported, each with its function, and for each package that cannot a line that says so."""
    found, missing = [], {}
    for peer in PEERS.get(op, ()):
        function, reason = imported(peer.function)
        if function is None:
            missing[peer.package] = reason
        else:
            found.append((peer, function))
    return found, [f"{package} {reason}: its rows are left out" for package, reason in missing.items()]


def imported(what: str) -> tuple[Any, str]:
    """A function or class, as module:name; or None, and what keeps it away."""
    module, _, name = what.partition(":")
    try:
        return getattr(importlib.import_module(module), name), ""
    except ModuleNotFoundError as error:
        absent = error.name == module.partition(".")[0]
        return None, "is not installed" if absent else f"needs {error.name}"
    except Exception as error:  # compiled for another PyTorch, say: whatever it is, it is not ours
        return None, f"cannot be imported ({error})"


def _scan(function: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    def call(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False) -> Tensor:
        return function(x, dt, A, B, C, D=D, z=z, delta_bias=dt_bias, delta_softplus=dt_softplus)

    return call, {k: _length_last(v) if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}


def _scan_step(function: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    def call(x, dt, A, B, C, state, D=None, z=None, dt_bias=None, dt_softplus=False) -> Tensor:
        return function(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)

    return call, {**inputs, "state": inputs["state"].clone()}


def _conv(function: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    return function, {**inputs, "x": _length_last(inputs["x"])}


def _conv_channels_last(
    function: Callable[..., Any], inputs: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    return function, {**inputs, "x": inputs["x"].transpose(1, 2)}


def _conv_step(function: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    def call(x, state, weight, bias=None, activation=None) -> Tensor:
        return function(x, state, weight, bias, activation)

    window = inputs["state"].to(inputs["x"].dtype)  # theirs has x's dtype
    return call, {**inputs, "state": _length_last(window)}


def _ssd(function: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    def call(x, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False) -> Tensor:
        return function(x, dt, A, B, C, chunk_size=256, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)

    return call, inputs


def _ssd_step(function: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A, dt and dt_bias are given for each channel and state, without memory for it: it looks at their strides. It does
    so even where there is no dt_bias or D, which therefore are zeros."""
    zeros = inputs["A"].new_zeros(1).expand(inputs["x"].shape[1:])

    def call(x, dt, A, B, C, state) -> Tensor:
        channels = dt[..., None].expand_as(x)
        return function(state, x, channels, A[:, None, None].expand(state.shape[1:]), B, C, D=zeros, dt_bias=zeros)

    return call, {**inputs, "state": inputs["state"].clone()}


def _ssd_as_scan(function: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A head's channels one by one, each with its own copy of the head's step and rate."""
    x, n = inputs["x"], inputs["B"].shape[-1]
    p = x.shape[-1]

    def call(x, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False) -> Tensor:
        y, _ = function(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)
        return y.unflatten(2, (-1, p))

    per_channel = {k: inputs[k].repeat_interleave(p, -1) for k in ("dt", "A", "D", "dt_bias") if k in inputs}
    per_channel["A"] = per_channel["A"][:, None].repeat(1, n)
    return call, {**inputs, **per_channel, "x": x.flatten(2)}


def _attention(
    kind: str, head: int, function: Callable[..., Any], inputs: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Causal attention of x's width, queries, keys and values drawn anew."""
    x = inputs["x"]
    shape = (x.shape[0], x[0, 0].numel() // head, x.shape[1], head)

    def call(q, k, v) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, kind)):
            return function(q, k, v, is_causal=True)

    return call, {name: torch.randn(shape, dtype=x.dtype, device=x.device) for name in "qkv"}


def _length_last(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous()


PEERS: dict[str, tuple[Peer, ...]] = {
    "selective_scan": (
        Peer(
            "mamba-ssm",
            "mamba-ssm",
            "mamba_ssm.ops.selective_scan_interface:selective_scan_fn",
            _scan,
            length_last=True,
        ),
    ),
    "selective_scan_step": (
        Peer(
            "mamba-ssm", "mamba-ssm", "mamba_ssm.ops.triton.selective_state_update:selective_state_update", _scan_step
        ),
    ),
    "ssd": (
        Peer("mamba-ssm", "mamba-ssm", "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined", _ssd),
        Peer("selective_scan", "ophis", "ophis.ops:selective_scan", _ssd_as_scan, longest=131072),
        *[
            Peer(
                f"attention, {name}, head {head}",
                "torch",
                "torch.nn.functional:scaled_dot_product_attention",
                partial(_attention, kind, head),
                same_work=False,
                longest=32768,
            )
            for name, kind in (("cuDNN", "CUDNN_ATTENTION"), ("FlashAttention-2", "FLASH_ATTENTION"))
            for head in (64, 128)
        ],
    ),
    "ssd_step": (
        Peer("mamba-ssm", "mamba-ssm", "mamba_ssm.ops.triton.selective_state_update:selective_state_update", _ssd_step),
    ),
    "causal_conv": (
        Peer("causal-conv1d", "causal-conv1d", "causal_conv1d:causal_conv1d_fn", _conv, length_last=True),
        Peer(
            "causal-conv1d, (b, l, d)",
            "causal-conv1d",
            "causal_conv1d:causal_conv1d_fn",
            _conv_channels_last,
            length_last=True,
        ),
    ),
    "causal_conv_step": (Peer("causal-conv1d", "causal-conv1d", "causal_conv1d:causal_conv1d_update", _conv_step),),
}
