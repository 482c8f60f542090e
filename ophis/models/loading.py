"""Reading saved models: folders of this library's, and of transformers' Mamba and Mamba-2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ophis.models.config import LanguageModelConfig
from ophis.models.language import LanguageModel
from ophis.models.transformers_format import config_from_transformers

T = TypeVar("T")


class CheckpointError(ValueError):
    """A folder that does not hold the model it says it does."""


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> LanguageModel:
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
    files = weight_files(folder)
    shapes = read(files, lambda file, name: tuple(file.get_slice(name).get_shape()))
    if config.num_hidden_layers > len(shapes):
        layers = config.num_hidden_layers
        raise CheckpointError(f"{folder}: config.json says {layers} layers; there are not as many tensors")
    with torch.device("meta"):
        model = LanguageModel(config)
    check_shapes(model, shapes, folder)  # before memory is taken
    tensors = read(files, lambda file, name: file.get_tensor(name))
    for name in tensors:
        if stays_wide(model, name) and tensors[name].dtype != torch.float64:
            tensors[name] = tensors[name].float()
    model.load_state_dict(tensors, strict=False, assign=True)  # strict=False: a tied head is not stored
    model.tie_weights()
    nn.Module.to(model, device=device or "cpu", dtype=dtype)
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


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors: one, or those its index names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error}") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():  # nothing outside the folder is read
            raise FileNotFoundError(f"{folder} has no weights: {name} is missing")
    return [folder / name for name in names]


def read(files: list[Path], what: Callable[[Any, str], T]) -> dict[str, T]:
    """`what(file, name)` of every tensor in the files, by name."""
    found: dict[str, T] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found.update({name: what(file, name) for name in file.keys()})  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cut short ({error}); copy or save it again") from error
    return found


def check_shapes(model: LanguageModel, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    tied = set(model._tied_weights_keys) if model.config.tie_word_embeddings else set()
    problems = [f"{name} is missing" for name in expected if name not in shapes and name not in tied]
    problems += [f"{name} is not part of this architecture" for name in shapes if name not in expected]
    problems += [
        f"{name} has shape {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{folder}: {'; '.join(problems[:5])}{more}")


def stays_wide(model: LanguageModel, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in getattr(model.get_submodule(owner), "ssm_parameters", ())
