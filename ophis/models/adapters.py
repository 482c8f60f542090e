"""What PEFT adapts when it is not told: `LoraConfig()` without target_modules."""

from __future__ import annotations

import sys

# Every projection of every layer, as QLoRA has it. A model lacks some of them, and PEFT takes those that it finds.
# The short convolution has four weights a channel, less than an adapter of rank 4 would: `modules_to_save=["conv1d"]`
# trains it whole.
ADAPTER_TARGETS = ("in_proj", "x_proj", "dt_proj", "out_proj", "fc1", "fc2", "output_linear")

_TABLES = (
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING",
)


def register_adapter_targets() -> None:
    """Enters them into PEFT's tables of defaults, if PEFT was imported. What is there already stays."""
    constants = sys.modules.get("peft.utils.constants")
    for name in _TABLES:
        table = getattr(constants, name, None)
        if table is not None:
            table.setdefault("ophis", list(ADAPTER_TARGETS))
