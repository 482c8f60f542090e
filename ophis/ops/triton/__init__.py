"""Triton kernels, for GPUs of NVIDIA, AMD and Intel; under TRITON_INTERPRET=1 on a CPU, to test them. Forward and
backward, any strides, packed sequences, offsets of 64 bits."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_not() -> str | None:
    if not (INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available()):
        return "this machine has no GPU"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing; PyTorch for GPUs brings it"
    return None


def why_not_here(x: torch.Tensor) -> str | None:
    """What keeps Triton from the device that x is on."""
    if x.device.type in ("cuda", "xpu") or (INTERPRETED and x.device.type == "cpu"):
        return None
    return f"x is on {x.device.type}, which Triton has no kernels for"


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, wherever the tensors are."""
    return contextlib.nullcontext() if x.device.type == "cpu" else torch.get_device_module(x.device.type).device_of(x)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device.type).get_device_properties(device)
    return properties.multi_processor_count if device.type == "cuda" else properties.max_compute_units


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have of it; none under the interpreter."""
    if device.type == "cpu":
        return 0
    from triton.runtime import driver

    index = torch.get_device_module(device.type).current_device() if device.index is None else device.index
    return driver.active.utils.get_device_properties(index)["max_shared_mem"]
