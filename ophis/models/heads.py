"""Models that make one thing of a text: a class, or a vector.   b batch  l length  s sequences"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import ModelOutput, can_return_tuple

from ophis.models.config import LanguageModelConfig
from ophis.models.language import LanguageBackbone, LanguageModelBase, batch_shape
from ophis.models.packing import Packing


class PooledModel(LanguageModelBase):
    """A backbone whose output is pooled, over each row or, where several texts are packed in a row, over each text."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__(config)
        self.backbone = LanguageBackbone(config)

    def pooled(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        arguments: Mapping[str, Any],
    ) -> Tensor:
        """(b, hidden_size), or (s, hidden_size) of packed texts."""
        packing = Packing.of(*batch_shape(input_ids, inputs_embeds), attention_mask, arguments)
        outputs = self.backbone(
            input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=False, packing=packing, return_dict=True
        )
        return pool(outputs.last_hidden_state, packing, self.config.pooling)


class LanguageModelForSequenceClassification(PooledModel):
    """Scores of classes, or with `num_labels=1` a number, from the pooled output by one matrix.

    model = LanguageModelForSequenceClassification.from_pretrained("a/saved/language/model", num_labels=3)
    """

    accepts_loss_kwargs = False  # the loss is a mean over texts: `Trainer` divides it by a step's parts itself

    def __init__(self, config: LanguageModelConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment] (never None once the config is made)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **arguments: Any,
    ) -> SequenceClassifierOutput:
        """Logits (b, num_labels); (s, num_labels) of packed texts.

        Args:
            input_ids, attention_mask, inputs_embeds, **arguments: as for `LanguageBackbone.forward`. Without a mask
                nothing is padding.
            labels: a class for each text, (b,) integers; numbers where num_labels is 1; (b, num_labels) of 0 and 1
                where any may hold. `config.problem_type` says which, by transformers' names; without it the labels do.
        """
        logits = self.score(self.pooled(input_ids, attention_mask, inputs_embeds, arguments))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@dataclass
class EmbeddingOutput(ModelOutput):
    embeddings: Tensor | None = None  # (b, hidden_size), or (s, hidden_size) of packed texts


class LanguageModelForEmbedding(PooledModel):
    """A vector for each text: the output at its last token or the mean over all, as `config.pooling` says.

    model = LanguageModelForEmbedding.from_pretrained("a/saved/language/model", pooling="mean")
    vectors = model(**tokenizer(texts, padding=True, return_tensors="pt")).embeddings
    """

    def __init__(self, config: LanguageModelConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **arguments: Any,
    ) -> EmbeddingOutput:
        """Embeddings (b, hidden_size), of no particular length. Arguments as for `LanguageBackbone.forward`."""
        return EmbeddingOutput(self.pooled(input_ids, attention_mask, inputs_embeds, arguments))


def pool(hidden: Tensor, packing: Packing | None, pooling: str) -> Tensor:
    """Hidden states (b, l, d) -> (b, d): "last" or "mean" of each sequence's real positions; zeros for none."""
    if packing is None:
        return hidden[:, -1] if pooling == "last" else hidden.float().mean(1).to(hidden.dtype)
    hidden = packing.pack(hidden)[0]
    offsets = packing.cu_seqlens.to(hidden.device).long()
    lengths = offsets.diff()[:, None]
    if pooling == "last":
        return hidden[(offsets[1:] - 1).clamp(min=0)] * (lengths > 0)
    rows = torch.arange(packing.sequences, device=hidden.device)
    sequence = rows.repeat_interleave(lengths.squeeze(1), output_size=len(hidden))
    sums = hidden.new_zeros(packing.sequences, hidden.shape[1], dtype=torch.float32)
    return (sums.index_add(0, sequence, hidden.float()) / lengths.clamp(min=1)).to(hidden.dtype)
