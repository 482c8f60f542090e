"""One run of training, from a model and its data to a folder."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from ophis.models import LanguageModel
from ophis.training.data import Data
from ophis.training.recipe import Recipe
from ophis.training.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Result(NamedTuple):
    step: int  # the last one
    finished: bool  # False: stopped by Ctrl-C, and saved
    held_out_loss: float | None  # nats per token, the last measured
    seconds: float


def require_extra() -> None:
    """Raises ImportError, saying what to install, where training cannot run."""
    missing = [name for name in ("accelerate", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"training needs {' and '.join(missing)}: pip install 'ophis[train]'")


def train(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    data: Data,
    recipe: Recipe,
    folder: RunFolder,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Result:
    """Trains the model and leaves it in the folder, from where `ophis.load` reads it at any time after the first save.

    Ctrl-C ends it after the step under way, saved; a second one at once, which leaves the checkpoint before.

    Args:
        model: a new one; with `resume`, its weights are replaced by the checkpoint's.
        tokenizer: saved with it.
        data: of that tokenizer.
        recipe: the numbers of the run.
        folder: where `folder.begin` was called, now or, with `resume`, when the run began.
        resume: go on from the last complete checkpoint, with the sequences and the random numbers that would have come
            next; from the start if there is none.
        callbacks: of transformers' Trainer; `ophis.training.progress` has two that show how far it is.
    """
    require_extra()
    from ophis.training.trainer import Trainer

    trainer = Trainer(model, tokenizer, data, recipe, folder, callbacks)
    last = folder.last_checkpoint() if resume else None
    start = time.perf_counter()
    with trainer.ending.on_interrupt(), no_progress_bars():
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.is_world_process_zero():
        folder.clean()
    trainer.accelerator.end_training()
    measured = [logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs]
    return Result(
        step=trainer.state.global_step,
        finished=trainer.state.global_step >= recipe.steps,
        held_out_loss=measured[-1] if measured else None,
        seconds=time.perf_counter() - start,
    )


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers shows one for every file it writes."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
