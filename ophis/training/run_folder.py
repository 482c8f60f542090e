"""A run's folder: what is in it, and the order in which it is written.

FOLDER/
    config.json, tokenizer.json, ...    the model's, written before the first step
    model.safetensors                   the latest weights; replaced in one step, so that the folder always loads
    run.json                            what the run was asked for, on which text, with which versions
    losses.csv                          the loss curve
    checkpoints/step-N/                 the model after N steps, and what resuming needs beside it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ophis.files import link_whole, remove_partial, remove_whole, rename_whole, write_whole

_FILES = (
    "run.json",
    "losses.csv",
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "checkpoints",
)


class RunFolder:
    """The folder at `path`, which need not exist yet."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.record_file = self.path / "run.json"
        self.losses_file = self.path / "losses.csv"
        self.checkpoints = self.path / "checkpoints"
        self.unfinished = self.checkpoints / ".partial-save"  # where a checkpoint is written before it has its name

    def check_free(self) -> None:
        """Raises FileExistsError where a new run would overwrite something."""
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is a file, expected a folder")
        if self.record_file.exists():
            raise FileExistsError(
                f"{self.path} already holds a run. Go on with it by --resume, discard it by --overwrite, or choose "
                "another folder"
            )
        taken = [name for name in _FILES if (self.path / name).exists()]
        if taken:
            raise FileExistsError(
                f"{self.path} already holds {', '.join(taken)}. Choose another folder, or discard them by --overwrite"
            )

    def begin(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]) -> None:
        """Makes it the folder of a new run. What an older run left goes; other files stay."""
        for name in _FILES:
            path = self.path / name
            if path.is_dir():
                remove_whole(path)
            else:
                path.unlink(missing_ok=True)
        self.checkpoints.mkdir(parents=True)
        model.config.architectures = [type(model).__name__]  # as `save_pretrained` writes it
        model.config.save_pretrained(self.path)
        tokenizer.save_pretrained(self.path)
        write_whole(self.record_file, json.dumps(record, indent=2) + "\n")

    def record(self) -> dict[str, Any]:
        """What `begin` was given.

        Raises:
            FileNotFoundError: the folder holds no run.
        """
        if not self.record_file.is_file():
            raise FileNotFoundError(f"{self.path} holds no run to go on with (no run.json)")
        return json.loads(self.record_file.read_text(encoding="utf-8"))

    def steps_saved(self) -> list[int]:
        """Of the complete checkpoints, in order."""
        names = [path.name for path in self.checkpoints.glob("step-*")]
        return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdecimal())

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def last_checkpoint(self) -> Path | None:
        steps = self.steps_saved()
        return self.checkpoint(steps[-1]) if steps else None

    def publish(self, written: Path, step: int, keep: int) -> None:
        """A checkpoint that is written becomes the last one, and its weights the folder's; all but `keep` go.

        The weights first: where there is a checkpoint, the folder loads.
        """
        self._show(written)
        rename_whole(written, self.checkpoint(step))
        for old in self.steps_saved()[:-keep]:
            remove_whole(self.checkpoint(old))

    def recover(self) -> None:
        """After a process was killed: what it was writing goes, and the folder's weights are the last checkpoint's."""
        self.clean()
        last = self.last_checkpoint()
        if last is not None:
            self._show(last)

    def clean(self) -> None:
        """Removes what is not whole."""
        remove_partial(self.path)
        remove_partial(self.checkpoints)

    def _show(self, checkpoint: Path) -> None:
        link_whole(checkpoint / "model.safetensors", self.path / "model.safetensors")
