"""What a measurement starts from: the tokenizer that belongs to a model, its dtype, its device."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ophis.generation import load_tokenizer


def tokenizer_of(model: str | Path, name: str | Path | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer called `name`, a folder or a name on the Hugging Face hub; the one saved with `model` when None.

    Raises:
        FileNotFoundError: no such folder, or none in it.
        ValueError: it is damaged, or there is no such name, or no way to the hub.
    """
    source = model if name is None else name
    if Path(source).is_dir():
        if name is None and not (Path(source) / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"{source} has no tokenizer.json; say which tokenizer its model was trained with, by --tokenizer"
            )
        return load_tokenizer(source)
    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer {source}: {str(error).strip().splitlines()[0]}") from error


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """torch's dtype of that name; None, the one that is saved, for "auto"."""
    if name is None or name == "auto":
        return None
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {name!r}, expected float32, bfloat16, float16, float64 or auto")
    return dtype


def device_of(name: str | torch.device | None) -> torch.device:
    """The device of that name; a GPU if there is one, else the CPU, when None."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, expected cpu, cuda, cuda:0 and so on, or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device is {name!r}, but this machine has {count or 'no'} CUDA device{'s' * (count > 1)}")
    return device
