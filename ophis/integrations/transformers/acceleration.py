"""The switch: puts the ops into transformers' models, says what it did, and takes them out again."""

from __future__ import annotations

import importlib
import inspect
import threading
import warnings
from typing import Any, NamedTuple

import torch

from ophis.integrations.transformers.families import FAMILIES, Family
from ophis.integrations.transformers.fingerprint import UnfamiliarError, fingerprint, wrappings
from ophis.integrations.transformers.keywords import passing_on
from ophis.integrations.transformers.packing import understanding_packing

OLDEST = (5, 15)  # where these models began to share their functions


class Replacement(NamedTuple):
    owner: Any  # a module or a class
    name: str
    original: Any
    ours: Any


class Outcome(NamedTuple):
    """What became of one model of transformers."""

    model: str
    functions: tuple[str, ...]  # replaced in its module
    methods: tuple[str, ...]  # replaced in its classes
    left: tuple[str, ...]  # what was left as it is, and why, a sentence each


class Acceleration:
    """What `accelerate_transformers` did; `print` it. As a context manager it is undone at the end of the block."""

    def __init__(self, version: str, models: tuple[Outcome, ...]):
        self.version = version
        self.models = models
        self.active = True

    def undo(self) -> None:
        """Gives transformers its own functions and methods back, unless another call of ours still holds them."""
        if self.active:
            self.active = False
            _release()

    def __enter__(self) -> Acceleration:
        if not self.active:
            raise RuntimeError("this acceleration was undone; call ophis.accelerate_transformers() again")
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<Acceleration of transformers {self.version}, {'active' if self.active else 'undone'}>"

    def __str__(self) -> str:
        return f"transformers {self.version} on ophis.ops{'' if self.active else ', undone'}:\n" + _table(self.models)


def accelerate_transformers() -> Acceleration:
    """Puts `ophis.ops` into transformers' own Mamba-family models, and makes right what they get wrong.

    It holds for all models of the process, built before or after, until `undo()` or the end of a `with` block; calls
    may be nested. The ops choose their backend by device, call by call. docs/transformers.md lists what is replaced in
    which models, and what that changes beside the speed.

    Returns:
        What was replaced, and what was not and why; print it.

    Raises:
        RuntimeError: transformers is older than 5.15, or none of its models is as expected.
    """
    global _holders, _report
    with _lock:
        if not _holders:
            _report = _replace()
        assert _report is not None
        _holders += 1
        return Acceleration(*_report)


_lock = threading.RLock()
_holders = 0  # calls that were not undone
_report: tuple[str, tuple[Outcome, ...]] | None = None
_replacements: list[Replacement] = []


def _replace() -> tuple[str, tuple[Outcome, ...]]:
    import transformers

    version = transformers.__version__
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])
    if (major, minor) < OLDEST:
        raise RuntimeError(
            f"accelerate_transformers needs transformers {'.'.join(map(str, OLDEST))} or newer, whose Mamba-family "
            f"models share their functions; found {version}"
        )
    found = [_prepare(family) for family in FAMILIES]
    outcomes = tuple(outcome for outcome, _ in found)
    replacements = [each for _, several in found for each in several]
    if not replacements:
        raise RuntimeError(f"nothing in transformers {version} is as expected:\n{_table(outcomes)}")
    for owner, name, _, ours in replacements:
        setattr(owner, name, ours)
    _replacements[:] = replacements
    return version, outcomes


def _release() -> None:
    global _holders
    with _lock:
        _holders -= 1
        if _holders:
            return
        kept = []
        for owner, name, original, ours in reversed(_replacements):
            if getattr(owner, name) is ours:
                setattr(owner, name, original)
            else:
                kept.append(f"{owner.__name__}.{name}")
        _replacements.clear()
    if kept:
        warnings.warn(f"replaced by others meanwhile, and left so: {', '.join(kept)}", stacklevel=3)


def _prepare(family: Family) -> tuple[Outcome, list[Replacement]]:
    """What is to be replaced in one model, without doing so yet."""
    try:
        module = importlib.import_module(family.module)
    except ImportError as error:
        return Outcome(family.name, (), (), (f"{family.module} cannot be imported: {error}",)), []
    methods, left = _methods(family, module)
    functions = []
    for name in family.kind.functions:
        original = getattr(module, name, None)
        if original is None:  # not every model calls all of them
            continue
        ours = family.function(name, mixer_is_ours=bool(methods))
        expected, came = (_parameters(function) for function in (ours, original))
        if came != expected:
            return Outcome(family.name, (), (), (f"{name} takes ({came}), expected ({expected})",)), []
        functions.append(Replacement(module, name, original, ours))
    names = tuple(each.name for each in functions), tuple(f"{each.owner.__name__}.{each.name}" for each in methods)
    return Outcome(family.name, *names, tuple(left)), functions + methods


def _methods(family: Family, module: Any) -> tuple[list[Replacement], list[str]]:
    """The mixer first; without it nothing else, since one that is not ours may drop what the others bring it."""
    try:
        mixer = _familiar(module, family.mixer, family.kind.known)
    except UnfamiliarError as error:
        return [], [f"{error}; continued prompts, padding and packing stay as transformers has them"]
    found = [Replacement(mixer, "forward", mixer.forward, family.kind.forward(mixer.forward))]
    try:
        stack = _familiar(module, family.stack, family.known)
        forwards = {stack: stack.forward}
        for name, callee in family.way:
            owner = _theirs(module, name)
            forwards[owner] = passing_on(owner.forward, callee)
    except UnfamiliarError as error:
        return found, [f"{error}; packing stays as transformers has it"]
    forwards[stack] = understanding_packing(forwards[stack])
    found += [
        Replacement(cls, "forward", cls.forward, ours) for cls, ours in forwards.items() if ours is not cls.forward
    ]
    return found, []


def _familiar(module: Any, name: str, known: frozenset[str]) -> Any:
    """The module's class of that name, if its `forward` is one of those that we know."""
    cls = _theirs(module, name)
    if (came := fingerprint(cls.forward)) not in known:
        raise UnfamiliarError(
            f"{name}.forward has changed (its fingerprint is {came}, expected {' or '.join(sorted(known))})"
        )
    return cls


def _theirs(module: Any, name: str) -> Any:
    """The module's class of that name, if nobody has put a `forward` of their own into it."""
    cls = getattr(module, name, None)
    if cls is None:
        raise UnfamiliarError(f"there is no {name}")
    for function in wrappings(cls.forward):
        if (home := function.__globals__["__name__"]).partition(".")[0] != "transformers":
            raise UnfamiliarError(f"{name}.forward was replaced by {home}")
    return cls


def _parameters(function: Any) -> str:
    if isinstance(function, torch.nn.Module):  # what the package `kernels` makes of a function
        function = type(function).forward
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=p.empty)) for p in parameters if p.name != "self")


def _table(models: tuple[Outcome, ...]) -> str:
    width = max(len(outcome.model) for outcome in models)
    lines = []
    for model, functions, methods, left in models:
        what = f"{len(functions)} functions" if functions else "left alone"
        if methods:
            what += f"; forward of {', '.join(name.removesuffix('.forward') for name in methods)}"
        lines.append(f"  {model:{width}}  {what}")
        lines += [f"  {'':{width}}  ! {reason}" for reason in left]
    return "\n".join(lines)
