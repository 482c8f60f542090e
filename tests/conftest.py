"""What holds for every test: one thread, a seed, poisoned memory; and what tests ask for: a device, a compiler."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, when it starts

import pytest
import torch

torch.set_num_threads(1)  # workers of pytest-xdist share the machine, and most tests are too small for two threads

# Whatever PyTorch hands out uninitialised, here and inside compiled and custom ops, is filled with NaN: a result that
# was never written, or padding that leaks, shows. PyTorch does so in deterministic mode only. There are CUDA functions
# without a deterministic variant (cumsum); they warn, and the "cuda" device below lets them.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
        ],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """The test runs on the CPU and, under `pytest -m gpu`, on a GPU."""
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """One that would rather fail than compile the same code a second time."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
