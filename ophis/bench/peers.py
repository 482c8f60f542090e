"""The same work by others, where they are installed: mamba-ssm's selective scan, causal-conv1d's convolution.

Both have the length last. Their inputs are copied into that layout before the clock runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Peer(NamedTuple):
    name: str  # in the table
    package: str
    function: str  # module:name
    prepare: Callable[[Callable[..., Any], dict[str, Any]], tuple[Callable[..., Any], dict[str, Any]]]
    # (the function, an op's inputs) -> (a function of the tensors that it has in their layout, these tensors)


def peers_of(op: str) -> tuple[list[tuple[Peer, Callable[..., Any]]], list[str]]:
    """Those that can be imported, each with its function, and for each package that cannot a line that says so."""
    found, missing = [], {}
    for peer in PEERS.get(op, ()):
        module, _, name = peer.function.partition(":")
        try:
            found.append((peer, getattr(importlib.import_module(module), name)))
        except ModuleNotFoundError as error:
            absent = error.name == module.partition(".")[0]
            missing[peer.package] = "is not installed" if absent else f"needs {error.name}"
        except Exception as error:  # compiled for another PyTorch, say: whatever it is, it is not ours
            missing[peer.package] = f"cannot be imported ({error})"
    return found, [f"{package} {reason}: its rows are left out" for package, reason in missing.items()]


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


def _length_last(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous()


PEERS: dict[str, tuple[Peer, ...]] = {
    "selective_scan": (
        Peer("mamba-ssm", "mamba-ssm", "mamba_ssm.ops.selective_scan_interface:selective_scan_fn", _scan),
    ),
    "selective_scan_step": (
        Peer(
            "mamba-ssm", "mamba-ssm", "mamba_ssm.ops.triton.selective_state_update:selective_state_update", _scan_step
        ),
    ),
    "causal_conv": (
        Peer("causal-conv1d", "causal-conv1d", "causal_conv1d:causal_conv1d_fn", _conv),
        Peer("causal-conv1d, (b, l, d)", "causal-conv1d", "causal_conv1d:causal_conv1d_fn", _conv_channels_last),
    ),
    "causal_conv_step": (Peer("causal-conv1d", "causal-conv1d", "causal_conv1d:causal_conv1d_update", _conv_step),),
}
