"""The configuration of a language model, as the published checkpoints have it in config.json."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class MambaConfig:
    """Sizes and options of a `MambaLMHeadModel`.

    Args:
        d_model, n_layer: the width and the number of blocks.
        d_intermediate: hidden width of the MLP in each block; 0 for none.
        vocab_size: rows of the embedding, rounded up to a multiple of pad_vocab_size_multiple.
        ssm_cfg: {"layer": "Mamba1" or "Mamba2"}, the first where it is left out, and arguments of that class.
        attn_layer_idx, attn_cfg: which blocks have attention instead; arguments of `MHA`.
        rms_norm: RMSNorm rather than nn.LayerNorm.
        residual_in_fp32: the residual stream is float32.
        fused_add_norm: taken and not used.
        tie_embeddings: the head shares the embedding's weights.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict = field(default_factory=dict)
    attn_layer_idx: list = field(default_factory=list)
    attn_cfg: dict = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
