"""Ophis: state-space sequence models on any machine, without a build step.

ophis.ops                       operators on tensors
ophis.layers                    Mamba, Mamba2, ... as nn.Modules
ophis.LanguageModel, ...        language models, loading, converting; transformers is imported when first used
ophis.accelerate_transformers   transformers' own Mamba family on ophis.ops
ophis.compat                    the names of mamba_ssm and causal_conv1d, where code asks for them
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public names and where they live; imported at first use, so that `import ophis` costs nothing.
_NAMES = {
    "compat": "ophis.compat",
    "ops": "ophis.ops",
    "layers": "ophis.layers",
    "models": "ophis.models",
    "use_backend": "ophis.ops",
    "LanguageModel": "ophis.models",
    "LanguageModelConfig": "ophis.models",
    "ModelState": "ophis.models",
    "convert": "ophis.models",
    "load": "ophis.models",
    "preset": "ophis.models",
    "accelerate_transformers": "ophis.integrations.transformers",
}

if TYPE_CHECKING:
    from ophis import compat, layers, models, ops
    from ophis.integrations.transformers import accelerate_transformers
    from ophis.models import LanguageModel, LanguageModelConfig, ModelState, convert, load, preset
    from ophis.ops import use_backend

__all__ = [
    "LanguageModel",
    "LanguageModelConfig",
    "ModelState",
    "accelerate_transformers",
    "compat",
    "convert",
    "layers",
    "load",
    "models",
    "ops",
    "preset",
    "use_backend",
]


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module 'ophis' has no attribute {name!r}; it has {', '.join(sorted(_NAMES))}")
    module = importlib.import_module(_NAMES[name])
    return module if _NAMES[name] == f"ophis.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *_NAMES]
