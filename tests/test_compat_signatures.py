"""The arguments of what mamba_ssm and causal_conv1d offer, written out here, and the names of ophis.compat."""

from __future__ import annotations

import importlib
import inspect

import pytest

from ophis import compat
from ophis.compat.mamba_ssm.ops.triton import layer_norm, layernorm_gated

INNER = (
    "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, "
    "C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True"
)
NORM = (
    "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, rowscale=None, "
    "prenorm=False, residual_in_fp32=False"
)
SCAN = "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False"
MAMBA = (
    "d_model, d_state=16, d_conv=4, expand=2, dt_rank='auto', dt_min=0.001, dt_max=0.1, dt_init='random', "
    "dt_scale=1.0, dt_init_floor=0.0001, conv_bias=True, bias=False, use_fast_path=True, layer_idx=None, "
    "device=None, dtype=None"
)
MAMBA2 = (
    "d_model, d_state=128, d_conv=4, conv_init=None, expand=2, headdim=64, d_ssm=None, ngroups=1, "
    "A_init_range=(1, 16), D_has_hdim=False, rmsnorm=True, norm_before_gate=False, dt_min=0.001, dt_max=0.1, "
    "dt_init_floor=0.0001, dt_limit=(0.0, inf), bias=False, conv_bias=True, chunk_size=256, use_mem_eff_path=True, "
    "layer_idx=None, process_group=None, sequence_parallel=True, device=None, dtype=None"
)
STEP = "self, hidden_states, conv_state, ssm_state"
ALLOCATE = "self, batch_size, max_seqlen, dtype=None, **kwargs"
# What mamba-ssm 2.3.2 and causal-conv1d 1.7.0 have: module -> name -> its arguments.
SIGNATURES = {
    "mamba_ssm.ops.selective_scan_interface": {
        "selective_scan_fn": SCAN,
        "selective_scan_ref": SCAN,
        "mamba_inner_fn": f"{INNER}, checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, "
        "b_c_dt_rms_eps=1e-06",
        "mamba_inner_ref": INNER,
    },
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, "
        "seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False, "
        "return_varlen_states=False",
        "mamba_split_conv1d_scan_combined": "zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, "
        "initial_states=None, seq_idx=None, dt_limit=(0.0, inf), return_final_states=False, activation='silu', "
        "rmsnorm_weight=None, rmsnorm_eps=1e-06, outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, "
        "norm_before_gate=True",
    },
    "mamba_ssm.ops.triton.selective_state_update": {
        "selective_state_update": "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, "
        "state_batch_indices=None",
        "selective_state_update_ref": "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False",
    },
    "mamba_ssm.ops.triton.layer_norm": {
        "layer_norm_fn": f"{NORM}, is_rms_norm=False, return_dropout_mask=False",
        "rms_norm_fn": f"{NORM}, return_dropout_mask=False",
        "RMSNorm": "hidden_size, eps=1e-05, dropout_p=0.0, device=None, dtype=None",
        "RMSNorm.forward": "self, x, residual=None, prenorm=False, residual_in_fp32=False",
    },
    "mamba_ssm.ops.triton.layernorm": {"rms_norm_fn": f"{NORM}, return_dropout_mask=False"},
    "mamba_ssm.ops.triton.layernorm_gated": {
        "layernorm_fn": "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True, is_rms_norm=False",
        "rmsnorm_fn": "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True",
        "LayerNorm": "hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, device=None, dtype=None",
        "RMSNorm": "hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, device=None, dtype=None",
        "RMSNorm.forward": "self, x, z=None",
    },
    "mamba_ssm.modules.mamba_simple": {
        "Mamba": MAMBA,
        "Mamba.forward": "self, hidden_states, inference_params=None",
        "Mamba.step": STEP,
        "Mamba.allocate_inference_cache": ALLOCATE,
        "Block": "dim, mixer_cls, norm_cls=LayerNorm, fused_add_norm=False, residual_in_fp32=False",  # of version 1
    },
    "mamba_ssm.modules.mamba2": {
        "Mamba2": MAMBA2,
        "Mamba2.forward": "self, u, seqlen=None, seq_idx=None, cu_seqlens=None, inference_params=None",
        "Mamba2.step": STEP,
        "Mamba2.allocate_inference_cache": ALLOCATE,
    },
    "mamba_ssm.modules.mha": {
        "MHA": "embed_dim, num_heads, num_heads_kv=None, head_dim=None, mlp_dim=0, qkv_proj_bias=True, "
        "out_proj_bias=True, softmax_scale=None, causal=False, layer_idx=None, d_conv=0, rotary_emb_dim=0, "
        "rotary_emb_base=10000.0, rotary_emb_interleaved=False, device=None, dtype=None",
        "MHA.forward": "self, x, inference_params=None",
        "MHA.allocate_inference_cache": "self, batch_size, max_seqlen, dtype=None",
    },
    "mamba_ssm.modules.mlp": {
        "GatedMLP": "in_features, hidden_features=None, out_features=None, activation=silu, bias=False, "
        "multiple_of=128, device=None, dtype=None",
    },
    "mamba_ssm.modules.block": {
        "Block": "dim, mixer_cls, mlp_cls, norm_cls=LayerNorm, fused_add_norm=False, residual_in_fp32=False",
        "Block.forward": "self, hidden_states, residual=None, inference_params=None, **mixer_kwargs",
        "Block.allocate_inference_cache": ALLOCATE,
    },
    "mamba_ssm.models.config_mamba": {
        "MambaConfig": "d_model=2560, d_intermediate=0, n_layer=64, vocab_size=50277, ssm_cfg={}, attn_layer_idx=[], "
        "attn_cfg={}, rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8, "
        "tie_embeddings=True",
    },
    "mamba_ssm.models.mixer_seq_simple": {
        "create_block": "d_model, d_intermediate, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None, "
        "norm_epsilon=1e-05, rms_norm=False, residual_in_fp32=False, fused_add_norm=False, layer_idx=None, "
        "device=None, dtype=None",
        "_init_weights": "module, n_layer, initializer_range=0.02, rescale_prenorm_residual=True, "
        "n_residuals_per_layer=1",
        "MixerModel": "d_model, n_layer, d_intermediate, vocab_size, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None, "
        "norm_epsilon=1e-05, rms_norm=False, initializer_cfg=None, fused_add_norm=False, residual_in_fp32=False, "
        "device=None, dtype=None",
        "MixerModel.forward": "self, input_ids, inference_params=None, **mixer_kwargs",
        "MambaLMHeadModel": "config, initializer_cfg=None, device=None, dtype=None",
        "MambaLMHeadModel.forward": "self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0, "
        "**mixer_kwargs",
        "MambaLMHeadModel.from_pretrained": "pretrained_model_name, device=None, dtype=None, **kwargs",
        "MambaLMHeadModel.save_pretrained": "self, save_directory",
        "MambaLMHeadModel.allocate_inference_cache": ALLOCATE,
    },
    "mamba_ssm.utils.generation": {
        "InferenceParams": "max_seqlen, max_batch_size, seqlen_offset=0, batch_size_offset=0, "
        "key_value_memory_dict={}, lengths_per_sample=None",
        "InferenceParams.reset": "self, max_seqlen, max_batch_size",
        "sample": "logits, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0",
        "decode": "input_ids, model, max_length, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0, "
        "repetition_penalty=1.0, eos_token_id=None, teacher_outputs=None, vocab_size=None, cg=False, "
        "enable_timing=False, output_scores=False, streamer=None",
        "GenerationMixin.generate": "self, input_ids, max_length, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0, "
        "return_dict_in_generate=False, output_scores=False, **kwargs",
    },
    "mamba_ssm.utils.hf": {
        "load_config_hf": "model_name",
        "load_state_dict_hf": "model_name, device=None, dtype=None",
    },
    "causal_conv1d.causal_conv1d_interface": {
        "causal_conv1d_fn": "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
        "final_states_out=None, activation=None",
        "causal_conv1d_ref": "x, weight, bias=None, initial_states=None, return_final_states=False, "
        "final_states_out=None, activation=None, seq_idx=None",
        "causal_conv1d_update": "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
        "conv_state_indices=None",
        "causal_conv1d_update_ref": "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None",
    },
    "causal_conv1d.causal_conv1d_varlen": {"causal_conv1d_varlen_states": "x, cu_seqlens, state_len"},
}


