"""Methods that take keyword arguments for others and drop them, made to pass them on."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from ophis.integrations.transformers.fingerprint import UnfamiliarError, definition_of


def passing_on(original: Callable[..., Any], callee: str) -> Callable[..., Any]:
    """The function with `**kwargs` added to its call of `callee`, such as "self.mixer"; itself if it is there already.

    It is compiled from the installed source, line for line: nothing else about it changes. Raises `UnfamiliarError`
    unless there is exactly one such call in a function that takes `**kwargs`.
    """
    definition, first = definition_of(original)
    name = original.__qualname__
    calls = [n for n in ast.walk(definition) if isinstance(n, ast.Call) and ast.unparse(n.func) == callee]
    if len(calls) != 1:
        raise UnfamiliarError(f"{name} calls {callee} {len(calls)} times, expected once")
    function: Any = inspect.unwrap(original)
    if definition.args.kwarg is None or function.__code__.co_freevars:
        raise UnfamiliarError(f"{name} takes no **kwargs, or needs more than its module to run")
    (call,) = calls
    if any(keyword.arg is None for keyword in call.keywords):
        return original
    call.keywords.append(ast.keyword(arg=None, value=ast.Name(definition.args.kwarg.arg, ast.Load())))
    # What it did to the original's docstring is copied below.
    definition.decorator_list = [d for d in definition.decorator_list if ast.unparse(d) != "auto_docstring"]
    tree = ast.fix_missing_locations(ast.Module([definition], type_ignores=[]))
    ast.increment_lineno(tree, first - 1)
    made: dict[str, Any] = {}
    exec(compile(tree, function.__code__.co_filename, "exec"), vars(sys.modules[function.__module__]), made)
    return functools.update_wrapper(made[definition.name], original)
