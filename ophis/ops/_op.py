"""What turns a function on tensors into an op: shape checks, and the choice of a backend.

    @op(x="b l d", dt="b l d", A="d n", B="b l n | b l g n | d n", divides={"g": "d"})
    def selective_scan(x, dt, A, B, ...):
        ...the equation: this body is the backend "reference"

    @selective_scan.register("torch", why_not=lambda call: None)
    def ...

Left alone, a call takes the fastest backend that can run it. Asked for by name, as `backend="torch"`, within
`use_backend("torch")` or by the environment variable OPHIS_BACKEND, a backend never falls back to another.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Call = Mapping[str, Any]

# Folders of backends, fastest first; each holds one module per op, of the op's name, imported at the first call, and a
# function `why_not()` that says in a sentence what keeps all of it from running on this machine, or returns None.
FOLDERS = ("cuda", "triton", "torch")

OPS: dict[str, Op[..., Any]] = {}


def _load_backends(name: str) -> None:
    OPS[name].load_backends()


# Run, not traced, where an op's first call is inside torch.compile. That is all `torch.compiler.assume_constant_result`
# does, after importing the compiler: 1.7 s for everyone who imports the ops.
_load_backends._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Backend(NamedTuple):
    name: str
    function: Callable[..., Any]
    why_not: Callable[[Call], str | None]


class Op(Generic[P, R]):
    """A function on tensors with several implementations of the same numbers."""

    def __init__(self, reference: Callable[P, R], shapes: dict[str, str], complex: str, divides: dict[str, str]):
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self.shapes = {k: tuple(tuple(s.split()) for s in v.split("|")) for k, v in shapes.items()}
        self.complex = frozenset(complex.split())
        self.divides = divides
        parameters = inspect.signature(reference).parameters
        self._names = tuple(parameters)
        self._positional = tuple(n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY)
        self._defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
        self._backends: dict[str, Backend] = {}
        self._loaded = False
        self._known: dict[Any, str] = {}  # the backends of calls like those that were checked before

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        call = self._bind(args, kwargs)
        asked = call.pop("backend") or _forced.get(self.name) or _forced.get("*")
        key = self._key(call, asked)
        name = None if key is None else self._known.get(key)
        function = self._backends[name or self._checked(call, asked, key)].function
        device = call[self._positional[0]].device.type
        if torch.is_autocast_enabled(device):  # an op chooses its own precision: states stay float32
            with torch.autocast(device, enabled=False):
                return function(**call)
        return function(**call)

    def register(self, name: str, why_not: Callable[[Call], str | None] = lambda call: None):
        """Adds a backend. `why_not(call)` says in a sentence why it cannot run that call, or returns None."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self._backends[name] = Backend(name, function, why_not)
            return function

        return add

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Fastest first; the reference last."""
        _load_backends(self.name)
        return tuple(self._backends.values())

    def load_backends(self) -> None:
        if self._loaded:
            return
        for folder in FOLDERS:
            module = f"{__package__}.{folder}.{self.reference.__module__.rpartition('.')[2]}"
            if importlib.util.find_spec(module) is None:  # this folder has nothing for this op
                continue
            reason = importlib.import_module(f"{__package__}.{folder}").why_not()
            if reason is None:
                importlib.import_module(module)
            else:  # its compiler may be missing, or cost a second to import in vain
                self._backends[folder] = Backend(folder, self.reference, lambda call, reason=reason: reason)
        # A module registers all its ops, so the first of them to be loaded brings backends to the others, out of turn.
        for folder in FOLDERS:
            if folder in self._backends:
                self._backends[folder] = self._backends.pop(folder)
        self._backends["reference"] = Backend("reference", self.run_reference, lambda call: None)
        self._loaded = True

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, str | None]:
        """For every backend, fastest first, why it would not run this call; None where it could."""
        call = self._bind(args, kwargs)
        call.pop("backend")
        self._check(call)
        return {b.name: b.why_not(call) for b in self.backends}

    def _key(self, call: Call, asked: str | None) -> Any:
        """All that the checks and the choice of a backend depend on, whether a gradient is wanted among it; None where
        they have to be made each time.

        Looking a call up takes 10 us where checking it takes 70: decoding repeats the same few calls.
        """
        if call.get("cu_seqlens") is not None or torch.compiler.is_compiling():
            return None
        parts: list[Any] = [asked, torch.is_grad_enabled(), *self._backends]
        for name in self._names:
            value: Any = call.get(name)
            kind = type(value)
            if value is None:
                parts.append(None)
            elif (kind is Tensor or kind is torch.nn.Parameter) and value.layout is torch.strided:
                parts.append((value.shape, value.stride(), value.dtype, value.device, value.requires_grad))
            elif isinstance(value, (bool, int, float, str, tuple)):
                parts.append((kind, value))  # True is not 1
            else:
                return None
        return tuple(parts)

    def _checked(self, call: Call, asked: str | None, key: Any) -> str:
        """The name of the backend, once the call is found to fit; kept for others like it."""
        self._check(call)
        name = self._choose(call, asked).name
        if key is not None:
            if len(self._known) >= 1024:  # lengths vary without end
                self._known.clear()
            self._known[key] = name
        return name

    def _choose(self, call: Call, asked: str | None) -> Backend:
        backends = self.backends
        if asked is None:
            return next(b for b in backends if b.why_not(call) is None)
        for backend in backends:
            if backend.name == asked:
                reason = backend.why_not(call)
                if reason is None:
                    return backend
                could = ", ".join(b.name for b in backends if b.why_not(call) is None)
                raise RuntimeError(f"{self.name}: backend {asked!r} cannot run this call: {reason}. These can: {could}")
        raise ValueError(f"{self.name}: no backend {asked!r}; it has {', '.join(b.name for b in backends)}")

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        # inspect.Signature.bind would do, at 10 us a call; decoding makes some hundred calls a token.
        call = {**self._defaults, **dict(zip(self._positional, args)), **kwargs}  # noqa: B905 (checked below)
        if len(call) != len(self._names) or len(args) > len(self._positional):
            inspect.signature(self.reference).bind(*args, **kwargs)  # raises the TypeError Python itself would
        return call

    def run_reference(self, **call: Any) -> R:
        """The reference runs packed sequences one by one; its body never sees `cu_seqlens`."""
        if call.get("cu_seqlens") is None:
            return self.reference(**call)  # type: ignore[call-arg]
        return cast(R, self.one_by_one(self.reference, call))

    def one_by_one(self, function: Callable[..., Any], call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Runs `function` on each sequence of a packed call by itself; the meaning of `cu_seqlens`."""
        bounds = call["cu_seqlens"].tolist()
        outputs, states = [], []
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            part = {**call, "cu_seqlens": None}
            for name, alternatives in self.shapes.items():
                tensor = part.get(name)
                if name == "initial_state":
                    part[name] = None if tensor is None else tensor[i : i + 1]
                elif tensor is not None and any(s[:2] == ("b", "l") and len(s) == tensor.ndim for s in alternatives):
                    part[name] = tensor[:, start:end]
            if start == end:  # nothing comes out of an empty sequence, and its state stays
                states.append(part["initial_state"])
                continue
            y, state = function(**part)
            outputs.append(y)
            states.append(state)
        zeros = torch.zeros_like(next(state for state in states if state is not None))
        return torch.cat(outputs, 1), torch.cat([zeros if state is None else state for state in states], 0)

    # Checks. Every error says: op, argument, what came, what was expected.

    def _check(self, call: Call) -> None:
        sizes: dict[str, Any] = {}
        first = call[self._positional[0]]
        for name, alternatives in self.shapes.items():
            tensor = call[name]
            if tensor is None and self._defaults.get(name, ...) is None:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{self.name}: {name} is {_describe(tensor)}, expected a tensor of shape "
                    f"{_expected(alternatives, sizes)}"
                )
            if not tensor.is_floating_point() and not (name in self.complex and tensor.is_complex()):
                kind = "a floating or complex" if name in self.complex else "a floating"
                raise TypeError(f"{self.name}: {name} has dtype {_short(tensor.dtype)}, expected {kind} dtype")
            if tensor.device != first.device:
                raise ValueError(f"{self.name}: {name} is on {tensor.device}, expected {first.device}, where x is")
            if not self._fit(name, tensor, alternatives, sizes, call):
                raise ValueError(
                    f"{self.name}: {name} has shape {tuple(tensor.shape)}, expected {_expected(alternatives, sizes)}"
                )
        for part, whole in self.divides.items():
            if part in sizes and sizes[whole] % sizes[part]:
                raise ValueError(
                    f"{self.name}: {part}={sizes[part]} groups cannot share {whole}={sizes[whole]} evenly; "
                    f"{part} must divide {whole}"
                )
        if sizes.get("l") == 0:
            raise ValueError(f"{self.name}: x has length 0, expected at least 1")
        if call.get("cu_seqlens") is not None:
            self._check_packing(call, sizes)

    def _fit(self, name: str, tensor: Tensor, alternatives: Any, sizes: dict[str, Any], call: Call) -> bool:
        rows = _sequences(call) if name == "initial_state" else None
        for letters in alternatives:
            shape: tuple[Any, ...] = tuple(tensor.shape)
            if letters[0] == "...":  # any leading axes, the same everywhere
                shape = (shape[: 1 - len(letters)], *shape[1 - len(letters) :])
            if len(letters) != len(shape):
                continue
            found = {}
            for letter, size in zip(letters, shape, strict=True):
                if letter == "b" and rows is not None:
                    known = rows
                elif letter.endswith("-1"):  # "w-1": the window of a convolution of width w
                    known = sizes[letter[:-2]] - 1
                else:
                    known = sizes.get(letter, size)
                    found[letter] = size
                if size != known:
                    break
            else:
                sizes.update(found)
                return True
        return False

    def _check_packing(self, call: Call, sizes: dict[str, Any]) -> None:
        offsets = call["cu_seqlens"]

        def malformed(got: object) -> ValueError:
            # Written when it is raised, not before: a length put into a string is a constant to torch.compile.
            form = f"int32 offsets (0, ..., l={sizes['l']}), one more than sequences"
            return ValueError(f"{self.name}: cu_seqlens must be {form}; got {got}")

        if not isinstance(offsets, Tensor) or offsets.dtype != torch.int32 or offsets.ndim != 1 or len(offsets) < 2:
            raise malformed(_describe(offsets))
        if sizes["b"] != 1:
            raise ValueError(f"{self.name}: packed sequences (cu_seqlens) need batch 1, got b={sizes['b']}")
        # Reading the offsets of a GPU tensor would wait for the GPU at every call; its values are the caller's.
        if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
            values = offsets.tolist()
            if values[0] != 0 or values[-1] != sizes["l"] or values != sorted(values):
                raise malformed(values)


