"""The command line: `ophis COMMAND`. One file a command; what it imports, it imports when it runs.

A command's module has a docstring, whose first line is its help, `add_arguments(parser)`, and `run(arguments)`, which
returns the exit code or raises `UserError`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ophis import __version__
from ophis.cli.errors import UserError

# To add a command: a module in this folder, and its name here.
COMMANDS = ("train", "generate", "convert", "evaluate", "info", "bench")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ophis: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command: 0 if all went well, 2 if the user has to change something, 130 after Ctrl-C."""
    try:
        commands = parser()
        arguments, rest = commands.parse_known_args(argv)
        if rest and not hasattr(arguments, "rest"):  # a command that hands arguments on has that default
            commands.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            arguments.rest = rest
        return arguments.run(arguments)
    except UserError as error:
        print(f"ophis: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` perhaps, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> Parser:
    top = Parser(
        prog="ophis", description="State-space sequence models: train them, let them write, take them elsewhere."
    )
    top.add_argument("--version", action="version", version=f"ophis {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        description = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=description.partition("\n")[0].rstrip("."),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top
