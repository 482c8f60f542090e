"""Language models of a few thousand parameters, one for each kind of layer and for a hybrid of them."""

from __future__ import annotations

from typing import Any

import torch

import ophis

VOCABULARY = 61
PATTERNS: dict[str, dict[str, Any]] = {
    "mamba": dict(pattern=["mamba"], mamba=dict(d_state=4)),
    "mamba2": dict(pattern=["mamba2"], mamba2=dict(headdim=8, d_state=8, ngroups=2)),
    "mamba2 with MLPs": dict(pattern=["mamba2"], mamba2=dict(headdim=16, d_state=8), intermediate_size=40),
    "hybrid": dict(
        pattern=["mamba2", "attention", "mamba"],
        mamba2=dict(headdim=16, d_state=8),
        attention=dict(num_heads=4, num_heads_kv=2, head_dim=8, rotary_emb_dim=4, d_conv=4),
    ),
    "transformer++": dict(pattern=["attention"], attention=dict(num_heads=4, rotary_emb_dim=8), intermediate_size=64),
    "s4d": dict(pattern=["s4d"], s4d=dict(d_state=8), intermediate_size=40),
}


def config(name: str, **changes: Any) -> ophis.LanguageModelConfig:
    sizes = dict(hidden_size=32, num_hidden_layers=3, vocab_size=VOCABULARY, pad_vocab_size_multiple=1)
    return ophis.LanguageModelConfig(**{**sizes, **PATTERNS[name], **changes})


def build(name: str, **changes: Any) -> ophis.LanguageModel:
    torch.manual_seed(0)
    return ophis.LanguageModel(config(name, **changes)).eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """In float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
