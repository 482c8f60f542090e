"""A short name for what a function does: the same for the same code, whatever its comments, types and docstring."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

# What does not run; and what only some versions of Python note.
IGNORED = {"annotation", "returns", "type_params", "type_comment", "ctx", "kind"}


class UnfamiliarError(Exception):
    """A function is not one that this was written for; the message says what was found."""


def fingerprint(function: Callable[..., Any]) -> str:
    """Of a function's source, decorators included. Raises `UnfamiliarError` where that is not installed."""
    definition, _ = definition_of(function)
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:]
    return hashlib.sha256(_described(definition).encode()).hexdigest()[:8]


def definition_of(function: Callable[..., Any]) -> tuple[ast.FunctionDef, int]:
    """A function's syntax tree, and the line of its file where it begins. Raises as `fingerprint`."""
    *_, innermost = wrappings(function)
    try:
        lines, first = inspect.getsourcelines(innermost)
    except OSError:
        raise UnfamiliarError(f"the source of {function.__qualname__} is not installed") from None
    (definition,) = ast.parse(textwrap.dedent("".join(lines))).body
    assert isinstance(definition, ast.FunctionDef)
    return definition, first


def wrappings(function: Any) -> Iterator[Any]:
    """The function, and what it wraps, by its own word or as the one function that it closes over, down to the last."""
    while True:
        yield function
        closed_over = [cell.cell_contents for cell in function.__closure__ or ()]
        inner = list(filter(inspect.isfunction, closed_over))
        if hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif "<locals>" in function.__qualname__ and len(inner) == 1:
            function = inner[0]
        else:
            return


def _described(node: object) -> str:
    """Not `ast.dump`, whose text changes with Python's version."""
    if isinstance(node, list):
        return f"[{' '.join(map(_described, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(n, v) for n, v in ast.iter_fields(node) if n not in IGNORED and v is not None and v != []]
    return f"{type(node).__name__}({' '.join(f'{n}={_described(v)}' for n, v in fields)})"
