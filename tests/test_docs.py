"""The Python in docs/huggingface.md runs as printed, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "huggingface.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


# PEFT and TRL use names that transformers is about to change; without a GPU no memory is pinned, as a warning says.
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning")
def test_huggingface(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"docs/huggingface.md, block {number}", "exec"), names)
    assert len(BLOCKS) == 6
    printed = capsys.readouterr().out
    assert "\nRome\n" in printed
    assert names["text"].startswith("It was")
    assert names["classify"]("upstairs")[0]["label"] == "up"
