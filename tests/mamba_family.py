"""Tiny random models of transformers' Mamba family, in which everything that could be wrong shows in the logits."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ophis.integrations.transformers import accelerate_transformers
from ophis.models.state import CACHE

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
NEWEST = (5, 24)  # of the versions whose sources are known
VOCABULARY = 96
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
SSD = dict(
    mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=16, mamba_d_conv=4
)  # fmt: skip
# model of transformers -> (its classes' prefix, options of its configuration)
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", dict(state_size=8)),
    "falcon_mamba": ("FalconMamba", dict(state_size=8)),
    "jamba": (
        "Jamba",
        dict(**ATTENTION, attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
             num_experts=2, num_experts_per_tok=1, mamba_d_state=8, mamba_dt_rank=4),
    ),
    "zamba": (
        "Zamba",
        dict(num_attention_heads=4, num_key_value_heads=4, intermediate_size=48, num_hidden_layers=4,
             layers_block_type=["mamba", "hybrid"] * 2, n_mamba_heads=2, mamba_d_state=8, mamba_dt_rank=4),
    ),
    "mamba2": ("Mamba2", dict(num_heads=8, head_dim=8, n_groups=2, state_size=8, chunk_size=16)),
    "bamba": ("Bamba", dict(**ATTENTION, **SSD, attn_layer_indices=[1])),
    "zamba2": (
        "Zamba2",
        dict(num_attention_heads=4, intermediate_size=48, layers_block_type=["mamba", "hybrid", "mamba"],
             num_mem_blocks=1, adapter_rank=4, n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=2, mamba_d_state=8,
             chunk_size=16, time_step_min=1e-6),
    ),
    "falcon_h1": (
        "FalconH1",
        dict(**ATTENTION, **SSD, head_dim=8, mamba_d_ssm=64, ssm_in_multiplier=1.1, mlp_multipliers=[1.0, 1.0],
             ssm_multipliers=[0.5, 1.5, 0.7, 0.8, 1.2]),
    ),
    "nemotron_h": (
        "NemotronH",
        dict(**ATTENTION, head_dim=8, hybrid_override_pattern="M*M", mamba_num_heads=8, mamba_head_dim=8, n_groups=2,
             ssm_state_size=8, chunk_size=16, time_step_min=1e-6),
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        dict(**ATTENTION, **SSD, layer_types=["mamba", "attention", "mamba"], num_local_experts=2,
             num_experts_per_tok=1, shared_intermediate_size=48, position_embedding_type="rope"),
    ),
}  # fmt: skip


@functools.cache
def left_alone() -> dict[str, tuple[str, ...]]:
    """Why the call leaves something of a model as it is: nothing, in the versions that are known."""
    with accelerate_transformers() as acceleration:
        return {outcome.model: outcome.left for outcome in acceleration.models if outcome.left}


def build(name: str, seed: int = 0, **options: Any) -> Any:
    """A model in evaluation mode whose weights are nowhere constant, and large enough for its states to matter."""
    if importlib.util.find_spec(f"transformers.models.{name}") is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if VERSION > NEWEST and name in left_alone():
        pytest.skip(f"transformers {transformers.__version__} is newer than the call: {left_alone()[name][0]}")
    prefix, own = FAMILY[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **own, **options})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            elif key.endswith("_proj_weight"):  # Zamba's, which are no linear layers
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
    return model.eval()


def tokens(b: int, l: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (b, l), generator=torch.manual_seed(seed))


def attends(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def cached(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as the argument that the model takes."""
    name = "cache" if CACHE == "cache" else "past_key_values" if attends(model) else "cache_params"
    return {name: cache} if cache is not None else {}


def cache_of(output: Any) -> Any:
    return next(output[name] for name in ("cache", "past_key_values", "cache_params") if name in output)


def plainly(model: Any, ids: Tensor) -> Tensor:
    """The logits of whole sequences: by transformers alone, these are what all else is held against."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def gradients(model: Any, **call: Any) -> dict[str, Tensor]:
    """Of the loss of a training step."""
    model.train()
    model.zero_grad()
    model(use_cache=False, **call).loss.backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within 1e-5 of the largest of all, or 1e-4 of its own."""
    assert actual.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        off = (actual[name] - gradient).abs().max()
        assert off < max(1e-5 * scale, 1e-4 * gradient.abs().max()), name


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest entry."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()
