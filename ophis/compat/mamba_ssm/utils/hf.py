"""Reading checkpoints in the layout of the published ones, from a folder or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_config_hf(model_name: str | Path) -> dict[str, Any]:
    """The contents of config.json."""
    from ophis.models.checkpoint import read_fields
    from ophis.models.hub import local_folder
    from ophis.models.official_format import is_official

    fields = read_fields(local_folder(model_name))
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
    from ophis.models.hub import local_folder
    from ophis.models.weight_files import stored_tensors, weight_files

    stored = stored_tensors(weight_files(local_folder(model_name)))
    tensors = {name: tensor.read() for name, tensor in stored.items()}
    if device is None or dtype not in (torch.float32, None):
        return tensors
    return {name: tensor.to(device) for name, tensor in tensors.items()}
