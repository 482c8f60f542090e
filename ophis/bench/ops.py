"""Times of operators: every backend that can run a call, beside other packages' functions for the same work.

A backend is checked before it is timed, by the rule in `ophis.testing` on fewer positions and then against the other
backends on all of them; a wrong one is refused. All sides of a call take turns in one run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ophis.bench import peers, shapes, tables, timing
from ophis.bench.shapes import FORWARD, Shape
from ophis.bench.tables import Note
from ophis.ops import OPS
from ophis.testing import STEPS, TOLERANCES, assert_close, check, error, is_differentiable, widened


class Side:
    """One implementation and its inputs."""

    def __init__(self, op: str, name: str, function: Callable[..., Any], inputs: dict[str, Any]):
        self.op, self.name, self.function, self.inputs = op, name, function, inputs
        self.leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if is_differentiable(v)}
        self.weights: list[Tensor] = []  # gradients of what comes out, drawn once

    def forward(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            outputs = self.function(**self.inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def training(self) -> tuple[Tensor, ...]:
        outputs = self.function(**{**self.inputs, **self.leaves})
        outputs = shapes.differentiated(self.op, outputs if isinstance(outputs, tuple) else (outputs,))
        if not self.weights:
            generator = torch.Generator(outputs[0].device).manual_seed(1)
            for y in outputs:
                weight = torch.empty(y.shape, dtype=y.dtype, device=y.device)
                self.weights.append(weight.normal_(generator=generator))
        return torch.autograd.grad(outputs, list(self.leaves.values()), self.weights)

    def call(self, direction: str) -> Callable[[], tuple[Tensor, ...]]:
        return self.forward if direction == FORWARD else self.training


def run(
    op: str,
    device: torch.device,
    *,
    backends: Sequence[str] = (),
    quick: bool = False,
    only: str = "",
    against: Sequence[dict[str, str]] = (),
) -> Iterator[dict[str, Any] | Note]:
    """The rows of an op's table as they are measured, and what else there is to tell.

    Args:
        op: one of `ophis.bench.shapes.SHAPES`.
        device: where.
        backends: by name; every one but the reference when empty.
        quick: tiny shapes, to see that it works.
        only: shapes with this in what they are called, as "16 x 2048" or "n 128"; all of them when empty.
        against: rows of `read_against`, joined where sizes and dtype are the same.
    """
    limits = timing.limits(device, quick)
    others, missing = peers.peers_of(op) if device.type == "cuda" else ([], [])
    yield from map(Note, missing)
    checked: dict[Any, str | None] = {}

    def measure(shape: Shape) -> Iterator[dict[str, Any] | Note]:
        names = yield from _fit_to_time(shape, device, backends, checked)
        if names:
            yield from _measure(shape, device, names, others, limits, quick, against)

    yield from tables.of_each(shapes.shapes_of(op, quick), measure, device, only)


def _fit_to_time(
    shape: Shape, device: torch.device, backends: Sequence[str], checked: dict[Any, str | None]
) -> Generator[Note, None, list[str]]:
    """The backends that can run this call, do so correctly, and take a reasonable time."""
    sizes = shapes.smaller(shape, device)
    small = shape.inputs(device, **sizes)
    names = []
    for name, reason in implementations(shape.op, small).items():
        if backends and name not in backends:
            continue
        if reason is not None:
            if backends:
                yield Note(f"{shape}: {name} cannot run it: {reason}")
            continue
        full = {**shape.sizes, **sizes}
        key = (name, shape.case, shape.dtype, *full.items())
        if key not in checked:
            checked[key] = _wrong(shape.op, name, small)
        if checked[key]:
            yield Note(f"{shape}: {name} is wrong, and is not timed: {checked[key]}", wrong=True)
            continue

        def call_of(b: int, l: int, name: str = name) -> timing.Call:
            inputs = _own(shape.inputs(device, **{**sizes, "b": b, "l": l}))
            return Side(shape.op, name, function(shape.op, name), inputs).call(shape.directions[-1])

        first = sizes["b"], sizes["l"]
        estimate = timing.estimate(call_of, shape.sizes["b"], shape.sizes["l"], first, device)
        if estimate > timing.SLOW:
            yield Note(f"{shape}: {name} would take {estimate:.0f} s a call, and is left out")
            continue
        names.append(name)
    return names


def _measure(
    shape: Shape,
    device: torch.device,
    names: Sequence[str],
    others: Sequence[tuple[peers.Peer, Callable[..., Any]]],
    limits: timing.Limits,
    quick: bool,
    against: Sequence[dict[str, str]],
) -> Iterator[dict[str, Any] | Note]:
    inputs = shape.inputs(device)
    reasons = implementations(shape.op, inputs)
    yield from (Note(f"{shape}: {n} cannot run it: {reasons[n]}") for n in names if reasons[n] is not None)
    sides = {n: Side(shape.op, n, function(shape.op, n), _own(inputs)) for n in names if reasons[n] is None}
    for peer, of_peer in others:
        if peer.longest and shape.sizes["l"] > peer.longest:
            yield Note(
                f"{shape}: {peer.name} is left out, for lengths above {peer.longest} would take it seconds a call"
            )
        else:
            sides[peer.name] = Side(shape.op, peer.name, *peer.prepare(of_peer, inputs))
    of_others = {peer.name: peer for peer, _ in others}
    for direction in shape.directions:
        yield from _first_calls(shape, sides, direction, of_others)
        ours = [n for n in sides if n not in of_others]
        if not ours:
            return
        least = tables.Least(
            shapes.bytes_moved(shape.op, inputs, sides[ours[0]].forward(), direction),
            shapes.exponentials(shape.op, inputs, direction),
            shapes.products(shape.op, inputs, direction),
        )
        calls = {name: side.call(direction) for name, side in sides.items()}
        same = [peer.name for peer, _ in others if peer.same_work]
        yield from tables.timed(
            {**shape.columns, "direction": direction}, calls, least, device, limits, names, same, against, quick
        )


# What is run


def function(op: str, backend: str) -> Callable[..., Any]:
    return partial(OPS[op], backend=backend)


def implementations(op: str, inputs: dict[str, Any]) -> dict[str, str | None]:
    """Each, and why it cannot run this call. The reference is never timed."""
    return {name: reason for name, reason in OPS[op].explain(**inputs).items() if name != "reference"}


def backends(op: str) -> list[str]:
    return [backend.name for backend in OPS[op].backends if backend.name != "reference"]


def _own(inputs: dict[str, Any]) -> dict[str, Any]:
    """A step writes into its state: each side has one of its own."""
    return {k: v.clone() if k == "state" else v for k, v in inputs.items()}


# That it is right


def _wrong(op: str, backend: str, inputs: dict[str, Any]) -> str | None:
    try:
        if op in STEPS:
            _check_step(op, backend, inputs)
        else:
            check(OPS[op], inputs, backend)
    except torch.OutOfMemoryError:
        raise
    except AssertionError as wrong:
        return str(wrong)
    except Exception as failed:  # a kernel that does not compile, perhaps; the other backends are still worth a time
        return tables.in_a_line(failed)
    return None


def _check_step(op: str, backend: str, inputs: dict[str, Any]) -> None:
    """Against the reference of the op that it is one position of."""
    sequence = OPS[op.removesuffix("_step")]
    with torch.no_grad():
        expected = sequence(**_as_sequence(widened(inputs)), backend="reference")
        plain = sequence(**_as_sequence(inputs), backend="reference")
        own = _own(inputs)
        y = function(op, backend)(**own)
    dtype = inputs["x"].dtype
    assert_close(y, expected[0][:, 0], plain[0][:, 0], dtype=dtype, name=f"{op}, {backend}: y")
    assert_close(own["state"], expected[1], plain[1], dtype=dtype, name=f"{op}, {backend}: state")


def _as_sequence(step: dict[str, Any]) -> dict[str, Any]:
    """A step's call as one of the op on sequences, of length 1."""
    call = {k: v[:, None] if k in ("x", "dt", "B", "C", "z") else v for k, v in step.items()}
    call["initial_state"] = call.pop("state")
    return call


