"""The rows of a table of `ophis bench OP`: times that took turns, beside what any implementation must at least do."""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ophis.bench import timing
from ophis.bench.provenance import provenance
from ophis.bench.shapes import FORWARD

Shape = TypeVar("Shape")
AGREE = 8  # times the floor in TOLERANCES: two results, each off by twice plain PyTorch's error and the floor


class Note(NamedTuple):
    """Something to tell that is not a row."""

    text: str
    wrong: bool = False  # a backend gave wrong results


def of_each(
    shapes: Iterable[Shape],
    measure: Callable[[Shape], Iterator[dict[str, Any] | Note]],
    device: torch.device,
    only: str = "",
) -> Iterator[dict[str, Any] | Note]:
    """What `measure` gives for each shape with `only` in its name; where memory runs out, what it gave until then."""
    for shape in shapes:
        if only not in str(shape):
            continue
        try:
            yield from measure(shape)
        except torch.OutOfMemoryError:
            yield Note(f"{shape}: more memory than {device} has")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def in_a_line(failed: Exception) -> str:
    """An error's kind and the first line of what it says."""
    return f"{type(failed).__name__}: {str(failed).strip().partition(chr(10))[0]}"


class Least(NamedTuple):
    """What any implementation must at least do."""

    bytes: int
    exponentials: int
    flops: int  # of matrix products


def timed(
    columns: dict[str, Any],
    calls: dict[str, timing.Call],
    least: Least,
    device: torch.device,
    limits: timing.Limits,
    ours: Collection[str],
    same: Collection[str],
    against: Sequence[dict[str, str]] = (),
    quick: bool = False,
) -> Iterator[dict[str, Any]]:
    """A row for each call.

    Args:
        columns: of all rows, those of `KEYS`.
        calls: by the name of the implementation; each ran before.
        least, limits: what any implementation must do, and how fast this machine does it.
        ours: names that are compared with others and with what was published.
        same: names of others that do the same work.
        against: rows of `read_against`.
        quick: few repeats.
    """
    found = timing.take_turns(calls, device, repeats=3 if quick else None)
    theirs = {name: times.p50 for name, times in found.items() if name in same}
    peer = min(theirs, key=lambda name: theirs[name], default=None)
    floor = limits.floor(least.bytes, least.exponentials, least.flops)
    for name, times in found.items():
        other = peer if name in ours else None
        published = fastest(columns, against) if name in ours else None
        yield {
            **columns,
            "backend": name,
            "ms_p20": _digits(times.p20),
            "ms_p50": _digits(times.p50),
            "ms_p80": _digits(times.p80),
            "repeats": times.repeats,
            "graph_ms": _digits(times.graph),
            "peak_mib": "" if times.peak_mib is None else f"{times.peak_mib:.1f}",
            **least._asdict(),
            "floor_ms": _digits(floor),
            "share_of_floor": _digits(floor / times.p50, 3),
            "peer": other or "",
            "peer_ms": _digits(theirs[other]) if other else "",
            "times_faster": _digits(theirs[other] / times.p50, 3) if other else "",
            "against": published["source"] if published else "",
            "against_ms": published["ms"] if published else "",
            "against_times_faster": _digits(float(published["ms"]) / times.p50, 3) if published else "",
            "copy_bytes_per_s": f"{limits.copy:.3g}",
            "exponentials_per_s": f"{limits.exponentials:.3g}" if limits.exponentials else "",
            "flops_per_s": f"{limits.products:.3g}" if limits.products else "",
            **provenance(device.type),
        }


KEYS = ("op", "case", "batch", "length", "d", "n", "w", "dtype", "direction")


def read_against(path: Path) -> list[dict[str, str]]:
    """A table with the columns above, `ms` and `source`; an empty cell fits everything."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if absent := {*KEYS, "ms", "source"} - set(reader.fieldnames or ()):
        raise ValueError(f"{path}: no column {', '.join(sorted(absent))}")
    return rows


def with_others(rows: Sequence[dict[str, Any]], table: Path) -> list[dict[str, Any]]:
    """The rows, in place of those of the same shapes and direction in a table, if there is one.

    Raises:
        ValueError: the table has other columns, those of another version; what it holds would be lost.
    """
    if not table.is_file():
        return list(rows)
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        there = list(reader)
    if rows and there and (reader.fieldnames or []) != list(rows[0]):
        raise ValueError(f"{table} has other columns than this version writes; move it away, or name another --out")
    new = {_measured(row) for row in rows}
    kept = [row for row in there if _measured(row) not in new]
    order = {key: i for i, key in enumerate(dict.fromkeys(_measured(row)[:-1] for row in [*there, *rows]))}
    return sorted([*kept, *rows], key=lambda row: (order[_measured(row)[:-1]], row["direction"] != FORWARD))


def _measured(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in KEYS)


def fastest(row: dict[str, Any], table: Sequence[dict[str, str]]) -> dict[str, str] | None:
    fitting = [other for other in table if all(other[key] in ("", str(row[key])) for key in KEYS)]
    return min(fitting, key=lambda other: float(other["ms"]), default=None)


def _digits(value: float | None, count: int = 4) -> str:
    """Without an exponent, which some spreadsheets do not read."""
    if value is None:
        return ""
    rounded = float(f"{value:.{count}g}")
    return f"{rounded:.9f}".rstrip("0").rstrip(".") if abs(rounded) < 1 else f"{rounded:g}"
