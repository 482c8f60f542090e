"""The keys, names, shapes and values of Mamba, Falcon-Mamba and Mamba-2 in GGUF files, in both directions.

All of it is what llama.cpp's converter makes of a folder of transformers'. So keys are translated to and from
transformers', and a model that transformers has not cannot be written. Shapes are PyTorch's; GGUF turns them around.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ophis.models.config import LanguageModelConfig
from ophis.models.transformers_format import fields_from_transformers, fields_to_transformers

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
    """The other way: an A_log of which A is what the file has, if there is one, so that it can be written again.

    Most often it is the one that was written: exp is rounded to float32, which maps neighbours below 1 to one number.
    """
    if not name.endswith(".A_log"):
        return tensor
    found = (-tensor.double()).log().float()
    for direction in (-torch.inf, torch.inf):
        beside = found.nextafter(torch.tensor(direction))
        better = (gguf_values(name, found) != tensor) & (gguf_values(name, beside) == tensor)
        found = torch.where(better, beside, found)
    return found


def fields_to_gguf(config: LanguageModelConfig) -> tuple[str, dict[str, Any]]:
    """The file's architecture, and its keys, each behind that architecture's name.

    Raises:
        ValueError: says what of the configuration llama.cpp has not.
    """
    theirs = fields_to_transformers(config)
    kind = ARCHITECTURES[theirs["model_type"]]
    inner, width = theirs["intermediate_size"], theirs["hidden_size"]
    if theirs["use_bias"] or not theirs["use_conv_bias"]:
        raise ValueError(
            "its biases are not llama.cpp's, which has one in the convolution, and none in the projections"
        )
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