def op(
    *, complex: str = "", divides: dict[str, str] | None = None, **shapes: str
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Makes a function an `Op`; its body becomes the backend "reference".

    `shapes` gives each tensor's axes as letters, alternatives separated by "|"; a letter means the same size
    everywhere in a call. `complex` names the arguments that may be complex, `divides` the sizes that divide others.
    An argument named `initial_state` has one row a sequence where `cu_seqlens` is given.
    """

    def wrap(function: Callable[P, R]) -> Op[P, R]:
        made = Op(function, shapes, complex, divides or {})
        OPS[made.name] = made
        return made

    return wrap


_forced: dict[str, str] = {"*": os.environ["OPHIS_BACKEND"]} if os.environ.get("OPHIS_BACKEND") else {}


@contextlib.contextmanager
def use_backend(name: str, *ops: str) -> Iterator[None]:
    """Within it, every op (or only `ops`, by name) uses this backend and never falls back. Process-wide."""
    for unknown in set(ops) - set(OPS):
        raise ValueError(f"use_backend: no op {unknown!r}; there are {', '.join(sorted(OPS))}")
    before = dict(_forced)
    _forced.update(dict.fromkeys(ops or ("*",), name))
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def _sequences(call: Call) -> int | None:
    offsets = call.get("cu_seqlens")
    return len(offsets) - 1 if isinstance(offsets, Tensor) and offsets.ndim == 1 else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{_short(value.dtype)} of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _expected(alternatives: tuple[tuple[str, ...], ...], sizes: Mapping[str, Any]) -> str:
    def letter(name: str) -> str:
        return f"{name}={sizes[name]}" if name in sizes else name

    return " or ".join("(" + ", ".join(map(letter, s)) + ("," if len(s) == 1 else "") + ")" for s in alternatives)
