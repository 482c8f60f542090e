"""The configuration of a language model: its sizes, and options handed to the layers under their own names."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import os
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ophis.files import write_whole
from ophis.models.adapters import register_adapter_targets
from ophis.models.backbone import MIXERS
from ophis.models.official_format import fields_from_official, is_official
from ophis.models.transformers_format import (
    KINDS,
    fields_from_transformers,
    fields_to_transformers,
    has_transformers_class,
    is_transformers,
)

# What transformers itself keeps in a config beside the fields.
_HOUSEKEEPING = {
    "model_type", "name_or_path", "torch_dtype", "attn_implementation", "experts_implementation", "num_labels",
}  # fmt: skip
POOLINGS = ("last", "mean")


class LanguageModelConfig(PreTrainedConfig):
    """Sizes and options of a `LanguageModel`. A key it does not know is an error.

    `from_pretrained` reads the config.json of every layout that `ophis.load` knows. `save_pretrained` of a model writes
    transformers' (`model_type` mamba, mamba2 or falcon_mamba) where one of its classes is that model, so that whoever
    knows those reads it; any other configuration is saved as `model_type` "ophis".

    Args:
        vocab_size: rows of the embedding; rounded up to a multiple of pad_vocab_size_multiple.
        hidden_size: the width of the residual stream.
        num_hidden_layers: number of blocks.
        pattern: the blocks' mixers, tiled to that number: ["mamba2"] * 5 + ["attention"], say.
        mamba, mamba2, attention, s4d: keyword arguments of `ophis.layers.Mamba` and so on, where they differ from its
            defaults. `{"mamba2": {"headdim": 32}}`.
        intermediate_size: hidden width of the gated MLP behind each mixer; 0 for none.
        norm_eps: of the blocks' norms and the last.
        residual_in_fp32: keep the residual stream in float32.
        initializer_range: standard deviation of the initial embeddings.
        tie_word_embeddings: the head shares the embedding's weights.
        pooling: what classification and embedding models take of a text: the output at its "last" token, or the
            "mean" over all.
    """

    model_type = "ophis"
    auto_map: ClassVar[dict[str, str]] = {}  # no code comes with the weights; TRL reads it of classes it does not know

    vocab_size: int = 50288
    pad_vocab_size_multiple: int = 8
    hidden_size: int = 768
    num_hidden_layers: int = 24
    pattern: list[str] | tuple[str, ...] = ("mamba2",)
    mamba: dict[str, Any] | None = None
    mamba2: dict[str, Any] | None = None
    attention: dict[str, Any] | None = None
    s4d: dict[str, Any] | None = None
    intermediate_size: int = 0
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pooling: str = "last"
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0

    def __post_init__(self, **kwargs: Any):
        known = set(self.__dataclass_fields__) | _HOUSEKEEPING
        for key in kwargs:
            if key not in known and not key.startswith("_"):
                own = set(LanguageModelConfig.__annotations__)
                raise ValueError(f"LanguageModelConfig: unknown key {key!r}{_suggest(key, own)}")
        self.pattern = list(self.pattern)
        self.vocab_size += -self.vocab_size % self.pad_vocab_size_multiple
        for kind in self.pattern or ["nothing"]:
            if kind not in MIXERS:
                raise ValueError(f"LanguageModelConfig: pattern names {kind!r}, expected some of {', '.join(MIXERS)}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"LanguageModelConfig: pooling is {self.pooling!r}, expected {' or '.join(POOLINGS)}")
        for kind in MIXERS:
            defaults = self.default_options(kind)
            for key in self.options(kind):
                if key not in defaults:
                    raise ValueError(f"LanguageModelConfig: {kind} has no option {key!r}{_suggest(key, set(defaults))}")
            for key, default in defaults.items():
                if kind in self.pattern and default is inspect.Parameter.empty and not self.options(kind):
                    raise ValueError(f"LanguageModelConfig: {kind} needs {key}: {kind}={{{key!r}: ...}}")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        register_adapter_targets()  # PEFT asks for this dict, then for the targets of its model_type
        return super().to_dict()

    def options(self, kind: str) -> dict[str, Any]:
        """Keyword arguments of that kind of mixer, where they differ from its defaults."""
        return getattr(self, kind) or {}

    def default_options(self, kind: str) -> dict[str, Any]:
        """Keyword arguments that every mixer of that kind takes, with the layer's defaults."""
        parameters = inspect.signature(MIXERS[kind]).parameters
        names = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY} - {"device", "dtype"}
        return {name: parameters[name].default for name in parameters if name in names}

    def all_options(self, kind: str) -> dict[str, Any]:
        """Keyword arguments of that kind of mixer, those at their defaults among them."""
        return self.default_options(kind) | self.options(kind)

    def changed_options(self, kind: str) -> dict[str, Any]:
        """Those that differ from the layer's defaults."""
        defaults = self.default_options(kind)
        return {name: value for name, value in self.options(kind).items() if _plain(value) != _plain(defaults[name])}

    @property
    def mixers(self) -> list[str]:
        """The kind of each block's mixer."""
        return [self.pattern[i % len(self.pattern)] for i in range(self.num_hidden_layers)]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
        """transformers' step between a folder or a name and the arguments of this class."""
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        notes = {key: fields.pop(key) for key in list(fields) if key.startswith("_")}  # transformers' to itself
        return (arguments(fields) | notes if fields else {}), kwargs

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """transformers' last step in saving a configuration."""
        fields = None
        if has_transformers_class(self):
            with contextlib.suppress(ValueError):  # none of its models is this one
                fields = fields_to_transformers(self)
        text = self.to_json_string(use_diff) if fields is None else json.dumps(fields, indent=2, sort_keys=True) + "\n"
        write_whole(Path(json_file_path), text)


def arguments(fields: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `LanguageModelConfig`, from the contents of any layout's config.json.

    Raises:
        ValueError: another architecture, or what the layout says is wrong or not to be had here.
    """
    if is_transformers(fields):
        return fields_from_transformers(fields)
    if is_official(fields):
        return fields_from_official(fields)
    known = [LanguageModelConfig.model_type, *KINDS]
    if "model_type" not in fields:
        raise ValueError("it has no model_type, and not the d_model and n_layer of an official checkpoint")
    if fields["model_type"] != LanguageModelConfig.model_type:
        raise ValueError(f"it has model_type {fields['model_type']!r}, expected one of {', '.join(map(repr, known))}")
    return fields


def _plain(value: Any) -> Any:
    """JSON has lists where the layers' defaults are tuples."""
    return list(value) if isinstance(value, tuple) else value


def _suggest(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; it knows {', '.join(sorted(known))}"
