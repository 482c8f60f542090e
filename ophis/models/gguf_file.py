"""GGUF files: one holds a model's configuration as keys, its tensors and its tokenizer."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ophis.models.config import LanguageModelConfig
from ophis.models.gguf_format import (
    NAMES,
    config_from_gguf,
    fields_to_gguf,
    gguf_name,
    gguf_package,
    gguf_shape,
    gguf_values,
)
from ophis.models.gguf_tokenizer import write_tokenizer
from ophis.models.weight_files import CheckpointError, Progress, StoredTensor

# The type of the large matrices, and GGUF's name for a file of them. Vectors, norms and the convolution's weights are
# float32 in each.
TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
BLOCK = 32  # numbers of a row that share a scale in Q8_0; a matrix whose rows are no multiple of it is F16


class Contents(NamedTuple):
    """An opened file."""

    config: LanguageModelConfig
    tensors: dict[str, StoredTensor]  # with their names and shapes there; read, they are float32
    keys: dict[str, Any]


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def open_gguf(path: Path) -> Contents:
    """What a file holds. Its tensors are taken out of it when read.

    Raises:
        CheckpointError: a damaged file, or one of another architecture.
    """
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
        keys = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # IndexError, KeyError, UnicodeDecodeError: whatever reading nonsense ends in
        raise CheckpointError(f"{path} is damaged or cut short ({error}); copy or convert it again") from error
    tensors = {
        tensor.name: StoredTensor(tuple(map(int, reversed(tensor.shape))), torch.float32, partial(_read, gguf, tensor))
        for tensor in reader.tensors
    }
    try:
        embedding = tensors[NAMES["backbone.embeddings.weight"]]
        config = config_from_gguf(keys, embedding.shape[0], NAMES["lm_head.weight"] not in tensors)
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: {reason}") from error
    return Contents(config, tensors, keys)


def _read(gguf: Any, tensor: Any) -> Tensor:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(values.copy() if values.base is not None else values)


def write_gguf(
    path: Path,
    config: LanguageModelConfig,
    tensors: dict[str, StoredTensor],
    beside: Path,
    *,
    file_type: str,
    progress: Progress,
) -> None:
    """A file with these tensors, given by their names here, one at a time in memory.

    Args:
        beside: a folder that is called as the model is, with transformers' config.json, the tokenizer's files, and
            README.md and generation_config.json where there are any: what the converter takes the general keys from.
        file_type: the type of the large matrices: "f32", "f16" or "q8_0".

    Raises:
        ValueError: llama.cpp has no such model, or no such tokenizer.
    """
    gguf = gguf_package()
    kind, fields = fields_to_gguf(config)
    writer = gguf.GGUFWriter(path=None, arch=kind)
    types = {}
    for name, tensor in tensors.items():
        there, shape = gguf_name(name), gguf_shape(name, tensor.shape, config)
        types[name] = stored = _type_of(gguf, there, shape, file_type)
        size = math.prod(gguf.quants.quant_shape_to_byte_shape(shape, stored))
        writer.add_tensor_info(there, shape, np.float32, size, raw_dtype=stored)
    _add_general_keys(gguf, writer, beside)
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[value.__class__]
        add(f"{kind}.{key}", value)
    writer.add_file_type(gguf.LlamaFileType[TYPES[file_type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_tokenizer(writer, beside, config.vocab_size)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            values = gguf_values(name, tensor.read()).float().reshape(gguf_shape(name, tensor.shape, config))
            writer.write_tensor_data(gguf.quants.quantize(values.contiguous().numpy(), types[name]))
            progress(tensor.nbytes)
    finally:
        writer.close()


def _add_general_keys(gguf: Any, writer: Any, beside: Path) -> None:
    """The model's name and size, and what else its card tells."""
    counts = writer.get_total_parameter_count()
    metadata = gguf.Metadata.load(None, beside, None, counts[0])
    metadata.name = metadata.name or beside.name
    metadata.size_label = metadata.size_label or gguf.size_label(*counts)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)


def _type_of(gguf: Any, name: str, shape: tuple[int, ...], file_type: str) -> Any:
    """As the converter decides it."""
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith(("_norm.weight", "ssm_conv1d.weight")):
        return gguf.GGMLQuantizationType.F32
    if file_type == "q8_0" and shape[-1] % BLOCK:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[file_type.upper()]
