"""The language model: embedding, blocks, final norm, head."""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ophis.compat.inference_cache import CachedMixer
from ophis.compat.mamba_ssm.models.config_mamba import MambaConfig
from ophis.compat.mamba_ssm.modules.block import Block, add_and_norm
from ophis.compat.mamba_ssm.modules.mamba2 import Mamba2
from ophis.compat.mamba_ssm.modules.mamba_simple import Mamba
from ophis.compat.mamba_ssm.modules.mha import MHA
from ophis.compat.mamba_ssm.modules.mlp import GatedMLP
from ophis.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm
from ophis.compat.mamba_ssm.utils.generation import GenerationMixin, InferenceParams
from ophis.compat.mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from ophis.files import PARTIAL, rename_whole, write_whole

SSM_LAYERS = {"Mamba1": Mamba, "Mamba2": Mamba2}

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """A `Block` with attention where layer_idx is among attn_layer_idx, else with the layer that ssm_cfg names."""
    options = dict(device=device, dtype=dtype)
    if layer_idx in (attn_layer_idx or ()):
        mixer_cls = partial(MHA, layer_idx=layer_idx, **(attn_cfg or {}), **options)
    else:
        ssm = dict(ssm_cfg or {})
        layer = ssm.pop("layer", "Mamba1")
        if layer not in SSM_LAYERS:
            raise ValueError(f"create_block: ssm_cfg has layer {layer!r}, expected 'Mamba1' or 'Mamba2'")
        mixer_cls = partial(SSM_LAYERS[layer], layer_idx=layer_idx, **ssm, **options)
    mlp_cls = nn.Identity
    if d_intermediate:
        mlp_cls = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **options)
    norm_cls = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **options)
    block = Block(d_model, mixer_cls, mlp_cls, norm_cls, fused_add_norm, residual_in_fp32)
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """For `nn.Module.apply`: embeddings, biases, and what is added to the residual stream, which starts smaller."""
    if isinstance(module, nn.Linear) and module.bias is not None and not getattr(module.bias, "_no_reinit", False):
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    for name in ("out_proj", "fc2") if rescale_prenorm_residual else ():
        output = getattr(module, name, None)
        if isinstance(output, nn.Linear):
            bound = (output.in_features * n_residuals_per_layer * n_layer) ** -0.5
            nn.init.uniform_(output.weight, -bound, bound)


class MixerModel(nn.Module):
    """Embedding, n_layer blocks and the final norm: token ids (b, l) -> (b, l, d_model)."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            create_block(
                d_model,
                d_intermediate,
                ssm_cfg=ssm_cfg,
                attn_layer_idx=attn_layer_idx,
                attn_cfg=attn_cfg,
                norm_epsilon=norm_epsilon,
                rms_norm=rms_norm,
                residual_in_fp32=residual_in_fp32,
                fused_add_norm=fused_add_norm,
                layer_idx=i,
                device=device,
                dtype=dtype,
            )
            for i in range(n_layer)
        )
        norm_cls = RMSNorm if rms_norm else nn.LayerNorm
        self.norm_f = norm_cls(d_model, eps=norm_epsilon, device=device, dtype=dtype)
        residuals = 2 if d_intermediate else 1
        self.apply(partial(_init_weights, n_layer=n_layer, n_residuals_per_layer=residuals, **(initializer_cfg or {})))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> dict[int, Any]:
        """The states of every layer, by its index."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # type: ignore[operator]
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids: Tensor, inference_params: InferenceParams | None = None, **mixer_kwargs) -> Tensor:
        x, residual = self.embedding(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, inference_params=inference_params, **mixer_kwargs)
        return add_and_norm(self.norm_f, x, residual, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """The language model of the published state-spaces/* checkpoints, under their names.

        model = MambaLMHeadModel.from_pretrained("state-spaces/mamba-130m", device="cuda", dtype=torch.bfloat16)
        model.generate(input_ids, max_length=100, top_k=50)

    `ophis.load` reads the same folders into a model of transformers.
    """

    def __init__(self, config: MambaConfig, initializer_cfg=None, device=None, dtype=None):
        super().__init__()
        self.config = config
        vocab_size = config.vocab_size + -config.vocab_size % config.pad_vocab_size_multiple
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=vocab_size,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device=device, dtype=dtype)
        # A second time, for one residual a layer: with an MLP these are the values that the published models started
        # from, not those of the backbone alone.
        self.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self):
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> dict[int, Any]:
        """The states of every layer, by its index, for `InferenceParams.key_value_memory_dict`."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
        **mixer_kwargs,
    ) -> CausalLMOutput:
        """Token ids (b, l) -> a named tuple with `logits` (b, l, vocabulary).

        Args:
            position_ids: taken and not used; the layers count for themselves.
            inference_params: an `InferenceParams`, for decoding.
            num_last_tokens: logits of the last so many positions only; 0 for all.
            mixer_kwargs: handed to every layer; `seq_idx` and `cu_seqlens` of Mamba2.
        """
        x = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(logits=self.lm_head(x[:, -num_last_tokens:] if num_last_tokens else x))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | Path, device: Any = None, dtype: torch.dtype | None = None, **kwargs
    ) -> MambaLMHeadModel:
        """The model saved in a folder or published under a name, in the layout of the state-spaces/* checkpoints.

        Args:
            pretrained_model_name: the folder, or the name on the Hugging Face hub.
            device, dtype: of the parameters. A_log, D and the biases of step sizes stay float32.
            kwargs: of the constructor.
        """
        config = MambaConfig(**load_config_hf(pretrained_model_name))
        tensors = load_state_dict_hf(pretrained_model_name)
        with torch.device("meta"):  # neither memory nor time for values that are replaced
            model = cls(config, dtype=dtype, **kwargs)
        if config.tie_embeddings:
            tensors.setdefault("lm_head.weight", tensors["backbone.embedding.weight"])
        expected = model.state_dict()
        tensors = {k: t.to(expected[k].dtype) if k in expected else t for k, t in tensors.items()}
        model.load_state_dict(tensors, assign=True)
        model.tie_weights()
        for module in model.modules():
            if isinstance(module, CachedMixer):
                module.mark_parameters()
        return model.to(device or "cpu")

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes config.json and pytorch_model.bin, as the published checkpoints have them."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / "pytorch_model.bin"
        partial_file = weights.with_name(PARTIAL + weights.name)
        torch.save(self.state_dict(), partial_file)
        rename_whole(partial_file, weights)
        write_whole(folder / "config.json", json.dumps(asdict(self.config), indent=4))
