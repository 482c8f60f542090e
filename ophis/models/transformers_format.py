"""transformers' configurations of Mamba, Mamba-2 and Falcon-Mamba in this library's terms, in both directions.

The weights' names and shapes are the same, so the configuration is all there is to translate. Defaults and types of
their keys are those of transformers' own classes: what they refuse is neither read nor written. Beside transformers,
vLLM, llama.cpp and mlx-lm read these folders; what only they ask for is in `fields_to_transformers`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, __version__

if TYPE_CHECKING:
    from ophis.models.config import LanguageModelConfig

# transformers' key <-> field of the configuration
FIELDS = {
    "vocab_size": "vocab_size",
    "pad_vocab_size_multiple": "pad_vocab_size_multiple",  # llama.cpp's
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "layer_norm_epsilon": "norm_eps",
    "residual_in_fp32": "residual_in_fp32",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    "use_cache": "use_cache",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "dtype": "dtype",
}
# transformers' key <-> option of the layer
OPTIONS = {
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "use_conv_bias": "conv_bias",
    "use_bias": "bias",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
}
MAMBA = {**OPTIONS, "time_step_rank": "dt_rank", "time_step_scale": "dt_scale", "time_step_init_scheme": "dt_init"}
MAMBA2 = {**OPTIONS, "head_dim": "headdim", "n_groups": "ngroups", "time_step_limit": "dt_limit"}
# Initial values that transformers has no key for. It keeps what it does not know, so they stand under their own names.
UNKNOWN_THERE = {"mamba2": ("A_init_range", "conv_init")}


class Kind(NamedTuple):
    """One of transformers' models."""

    mixer: str
    name: str  # of its classes, before ForCausalLM
    options: dict[str, str]
    fixed: dict[str, Any]  # options that it has without a key


KINDS = {
    "mamba": Kind("mamba", "Mamba", MAMBA, {}),
    "mamba2": Kind("mamba2", "Mamba2", {**MAMBA2, "layer_norm_epsilon": "norm_eps"}, {}),
    "falcon_mamba": Kind("mamba", "FalconMamba", {**MAMBA, "mixer_rms_eps": "norm_eps"}, {"norm_bcdt": True}),
}
# Our class <-> the end of theirs. A model with another head has no counterpart there.
ARCHITECTURES = {"LanguageModel": "ForCausalLM", "LanguageBackbone": "Model"}

# JSON has no infinity. transformers writes one as {"__float__": "Infinity"}, which not every reader knows; so the
# largest float32 stands for it here, which limits no step size.
LARGEST = (2 - 2**-23) * 2.0**127


def is_transformers(fields: dict[str, Any]) -> bool:
    """Whether the contents of config.json are of one of these models."""
    return fields.get("model_type") in list(KINDS)


def fields_from_transformers(fields: dict[str, Any]) -> dict[str, Any]:
    """The arguments of LanguageModelConfig, from the contents of config.json.

    Raises:
        ValueError: a key that is wrong, or asks for something else than the published blocks.
    """
    kind = KINDS[fields["model_type"]]
    given = {key: _finite(value) for key, value in fields.items()}
    theirs = _validated({"pad_vocab_size_multiple": 1, **given})
    if theirs["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {theirs['hidden_act']!r}; the published blocks, and these, use 'silu'")
    options = kind.fixed | {ours: theirs[key] for key, ours in kind.options.items()}
    if options.get("dt_rank") == math.ceil(theirs["hidden_size"] / 16):
        options["dt_rank"] = "auto"
    options |= {key: given[key] for key in UNKNOWN_THERE.get(kind.mixer, ()) if key in given}
    if kind.mixer == "mamba":  # there the inner width may be any; Mamba-2's is expand times the outer one
        options["expand"] = _expansion(theirs["intermediate_size"], theirs["hidden_size"])
    else:
        low, high = options["dt_limit"]
        options["dt_limit"] = [low, math.inf if high >= LARGEST else high]
    return {ours: theirs.get(key) for key, ours in FIELDS.items()} | {kind.mixer: options, "pattern": [kind.mixer]}


