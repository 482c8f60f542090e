"""Train a language model on text, in a folder of its own.

ophis train book.txt --out runs/book              a small Mamba-2 on bytes
ophis train --out runs/book --resume              go on after Ctrl-C, a crash, a power cut
ophis generate runs/book --prompt "Chapter 1"     at any time after the first checkpoint
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ophis.cli.errors import UserError, user_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ophis.models import LanguageModel
    from ophis.training import Data, Documents, Recipe, RunFolder

# Options by what they are for, under the names that model_config and Recipe have for them.
MODEL = ("preset", "pattern", "hidden_size", "layers")
RECIPE = (
    "steps", "batch_size", "accumulate", "length", "learning_rate", "precision", "evaluate_every", "save_every", "seed",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # No defaults here: what is not given is the recipe's or, with --resume, what the run began with.
    parser.add_argument("text", metavar="PATH", nargs="?", help="a text file, or a folder of them (UTF-8)")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where the model and its checkpoints go")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the folder's last checkpoint")
    again.add_argument("--overwrite", action="store_true", help="discard the run that the folder holds")
    model = parser.add_argument_group("model")
    model.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json of the tokenizers library (default: bytes)")
    model.add_argument("--preset", metavar="NAME", help="a published size: mamba2-130m (default: a small Mamba-2)")
    model.add_argument("--pattern", metavar="A,B", type=names, help="mixers of the blocks, repeated: mamba2,attention")
    model.add_argument("--hidden-size", metavar="N", type=int, help="width of the residual stream")
    model.add_argument("--layers", metavar="N", type=int, help="number of blocks")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--steps", metavar="N", type=int, help="(default: 1000)")
    recipe.add_argument("--batch-size", metavar="N", type=int, help="sequences at a time (default: 4)")
    recipe.add_argument("--accumulate", metavar="N", type=int, help="such batches a step (default: 1)")
    recipe.add_argument("--length", metavar="N", type=int, help="tokens a sequence (default: 256)")
    recipe.add_argument("--learning-rate", metavar="X", type=float, help="the highest (default: 0.003)")
    recipe.add_argument(
        "--precision", choices=("float32", "bfloat16"), help="(default: bfloat16 on a GPU that has it, else float32)"
    )
    recipe.add_argument("--evaluate-every", metavar="N", type=int, help="steps between measurements (default: 100)")
    recipe.add_argument("--save-every", metavar="N", type=int, help="steps between checkpoints (default: 100)")
    recipe.add_argument("--seed", metavar="N", type=int, help="(default: 0)")


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def run(arguments: argparse.Namespace) -> int:
    if arguments.text is None and not arguments.resume:
        raise UserError("which text? Say: ophis train PATH --out FOLDER")
    # Threads that wait for each other without sleeping lose most of their time on cores shared with another program: a
    # step took 2.7 s so and 0.27 s like this, and on idle cores the same either way. Read as PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with user_errors():
        from ophis.training import RunFolder, require_extra, train

        require_extra()
        folder = RunFolder(arguments.out)
        settings = old_settings(arguments, folder) if arguments.resume else new_settings(arguments, folder)
        ready = prepare(settings, folder, resume=arguments.resume)
    from torch import OutOfMemoryError

    from ophis.training.progress import duration, progress

    recipe = ready.recipe
    if arguments.resume and folder.steps_saved()[-1:] == [recipe.steps]:
        say(f"The run in {folder.path} is finished: {recipe.steps} steps of {recipe.steps}.")
        return 0
    describe(ready, folder)
    shown = progress(tokens_per_step(recipe), ready.data.bits_per_byte)
    callbacks = [shown] if is_main_process() else []
    try:
        result = train(
            ready.model, ready.tokenizer, ready.data, recipe, folder, resume=arguments.resume, callbacks=callbacks
        )
    except FloatingPointError as error:
        raise UserError(f"{error}. {last_checkpoint(folder)}") from error
    except OutOfMemoryError as error:
        raise UserError(f"{error}. Try a smaller --batch-size, and --accumulate to make up for it") from error
    except KeyboardInterrupt:
        result = None
    finally:
        shown.close()
    if result is None or not result.finished:
        say(f"Stopped. {last_checkpoint(folder)} Go on by: ophis train --out {folder.path} --resume")
        return 130
    loss = result.held_out_loss or math.nan
    bits = ready.data.bits_per_byte(loss)
    say(f"Done in {duration(result.seconds)}. Held out: {loss:.3f} nats per token, {bits:.3f} bits per byte.")
    say(f"Now: ophis generate {folder.path}")
    return 0


class Ready(NamedTuple):
    documents: Documents
    tokenizer: PreTrainedTokenizerFast
    data: Data
    model: LanguageModel
    recipe: Recipe


def new_settings(arguments: argparse.Namespace, folder: RunFolder) -> dict[str, Any]:
    """What run.json keeps of the command line, nothing left open."""
    import torch

    if is_main_process() and not arguments.overwrite:
        folder.check_free()
    settings = given(arguments)
    if "precision" not in settings["recipe"] and torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        settings["recipe"]["precision"] = "bfloat16"
    return settings


def old_settings(arguments: argparse.Namespace, folder: RunFolder) -> dict[str, Any]:
    """Those the run began with. Repeating them is no error, contradicting them is."""
    settings, now = folder.record()["arguments"], given(arguments)
    for kind in ("model", "recipe"):
        for name, value in now[kind].items():
            before = settings[kind].get(name)
            if value != before:
                option = "--" + name.replace("_", "-")
                raise UserError(f"{option} is {value}, but the run in {folder.path} began with {before}; leave it out")
    if now["processes"] != settings["processes"]:  # they share out the sequences, so the order would be another
        began = plural(settings["processes"], "process", "es")
        raise UserError(f"the run in {folder.path} began with {began} and can only go on so")
    return {**settings, "text": now["text"] or settings["text"]}  # the text may have moved; it is compared later


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    def chosen(options: tuple[str, ...]) -> dict[str, Any]:
        return {name: value for name in options if (value := getattr(arguments, name)) is not None}

    text = None if arguments.text is None else str(Path(arguments.text).resolve())
    return {
        "text": text,
        "tokenizer": arguments.tokenizer,
        "model": chosen(MODEL),
        "recipe": chosen(RECIPE),
        "processes": processes(),
    }


def prepare(settings: dict[str, Any], folder: RunFolder, *, resume: bool) -> Ready:
    """Reads the text and makes the model; the folder is touched last, when nothing is wrong."""
    import torch

    from ophis.generation import load_tokenizer
    from ophis.models import LanguageModel, LanguageModelConfig
    from ophis.training import Data, Recipe, byte_tokenizer, model_config, read_documents, read_tokenizer

    recipe = Recipe(**settings["recipe"])
    documents = read_documents(settings["text"], leave_out=folder.path)
    if resume:
        tokenizer = load_tokenizer(folder.path)
        config = LanguageModelConfig.from_pretrained(folder.path)
    else:
        tokenizer = read_tokenizer(settings["tokenizer"]) if settings["tokenizer"] else byte_tokenizer()
        config = model_config(tokenizer, **settings["model"])
    data = Data.of(documents.texts, tokenizer, length=recipe.length, held_out=recipe.held_out)
    torch.manual_seed(recipe.seed)
    ready = Ready(documents, tokenizer, data, LanguageModel(config), recipe)
    if resume and data.fingerprint != folder.record()["data"]["fingerprint"]:
        raise UserError(f"the text in {settings['text']} is not what the run in {folder.path} began with")
    if is_main_process():
        if resume:
            folder.recover()
        else:
            folder.begin(ready.model, tokenizer, record(ready, settings))
    return ready


def record(ready: Ready, settings: dict[str, Any]) -> dict[str, Any]:
    """What run.json holds."""
    import platform

    import torch
    import transformers

    from ophis import __version__

    train, held_out = ready.data
    return {
        "arguments": {**settings, "recipe": asdict(ready.recipe)},
        "data": {
            "documents": len(ready.documents.texts),
            "skipped_files": ready.documents.skipped,
            "tokens": len(train.stream.ids),
            "held_out_tokens": len(held_out.stream.ids),
            "fingerprint": ready.data.fingerprint,
        },
        "parameters": ready.model.num_parameters(),
        "versions": {
            "ophis": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def describe(ready: Ready, folder: RunFolder) -> None:
    import torch

    documents, recipe, config = ready.documents, ready.recipe, ready.model.config
    train, held_out = (len(sequences.stream.ids) for sequences in ready.data)
    skipped = f"; {plural(documents.skipped, 'file')} skipped, not UTF-8 text" if documents.skipped else ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    tokens = tokens_per_step(recipe)
    mixers = " ".join(config.pattern)
    parameters = f"{ready.model.num_parameters() / 1e6:,.2f} million parameters"
    saved = folder.steps_saved()
    say(f"text    {plural(len(documents.texts), 'document')}, {train:,} tokens, and {held_out:,} held out{skipped}")
    say(f"model   {parameters}: {config.num_hidden_layers} layers of {mixers}, width {config.hidden_size}")
    say(f"run     {recipe.steps:,} steps of {tokens:,} tokens, {recipe.steps * tokens / train:.1f} times the text")
    say(f"        {recipe.precision} on {device}; into {folder.path}")
    if saved:
        say(f"        from step {saved[-1]} on")


def last_checkpoint(folder: RunFolder) -> str:
    last = folder.last_checkpoint()
    return f"The last checkpoint is {last}." if last else "Nothing was saved yet."


def tokens_per_step(recipe: Recipe) -> int:
    return recipe.batch_size * recipe.accumulate * recipe.length * processes()


def processes() -> int:
    """How many torchrun started, each with a GPU of its own."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Of those that torchrun starts, the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    if is_main_process():
        print(line, flush=True)


def plural(count: int, noun: str, ending: str = "s") -> str:
    return f"{count:,} {noun}{'' if count == 1 else ending}"
