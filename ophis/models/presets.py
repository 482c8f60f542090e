"""The published language models by name."""

from __future__ import annotations

from typing import Any

from ophis.models.config import LanguageModelConfig

# GPT-NeoX's tokenizer has 50277 entries; Mamba's rows are padded to a multiple of 8, the others' to one of 16.
_VOCABULARY = 50277

# (hidden_size, num_hidden_layers)
_MAMBA = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
_MAMBA2 = {"130m": (768, 24), "370m": (1024, 48), "780m": (1536, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}


def _sizes(width: int, depth: int, multiple: int) -> dict[str, Any]:
    return dict(hidden_size=width, num_hidden_layers=depth, vocab_size=_VOCABULARY, pad_vocab_size_multiple=multiple)


PRESETS: dict[str, dict[str, Any]] = {
    **{f"mamba-{name}": dict(**_sizes(*size, 8), pattern=["mamba"]) for name, size in _MAMBA.items()},
    **{f"mamba2-{name}": dict(**_sizes(*size, 16), pattern=["mamba2"]) for name, size in _MAMBA2.items()},
    # Attention at blocks 9, 18, 27, 36, 45 and 56 of 64, so the pattern is written out.
    "mamba2attn-2.7b": dict(
        **_sizes(2560, 64, 16),
        pattern=["attention" if i in (9, 18, 27, 36, 45, 56) else "mamba2" for i in range(64)],
        attention=dict(num_heads=30, head_dim=128, rotary_emb_dim=64, d_conv=4),
    ),
    # 32 blocks of attention and a gated MLP of 8/3 the width, rounded up to a multiple of 128.
    "transformerpp-2.7b": dict(
        **_sizes(2560, 32, 16),
        pattern=["attention"],
        attention=dict(num_heads=20, head_dim=128, rotary_emb_dim=128),
        intermediate_size=6912,
    ),
}


def preset(name: str, **changes: Any) -> LanguageModelConfig:
    """The configuration of a published model, with `changes` to it: preset("mamba2-130m", num_hidden_layers=2)."""
    if name not in PRESETS:
        raise ValueError(f"preset: no model {name!r}; there are {', '.join(PRESETS)}")
    return LanguageModelConfig(**{**PRESETS[name], **changes})
