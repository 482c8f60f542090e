"""Pictures of a table of `ophis bench OP`, drawn from its CSV and from nothing else."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]

DIRECTIONS = ("forward", "forward + backward")
# One colour a side, whatever the others are; told apart with any colour vision, after Okabe and Ito (2008).
COLOURS = {"cuda": "#0072B2", "triton": "#009E73", "torch": "#E69F00", "ophis": "#0072B2"}
OF_OTHERS = ("#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F", "#000000", "#A6761D")
FEWEST = 3  # lengths that make a line
FLOOR = "floor: bytes, exponentials or matrix products"
IN_A_GRAPH: dict[str, Any] = {"marker": "o", "markerfacecolor": "white", "markersize": 5, "linestyle": ""}
LEGEND_COLUMNS = 4  # that fit under a figure, with names as long as attention's


def draw(table: Path) -> list[Path]:
    """Draws what the table has, beside it: times of each shape, and times and memory over the length."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return []
    drawn = [_shapes(rows, table.with_suffix(".png"))]
    if line := _line(rows):
        drawn.append(_lengths(line, table.with_name(f"{table.stem}_length.png")))
    if line := _most(rows, along="n", apart=("case", "batch", "length", "d", "w", "dtype")):
        drawn.append(_states(line, table.with_name(f"{table.stem}_state.png")))
    return drawn


def _shapes(rows: list[Row], path: Path) -> Path:
    """A dot at the median, on a line over the middle three fifths of the repeats; a stem to it from the floor. Hollow,
    the same call replayed as a CUDA graph: what is between the two is the CPU's."""
    directions = [d for d in DIRECTIONS if any(row["direction"] == d for row in rows)]
    shapes = list(dict.fromkeys(map(_shape, rows)))
    sides = _sides(rows)
    figure = _figure(5 * len(directions) + 2, 1.4 + (0.15 * len(sides) + 0.2) * len(shapes))
    subplots = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
    for axes, direction in zip(subplots, directions, strict=True):
        for row in (row for row in rows if row["direction"] == direction):
            y = shapes.index(_shape(row)) + (sides.index(row["backend"]) + 0.5) / (len(sides) + 1) - 0.5
            low, middle, high, floor = (float(row[key]) for key in ("ms_p20", "ms_p50", "ms_p80", "floor_ms"))
            colour = _colour(row["backend"], sides)
            axes.plot([floor, middle], [y, y], color=colour, linewidth=2, alpha=0.4)
            axes.plot([low, high], [y, y], color="black", linewidth=1)
            if row["graph_ms"]:
                axes.plot(float(row["graph_ms"]), y, color=colour, **IN_A_GRAPH)
            axes.plot(middle, y, "o", color=colour, markersize=5)
            axes.plot(floor, y, "|", color="black", markersize=8)
        axes.set(xscale="log", xlabel="milliseconds", title=direction)
        axes.set_yticks(range(len(shapes)), shapes, fontsize=8)
        axes.set_ylim(len(shapes) - 0.4, -0.7)  # the first on top
        axes.grid(axis="x", alpha=0.3)
    marks = [{"color": "black", "marker": "|", "linestyle": "", "label": FLOOR}]
    if any(row["graph_ms"] for row in rows):
        marks.append({"color": "black", "label": "in a CUDA graph", **IN_A_GRAPH})
    _finish(figure, rows, sides, *marks)
    figure.savefig(path)
    return path


def _lengths(rows: list[Row], path: Path) -> Path:
    """Times and memory over the length, both logarithmic: what is linear rises by one decade a decade."""
    sides = _sides(rows)
    figure = _figure(11, 8)
    for line, (column, label) in zip(
        figure.subplots(2, len(DIRECTIONS), sharex=True, squeeze=False),
        (("ms_p50", "milliseconds"), ("peak_mib", "MiB above the inputs")),
        strict=True,
    ):
        for axes, direction in zip(line, DIRECTIONS, strict=True):
            of_direction = [row for row in rows if row["direction"] == direction]
            for side in sides:
                points = _points([row for row in of_direction if row["backend"] == side], column)
                axes.plot(*points, marker="o", markersize=4, color=_colour(side, sides))
            if column == "ms_p50":
                axes.plot(*_points(of_direction, "floor_ms"), color="black", linestyle="--")
                axes.set_title(direction)
            axes.set(yscale="log", ylabel=label, xlabel="length" if column == "peak_mib" else "")
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
    _finish(figure, rows, sides, {"color": "black", "linestyle": "--", "label": FLOOR})
    figure.savefig(path)
    return path


def _states(rows: list[Row], path: Path) -> Path:
    """Times over the state size, both logarithmic."""
    sides = _sides(rows)
    figure = _figure(11, 4.5)
    for axes, direction in zip(figure.subplots(1, len(DIRECTIONS), squeeze=False)[0], DIRECTIONS, strict=True):
        of_direction = [row for row in rows if row["direction"] == direction]
        for side in sides:
            points = _points([row for row in of_direction if row["backend"] == side], "ms_p50", along="n")
            axes.plot(*points, marker="o", markersize=4, color=_colour(side, sides))
        axes.plot(*_points(of_direction, "floor_ms", along="n"), color="black", linestyle="--")
        axes.set(yscale="log", ylabel="milliseconds", xlabel="state size n", title=direction)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3)
    _finish(figure, rows, sides, {"color": "black", "linestyle": "--", "label": FLOOR})
    figure.savefig(path)
    return path


def _line(rows: list[Row]) -> list[Row]:
    """The rows of the sizes that were measured at the most lengths of batch 1; none where these are too few."""
    single = [row for row in rows if row["batch"] == "1"]
    return _most(single, along="length", apart=("case", "d", "n", "w", "dtype"))


def _most(rows: list[Row], *, along: str, apart: tuple[str, ...]) -> list[Row]:
    """Of the groups of rows that have the same in `apart`, the one with the most values `along`; none of too few."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in apart), []).append(row)

    def values(group: list[Row]) -> int:
        return len({row[along] for row in group})

    most = max(groups.values(), key=values, default=[])
    return most if values(most) >= FEWEST else []


def _points(rows: list[Row], column: str, along: str = "length") -> tuple[list[int], list[float]]:
    found = {int(row[along]): float(row[column]) for row in rows if row[column]}
    return sorted(found), [found[value] for value in sorted(found)]


def _shape(row: Row) -> str:
    state = "".join(f", {letter} {row[letter]}" for letter in ("n", "w") if row[letter])
    return f"{row['batch']} x {row['length']} x {row['d']}{state}\n{row['case']}, {row['dtype']}"


def _sides(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["backend"] for row in rows))


def _colour(side: str, sides: Sequence[str]) -> str:
    others = [other for other in sides if other not in COLOURS]
    return COLOURS.get(side) or OF_OTHERS[others.index(side) % len(OF_OTHERS)]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # no pyplot: its windows and its global state are not needed

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _finish(figure: Any, rows: list[Row], sides: Sequence[str], *marks: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_colour(side, sides), linewidth=4, label=side) for side in sides]
    handles += [Line2D([], [], **mark) for mark in marks]
    columns = min(len(handles), LEGEND_COLUMNS)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    row = rows[0]
    figure.suptitle(f"{row['op']} on {row['machine']}, PyTorch {row['torch']}, {row['date']}", fontsize=10)
