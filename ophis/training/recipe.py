"""How a model is trained, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The optimiser and its schedule are those of the Mamba papers (Gu and Dao 2023, appendix E.2).

    AdamW; the learning rate climbs linearly to `learning_rate` and falls as a cosine to `final_learning_rate`; the norm
    of the gradients is clipped. A step sees batch_size x accumulate sequences of `length` tokens, on each device.
    """

    steps: int = 1000
    batch_size: int = 4
    accumulate: int = 1  # batches a step, where the memory has no room for all sequences at once
    length: int = 256
    learning_rate: float = 3e-3
    final_learning_rate: float = 1e-5
    warmup: float = 0.1  # of the steps
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    precision: str = "float32"  # "bfloat16": automatic mixed precision; the parameters stay float32
    held_out: float = 0.05  # of the text
    log_every: int = 10  # steps; so are the next two
    evaluate_every: int = 100
    save_every: int = 100
    keep: int = 2  # checkpoints
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "evaluate_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.length < 2:
            raise ValueError(f"length is {self.length}, expected at least 2: the first token is not predicted")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, expected more than 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}, expected a part of the steps: 0 to 1")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision is {self.precision!r}, expected 'float32' or 'bfloat16'")
