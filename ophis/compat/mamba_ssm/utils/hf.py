"""Reading checkpoints in the layout of the published ones, from a folder or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_config_hf(model_name: str | Path) -> dict[str, Any]:
    """The contents of config.json."""
    from ophis.models.loading import read_fields
    from ophis.models.official_format import is_official

    fields = read_fields(_folder(model_name))
    if not is_official(fields):
        kind = f"model_type {fields['model_type']!r}" if "model_type" in fields else "no d_model and n_layer"
        raise ValueError(
            f"{model_name}: config.json has {kind}; expected the layout of the published state-spaces/* checkpoints. "
            "ophis.load reads this library's and transformers'"
        )
    return fields


def load_state_dict_hf(
    model_name: str | Path, device: Any = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors by name, as they are saved. Of a .bin only tensors are unpickled, never code.

    Args:
        device: where they go, unless they are still to be converted from float32: then the CPU.
        dtype: what they are to be converted to.
    """
    from ophis.models.loading import read, tensor_of, weight_files

    tensors = read(weight_files(_folder(model_name)), tensor_of)
    if device is None or dtype not in (torch.float32, None):
        return tensors
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _folder(model_name: str | Path) -> Path:
    if Path(model_name).is_dir():
        return Path(model_name)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(str(model_name), allow_patterns=["config.json", "*.safetensors", "*.bin", "*.index.json"])
    )
