"""The language model: embedding, blocks, final norm, head.   b batch  l length  v vocabulary"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ophis.layers import GatedRMSNorm, RMSNorm
from ophis.layers.mamba import StepProjection
from ophis.layers.ssm_parameters import SSMParameters
from ophis.models import backbone
from ophis.models.config import LanguageModelConfig
from ophis.models.generating import StatefulGeneration
from ophis.models.official_format import NAMES
from ophis.models.packing import Packing
from ophis.models.state import CACHE, ModelState, fingerprint


class LanguageModelBase(PreTrainedModel):
    """What the backbone and the models with heads share: the configuration's class and the initial values."""

    config: LanguageModelConfig
    config_class = LanguageModelConfig
    base_model_prefix = "backbone"
    _input_embed_layer = "embeddings"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' protocol)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 (each layer's state is where the layer is)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.config.vocab_size % self.config.pad_vocab_size_multiple:  # a saved config rounds up to it
            self.config.pad_vocab_size_multiple = 1
        return embeddings

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args: Any, **kwargs: Any):
        """transformers' own, for each of the folders that `ophis.load` reads: the configuration sees to their keys."""
        renamed = {f"^{re.escape(theirs)}$": ours for theirs, ours in NAMES.items()}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **{"key_mapping": renamed, **kwargs})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if "key_mapping" not in kwargs and getattr(model, "hf_quantizer", None) is None:
            # Or `save_pretrained` would give tensors their official names back.
            model._weight_conversions = None  # type: ignore[assignment]
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The published initial values, module by module. Parameters that transformers loaded keep their values.

        Within its initialisation transformers lets `nn.init` pass those over; other writes have to.
        """
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, StepProjection):
            pass  # its Mamba layer's
        elif isinstance(module, SSMParameters):
            loaded = {p: p.clone() for p in module.parameters() if getattr(p, "_is_hf_initialized", False)}
            module.reset_ssm_parameters()
            for parameter, value in loaded.items():
                parameter.copy_(value)
        elif isinstance(module, nn.Linear):
            bound = getattr(module, "residual_scale", 1.0) * module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm | GatedRMSNorm | nn.Conv1d):
            module.reset_parameters()


class LanguageBackbone(LanguageModelBase):
    """Embedding, blocks and final norm, under transformers' names."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = backbone.blocks(config)
        self.norm_f = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: ModelState | None = None,
        cache: ModelState | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        packing: Packing | None = None,
        **arguments: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (b, l, hidden_size) after the final norm, and the state after the last position.

        Args:
            input_ids: (b, l) integers; or inputs_embeds: (b, l, hidden_size).
            attention_mask: (b, l), or (b, past + l), zero at padding. A padded batch runs as packed sequences, so
                padding, on either side, is neither computed nor seen.
            past_key_values: the state to go on from; or cache, as newer transformers call it.
            use_cache: whether the state is returned; by default as configured, outside training.
            output_hidden_states: also return every block's input, and the final output.
            packing: mask and arguments as `Packing.of` reads them, for callers that need them read themselves.
            **arguments: sequences packed in a row, as cu_seqlens, seq_idx, position_ids or under the names of
                transformers' collators (`PackingArguments`); states then have one row a sequence.
        """
        shape = batch_shape(input_ids, inputs_embeds)
        past = ModelState.of(past_key_values, cache)
        if packing is None:
            packing = Packing.of(*shape, attention_mask, arguments, continued=past.layers is not None)
        x = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        cu_seqlens = None
        if packing is not None:
            x, cu_seqlens = packing.pack(x), packing.cu_seqlens
        call = self._gradient_checkpointing_func if self.gradient_checkpointing and self.training else None
        inputs: list[Tensor] | None = [] if output_hidden_states else None
        x, states = backbone.run(self.layers, x, past.layers, cu_seqlens=cu_seqlens, call=call, outputs=inputs)
        x, _ = self.norm_f(x)
        hidden = None if inputs is None else (*inputs, x)
        if packing is not None:
            x = packing.unpack(x)
            hidden = None if hidden is None else tuple(map(packing.unpack, hidden))
        keep = use_cache if use_cache is not None else (self.config.use_cache and not self.training)
        after = None
        if keep and packing is not None and packing.documents:
            after = ModelState(states)  # of many texts, each with a length of its own
        elif keep:
            known = None
            if input_ids is not None and (past.fingerprint is not None or not past.length):
                known = fingerprint(input_ids, past.fingerprint)
            after = ModelState(states, past.length + shape[1], known)
        state: dict[str, Any] = {CACHE: after}
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden, **state)

    def _embed(self, input_ids: Tensor | None) -> Tensor:
        assert input_ids is not None
        # nn.Embedding's own message names neither the id nor the size; on a GPU the check would wait for it.
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling() and input_ids.numel():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"LanguageModel: token ids run from {low} to {high}, expected 0 to {self.config.vocab_size - 1}; "
                    "is this the tokenizer of this model?"
                )
        return self.embeddings(input_ids)


class LanguageModel(LanguageModelBase, StatefulGeneration, GenerationMixin):  # transformers looks for its own mixin
    """A causal language model of any pattern of layers.

        config = LanguageModelConfig(hidden_size=256, num_hidden_layers=8, pattern=["mamba2"] * 3 + ["attention"],
                                     attention={"num_heads": 4}, vocab_size=272)
        model = LanguageModel(config)
        logits = model(input_ids).logits

    It is a model of transformers: `generate`, `save_pretrained`, `from_pretrained`, `Trainer`.
    """

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012 (transformers' protocol)

    def __init__(self, config: LanguageModelConfig):
        super().__init__(config)
        self.backbone = LanguageBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # transformers would look for it in the class's name
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: ModelState | None = None,
        cache: ModelState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **arguments: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (b, l, vocab_size), and the state after the last position.

        Args:
            labels: (b, l), -100 where there is no loss; the shift by one happens here. The loss is the mean
                cross-entropy in nats, of tokens that follow another of their own sequence.
            logits_to_keep: logits of the last so many positions only; 0 for all.
            num_items_in_batch: divide the sum of the losses by this instead of by their number, as `Trainer` does
                where a step's batch comes in parts.
            The others: as for `LanguageBackbone.forward`.
        """
        shape, past = batch_shape(input_ids, inputs_embeds), ModelState.of(past_key_values, cache)
        packing = Packing.of(*shape, attention_mask, arguments, continued=past.layers is not None)
        outputs = self.backbone(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            packing=packing,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels if packing is None else packing.mask_labels(labels),
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )


def batch_shape(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    """(b, l) of whichever is given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("LanguageModel: give either input_ids or inputs_embeds")
    if inputs_embeds is not None:
        return inputs_embeds.shape[0], inputs_embeds.shape[1]
    assert input_ids is not None
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"LanguageModel: input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}, expected "
            "integers of shape (batch, length)"
        )
    return input_ids.shape[0], input_ids.shape[1]
