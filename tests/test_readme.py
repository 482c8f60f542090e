"""The README's Python runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("index", range(2), ids=["layer", "language model"])
def test_block(index: int):
    assert len(BLOCKS) == 2
    exec(compile(BLOCKS[index], f"README.md, block {index}", "exec"), {})


def test_files_it_names_exist():
    root = Path(__file__).parent.parent
    for name in re.findall(r"`(ophis/[\w/.]+)`|\]\(((?!http)[\w/.]+)\)", README):
        assert (root / next(filter(None, name))).exists(), name
