"""The CUDA kernels on a machine without a GPU: compiled by the system's C++ compiler, in a process of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent / "emulated_cuda" / "kernels.py"


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_kernels_thread_by_thread():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", str(KERNELS)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-20000:] + process.stderr[-2000:]
