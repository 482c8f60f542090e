"""Models on transformers' classes: the language model, its presets, and saved models in every layout."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from ophis.models.config import LanguageModelConfig
from ophis.models.conversion import convert
from ophis.models.heads import LanguageModelForEmbedding, LanguageModelForSequenceClassification
from ophis.models.language import LanguageBackbone, LanguageModel
from ophis.models.loading import load
from ophis.models.presets import PRESETS, preset
from ophis.models.state import ModelState

__all__ = [
    "PRESETS",
    "LanguageBackbone",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelForEmbedding",
    "LanguageModelForSequenceClassification",
    "ModelState",
    "convert",
    "load",
    "preset",
]

# transformers' Auto classes find a folder's class by its model_type, "ophis".
AutoConfig.register(LanguageModelConfig.model_type, LanguageModelConfig, exist_ok=True)
AutoModel.register(LanguageModelConfig, LanguageBackbone, exist_ok=True)
AutoModelForCausalLM.register(LanguageModelConfig, LanguageModel, exist_ok=True)
AutoModelForSequenceClassification.register(LanguageModelConfig, LanguageModelForSequenceClassification, exist_ok=True)
