"""Four minutes of Ophis: a small Mamba-2 reads Python's own documentation, byte by byte, and then writes some.

    make demo

Everything goes into demo/, and a second time it starts over. What is done is what the lines beginning with "$" do in a
shell; `ophis train` takes any other text in place of this one.
"""

from __future__ import annotations

import csv
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from pydoc_data import topics

from ophis.cli import main

FOLDER = Path("demo")
TRAIN = "ophis train demo/text --out demo/model --overwrite"
GENERATE = 'ophis generate demo/model --prompt "The " --max-new-tokens 600 --temperature 0.7 --seed 1'


def write_text(folder: Path) -> None:
    """A file for each topic that `help()` knows: half a million characters that come with every Python.

    Without the tables: so small a model learns to draw frames first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in topics.topics.items():
        prose = re.sub(r"^ *[|+].*\n", "", text, flags=re.MULTILINE)
        (folder / f"{re.sub(r'[^A-Za-z-]', '_', name)}.txt").write_text(prose, encoding="utf-8")


def run(command: str) -> None:
    print(f"\n$ {command}", flush=True)
    code = main(shlex.split(command)[1:])
    if code:
        sys.exit(code)


def losses(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def sparkline(values: list[float]) -> str:
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / ((high - low) or 1))] for value in values)


def plot(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for name, style in (("loss", "-"), ("held_out_loss", "o-")):
        points = [(row["tokens"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), markersize=4)
    axes.set(xlabel="bytes read", ylabel="nats per byte", title="A small Mamba-2 on Python's documentation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    write_text(FOLDER / "text")
    run(TRAIN)
    rows = losses(FOLDER / "model/losses.csv")
    curve = [row["loss"] for row in rows if "loss" in row]
    print(f"loss {curve[0]:.2f} {sparkline(curve)} {curve[-1]:.2f}")
    if importlib.util.find_spec("matplotlib"):
        plot(rows, FOLDER / "loss.png")
        print(f"drawn in {FOLDER / 'loss.png'}, its numbers in {FOLDER / 'model/losses.csv'}")
    run(GENERATE)