def arguments_of(thing) -> str:
    """As the table writes them: no annotations, no slashes of a dataclass's factories, functions by their names."""
    parts = []
    for parameter in inspect.signature(thing).parameters.values():
        text = "**" * (parameter.kind is parameter.VAR_KEYWORD) + parameter.name
        assert parameter.kind is not parameter.KEYWORD_ONLY
        if parameter.default is not parameter.empty:
            default = parameter.default
            if "factory" in repr(default):  # a dataclass's
                default = {"key_value_memory_dict": {}, "ssm_cfg": {}, "attn_cfg": {}, "attn_layer_idx": []}[
                    parameter.name
                ]
            text += f"={getattr(default, '__name__', None) or repr(default)}"
        parts.append(text)
    return ", ".join(parts)


@pytest.mark.parametrize("module", SIGNATURES)
def test_signatures(module: str):
    found = importlib.import_module(f"ophis.compat.{module}")
    for name, expected in SIGNATURES[module].items():
        thing = found
        for part in name.split("."):
            thing = getattr(thing, part)
        assert arguments_of(thing) == expected, name


def test_public_names():
    for name in compat.__all__:
        assert getattr(compat, name).__doc__, name
    assert compat.RMSNormGated is layernorm_gated.RMSNorm
    assert compat.RMSNorm is layer_norm.RMSNorm
    with pytest.raises(AttributeError, match="no attribute 'Mamba3'; it has Block, InferenceParams"):
        compat.Mamba3  # noqa: B018
