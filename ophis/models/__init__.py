"""Models on transformers' classes: the language model, its presets, and the reading of saved folders."""

from ophis.models.config import LanguageModelConfig
from ophis.models.language import LanguageModel
from ophis.models.loading import load
from ophis.models.presets import PRESETS, preset
from ophis.models.state import ModelState

__all__ = ["PRESETS", "LanguageModel", "LanguageModelConfig", "ModelState", "load", "preset"]
