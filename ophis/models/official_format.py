"""The layout of the published state-spaces/* checkpoints in this library's terms, in both directions.

Their config.json has no model_type; d_model and n_layer tell it. Tensors have the same shapes, and parts in the same
order (in_proj of Mamba-2 [z, x, B, C, dt], of attention [q, k, v]; fc1 [value, gate]): only names are translated. The
official loader reads config.json into a class that refuses keys it does not know, and one pytorch_model.bin, in which
the head is stored although it is tied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ophis.layers.mlp import MULTIPLE

if TYPE_CHECKING:
    from ophis.models.config import LanguageModelConfig

# official name <-> name here, where they differ
NAMES = {"backbone.embedding.weight": "backbone.embeddings.weight"}

# official key <-> field of the configuration
FIELDS = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "pad_vocab_size_multiple": "pad_vocab_size_multiple",
    "d_intermediate": "intermediate_size",
    "residual_in_fp32": "residual_in_fp32",
    "tie_embeddings": "tie_word_embeddings",
}
NORM_EPSILON = "norm_epsilon"  # read where a fork has it; the official class has not, and a constant instead
OFFICIAL_NORM_EPSILON = 1e-5
LAYOUT = {"ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm"}
# What chooses a kernel or is a note of transformers', and changes no number.
IGNORED = {"fused_add_norm", "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}

# ssm_cfg["layer"] <-> kind of mixer. The options have one name and one default in both, save those of attention.
LAYERS = {"Mamba1": "mamba", "Mamba2": "mamba2"}
STEPS = ("dt_min", "dt_max", "dt_init_floor")
OPTIONS = {
    "mamba": ("d_state", "d_conv", "expand", "dt_rank", "dt_init", "dt_scale", *STEPS, "conv_bias", "bias"),
    "mamba2": (
        "d_state", "d_conv", "conv_init", "expand", "headdim", "d_ssm", "ngroups", "A_init_range", "D_has_hdim",
        "rmsnorm", "norm_before_gate", *STEPS, "dt_limit", "conv_bias", "bias",
    ),
    "attention": (
        "num_heads", "num_heads_kv", "head_dim", "rotary_emb_dim", "rotary_emb_base", "d_conv", "softmax_scale",
        "qkv_proj_bias", "out_proj_bias",
    ),
}  # fmt: skip
KERNELS = {"mamba": ("use_fast_path",), "mamba2": ("chunk_size", "use_mem_eff_path", "sequence_parallel")}
ATTENTION_DEFAULTS = {"qkv_proj_bias": True, "out_proj_bias": True}
# What attention has in one form only here -> (the official default, the form)
ATTENTION_FORM = {"causal": (False, True), "rotary_emb_interleaved": (False, False), "mlp_dim": (0, 0)}

MOST_LAYERS = 10_000  # a hybrid's pattern is written out, which a damaged n_layer must not make a matter of memory


def is_official(fields: dict[str, Any]) -> bool:
    """Whether the contents of config.json are of this layout."""
    return "model_type" not in fields and "d_model" in fields and "n_layer" in fields


def to_official(name: str) -> str:
    """The official name of the tensor with that name here."""
    return next((theirs for theirs, ours in NAMES.items() if ours == name), name)


def fields_from_official(fields: dict[str, Any]) -> dict[str, Any]:
    """The arguments of LanguageModelConfig, from the contents of config.json.

    Raises:
        ValueError: what the official loader would read and this library lacks.
    """
    known = [*FIELDS, NORM_EPSILON, *sorted(LAYOUT)]
    for key in fields:
        if key not in known and key not in IGNORED:
            raise ValueError(f"unknown key {key!r}, expected some of {', '.join(known)}")
    sizes = {"pad_vocab_size_multiple": 8, "d_intermediate": 0, **fields}
    for key in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "d_intermediate"):
        value, least = sizes.get(key), 0 if key == "d_intermediate" else 1
        if type(value) is not int or value < least:
            raise ValueError(f"{key} is {value!r}, expected an integer of at least {least}")
    for key, kind in {"residual_in_fp32": bool, "tie_embeddings": bool, "norm_epsilon": float}.items():
        if key in fields and type(fields[key]) is not kind:
            raise ValueError(f"{key} is {fields[key]!r}, expected a {kind.__name__}")
    if fields["n_layer"] > MOST_LAYERS:
        raise ValueError(f"n_layer is {fields['n_layer']}, expected at most {MOST_LAYERS}")
    if fields.get("rms_norm", True) is not True:
        raise ValueError(f"rms_norm is {fields['rms_norm']!r}; the published models, and this library's, have RMSNorm")
    sizes["d_intermediate"] += -sizes["d_intermediate"] % MULTIPLE  # given or not, the width is rounded up
    values: dict[str, Any] = {ours: sizes[theirs] for theirs, ours in FIELDS.items() if theirs in sizes}
    values["norm_eps"] = fields.get(NORM_EPSILON, OFFICIAL_NORM_EPSILON)

    layers, attention = fields["n_layer"], fields.get("attn_layer_idx") or []
    if not isinstance(attention, list) or any(type(i) is not int or not 0 <= i < layers for i in attention):
        raise ValueError(f"attn_layer_idx is {attention!r}, expected a list of numbers from 0 to n_layer - 1")
    chosen = set(attention)
    pattern = ["attention"]
    if len(chosen) < layers:  # without such a block ssm_cfg means nothing
        kind, options = _ssm(_mapping(fields, "ssm_cfg"))
        values[kind] = options
        pattern = ["attention" if i in chosen else kind for i in range(layers)] if chosen else [kind]
    if chosen:
        values["attention"] = _attention(_mapping(fields, "attn_cfg"))
    return {**values, "pattern": pattern}


def fields_to_official(config: LanguageModelConfig) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
        ValueError: says what of the configuration the official model has not.
    """
    recurrent = sorted(set(config.mixers) - {"attention"})
    if len(recurrent) > 1 or not set(recurrent) <= set(LAYERS.values()):
        raise ValueError(
            f"its blocks are of {' and '.join(sorted(set(config.mixers)))}; the official model has attention and one "
            f"of {' or '.join(LAYERS.values())}"
        )
    if config.norm_eps != OFFICIAL_NORM_EPSILON:
        raise ValueError(
            f"its norms have an epsilon of {config.norm_eps:g}; the official ones {OFFICIAL_NORM_EPSILON:g}"
        )
    if config.intermediate_size % MULTIPLE:
        raise ValueError(
            f"its intermediate_size is {config.intermediate_size}; the official one is a multiple of {MULTIPLE}"
        )
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    if config.vocab_size % config.pad_vocab_size_multiple:  # the embedding was resized
        fields["pad_vocab_size_multiple"] = 1
    chosen = [i for i, kind in enumerate(config.mixers) if kind == "attention"]
    fields |= {"ssm_cfg": {}, "attn_layer_idx": chosen, "attn_cfg": {}, "rms_norm": True, "fused_add_norm": True}
    for kind in recurrent:
        layer = next(theirs for theirs, ours in LAYERS.items() if ours == kind)
        named = {} if layer == "Mamba1" else {"layer": layer}  # what was published first has no name for it
        fields["ssm_cfg"] = {**named, **_official_options(config, kind)}
    if chosen:
        form = {key: form for key, (default, form) in ATTENTION_FORM.items() if form != default}
        biases = {key: config.all_options("attention")[key] for key in ATTENTION_DEFAULTS}
        fields["attn_cfg"] = {**form, **biases, **_official_options(config, "attention")}
    return fields


