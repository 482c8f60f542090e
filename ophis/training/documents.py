"""Text as it lies on disk: which files are documents, and which part of them is held out."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# More held-out text than this narrows the error of its mean loss little (0.005 nats a byte, or so) and costs time.
MOST_HELD_OUT = 128 * 1024  # characters


class Documents(NamedTuple):
    texts: list[str]  # not empty, in the order of their paths
    skipped: int  # files that are not UTF-8 text


class Split(NamedTuple):
    train: list[str]
    held_out: list[str]


def read_documents(path: str | Path, *, leave_out: str | Path | None = None) -> Documents:
    """Every UTF-8 text file at or below `path`, each a document.

    Hidden files and folders are passed over, and so is the folder `leave_out`. What is not UTF-8, or holds a zero byte,
    is no text; it is counted, not read.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: there is, but no text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}")
    texts, skipped, empty = [], 0, 0
    for file in _files(path, Path(leave_out).resolve() if leave_out is not None else None):
        text = _read(file)
        if text is None:
            skipped += 1
        elif not text.strip():
            empty += 1
        else:
            texts.append(text)
    if not texts:
        found = f"{skipped} files that are not UTF-8 text, {empty} empty ones" if path.is_dir() else "not UTF-8 text"
        raise ValueError(f"no text in {path}: {'it is empty' if empty and not skipped else found}")
    return Documents(texts, skipped)


def hold_out(texts: list[str], fraction: float) -> Split:
    """Sets about that fraction of the text aside, the same part every time; at most `MOST_HELD_OUT` characters.

    Where there are documents enough, whole ones, drawn at random: text that the model has seen nothing of. Where there
    are few large ones, the tail of each.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction held out is {fraction}, expected more than 0 and less than 1")
    total = sum(map(len, texts))
    budget = min(fraction * total, MOST_HELD_OUT)
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)
    whole, size = set(), 0
    for i in order:
        if size + len(texts[i]) <= budget:
            whole.add(i)
            size += len(texts[i])
    if size >= budget / 2:
        return Split([t for i, t in enumerate(texts) if i not in whole], [texts[i] for i in sorted(whole)])
    cuts = [len(t) - round(len(t) * budget / total) for t in texts]
    return Split(
        [head for t, cut in zip(texts, cuts, strict=True) if (head := t[:cut])],
        [tail for t, cut in zip(texts, cuts, strict=True) if (tail := t[cut:])],
    )


def _files(path: Path, leave_out: Path | None) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for parent, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and Path(parent, f).resolve() != leave_out)
        for name in sorted(names):
            file = Path(parent, name)
            if not name.startswith(".") and file.is_file():  # no pipes, no dangling links
                yield file


def _read(file: Path) -> str | None:
    try:
        text = file.read_bytes().decode("utf-8-sig")  # a byte order mark is no part of the text
    except (UnicodeDecodeError, PermissionError):
        return None
    return None if "\0" in text else text
