"""Four minutes of Ophis: a small Mamba-2 reads Python's own documentation, byte by byte, and then writes some.

    make demo

Everything goes into demo/, and a second time it starts over. The lines beginning with "$" are what one would type in a
shell; `ophis train` takes any other text in place of this one.
"""

from __future__ import annotations

import csv
import importlib.util
import re
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from pydoc_data import topics

from ophis.cli import main

FOLDER = Path("demo")
TRAIN = "ophis train demo/text --out demo/model --overwrite --steps 800"
GENERATE = 'ophis generate demo/model --prompt "The " --max-new-tokens 800 --temperature 0.6 --seed 2'


def write_text(folder: Path) -> None:
    """The prose of the topics that `help()` knows, a file each: 260,000 characters that come with every Python.

    The topics repeat each other. A paragraph is written once, so that none is held out and learnt all the same.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seen: set[str] = set()
    for name, text in topics.topics.items():
        paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
        paragraphs = [paragraph for paragraph in paragraphs if is_prose(paragraph) and paragraph not in seen]
        seen.update(paragraphs)
        lines = "\n\n".join(textwrap.fill(paragraph, 80) for paragraph in paragraphs)
        (folder / f"{re.sub(r'[^A-Za-z-]', '_', name)}.txt").write_text(lines, encoding="utf-8")


def is_prose(paragraph: str) -> bool:
    """No code, grammar, table or title."""
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return len(paragraph) > 60 and letters > 0.85 * len(paragraph) and not re.search(r">>>|::=|\+--", paragraph)


def run(command: str) -> None:
    print(f"\n$ {command}", flush=True)
    code = main(shlex.split(command)[1:])
    if code:
        sys.exit(code)


def read_losses(path: Path) -> list[dict[str, float]]:
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
    rows = read_losses(FOLDER / "model/losses.csv")
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    print(f"Loss {held_out[0]:.2f} {sparkline(held_out)} {held_out[-1]:.2f} nats per byte, on text held out")
    if importlib.util.find_spec("matplotlib"):
        plot(rows, FOLDER / "loss.png")
        print(f"The curve: {FOLDER / 'loss.png'}, {FOLDER / 'model/losses.csv'}")
    run(GENERATE)
