"""On which device kernels are launched, and in which context, with a driver that only remembers (see emulation.py)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulation import driver, runtime


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of two devices, the first of which is the current one: whose contexts threads without one were given."""
    given: list[int] = []
    current = [0]

    @contextlib.contextmanager
    def device(of: torch.device) -> Iterator[None]:
        before, current[0] = current[0], of.index
        yield
        current[0] = before

    monkeypatch.setattr(runtime, "_thread", runtime._Thread())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(driver, "cuCtxGetCurrent", lambda: (0, 0))
    monkeypatch.setattr(driver, "cuDeviceGet", lambda index: (0, index), raising=False)
    monkeypatch.setattr(driver, "cuDevicePrimaryCtxRetain", lambda index: (0, 100 + index), raising=False)
    monkeypatch.setattr(driver, "cuCtxSetCurrent", lambda context: (given.append(context), (0,))[1], raising=False)
    return given


@runtime.on_its_device
def launched(x: Any, what: str) -> tuple[int, str]:
    return torch._C._cuda_getDevice(), what


def on(index: int) -> Any:
    return SimpleNamespace(device=torch.device("cuda", index))


def test_a_launch_is_where_its_first_tensor_is(contexts: list[int]):
    assert launched(on(0), "a") == (0, "a")
    assert launched(on(1), "b") == (1, "b")
    assert launched(on(0), "c") == (0, "c")
    assert contexts == [100, 101]  # once each


def test_every_thread_has_a_context(contexts: list[int]):
    """Autograd's may have none."""
    for _ in range(2):
        thread = threading.Thread(target=launched, args=(on(0), "a"))
        thread.start()
        thread.join()
    assert contexts == [100, 100]
