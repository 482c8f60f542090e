"""The CUDA kernels on a machine without a GPU: compiled by the system's C++ compiler, in a process of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "emulated_cuda"


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize("of", ("numbers", "runtime", "selective_scan", "causal_conv", "ssd", "split"))
def test_kernels_thread_by_thread(of: str):
    file = str(FOLDER / f"emulated_{of}.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", file]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-20000:] + process.stderr[-2000:]
