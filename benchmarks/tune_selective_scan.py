"""Times other layouts of the selective scan's CUDA kernels, to choose the tables in ophis/ops/cuda/selective_scan.py.

    python benchmarks/tune_selective_scan.py [forward] [backward] [eager]

Each layout is checked before it is timed. Launches queue behind a kernel that sleeps, so that times are the GPU's own;
"eager" leaves it out and times what a call from Python costs. The cache is emptied before each call.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ophis import ops
from ophis.ops.cuda import selective_scan as cuda
from ophis.ops.cuda.selective_scan import Shape
from ophis.testing import CASES, check

# lanes, states, channels, preparers, steps, unroll, blocks
FORWARD = {
    16: [Shape(4, 4, 64, 128, 16, 1, 3), Shape(4, 4, 64, 64, 8, 1, 4), Shape(4, 4, 64, 96, 12, 1, 3)],
    64: [Shape(8, 8, 32, 128, 16, 1, 2), Shape(8, 8, 32, 64, 8, 1, 3)],
    128: [Shape(16, 8, 16, 128, 16, 1, 2), Shape(8, 16, 32, 128, 8, 1, 1)],
}
RUNNERS = (16, 12, 8)  # of a relay, for n = 16
BACKWARD = (4, 8)  # warps
SHAPES = {
    16: [(64, 512), (16, 2048), (8, 4096), (4, 8192), (2, 16384), (1, 32768), (1, 2048)],
    64: [(4, 2048)],
    128: [(4, 2048)],
}
SLEEP = 2_000_000  # cycles, about a millisecond


def draw(b: int, l: int, n: int, d: int = 2048) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    steps = torch.exp(torch.rand(d, device="cuda", generator=generator) * math.log(100) + math.log(1e-3))
    signals = {
        "x": normal(b, l, d),
        "dt": 0.1 * normal(b, l, d),
        "B": normal(b, l, n),
        "C": normal(b, l, n),
        **({"z": normal(b, l, d)} if n == 16 else {}),
    }
    return {
        **{name: signal.bfloat16() for name, signal in signals.items()},
        "A": -torch.arange(1.0, n + 1, device="cuda").expand(d, n).contiguous(),
        "D": normal(d),
        "dt_bias": torch.log(torch.expm1(steps)),
    }


def calls(b: int, l: int, n: int) -> dict[str, Callable[[], Any]]:
    tensors = draw(b, l, n)
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    y, _ = ops.selective_scan(**leaves, dt_softplus=True, backend="cuda")
    dy = torch.randn_like(y)

    @torch.no_grad()
    def forward() -> Any:
        return ops.selective_scan(**tensors, dt_softplus=True, backend="cuda")

    def backward() -> Any:
        return torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)

    def both() -> Any:
        out, _ = ops.selective_scan(**leaves, dt_softplus=True, backend="cuda")
        return torch.autograd.grad(out, list(leaves.values()), dy)

    return {"forward": forward, "backward": backward, "eager": both}


def milliseconds(call: Callable[[], Any], repeats: int = 10, sleep: bool = True) -> float:
    trash = torch.empty(64 * 2**20, device="cuda")
    times = []
    for i in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        trash.zero_()
        if sleep:
            torch.cuda._sleep(SLEEP)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def layouts(n: int) -> Iterator[str]:
    """Sets each in turn, and says which it is."""
    for shape in FORWARD[n]:
        cuda.SHAPES[n], cuda.relay_pays = shape, lambda b, d, device: False
        yield str(tuple(shape))
    for runners in RUNNERS if n == 16 else ():
        cuda.RUNNERS, cuda.relay_pays = runners, lambda b, d, device: True
        cuda.relay_kernel.cache_clear()
        yield f"relay of {runners}"


def checked(n: int) -> str:
    try:
        for length, case in ((333, 1), (150, 10)):
            sizes = dict(d=192, n=n) if case == 10 else dict(b=1, d=192, n=n)
            for dtype in (torch.float32, torch.bfloat16):
                check(ops.selective_scan, CASES["selective_scan"][case].inputs("cuda", dtype, length, **sizes), "cuda")
    except (AssertionError, RuntimeError) as error:
        return f"  WRONG: {str(error)[-200:]}"
    return ""


def main(works: list[str]) -> None:
    for n, shapes in SHAPES.items():
        work = {shape: calls(*shape, n) for shape in shapes}
        if "forward" in works:
            for layout in layouts(n):
                cuda.forward_plan.cache_clear()
                times = "  ".join(f"{b}x{l} {milliseconds(c['forward']):.3f}" for (b, l), c in work.items())
                print(f"forward n={n} {layout}: {times}{checked(n)}", flush=True)
        if "backward" in works:
            for warps in BACKWARD:
                cuda.warps_for = lambda b, l, d, groups, macros, warps=warps: warps
                cuda.backward_plan.cache_clear()
                times = "  ".join(f"{b}x{l} {milliseconds(c['backward']):.3f}" for (b, l), c in work.items())
                print(f"backward n={n} {warps} warps: {times}{checked(n)}", flush=True)
        if "eager" in works:
            times = "  ".join(f"{b}x{l} {milliseconds(c['eager'], sleep=False):.3f}" for (b, l), c in work.items())
            print(f"eager forward + backward n={n}: {times}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["forward", "backward", "eager"])
