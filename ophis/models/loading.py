"""Reading saved models: folders of this library's, of transformers' Mamba and Mamba-2, and the official ones."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ophis.models.config import LanguageModelConfig
from ophis.models.language import LanguageModel
from ophis.models.official_format import config_from_official, from_official, is_official, to_official
from ophis.models.transformers_format import config_from_transformers

T = TypeVar("T")


class CheckpointError(ValueError):
    """A folder that does not hold the model it says it does."""


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> LanguageModel:
    """The model saved in a folder, in evaluation mode.

    Args:
        folder: with config.json and safetensors or pytorch_model.bin (one file, or several and their index), saved by
            this library, by transformers (`model_type` mamba or mamba2), or in the layout of the published
            state-spaces/* models. Of a .bin only tensors are unpickled, never code.
        dtype: of the parameters, as saved when None. A_log, D and the biases of step sizes stay float32.
        device: where to put it; the CPU when None.

    Raises:
        FileNotFoundError: no such folder, no config.json or no weights in it.
        CheckpointError: damaged files, an architecture that is not here, tensors missing, left over or of a wrong
            shape; each named.
    """
    folder = Path(folder)
    fields = read_fields(folder)
    config = read_config(folder, fields)
    files = weight_files(folder)
    shapes = read(files, shape_of)
    if config.num_hidden_layers > len(shapes):
        layers = config.num_hidden_layers
        raise CheckpointError(f"{folder}: config.json says {layers} layers; there are not as many tensors")
    with torch.device("meta"):
        model = LanguageModel(config)
    official = is_official(fields)
    check_shapes(model, shapes, folder, to_official if official else str)  # before memory is taken
    tensors = read(files, tensor_of)
    if official:
        tensors = {from_official(name): tensor for name, tensor in tensors.items()}
    check_tied(model, tensors, folder)
    for name in tensors:
        if stays_wide(model, name) and tensors[name].dtype != torch.float64:
            tensors[name] = tensors[name].float()
    model.load_state_dict(tensors, strict=False, assign=True)  # strict=False: a tied head is not stored
    model.tie_weights()
    nn.Module.to(model, device=device or "cpu", dtype=dtype)
    return model.eval()


def read_fields(folder: Path) -> dict[str, Any]:
    """The contents of config.json."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a saved model")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def read_config(folder: Path, fields: dict[str, Any]) -> LanguageModelConfig:
    path, kind = folder / "config.json", fields.get("model_type")
    if kind == LanguageModelConfig.model_type:
        return LanguageModelConfig.from_pretrained(folder)
    if kind in ("mamba", "mamba2"):
        return config_from_transformers(fields)
    if is_official(fields):
        try:
            return config_from_official(fields)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    if kind is None:
        raise CheckpointError(f"{path} has no model_type, and not the d_model and n_layer of an official checkpoint")
    raise CheckpointError(f"{path} has model_type {kind!r}, expected 'ophis', 'mamba' or 'mamba2'")


def weight_files(folder: Path) -> list[Path]:
    """The folder's weights, safetensors before pickles: one file, or those its index names."""
    names = ["model.safetensors"]
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{index} is damaged: {error}") from error
            break
        if (folder / single).is_file():
            names = [single]
            break
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():  # nothing outside the folder is read
            raise FileNotFoundError(f"{folder} has no weights: {name} is missing")
    return [folder / name for name in names]


def read(files: list[Path], what: Callable[[Any, str], T]) -> dict[str, T]:
    """`what(file, name)` of every tensor in the files, by name."""
    found: dict[str, T] = {}
    for path in files:
        try:
            with open_weights(path) as file:
                found.update({name: what(file, name) for name in file.keys()})  # noqa: SIM118 (not always a dict)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cut short ({error}); copy or save it again") from error
    return found


def open_weights(path: Path) -> AbstractContextManager[Any]:
    """A safetensors file, or the dict that a pickled one holds."""
    return nullcontext(unpickle(path)) if path.suffix == ".bin" else safe_open(path, framework="pt")


def shape_of(file: Any, name: str) -> tuple[int, ...]:
    return tuple(file[name].shape if isinstance(file, dict) else file.get_slice(name).get_shape())


def tensor_of(file: Any, name: str) -> torch.Tensor:
    return file[name] if isinstance(file, dict) else file.get_tensor(name)


def unpickle(path: Path) -> dict[str, torch.Tensor]:
    """What torch.save wrote; mapped into memory, but for the format of before PyTorch 1.6, which is read."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a pickle of tensors alone; to read it could run code. Save it again as safetensors"
        ) from error
    except Exception as error:  # a damaged pickle fails in a dozen ways, KeyError and AssertionError among them
        raise CheckpointError(f"{path} is damaged or cut short ({error}); copy or save it again") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise CheckpointError(f"{path} does not hold tensors by name, as the state_dict of a model does")
    return found


def check_shapes(
    model: LanguageModel, shapes: dict[str, tuple[int, ...]], folder: Path, spell: Callable[[str], str]
) -> None:
    """`spell` gives the name that a tensor of the model has in the files."""
    expected = {spell(name): tuple(p.shape) for name, p in model.state_dict().items()}
    tied = {spell(name) for name in model._tied_weights_keys} if model.config.tie_word_embeddings else set()
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


def check_tied(model: LanguageModel, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """A head stored beside the embedding that it shares must not hold something else: it is not kept."""
    for head, embedding in model._tied_weights_keys.items() if model.config.tie_word_embeddings else ():
        shared = tensors[embedding]
        if head in tensors and (tensors[head].dtype != shared.dtype or not torch.equal(tensors[head], shared)):
            raise CheckpointError(f"{folder}: config.json ties {head} to the embedding; the one stored is another")


def stays_wide(model: LanguageModel, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in getattr(model.get_submodule(owner), "ssm_parameters", ())
