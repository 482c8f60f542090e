"""What happens beside the steps of transformers' Trainer: checkpoints, the loss curve, an end on request."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from ophis.training.run_folder import RunFolder


class Publish(TrainerCallback):
    """Trainer wrote a checkpoint into `folder.unfinished`; give it its name once every process is through."""

    def __init__(self, folder: RunFolder, keep: int):
        self.folder, self.keep = folder, keep

    def on_save(self, args, state, control, **kwargs):
        everyone = PartialState()
        everyone.wait_for_everyone()
        if state.is_world_process_zero:
            step = state.global_step
            self.folder.publish(self.folder.unfinished / f"checkpoint-{step}", step, self.keep)
        everyone.wait_for_everyone()


class LossCurve(TrainerCallback):
    """Writes losses.csv, a row for each mean loss of the last steps and for each measurement on the held-out text.

    Trainer keeps the rows in its state, and so in the checkpoints: a run that goes on rewrites the file from there.
    """

    COLUMNS = ("step", "tokens", "learning_rate", "loss", "held_out_loss", "bits_per_byte")

    def __init__(self, path: Path, tokens_per_step: int, bits_per_byte: Callable[[float], float]):
        self.path, self.tokens_per_step, self.bits_per_byte = path, tokens_per_step, bits_per_byte

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with self.path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(self.COLUMNS)
                writer.writerows(row for logs in state.log_history if (row := self.row(logs)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        row = self.row(state.log_history[-1])
        if state.is_world_process_zero and row:
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerow(row)

    def row(self, logs: dict[str, Any]) -> list[Any]:
        position = [logs["step"], logs["step"] * self.tokens_per_step]
        if "loss" in logs:
            return [*position, logs["learning_rate"], logs["loss"], "", ""]
        if "eval_loss" in logs:
            return [*position, "", "", logs["eval_loss"], self.bits_per_byte(logs["eval_loss"])]
        return []  # Trainer's summary


class StopAtNonsense(TrainerCallback):
    """A loss that is not a number will not become one again; the last checkpoint is from before it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(
                f"the loss is {logs['loss']} after step {state.global_step}; a lower learning rate or a longer warm-up "
                "may help"
            )


class Ending(TrainerCallback):
    """The last step is measured and saved whatever the intervals, and a step after which to stop is saved."""

    def __init__(self):
        self.asked = False

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step >= state.max_steps
        if last or self.asked:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = last
        if control.should_save:  # a mean loss is of steps since the one before: none is to begin before a checkpoint
            control.should_log = True

    @contextlib.contextmanager
    def on_interrupt(self) -> Iterator[None]:
        """Within it, the first Ctrl-C asks for an end after the step under way; the second interrupts at once."""
        if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
            yield
            return

        def ask(number, frame):
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            # Not print: a signal may arrive in the middle of one, and the stream's lock is not for two.
            os.write(2, b"\nStopping after this step; Ctrl-C again stops at once.\n")

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