def _first_calls(shape: Shape, sides: dict[str, Side], direction: str, others: dict[str, peers.Peer]) -> Iterator[Note]:
    """Runs every side once, and removes backends that differ and others' functions that fail.

    At the full size no reference is affordable. But an error there is unlikely to be the same in two of them. Two that
    differ do not tell which is wrong: PyTorch's, the slowest and plainest, is taken at its word.
    """
    ours = [name for name in sides if name not in others]
    if not ours:
        return
    trusted = sides["torch" if "torch" in ours else ours[-1]]
    expected = trusted.call(direction)()
    floor = max(TOLERANCES[v.dtype] for v in trusted.leaves.values())
    what = ("y", "state") if direction == FORWARD else [f"the gradient of {name}" for name in trusted.leaves]
    for side in [side for side in sides.values() if side is not trusted]:
        try:
            actual = side.call(direction)()
        except Exception as failed:  # of any kind: it is somebody else's code
            if side.name in ours or isinstance(failed, torch.OutOfMemoryError):
                raise
            del sides[side.name]
            yield Note(f"{shape}: {side.name} fails: {tables.in_a_line(failed)}")
            continue
        if other := others.get(side.name):
            if direction != FORWARD or not other.same_work:
                continue  # theirs lie elsewhere in memory, or are other numbers
            actual = (actual[0].transpose(1, 2) if other.length_last else actual[0],)
        off = {w: _error_in_parts(a, e) for w, a, e in zip(what, actual, expected, strict=False)}
        if beyond := [f"{w} by {o:.1e}" for w, o in off.items() if not o <= tables.AGREE * floor]:
            text = f"{shape}: {side.name} and {trusted.name} differ, in {', '.join(beyond)}"
            if side.name in ours:
                del sides[side.name]
                text += f"; {side.name} is not timed"
            yield Note(text, wrong=side.name in ours)


def _error_in_parts(actual: Tensor, expected: Tensor) -> float:
    """`error`, of float32 copies of some of the positions at a time: those of all would take gigabytes."""
    if expected.ndim != 3:
        return error(actual.float(), expected.float())
    pairs = zip(actual.split(65536, 1), expected.split(65536, 1), strict=True)
    return max((error(a.float(), e.float()) for a, e in pairs), key=lambda off: (off != off, off))
