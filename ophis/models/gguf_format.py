"""GGUF files of Mamba, Falcon-Mamba and Mamba-2, as llama.cpp reads them, in both directions.

One file holds the configuration as keys, the tensors, and the tokenizer (`gguf_tokenizer.py`). All of it is what
llama.cpp's converter makes of a folder of transformers', so keys are translated to and from transformers', and a model
that transformers has not cannot be written. Shapes are given here as PyTorch has them; GGUF turns them around.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ophis.models.config import LanguageModelConfig
from ophis.models.transformers_format import fields_from_transformers, fields_to_transformers
from ophis.models.weight_files import CheckpointError, Progress, StoredTensor

# The type of the large matrices, and GGUF's name for a file of them. Vectors, norms and the convolution's weights are
# float32 in each.
TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
BLOCK = 32  # numbers of a row that share a scale in Q8_0; a matrix whose rows are no multiple of it is F16

# transformers' model_type -> the file's architecture, which begins its keys
ARCHITECTURES = {"mamba": "mamba", "falcon_mamba": "mamba", "mamba2": "mamba2"}
# GGUF's key <-> transformers'
KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.inner_size": "intermediate_size",
    "ssm.state_size": "state_size",
}
OWN_KEYS = {
    "mamba": {"ssm.time_step_rank": "time_step_rank"},
    "mamba2": {"ssm.time_step_rank": "num_heads", "ssm.group_count": "n_groups"},
}
NORMS = "ssm.dt_b_c_rms"  # whether dt, B and C are normalised: what makes a Mamba a Falcon-Mamba
# llama.cpp asks for these, which mean nothing for a model without attention and MLPs.
CONSTANTS = {"context_length": 2**20, "feed_forward_length": 0, "attention.head_count": 0}
TOKEN_KEYS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}

# name here <-> name there, and in a block, behind backbone.layers.N.mixer and blk.N
NAMES = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK_NAMES = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",  # A itself
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}


class Contents(NamedTuple):
    """An opened file."""

    config: LanguageModelConfig
    tensors: dict[str, StoredTensor]  # with their names and shapes there; read, they are float32
    keys: dict[str, Any]


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def gguf_package() -> Any:
    """The `gguf` package, which the extra of that name brings."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package: pip install 'ophis[gguf]'") from error
    return gguf


def gguf_name(name: str) -> str:
    """The name there of the tensor with that name here."""
    if name in NAMES:
        return NAMES[name]
    _, _, number, leaf = name.split(".", 3)
    return f"blk.{number}.{BLOCK_NAMES[leaf]}"


def gguf_shape(name: str, shape: tuple[int, ...], config: LanguageModelConfig) -> tuple[int, ...]:
    """The shape there of the tensor with that name and shape here."""
    leaf = name.partition(".mixer.")[2]
    if leaf == "conv1d.weight":
        return (shape[0], shape[2])
    if leaf in ("A_log", "D") and config.mixers[0] == "mamba2":
        return (*shape, 1)
    if leaf == "norm.weight":
        groups = config.all_options("mamba2")["ngroups"]
        return (groups, shape[0] // groups)
    return shape


def gguf_values(name: str, tensor: Tensor) -> Tensor:
    """The values there of the tensor with that name here."""
    return -torch.exp(tensor.float()) if name.endswith(".A_log") else tensor


def values_from_gguf(name: str, tensor: Tensor) -> Tensor:
    """The other way. In float64: so the logarithm of what was written from a float32 is that, or next to it."""
    return (-tensor.double()).log().float() if name.endswith(".A_log") else tensor


def fields_to_gguf(config: LanguageModelConfig) -> tuple[str, dict[str, Any]]:
    """The file's architecture, and its keys, each behind that architecture's name.

    Raises:
        ValueError: says what of the configuration llama.cpp has not.
    """
    theirs = fields_to_transformers(config)
    kind = ARCHITECTURES[theirs["model_type"]]
    inner, width = theirs["intermediate_size"], theirs["hidden_size"]
    if theirs["use_bias"] or not theirs["use_conv_bias"]:
        raise ValueError("its biases are not llama.cpp's, which has one in the convolution, and none in the projections")
    if kind == "mamba" and inner != 2 * width:
        raise ValueError(f"its inner width is {inner}; llama.cpp's Mamba has twice the outer one, {width}")
    low, high = config.all_options(config.mixers[0]).get("dt_limit", (0.0, math.inf))
    if low > 0 or high < math.inf:
        raise ValueError(f"it limits step sizes to {low:g} to {high:g}; llama.cpp does not")
    inner_epsilon, epsilon = theirs.get("mixer_rms_eps"), theirs["layer_norm_epsilon"]
    if inner_epsilon not in (None, epsilon):
        raise ValueError(
            f"its norms of dt, B and C have an epsilon of {inner_epsilon:g}, the blocks' one of {epsilon:g}; "
            "llama.cpp has one for both"
        )
    fields = CONSTANTS | {key: theirs[name] for key, name in (KEYS | OWN_KEYS[kind]).items()}
    if kind == "mamba":
        fields[NORMS] = theirs["model_type"] == "falcon_mamba"
    return kind, fields


def config_from_gguf(keys: dict[str, Any], rows: int, tied: bool) -> LanguageModelConfig:
    """From all of a file's keys, the rows of its embedding, and whether that is its head too.

    Raises:
        ValueError: a key that is wrong or missing.
    """
    kind = keys["general.architecture"]
    if kind not in OWN_KEYS:
        raise ValueError(f"it is of architecture {kind!r}, expected {' or '.join(map(repr, OWN_KEYS))}")
    for key in KEYS | OWN_KEYS[kind]:
        if f"{kind}.{key}" not in keys:
            raise ValueError(f"it has no key {kind}.{key}")
    theirs = {name: keys[f"{kind}.{key}"] for key, name in (KEYS | OWN_KEYS[kind]).items()}
    falcon = keys.get(f"{kind}.{NORMS}", False)
    theirs |= {
        "layer_norm_epsilon": float(str(np.float32(theirs["layer_norm_epsilon"]))),  # 1e-5, not the float32 next to it
        "model_type": "falcon_mamba" if falcon else kind,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        **{name: keys.get(f"tokenizer.ggml.{key}") for key, name in TOKEN_KEYS.items()},
    }
    if falcon:
        theirs["mixer_rms_eps"] = theirs["layer_norm_epsilon"]
    if kind == "mamba2":
        theirs["expand"] = theirs["intermediate_size"] // theirs["hidden_size"]
        theirs["head_dim"] = theirs["intermediate_size"] // theirs["num_heads"]
    return LanguageModelConfig(**fields_from_transformers(theirs))


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
    *,
    file_type: str,
    describe: Callable[[Any], object],
    progress: Progress,
) -> None:
    """A file with these tensors, given by their names here, one after the other in memory.

    Args:
        file_type: of the large matrices: "f32", "f16" or "q8_0".
        describe: is given the `gguf.GGUFWriter`, once it knows the tensors, to add the general and the tokenizer's keys.
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
    describe(writer)
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[value.__class__]
        add(f"{kind}.{key}", value)
    writer.add_file_type(gguf.LlamaFileType[TYPES[file_type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
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


def _type_of(gguf: Any, name: str, shape: tuple[int, ...], file_type: str) -> Any:
    """As the converter decides it."""
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith(("_norm.weight", "ssm_conv1d.weight")):
        return gguf.GGMLQuantizationType.F32
    if file_type == "q8_0" and shape[-1] % BLOCK:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[file_type.upper()]
