"""CUDA C++ compiled at run time by NVRTC, for the GPUs that it was measured on: the H100 and H200.

No toolkit and no build step: NVRTC and the driver are reached through the package cuda-bindings, which PyTorch for
CUDA 13 brings along. Compiled kernels are kept on disk (`runtime.py`).
"""

from __future__ import annotations

import importlib.util

import torch


def why_not() -> str | None:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "this machine has no NVIDIA GPU"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "the package cuda-bindings is missing: pip install 'ophis[cuda]'"
    return None
