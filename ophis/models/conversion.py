"""From any layout of a saved model to any other, tensor by tensor: no number changes but those that GGUF rounds."""

from __future__ import annotations

import fnmatch
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig

from ophis.files import made_whole
from ophis.models.checkpoint import Checkpoint, open_checkpoint
from ophis.models.config import LanguageModelConfig
from ophis.models.gguf_file import TYPES, is_gguf, write_gguf
from ophis.models.gguf_format import fields_to_gguf, gguf_package
from ophis.models.gguf_tokenizer import check_vocabulary, tokenizer_from_gguf
from ophis.models.hub import CARD, GENERATION, TOKENIZER_FILES, local_folder
from ophis.models.official_format import fields_to_official, to_official
from ophis.models.transformers_format import fields_to_transformers
from ophis.models.weight_files import (
    PICKLE_PATTERNS,
    SAFETENSORS_PATTERNS,
    Progress,
    write_pickle,
    write_safetensors,
)


class Folder(NamedTuple):
    """A layout of folders."""

    fields: Callable[[LanguageModelConfig], dict[str, Any]]  # contents of config.json; ValueError: it has no such model
    name: Callable[[str], str]  # the name there of the tensor with that name here
    pickle: bool  # whether the weights are one pytorch_model.bin, a tied head among them


