"""The files of a folder that hold weights: safetensors and PyTorch's pickles, whole or in shards with an index."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
# What else a repository may hold, a consolidated copy for example, is not read, and so not fetched.
SAFETENSORS_PATTERNS = [SAFETENSORS, "model-*.safetensors", f"{SAFETENSORS}.index.json"]
PICKLE_PATTERNS = [PICKLE, "pytorch_model-*.bin", f"{PICKLE}.index.json"]

Progress = Callable[[int], object]  # called with the number of bytes that were written since the last call

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(ValueError):
    """A folder that does not hold the model it says it does."""


class StoredTensor(NamedTuple):
    """A tensor in a file, known and not read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def weight_files(folder: Path) -> list[Path]:
    """The folder's weights, safetensors before pickles: one file, or those its index names."""
    names = [SAFETENSORS]
    for single in (SAFETENSORS, PICKLE):
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


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """The tensors in the files, by the names they have there. Their memory is the files', mapped."""
    found: dict[str, StoredTensor] = {}
    for path in files:
        if path.suffix == ".bin":
            found |= {name: StoredTensor.of(tensor) for name, tensor in unpickle(path).items()}
            continue
        try:
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 (it is not a dict)
                view = file.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    raise CheckpointError(
                        f"{path}: {name} is of type {view.get_dtype()}, expected one of {', '.join(_DTYPES)}"
                    )
                read = partial(file.get_tensor, name)
                found[name] = StoredTensor(tuple(view.get_shape()), _DTYPES[view.get_dtype()], read)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cut short ({error}); copy or save it again") from error
    return found


def unpickle(path: Path) -> dict[str, Tensor]:
    """What torch.save wrote; mapped into memory, but for the format of before PyTorch 1.6, which is read."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a pickle of tensors alone; to read it could run code. Save it again as safetensors"
        ) from error
    except Exception as error:  # a damaged pickle fails in a dozen ways, KeyError and AssertionError among them
        raise CheckpointError(f"{path} is damaged or cut short ({error}); copy or save it again") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{path} does not hold tensors by name, as the state_dict of a model does")
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} is of type {tensor.dtype}, expected floating-point numbers")
    return found


def write_safetensors(
    folder: Path, tensors: dict[str, StoredTensor], *, max_shard_size: int | str, progress: Progress
) -> None:
    """model.safetensors; or shards of at most that size ("5GB") with their index, where one file would be larger."""
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].read().contiguous() for name in names}, folder / file, {"format": "pt"})
        progress(sum(tensors[name].nbytes for name in names))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_pickle(folder: Path, tensors: dict[str, StoredTensor], *, progress: Progress) -> None:
    """pytorch_model.bin: a state_dict, by torch.save. What stands under two names is stored once."""
    held = {id(tensor): tensor.read() for tensor in tensors.values()}
    for key, tensor in held.items():
        if tensor.untyped_storage().nbytes() != tensor.nbytes:  # a view, with which all it views would be written
            held[key] = tensor.clone()
    with _Counted(folder / PICKLE, progress) as file:
        torch.save({name: held[id(tensor)] for name, tensor in tensors.items()}, file)


class _Counted(io.BufferedWriter):
    """A file to write to that says how much was."""

    def __init__(self, path: Path, progress: Progress):
        super().__init__(io.FileIO(path, "wb"))
        self.progress = progress

    def write(self, data) -> int:  # type: ignore[override]
        self.progress(memoryview(data).nbytes)
        return super().write(data)
