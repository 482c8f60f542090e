"""The Triton kernels on a machine without a GPU: under Triton's interpreter, which runs them in NumPy.

The interpreter is chosen when triton is imported, and in every other test the backend must be what it is for a user of
this machine. So those tests are in interpreted_triton.py, which pytest does not collect, and run in a process of their
own. On a GPU the kernels are checked like every backend, and by test_ops_gpu.py and its neighbour.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="here a GPU runs them, for the tests marked so")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is for Linux")
def test_kernels_under_the_interpreter():
    files = [str(HERE / name) for name in ("interpreted_triton.py", "test_ops_steps.py")]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", "-k", "triton", *files],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-20000:] + process.stderr[-2000:]
