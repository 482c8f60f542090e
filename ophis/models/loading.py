"""Saved models: those of this library, of transformers' Mamba family, the official ones, and GGUF files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig

from ophis.models.checkpoint import open_checkpoint
from ophis.models.hub import local_folder
from ophis.models.language import LanguageModel
from ophis.models.weight_files import CheckpointError

__all__ = ["CheckpointError", "load"]


def load(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """A saved model, in evaluation mode.

    Args:
        name_or_folder: a folder with config.json and safetensors or pytorch_model.bin (one file, or several and their
            index), saved by this library, by transformers (`model_type` mamba, mamba2 or falcon_mamba), or in the
            layout of the published state-spaces/* models; a .gguf file of one of these; or the name of such a folder on
            the Hugging Face hub, "state-spaces/mamba2-130m", which is fetched, once, into the cache of
            `huggingface_hub`. Of a .bin only tensors are unpickled, never code.
        dtype: of the parameters, as saved when None; a GGUF file's are then float32. A_log, D and the biases of step
            sizes stay float32.
        device: where to put it; the CPU when None.
        revision: a branch, tag or commit, of a name on the hub.

    Raises:
        FileNotFoundError: no such folder, no such name or no way to it; no config.json or no weights in it.
        CheckpointError: damaged files, an architecture that is not here, tensors missing, left over or of a wrong
            shape; each named.
    """
    folder = local_folder(name_or_folder, revision=revision)
    checkpoint = open_checkpoint(folder)
    model = checkpoint.model
    tensors = {name: stored.read() for name, stored in checkpoint.tensors.items()}
    for name, tensor in tensors.items():
        if _stays_wide(model, name) and tensor.dtype != torch.float64:
            tensors[name] = tensor.float()
    model.load_state_dict(tensors, strict=False, assign=True)  # strict=False: a tied head is not stored
    model.tie_weights()
    nn.Module.to(model, device=device or "cpu", dtype=dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = model.config.name_or_path = str(name_or_folder)  # what an adapter says it belongs to
    return model.eval()


def _stays_wide(model: LanguageModel, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in getattr(model.get_submodule(owner), "ssm_parameters", ())