def fields_to_transformers(config: LanguageModelConfig) -> dict[str, Any]:
    """The contents of config.json, for transformers and for what else reads its folders.

    Raises:
        ValueError: says what of the configuration none of these models has.
    """
    model_type, options = _kind(config)
    kind = KINDS[model_type]
    width, inner = config.hidden_size, int(options["expand"] * config.hidden_size)
    fields = {key: getattr(config, ours) for key, ours in FIELDS.items()}
    fields |= {key: options[ours] for key, ours in kind.options.items()}
    changed = config.changed_options(kind.mixer)
    fields |= {key: changed[key] for key in UNKNOWN_THERE.get(kind.mixer, ()) if key in changed}
    fields |= {
        "model_type": model_type,
        "architectures": [kind.name + ARCHITECTURES.get((config.architectures or ["LanguageModel"])[0], "ForCausalLM")],
        "intermediate_size": inner,  # mlx-lm's Mamba-2 asks for it
        "hidden_act": "silu",
        "rescale_prenorm_residual": False,  # set, transformers (5.15 to 5.24) scales out_proj down as it loads it
        "transformers_version": __version__,
    }
    if config.vocab_size % config.pad_vocab_size_multiple:  # the embedding was resized
        fields["pad_vocab_size_multiple"] = 1
    if kind.mixer == "mamba2":
        low, high = options["dt_limit"]
        fields |= {
            "num_heads": inner // options["headdim"],
            "time_step_limit": [low, min(high, LARGEST)],
            "time_step_rank": math.ceil(width / 16),  # a key without a meaning there, but mlx-lm asks for it
            "chunk_size": 256,
        }
    elif fields["time_step_rank"] == "auto":  # llama.cpp reads a number
        fields["time_step_rank"] = math.ceil(width / 16)
    if inner % width == 0:
        fields["expand"] = inner // width
    elif kind.mixer == "mamba":
        fields["expand"] = 2  # an integer there; what counts is intermediate_size
    else:
        raise ValueError(f"its inner width is {inner}; transformers' Mamba-2 takes multiples of the outer one, {width}")
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    if fields["dtype"] is None:
        del fields["dtype"]
    else:
        fields["dtype"] = str(fields["dtype"]).removeprefix("torch.")
    _validated(fields)
    return fields


def has_transformers_class(config: LanguageModelConfig) -> bool:
    """Whether transformers has a class for that model: not for one with another head, or with quantised weights."""
    named, quantised = config.architectures or [], getattr(config, "quantization_config", None) is not None
    return not quantised and len(named) == 1 and named[0] in ARCHITECTURES


def _kind(config: LanguageModelConfig) -> tuple[str, dict[str, Any]]:
    """The model_type of a configuration, and all options of its layers."""
    mixers = sorted(set(config.mixers))
    if len(mixers) != 1 or mixers[0] not in ("mamba", "mamba2"):
        raise ValueError(f"its blocks are of {' and '.join(mixers)}; transformers has Mamba alone and Mamba-2 alone")
    if config.intermediate_size:
        raise ValueError(
            f"it has MLPs (intermediate_size {config.intermediate_size}), which transformers' Mamba has not"
        )
    mixer = mixers[0]
    options = config.all_options(mixer)
    if mixer == "mamba2":
        model_type = "mamba2"
        if options["norm_eps"] != config.norm_eps:
            raise ValueError(
                f"its blocks' norms have an epsilon of {config.norm_eps:g}, the gated norms one of "
                f"{options['norm_eps']:g}; transformers' Mamba-2 has one for both"
            )
    else:
        model_type = "falcon_mamba" if options["norm_bcdt"] else "mamba"
    kind = KINDS[model_type]
    known = {*kind.options.values(), *kind.fixed, *UNKNOWN_THERE.get(mixer, ())}
    for name, value in config.changed_options(mixer).items():
        if name not in known:
            raise ValueError(f"its {mixer} has {name}={value!r}, which transformers' has not")
    return model_type, options


def _validated(fields: dict[str, Any]) -> dict[str, Any]:
    """All keys of transformers' configuration: those given and, for the rest, its defaults."""
    try:
        return CONFIG_MAPPING[fields["model_type"]](**fields).to_dict()
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _expansion(inner: int, width: int) -> float:
    """The `expand` with which int(expand * width) == inner."""
    if inner % width == 0:
        return inner // width
    ratio = inner / width
    return ratio if int(ratio * width) == inner else math.nextafter(ratio, math.inf)


def _finite(value: Any) -> Any:
    """With the form in which transformers writes an infinity read as one."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return [_finite(v) for v in value] if isinstance(value, list) else value
