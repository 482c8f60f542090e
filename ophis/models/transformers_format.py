"""transformers' configurations of Mamba and Mamba-2 in this library's terms. The weights' names are the same."""

from __future__ import annotations

from typing import Any

from ophis.models.config import LanguageModelConfig

# transformers' key -> (field of the configuration) or (option of the layer)
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "layer_norm_epsilon": "norm_eps",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_word_embeddings",
    "use_cache": "use_cache",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "dtype": "dtype",
}
MIXER = {
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "use_conv_bias": "conv_bias",
    "use_bias": "bias",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
}
MAMBA = {"time_step_rank": "dt_rank", "time_step_scale": "dt_scale", "time_step_init_scheme": "dt_init"}
MAMBA2 = {"head_dim": "headdim", "n_groups": "ngroups", "time_step_limit": "dt_limit", "layer_norm_epsilon": "norm_eps"}
# Where a saved config leaves a key out, these differ between transformers' defaults and the layers'.
DEFAULTS = {
    "mamba": {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "tie_word_embeddings": True},
    "mamba2": {
        "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "n_groups": 8, "head_dim": 64,
        "tie_word_embeddings": False, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    },
}  # fmt: skip


def config_from_transformers(fields: dict[str, Any]) -> LanguageModelConfig:
    """From the contents of config.json with `model_type` mamba or mamba2."""
    kind = fields["model_type"]
    fields = {**DEFAULTS[kind], **{key: _number(value) for key, value in fields.items() if value is not None}}
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {fields['hidden_act']!r}; the published blocks, and these, use 'silu'")
    options = {ours: fields[theirs] for theirs, ours in (MIXER | (MAMBA if kind == "mamba" else MAMBA2)).items()
               if theirs in fields}  # fmt: skip
    if "intermediate_size" in fields:  # not always an integer multiple
        options["expand"] = fields["intermediate_size"] / fields["hidden_size"]
    known: dict[str, Any] = {ours: fields[theirs] for theirs, ours in FIELDS.items() if theirs in fields}
    known[kind] = options
    return LanguageModelConfig(**known, pad_vocab_size_multiple=1, pattern=[kind])


def _number(value: Any) -> Any:
    """JSON has no infinity: transformers writes {"__float__": "Infinity"}."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return [_number(v) for v in value] if isinstance(value, list) else value