FOLDERS = {
    "ophis": Folder(lambda config: json.loads(config.to_json_string()), str, pickle=False),
    "transformers": Folder(fields_to_transformers, str, pickle=False),
    "official": Folder(fields_to_official, to_official, pickle=True),
}
FORMATS = (*FOLDERS, "gguf")
# What a conversion writes; a folder that holds anything else is never replaced.
OWN_FILES = [*SAFETENSORS_PATTERNS, *PICKLE_PATTERNS, *TOKENIZER_FILES, GENERATION, "config.json"]


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    file_type: str | None = None,
    max_shard_size: int | str | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int], Progress] | None = None,
) -> Path:
    """Writes a saved model in another layout, whole or not at all. Tensors keep the type that they are stored in.

    Args:
        source: whatever `ophis.load` reads: a folder, a .gguf file, or a name on the hub.
        target: the folder to make; for "gguf" the file, whose name ends in .gguf.
        to: "ophis", this library's layout, which can express every model; "transformers", a pure Mamba, Mamba-2 or
            Falcon-Mamba, which vLLM, llama.cpp and mlx-lm read too; "official", that of the state-spaces/* models;
            "gguf", for llama.cpp. The official config.json has no place for the special tokens' numbers; they are then
            in generation_config.json alone.
        file_type: for "gguf", of the large matrices: "f32" (when None), "f16" or "q8_0".
        max_shard_size: for "ophis" and "transformers", of each file of weights; "5GB" when None.
        tokenizer: a folder, or a name on the hub, whose tokenizer goes along instead of the source's own.
        overwrite: whether a target that exists is replaced.
        progress: is given the number of bytes to write, and gives a function that is then called with parts of it.

    Raises:
        ValueError: the target cannot express the model, or the tokenizer does not fit it; CheckpointError, a
            ValueError too, as `ophis.load` raises it.
        FileNotFoundError: as `ophis.load` raises it.
        FileExistsError: there is something at the target, and `overwrite` is not set; or something not of a model.
        ImportError: GGUF files need the extra "gguf".
    """
    if to not in FORMATS:
        raise ValueError(f"there is no layout {to!r}; there are {', '.join(FORMATS)}")
    if file_type is not None and (to != "gguf" or file_type not in TYPES):
        raise ValueError(f"the type is {file_type!r}; GGUF files have one, of {', '.join(TYPES)}, and no others")
    if max_shard_size is not None and to not in ("ophis", "transformers"):
        raise ValueError(f"the largest size of a shard is {max_shard_size}; {to} has one file of weights, never shards")
    target = Path(target)
    _check_target(target, to, overwrite)
    if to == "gguf":
        gguf_package()
    checkpoint = open_checkpoint(local_folder(source))
    config = checkpoint.config
    config.architectures, config.dtype = ["LanguageModel"], checkpoint.tensors["backbone.embeddings.weight"].dtype
    try:
        if to == "gguf":
            fields_to_gguf(config)
        fields = FOLDERS["transformers" if to == "gguf" else to].fields(config)
    except ValueError as error:
        raise ValueError(f"{source} cannot be written as {to}: {error}") from error
    with tempfile.TemporaryDirectory() as scratch:
        beside = Path(scratch, _name_of(source))  # a GGUF file says what its model is called
        beside.mkdir()
        (beside / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _gather(checkpoint, beside, tokenizer)
        check_vocabulary(beside, config.vocab_size)
        report = (progress or _silent)(sum(tensor.nbytes for tensor in checkpoint.tensors.values()))
        with made_whole(target) as partial:
            if to == "gguf":
                _copy(checkpoint.path, beside, [CARD])  # which tells the licence, and whose model it is
                write_gguf(partial, config, checkpoint.tensors, beside, file_type=file_type or "f32", progress=report)
            else:
                shutil.copytree(beside, partial)
                _write_weights(partial, checkpoint, FOLDERS[to], max_shard_size or "5GB", report)
    return target


def _write_weights(
    folder: Path, checkpoint: Checkpoint, layout: Folder, max_shard_size: int | str, progress: Progress
) -> None:
    tensors = {layout.name(name): tensor for name, tensor in checkpoint.tensors.items()}
    if not layout.pickle:
        return write_safetensors(folder, tensors, max_shard_size=max_shard_size, progress=progress)
    for head, embedding in checkpoint.model._tied_weights_keys.items() if checkpoint.config.tie_word_embeddings else ():
        tensors[layout.name(head)] = tensors[layout.name(embedding)]
    return write_pickle(folder, tensors, progress=progress)


def _gather(checkpoint: Checkpoint, beside: Path, tokenizer: str | Path | None) -> None:
    """What goes along with the weights, into a folder: how to generate, and the model's own tokenizer or that one."""
    if not _copy(checkpoint.path, beside, [GENERATION]):
        GenerationConfig.from_model_config(checkpoint.config).save_pretrained(beside)
    if tokenizer is not None:
        if not _copy(local_folder(tokenizer, weights=False), beside, TOKENIZER_FILES):
            raise FileNotFoundError(f"{tokenizer} holds no tokenizer (no {', '.join(TOKENIZER_FILES[:2])}, ...)")
    elif checkpoint.keys:
        tokenizer_from_gguf(checkpoint.keys).save_pretrained(beside)
    else:
        _copy(checkpoint.path, beside, TOKENIZER_FILES)


def _copy(source: Path, target: Path, names: list[str]) -> int:
    """Copies those of the named files that are there; how many they were."""
    present = [name for name in names if (source / name).is_file()]
    for name in present:
        shutil.copyfile(source / name, target / name)
    return len(present)


def _check_target(target: Path, to: str, overwrite: bool) -> None:
    if target.name in ("", ".."):
        raise ValueError(f"the target is {target}, expected the name of a new folder or file")
    if to == "gguf":
        if target.suffix != ".gguf" or target.is_dir():
            raise ValueError(f"the target is {target}, expected the name of a file that ends in .gguf")
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} exists already; choose another name, or replace it by --overwrite")
        return
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file, expected a folder")
    held = sorted(path.name for path in target.iterdir()) if target.exists() else []
    if held and not overwrite:
        raise FileExistsError(
            f"{target} is not empty: it holds {_some(held)}. Choose another folder, or replace this one by --overwrite"
        )
    others = [name for name in held if not any(fnmatch.fnmatch(name, own) for own in OWN_FILES)]
    if others:
        raise FileExistsError(
            f"{target} holds more than a saved model: {_some(others)}. It is not replaced; choose another folder"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _name_of(source: str | Path) -> str:
    path = Path(source)
    return path.stem if is_gguf(path) else (path.resolve() if path.exists() else path).name


def _silent(total: int) -> Progress:
    return lambda written: None