def _official_options(config: LanguageModelConfig, kind: str) -> dict[str, Any]:
    changed = config.changed_options(kind)
    for key, value in changed.items():
        if key not in OPTIONS[kind]:
            raise ValueError(f"its {kind} has {key}={value!r}, which the official one has not")
    return changed


def _ssm(options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    layer = options.get("layer", "Mamba1")
    if layer not in list(LAYERS):
        raise ValueError(f"ssm_cfg has layer {layer!r}, expected {' or '.join(map(repr, LAYERS))}")
    kind = LAYERS[layer]
    ignored = ("layer", *KERNELS[kind])
    return kind, _known({k: v for k, v in options.items() if k not in ignored}, "ssm_cfg", OPTIONS[kind], layer)


def _attention(options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    for key, (default, form) in ATTENTION_FORM.items():
        value = options.pop(key, default)
        if value != form:
            raise ValueError(f"attn_cfg has {key} {value!r}; attention here has {form!r} only")
    if "num_heads" not in options:
        raise ValueError("attn_cfg has no num_heads")
    return {**ATTENTION_DEFAULTS, **_known(options, "attn_cfg", OPTIONS["attention"], "attention")}


def _known(options: dict[str, Any], where: str, known: tuple[str, ...], layer: str) -> dict[str, Any]:
    for key in options:
        if key not in known:
            raise ValueError(f"{where} has {key!r}, which {layer} does not know; it knows {', '.join(known)}")
    return options


def _mapping(fields: dict[str, Any], key: str) -> dict[str, Any]:
    value = fields.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}, expected a mapping of options")
    return value or {}
