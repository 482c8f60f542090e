"""Milliseconds of calls that take turns on one device, and what that device can do at best."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

REPEATS = {"cuda": 30, "cpu": 5}
FEWEST = 3
BUDGET = 2.0  # seconds that the repeats of one call may take; one of 0.1 s, a scan of a million, keeps 20 of them
CACHE = 256 * 2**20  # bytes, more than any device's last cache holds
GRAPH_BELOW = 8.0  # ms: launching kernels, 70 in a layer forward and backward, may take longer than running them
SLOW = 1.0  # seconds of a call above which it is not timed: PyTorch's scan of a hundred thousand positions
SHORT = 0.01  # seconds, of which launching kernels may be a good part

Call = Callable[[], Any]


class Times(NamedTuple):
    p20: float  # milliseconds
    p50: float
    p80: float
    repeats: int
    peak_mib: float | None  # allocated above what was there before the call
    graph: float | None  # p50 of the same call replayed as a CUDA graph: its time without the CPU's part


class Limits(NamedTuple):
    """Of a device."""

    copy: float  # bytes a second, read and written
    exponentials: float | None  # a second
    products: float | None = None  # floating-point operations a second, of matrices in bfloat16

    def floor(self, moved: int, exponentials: int, products: int = 0) -> float:
        """The milliseconds that nothing can be faster than."""
        seconds = [moved / self.copy]
        if self.exponentials:
            seconds.append(exponentials / self.exponentials)
        if self.products:
            seconds.append(products / self.products)
        return 1e3 * max(seconds)


def take_turns(calls: dict[str, Call], device: torch.device, repeats: int | None = None) -> dict[str, Times]:
    """Each call in turn, again and again: a device that slows down slows all of them. All ran before, once at least.

    The CPU goes on while the GPU works, as it does in a model; the last cache is emptied before each call.
    """
    repeats = repeats or REPEATS[device.type]
    again = {}
    for name, call in calls.items():
        again[name] = max(min(FEWEST, repeats), min(repeats, int(BUDGET / seconds(call, device))))
    peaks = {name: peak_mib(call, device) for name, call in calls.items()}
    eager = _rounds(calls, again, device)
    graphs = {
        n: _graph(c) for n, c in calls.items() if device.type == "cuda" and statistics.median(eager[n]) < GRAPH_BELOW
    }
    replays = {name: graph.replay for name, graph in graphs.items() if graph is not None}
    replayed = _rounds(replays, again, device)
    found = {}
    for name, times in eager.items():
        p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
        graph = statistics.median(replayed[name]) if name in replayed else None
        found[name] = Times(p20, statistics.median(times), p80, len(times), peaks[name], graph)
    return found


def _rounds(calls: dict[str, Call], again: dict[str, int], device: torch.device) -> dict[str, list[float]]:
    flush = torch.empty(CACHE if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    measured: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    for i in range(max((again[name] for name in calls), default=0)):
        for name, call in calls.items():
            if i < again[name]:
                flush.zero_()
                measured[name].append(_once(call, device))
    return {name: [read() for read in reads] for name, reads in measured.items()}


def _once(call: Call, device: torch.device) -> Callable[[], float]:
    """Runs it; what is returned gives the milliseconds, and waits for them."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        milliseconds = 1e3 * (time.perf_counter() - start)
        return lambda: milliseconds
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()

    def read() -> float:
        last.synchronize()
        return first.elapsed_time(last)

    return read


def seconds(call: Call, device: torch.device) -> float:
    """Of one call, from end to end."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return max(time.perf_counter() - start, 1e-9)


def estimate(
    call_of: Callable[[int, int], Call], batch: int, length: int, first: tuple[int, int], device: torch.device
) -> float:
    """About how many seconds `call_of(batch, length)` takes, from shorter ones, of which `first` is the first.

    The time grows at least with the length; on a CPU with the batch as well. Of a short call on a GPU most is the
    CPU's, which does not grow, so it is not multiplied by thousands.
    """
    b, l = first
    while True:
        call = call_of(b, l)
        call()  # may compile
        took = seconds(call, device)
        times = length / l * (batch / b if device.type == "cpu" else 1)
        if took * times <= SLOW or took >= SHORT or l == length:
            return took * times
        l = min(16 * l, length)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(call: Call, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None  # the CPU's allocator does not count
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _graph(call: Call) -> torch.cuda.CUDAGraph | None:
    """None where the call cannot be captured: it reads something back from the device."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        return None
    return graph


def limits(device: torch.device, quick: bool = False) -> Limits:
    """Copying and matrix products are measured; exponentials are 16 a clock and multiprocessor, as on every GPU of
    NVIDIA's from 2016 on."""
    source = torch.zeros(2**30 if device.type == "cuda" and not quick else 2**26, dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    milliseconds = statistics.median(_rounds({"copy": copy}, {"copy": 5 if quick else 20}, device)["copy"])
    rate = None
    if device.type == "cuda" and not torch.version.hip and (clock := _clock(device)):
        rate = 16 * clock * torch.cuda.get_device_properties(device).multi_processor_count
    return Limits(2 * source.numel() / (milliseconds / 1e3), rate, _products(device, quick))


def _products(device: torch.device, quick: bool) -> float | None:
    """On numbers as they come: of zeros a product is a tenth faster."""
    if device.type != "cuda":
        return None
    size = 1024 if quick else 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))

    def multiply() -> None:
        torch.mm(a, b)

    multiply()
    milliseconds = statistics.median(
        _rounds({"products": multiply}, {"products": 5 if quick else 10}, device)["products"]
    )
    return 2 * size**3 / (milliseconds / 1e3)


def _clock(device: torch.device) -> float | None:
    """The highest, in cycles a second."""
    kilohertz = getattr(torch.cuda.get_device_properties(device), "clock_rate", None)  # from PyTorch 2.9 on
    if kilohertz:
        return 1e3 * kilohertz
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        return 1e6 * float(subprocess.check_output(query, text=True, stderr=subprocess.DEVNULL).splitlines()[0])
    except (OSError, ValueError, IndexError, subprocess.CalledProcessError):
        return None
