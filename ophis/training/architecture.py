"""The configuration of a model to train: a published size by name, or a small one."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedTokenizerFast

from ophis import models

# For bytes and a CPU. Of twelve shapes given 150 s on two cores, this and its neighbours (256 x 2, 192 x 4) came out
# within 2 % of each other; narrower, wider and state sizes of 64 behind. Batches of 4 were better than 8.
SMALL: dict[str, Any] = dict(hidden_size=192, num_hidden_layers=3, pad_vocab_size_multiple=16, mamba2=dict(d_state=32))


def model_config(
    tokenizer: PreTrainedTokenizerFast,
    preset: str | None = None,
    *,
    pattern: list[str] | None = None,
    hidden_size: int | None = None,
    layers: int | None = None,
) -> models.LanguageModelConfig:
    """Of a model for that tokenizer.

    Args:
        tokenizer: gives the size of the vocabulary and the token that ends a text.
        preset: one of `ophis.models.PRESETS`; `SMALL` when None.
        pattern: the blocks' mixers, repeated along the depth: ["mamba2"] * 5 + ["attention"].
        hidden_size, layers: other sizes than the preset's.
    """
    end = tokenizer.eos_token_id
    changes: dict[str, Any] = dict(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=end)
    chosen = dict(pattern=pattern, hidden_size=hidden_size, num_hidden_layers=layers)
    changes |= {key: value for key, value in chosen.items() if value is not None}
    if "attention" in (pattern or ()):  # it has no default number of heads
        width = hidden_size or models.PRESETS.get(preset or "", SMALL)["hidden_size"]
        changes["attention"] = dict(num_heads=math.ceil(width / 64), head_dim=64, rotary_emb_dim=32)
    if preset is not None:
        return models.preset(preset, **changes)
    return models.LanguageModelConfig(**{**SMALL, **changes})
