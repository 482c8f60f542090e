"""A model of this library for EleutherAI's evaluation harness, under the name "ophis".

Importing this module registers it: `lm_eval.simple_evaluate(model="ophis", model_args="pretrained=runs/first", ...)`.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ophis.evaluation.loading import device_of, dtype_of, tokenizer_of
from ophis.generation import check_vocabulary
from ophis.models import load

# What lm-eval hands on with every model of its Hugging Face class and means nothing here.
UNREAD = {
    "dtype", "trust_remote_code", "gpus", "max_memory_per_gpu", "max_cpu_memory", "offload_folder",
    "quantization_config",
}  # fmt: skip


@register_model("ophis")
class OphisLM(HFLM):
    """lm-eval's model of transformers, with the model and the tokenizer from `ophis.load` and its folder.

    Args:
        pretrained: the model, as for `ophis.load`.
        tokenizer: another folder, or a name on the hub; the one in the model's folder when None.
        dtype: of the parameters, by name; as saved when "auto".
        device: a GPU if there is one when None.
        kwargs: batch_size, max_length (2048 when not given, as lm-eval has it) and whatever else lm-eval's class takes
            that is not about how a model is loaded.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str | torch.dtype | None = "auto",
        device: str | None = None,
        **kwargs: Any,
    ):
        self._dtype = dtype_of(dtype)
        device = device or str(device_of(None))
        super().__init__(pretrained=str(pretrained), backend="causal", device=device, **kwargs)  # type: ignore[call-arg]

    # The three steps in which the class that this one derives from gets ready, in its order.

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        self._model = load(pretrained, dtype=self._dtype, device=self.device)
        self._config = self._model.config

    def _create_tokenizer(self, pretrained: str, tokenizer: str | None, **kwargs: Any) -> None:  # type: ignore[override]
        self.tokenizer = tokenizer_of(pretrained, tokenizer)

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:  # type: ignore[override]
        for name, value in kwargs.items():
            if value and name not in UNREAD and (name, value) != ("revision", "main"):
                raise ValueError(f"the model 'ophis' of lm-eval takes no {name}={value!r}; leave it out of model_args")
        check_vocabulary(self._model, self.tokenizer)  # type: ignore[arg-type]
