"""Which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def decaying(model: nn.Module) -> list[str]:
    """Names of the parameters that take weight decay, as in the papers: matrices, embeddings and convolutions.

    The rest takes none: norms and biases, which have one axis, and what governs a recurrence, the `ssm_parameters` of
    its module. Decay would pull A_log to 0 and so every time scale to the same one.
    """
    spared = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in getattr(module, "ssm_parameters", ())
    }
    return [name for name, parameter in model.named_parameters() if parameter.ndim > 1 and name not in spared]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """For a torch optimizer: the parameters that decay, then those that do not."""
    decay = set(decaying(model))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in trained if name in decay], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decay], "weight_decay": 0.0},
    ]
