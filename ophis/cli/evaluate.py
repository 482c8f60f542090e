"""Measure a model: how well it predicts texts, or its scores in tasks of lm-eval.

ophis evaluate runs/book --text held_out.txt             nats and bits per token and byte, and the perplexity
ophis evaluate runs/book --text book.txt --window 2048   the same in sliding windows, without a carried state
ophis evaluate runs/book --tasks lambada_openai          whatever else is given goes to lm-eval as it is
ophis evaluate runs/book --tasks my_task --include_path folder/with/yaml --batch_size 8 --limit 100

The model comes first. A text is read in one pass, each token given all before it: the state is carried from part to
part. A folder's texts are documents of their own; so are several --text. lm-eval's options are those of `lm_eval run`
(`lm_eval run --help`); they take `pip install 'ophis[evaluate]'`.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import sys
from collections.abc import Callable
from functools import partial, reduce
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from ophis.cli.errors import UserError, user_errors

if TYPE_CHECKING:
    from ophis.evaluation import TextScore
    from ophis.training import Documents

COLUMNS = ("nats_per_token", "bits_per_token", "nats_per_byte", "bits_per_byte", "perplexity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.allow_abbrev = False  # what is not ours is lm-eval's
    parser.set_defaults(rest=[])
    parser.add_argument("model", metavar="MODEL", help="a folder of `ophis train`, or any that ophis.load reads")
    parser.add_argument("--tokenizer", metavar="NAME", help="a folder or name on the hub (default: the model's own)")
    parser.add_argument(
        "--dtype", default="auto", metavar="D", help="float32, bfloat16 or float16 (default: as it is saved)"
    )
    parser.add_argument("--device", metavar="D", help="cuda:1, cpu, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--batch_size", "--batch-size", default="1", metavar="N", help="windows, or requests, at a time (default: 1)"
    )
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--text",
        action="append",
        metavar="PATH",
        help="a text file, or a folder of them (UTF-8); more than once for more",
    )
    texts.add_argument("--window", type=int, metavar="N", help="read in windows of N tokens, each from nothing")
    texts.add_argument("--stride", type=int, metavar="N", help="from one window to the next (default: half of it)")
    parser.add_argument_group("tasks", "--tasks NAME [NAME ...], and every other option of `lm_eval run`")


def run(arguments: argparse.Namespace) -> int:
    if arguments.text and arguments.rest:
        raise UserError(
            f"unrecognized arguments: {' '.join(arguments.rest)} (options of lm-eval are for its tasks, without --text)"
        )
    if arguments.text:
        return run_texts(arguments)
    for option in ("window", "stride"):
        if getattr(arguments, option) is not None:
            raise UserError(f"--{option} is for texts, and none is given; say --text PATH")
    if not arguments.rest:
        raise UserError("what is it to be measured by? Say --text PATH, or --tasks NAME for tasks of lm-eval")
    return run_tasks(arguments)


def run_texts(arguments: argparse.Namespace) -> int:
    if not arguments.batch_size.isdecimal():
        raise UserError(f"--batch_size is {arguments.batch_size!r}, expected the number of windows at a time")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in train.py
    with user_errors():
        from ophis.training import read_documents

        documents = {path: read_documents(path) for path in arguments.text}
    from ophis.evaluation import device_of, dtype_of, score_text, tokenizer_of
    from ophis.models import load

    with user_errors():
        model = load(arguments.model, dtype=dtype_of(arguments.dtype), device=device_of(arguments.device))
        tokenizer = tokenizer_of(arguments.model, arguments.tokenizer)
    score = partial(
        score_text,
        model,
        tokenizer,
        window=arguments.window,
        stride=arguments.stride,
        batch_size=int(arguments.batch_size),
    )
    with user_errors():
        scores = {name_of(path, found): score_all(found.texts, path, score) for path, found in documents.items()}
    if len(scores) > 1:
        scores["total"] = reduce(operator.add, scores.values())
    width = max(map(len, [*scores, "text"]))
    print(f"{'text':{width}}{'tokens':>13}{'bytes':>13}", *(f"{c.replace('_per_', '/'):>11}" for c in COLUMNS))
    for name, found in scores.items():
        values = (f"{getattr(found, column):11.4f}" for column in COLUMNS)
        print(f"{name:{width}}{found.tokens:13,}{found.bytes:13,}", *values)
    return 0


def score_all(texts: list[str], name: str, score: Callable[..., TextScore]) -> TextScore:
    """The sum of all texts' scores, and how far it is: a bar in a terminal, elsewhere a line every ten seconds."""
    from tqdm import tqdm

    sizes = [len(text.encode()) for text in texts]
    pace = 0.1 if sys.stderr.isatty() else 10  # and neither for what takes less than two seconds
    with tqdm(total=sum(sizes), desc=name, unit="B", unit_scale=True, leave=False, mininterval=pace, delay=2) as bar:

        def advance(before: int, size: int, counted: int, tokens: int) -> None:
            bar.update(before + round(counted / tokens * size) - bar.n)

        starts = accumulate(sizes, initial=0)
        return reduce(
            operator.add,
            [
                score(text, progress=partial(advance, before, size))
                for text, size, before in zip(texts, sizes, starts, strict=False)
            ],
        )


def name_of(path: str, found: Documents) -> str:
    if not Path(path).is_dir():
        return path
    skipped = f", {plural(found.skipped, 'file')} skipped, not UTF-8 text" if found.skipped else ""
    return f"{path} ({plural(len(found.texts), 'text')}{skipped})"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def run_tasks(arguments: argparse.Namespace) -> int:
    if any(word.partition("=")[0] in ("--model", "-M") for word in arguments.rest):
        raise UserError("the model is the first argument; leave --model out, or use lm_eval itself")
    with user_errors():
        require_extra()
        import ophis.evaluation.harness  # gives lm-eval the model "ophis"  # noqa: F401
    from lm_eval.__main__ import cli_evaluate

    model = {"pretrained": arguments.model, "tokenizer": arguments.tokenizer, "dtype": arguments.dtype}
    model = {name: value for name, value in model.items() if value is not None}
    command = ["lm_eval", "run", "--model", "ophis", "--model_args", json.dumps(model)]
    command += ["--batch_size", arguments.batch_size]
    command += ["--device", arguments.device] if arguments.device else []
    before, sys.argv = sys.argv, [*command, *arguments.rest]
    try:
        with user_errors():
            cli_evaluate()
    finally:
        sys.argv = before
    return 0


def require_extra() -> None:
    """Raises ImportError, saying what to install, where lm-eval's tasks cannot run."""
    import importlib.util

    missing = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"tasks of lm-eval need {' and '.join(missing)}: pip install 'ophis[evaluate]'")
