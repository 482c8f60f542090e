"""How far a run is: a bar in a terminal, lines in a file."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from transformers import TrainerCallback


class Progress(TrainerCallback):
    """What there is to tell, and when; the classes below show it.

    Args:
        tokens_per_step: for the speed.
        bits_per_byte: from nats per token.
    """

    def __init__(self, tokens_per_step: int, bits_per_byte: Callable[[float], float]):
        self.tokens_per_step, self.bits_per_byte = tokens_per_step, bits_per_byte
        self.seconds: deque[float] = deque(maxlen=20)  # of the last steps
        self.step_began = 0.0
        self.loss: float | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.step_began)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if "loss" in logs:
            self.loss = logs["loss"]
            if not control.should_evaluate:  # else the same step is told again, measured
                self.tell(state, None)
        elif "eval_loss" in logs:
            self.tell(state, logs["eval_loss"])

    def tell(self, state, held_out: float | None) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Leaves the screen as it should be; also after an error."""

    def losses(self, state, held_out: float | None) -> str:
        width = len(str(state.max_steps))
        text = f"step {state.global_step:{width}}/{state.max_steps}"
        if self.loss is not None:
            text += f"   loss {self.loss:.3f}"
        if held_out is not None:
            text += f"   held out {held_out:.3f} ({self.bits_per_byte(held_out):.3f} bits/byte)"
        return text

    def pace(self, state) -> str:
        if not self.seconds:
            return ""
        seconds = sum(self.seconds) / len(self.seconds)
        left = duration((state.max_steps - state.global_step) * seconds)
        return f"   {self.tokens_per_step / seconds:,.0f} tokens/s   {left} left"


class Lines(Progress):
    """A line at each measurement, and between them one when the last is ten seconds old."""

    told = 0.0

    def tell(self, state, held_out: float | None) -> None:
        now = time.perf_counter()
        if held_out is not None or now - self.told > 10:
            self.told = now
            print(self.losses(state, held_out) + self.pace(state), flush=True)


class Bar(Progress):
    """A bar with the last loss, below a line for each measurement."""

    bar: RichProgress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = RichProgress(
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=Console(highlight=False),
            transient=True,
            refresh_per_second=4,
        )
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        loss = "" if self.loss is None else f"  loss {self.loss:.3f}"
        assert self.bar is not None
        self.bar.update(self.task, completed=state.global_step, description=loss + self.pace(state))

    def tell(self, state, held_out: float | None) -> None:
        if held_out is not None and self.bar is not None:
            self.bar.console.print(self.losses(state, held_out))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def progress(tokens_per_step: int, bits_per_byte: Callable[[float], float]) -> Progress:
    """The kind that suits standard output."""
    return (Bar if sys.stdout.isatty() else Lines)(tokens_per_step, bits_per_byte)


def duration(seconds: float) -> str:
    """minutes:seconds, or hours:minutes:seconds."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
