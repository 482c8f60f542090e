"""Methods that take keyword arguments for others and drop them, made to pass them on."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable
from typing import Any

from ophis.integrations.transformers.fingerprint import UnfamiliarError, definition_of, wrappings


def passing_on(original: Callable[..., Any], callee: str) -> Callable[..., Any]:
    """The function with `**kwargs` added to its call of `callee`; itself if they are passed on already.

    It is compiled from the installed source, line for line: nothing else about it changes. Raises `UnfamiliarError`
    unless there is exactly one such call in a function that takes `**kwargs`.

    Args:
        original: the function.
        callee: as it is written there, such as "self.mixer", or "self.mixer(cache_params|cache)" for the one of several
            calls that is given one of these keywords.
    """
    definition, first = definition_of(original)
    *_, function = wrappings(original)
    name, _, alternatives = callee.removesuffix(")").partition("(")
    keywords = set(filter(None, alternatives.split("|")))
    calls = [
        node
        for node in ast.walk(definition)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == name
        and (not keywords or keywords & {k.arg for k in node.keywords})
    ]
    if calls and all(any(k.arg is None for k in call.keywords) for call in calls):
        return original
    if len(calls) != 1:
        raise UnfamiliarError(f"{original.__qualname__} calls {callee} {len(calls)} times, expected once")
    if definition.args.kwarg is None or function.__code__.co_freevars:
        raise UnfamiliarError(f"{original.__qualname__} takes no **kwargs, or needs more than its module to run")
    (call,) = calls
    call.keywords.append(ast.keyword(arg=None, value=ast.Name(definition.args.kwarg.arg, ast.Load())))
    # What it did to the original's docstring is copied below.
    definition.decorator_list = [d for d in definition.decorator_list if ast.unparse(d) != "auto_docstring"]
    tree = ast.fix_missing_locations(ast.Module([definition], type_ignores=[]))
    ast.increment_lineno(tree, first - 1)
    made: dict[str, Any] = {}
    exec(compile(tree, function.__code__.co_filename, "exec"), vars(sys.modules[function.__module__]), made)
    return functools.update_wrapper(made[definition.name], original)
