"""A saved model, opened: its configuration, and its tensors by their names here, checked and not yet read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ophis.models.config import LanguageModelConfig
from ophis.models.gguf_file import is_gguf, open_gguf
from ophis.models.gguf_format import gguf_name, gguf_shape, values_from_gguf
from ophis.models.language import LanguageModel
from ophis.models.official_format import is_official, to_official
from ophis.models.weight_files import CheckpointError, StoredTensor, stored_tensors, weight_files


@dataclass(frozen=True)
class Checkpoint:
    """A configuration, and tensors that fit it name by name and shape by shape."""

    path: Path
    model: LanguageModel  # on the "meta" device: without values
    tensors: dict[str, StoredTensor]  # of a tied head and embedding, the embedding alone
    keys: dict[str, Any] = field(default_factory=dict)  # a GGUF file's, its tokenizer among them

    @property
    def config(self) -> LanguageModelConfig:
        return self.model.config


def open_checkpoint(path: Path) -> Checkpoint:
    """A folder of any layout that `ophis.load` reads, or a .gguf file.

    Raises:
        FileNotFoundError: no config.json or no weights in it.
        CheckpointError: damaged files, an architecture that is not here, tensors missing, left over or of a wrong
            shape; each named.
    """
    if is_gguf(path):
        config, stored, keys = open_gguf(path)
        model = _empty(config, stored, path)
        fitting = _fit(model, stored, path, gguf_name, lambda name, shape: gguf_shape(name, shape, config))
        shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        return Checkpoint(path, model, {name: _from_gguf(name, shapes[name], t) for name, t in fitting.items()}, keys)
    fields = read_fields(path)
    try:
        config = LanguageModelConfig.from_pretrained(path)
    except ValueError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    stored = stored_tensors(weight_files(path))
    model = _empty(config, stored, path)
    return Checkpoint(path, model, _fit(model, stored, path, to_official if is_official(fields) else str))


def read_fields(folder: Path) -> dict[str, Any]:
    """The contents of config.json."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is neither a folder nor a .gguf file")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a saved model")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(fields).__name__}, expected keys and values")
    return fields


def _empty(config: LanguageModelConfig, stored: dict[str, StoredTensor], path: Path) -> LanguageModel:
    """The model without values, which takes no memory, unless it has more layers than could be stored."""
    if config.num_hidden_layers > len(stored):
        layers = config.num_hidden_layers
        raise CheckpointError(f"{path}: its configuration says {layers} layers; there are not as many tensors")
    with torch.device("meta"):
        return LanguageModel(config)


def _fit(
    model: LanguageModel,
    stored: dict[str, StoredTensor],
    path: Path,
    spell: Callable[[str], str],
    shape_there: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda name, shape: shape,
) -> dict[str, StoredTensor]:
    """The stored tensors by their names here. `spell` gives the name that each has in the files."""
    names = {spell(name): name for name in model.state_dict()}
    expected = {spell(name): shape_there(name, tuple(p.shape)) for name, p in model.state_dict().items()}
    tied = {spell(name) for name in model._tied_weights_keys} if model.config.tie_word_embeddings else set()
    problems = [f"{name} is missing" for name in expected if name not in stored and name not in tied]
    problems += [f"{name} is not part of this architecture" for name in stored if name not in expected]
    problems += [
        f"{name} has shape {stored[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path}: {'; '.join(problems[:5])}{more}")
    fitting = {names[name]: tensor for name, tensor in stored.items()}
    if model.config.tie_word_embeddings:
        for head, embedding in model._tied_weights_keys.items():
            _check_tied(fitting, head, embedding, path)
            fitting.pop(head, None)
    return fitting


def _check_tied(tensors: dict[str, StoredTensor], head: str, embedding: str, path: Path) -> None:
    """A head stored beside the embedding that it shares must not hold something else: it is not kept."""
    if head not in tensors:
        return
    one, other = tensors[head].read(), tensors[embedding].read()
    if one.dtype != other.dtype or not torch.equal(one, other):
        raise CheckpointError(f"{path}: config.json ties {head} to the embedding; the one stored is another")


def _from_gguf(name: str, shape: tuple[int, ...], stored: StoredTensor) -> StoredTensor:
    return StoredTensor(shape, stored.dtype, lambda: values_from_gguf(name, stored.read()).reshape(shape))
