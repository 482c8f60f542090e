"""Reading saved models: folders of this library's, and of transformers' Mamba and Mamba-2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ophis.models.config import LanguageModelConfig
from ophis.models.language import LanguageModel
from ophis.models.transformers_format import config_from_transformers


class CheckpointError(ValueError):
    """A folder that does not hold the model it says it does."""


def load(folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LanguageModel:
    """The model saved in a folder, in evaluation mode.

    Args:
        folder: with config.json and safetensors (one file, or several and their index), saved by this library or by
            transformers (`model_type` mamba or mamba2).
        dtype: of the parameters, as saved when None. A_log, D and the biases of step sizes stay float32.
        device: where to put it; the CPU when None.

    Raises:
        FileNotFoundError: no such folder, no config.json or no weights in it.
        CheckpointError: damaged files, an architecture that is not here, tensors missing, left over or of a wrong
            shape; each named.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = LanguageModel(config)
    tensors = read_weights(folder)
    check_tensors(model, tensors, folder)
    for name, parameter in model.named_parameters():
        if name in tensors and parameter.dtype == torch.float32 and _stays_wide(model, name):
            tensors[name] = tensors[name].float()
    model.load_state_dict(tensors, strict=False, assign=True)  # strict=False: a tied head is not stored
    model.tie_weights()
    model.to(device=device or "cpu", dtype=dtype)
    return model.eval()


def read_config(folder: Path) -> LanguageModelConfig:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a saved model")
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    kind = fields.get("model_type")
    if kind == LanguageModelConfig.model_type:
        return LanguageModelConfig.from_pretrained(folder)
    if kind in ("mamba", "mamba2"):
        return config_from_transformers(fields)
    raise CheckpointError(f"{path} has model_type {kind!r}, expected 'ophis', 'mamba' or 'mamba2'")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files, by name."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error}") from error
    else:
        names = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise FileNotFoundError(f"{folder} has no weights: {name} is missing")
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cut short ({error}); copy or save it again") from error
    return tensors


def check_tensors(model: LanguageModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Names and shapes, before any of it is used."""
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    tied = set(model._tied_weights_keys) if model.config.tie_word_embeddings else set()
    problems = [f"{name} is missing" for name in expected if name not in tensors and name not in tied]
    problems += [f"{name} is not part of this architecture" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{folder}: {'; '.join(problems[:5])}{more}")


def _stays_wide(model: LanguageModel, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in getattr(model.get_submodule(owner), "ssm_parameters", ())
