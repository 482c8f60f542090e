"""Let a trained model write.

The model is a folder of `ophis train`, any saved Mamba with its tokenizer, or a name on the Hugging Face hub. The text
is printed as it is decoded, after the prompt. Without --prompt or --prompt-file, the prompt is read from standard
input, unless that is a terminal; after an empty one, a text is begun.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ophis.cli.errors import UserError, user_errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="FOLDER", help="the model: config.json, model.safetensors, tokenizer.json; or its name"
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="a tokenizer from elsewhere, where the model has none")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="how the text begins")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file with that; one line end at its end is dropped")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most so many (default: 256)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0: always the likeliest token; 1: as likely as the model says (default: 0.8)",
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens that make up P (default: 1)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")


def run(arguments: argparse.Namespace) -> int:
    with user_errors():
        prompt = read_prompt(arguments)
    # As in train.py; but a token is hundreds of short operations, and threads that sleep at once wake too late for them
    # (90 tokens a second, where these wait for some 50 us first and make 300).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    import torch

    from ophis.generation import generate_text, load_tokenizer
    from ophis.models import load

    with user_errors():
        model = load(arguments.folder, device="cuda" if torch.cuda.is_available() else None)
        tokenizer = load_tokenizer(arguments.tokenizer or arguments.folder)
    written = prompt
    write(prompt)

    def go_on(text: str) -> None:
        nonlocal written
        written += text
        write(text)

    try:
        with user_errors():
            generate_text(
                model,
                tokenizer,
                prompt,
                max_new_tokens=arguments.max_new_tokens,
                temperature=arguments.temperature,
                top_p=arguments.top_p,
                seed=arguments.seed,
                write=go_on,
            )
    finally:
        if written and not written.endswith("\n"):
            write("\n")
    return 0


def read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        return arguments.prompt
    if arguments.prompt_file is not None:
        return text_of(Path(arguments.prompt_file).read_bytes(), arguments.prompt_file)
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    return text_of(sys.stdin.buffer.read(), "standard input")


def text_of(data: bytes, source: str) -> str:
    """Without the line end at its end: every editor and `echo` puts one there, and few prompts mean it."""
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text: {error}") from error


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
