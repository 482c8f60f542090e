"""Files and folders that appear whole or not at all: a process killed at any moment leaves nothing half-written.

The way is the usual one: write under another name in the same folder, have the disk confirm it, and rename. A rename
either happened or did not, and what is read under the old name until then stays whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial-"  # begins the name of what is not whole yet, or no longer


def write_whole(path: Path, text: str) -> None:
    """Replaces a file's contents in one step."""
    partial = _partial(path)
    partial.write_text(text, encoding="utf-8")
    _publish(partial, path)


def link_whole(source: Path, path: Path) -> None:
    """Makes `path` the same file as `source`, in one step; a copy where the file system has no hard links."""
    if path.exists() and path.samefile(source):  # a rename between two names of one file does nothing
        return
    partial = _partial(path)
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    _publish(partial, path)


def rename_whole(folder: Path, path: Path) -> None:
    """Gives a folder that is filled its final name, once everything in it is on disk. A folder of that name goes."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))
    old = path.with_name(f"{PARTIAL}old-{path.name}")
    if path.is_dir():  # with something in it, it cannot be renamed over
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    _publish(folder, path)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """Another name to write a file or folder under. It becomes `path` at the end, and is gone after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        _remove(partial)
        yield partial
        if partial.is_dir():
            rename_whole(partial, path)
        else:
            _publish(partial, path)
    finally:
        _remove(partial)


def remove_whole(folder: Path) -> None:
    """Removes a folder; from the first moment on, nothing is left under its name."""
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    folder.rename(partial)
    shutil.rmtree(partial)


def remove_partial(folder: Path) -> None:
    """Clears away what a process that was killed left unfinished in a folder."""
    for path in folder.glob(f"{PARTIAL}*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(PARTIAL + path.name)


def _publish(partial: Path, path: Path) -> None:
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
