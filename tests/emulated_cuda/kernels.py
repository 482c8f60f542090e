"""The CUDA kernels compiled for the CPU and run there, thread by thread. Run by tests/test_ops_cuda.py.

Nothing of this is fast, and it says nothing about races within a warp; but every line of the kernels runs, on poisoned
shared memory, against the float64 reference.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
import torch

for name in ("cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.bindings.nvrtc"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["cuda.bindings"].__dict__.update(
    driver=types.SimpleNamespace(CUmodule=object), nvrtc=types.SimpleNamespace()
)

from ophis import ops
from ophis.ops.causal_conv import causal_conv
from ophis.ops.cuda import causal_conv as convolution
from ophis.ops.cuda import runtime, selective_scan
from ophis.ops.library import causal_conv as conv_library
from ophis.ops.library.selective_scan import Kernels, custom_op
from ophis.testing import CASES, check

HERE = Path(__file__).parent
STRUCTS = {"gather": "Parts"}
LAUNCH = """
extern "C" void launch_{name}(long blocks, int threads, long shared, const {struct}* p) {{
  if (shared < (long){shared}) std::abort();
  run(blocks, threads, [&] {{ {name}(*p); }});
}}
"""
NAMES = {
    "selective_scan_forward.cu": ("outputs", "states", "gradients", "pass_states", "pass_gradients"),
    "selective_scan_relay.cu": ("relay",),
    "selective_scan_backward.cu": ("backward", "gather"),
    "ssd_steps.cu": ("steps", "d_steps"),
    "ssd_forward.cu": ("outputs", "states", "ends", "flows", "flow_ends", "pass_states", "pass_flows"),
    "ssd_backward.cu": ("backward",),
    "causal_conv.cu": ("convolve",),
}
# What has `Shared` of its own, by kernel where they differ.
SHARED = {"outputs": "Shared<true>", **dict.fromkeys(("states", "ends", "flows", "flow_ends"), "Shared<false>")}
FOLDER = Path(tempfile.mkdtemp())


@functools.cache
def load(file: str, macros: runtime.Macros, device: torch.device) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(dir=FOLDER))
    for source in runtime.FOLDER.glob("*.cu*"):
        (folder / source.name).write_text(source.read_text())
    for source in HERE.glob("*.cuh"):
        (folder / source.name).write_text(source.read_text())
    launches = [
        LAUNCH.format(
            name=name,
            struct=STRUCTS.get(name, "Params"),
            shared=shared_of(file, name),
        )
        for name in NAMES[file]
    ]
    (folder / "launches.cu").write_text(f'#include <cstdlib>\n#include "{file}"\n' + "".join(launches))
    options = ["-O1", "-std=c++20", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    options += [f"-D{name}={value}" for name, value in macros]
    command = ["g++", *options, "-x", "c++", str(folder / "launches.cu"), "-o", str(folder / "kernels.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "kernels.so"))


def shared_of(file: str, name: str) -> str:
    """The size of the shared memory that a kernel takes, in C++."""
    if name in ("gather", "convolve", "steps", "d_steps") or name.startswith("pass_"):
        return "0"
    return f"sizeof({SHARED[name]})" if file == "ssd_forward.cu" else "sizeof(Shared)"


class Kernel:
    def __init__(self, module: ctypes.CDLL, name: str, threads: int, shared: int):
        self.function = getattr(module, f"launch_{name}")
        self.threads, self.shared = threads, shared

    def __call__(self, blocks: int, parameters: Any, stream: int) -> None:
        self.function(ctypes.c_long(blocks), self.threads, ctypes.c_long(self.shared), ctypes.byref(parameters))


runtime.load, runtime.Kernel = load, Kernel  # type: ignore[assignment]
runtime.on_device_of = lambda x: contextlib.nullcontext()
runtime.stream = lambda: 0
runtime.multiprocessors = lambda device: 1
kernels = Kernels(selective_scan.forward, selective_scan.backward, selective_scan.kept_shape, in_groups=False)
ops.selective_scan.register("emulated", selective_scan.why_not_these)(custom_op("emulated", kernels))


@pytest.fixture(autouse=True)
def no_plans():
    """Tests change what they depend on."""
    selective_scan.forward_plan.cache_clear()
    selective_scan.backward_plan.cache_clear()


SIZES = dict(d=24, n=16)  # groups of 8 channels are Triton's; the others are all here
RUN = [
    case
    for case in CASES["selective_scan"]
    if "channel" not in case.name and ops.selective_scan.explain(**case.inputs(length=4, **SIZES))["emulated"] is None
]


def test_there_are_cases():
    assert {case.name for case in RUN} >= {"plain", "everything", "packed"}


@pytest.mark.parametrize("case", RUN, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("dtype", "length"), [(torch.float32, 3), (torch.float32, 70), (torch.bfloat16, 70), (torch.float16, 33)], ids=str
)
def test_cases(case: Any, dtype: torch.dtype, length: int):
    check(ops.selective_scan, case.inputs(dtype=dtype, length=length, **SIZES), "emulated")


@pytest.mark.parametrize("n", (1, 8, 24, 64, 128, 256))
def test_state_sizes(n: int):
    case = next(case for case in RUN if case.name == "everything")
    check(ops.selective_scan, case.inputs(length=40, b=1, d=20, n=n), "emulated")


@pytest.mark.parametrize("name", ("everything", "packed"))
@pytest.mark.parametrize("n", (16, 32))
def test_segments(name: str, n: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: 100)
    monkeypatch.setattr(selective_scan, "SHORTEST", 32)
    case = next(case for case in RUN if case.name == name)
    check(ops.selective_scan, case.inputs(length=150, b=1, d=20, n=n), "emulated")


@pytest.fixture
def relayed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selective_scan, "relay_pays", lambda b, d, device: True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("everything", "packed"))
@pytest.mark.usefixtures("relayed")
def test_relay(name: str, dtype: torch.dtype):
    case = next(case for case in RUN if case.name == name)
    check(ops.selective_scan, case.inputs(dtype=dtype, length=300, b=1, d=20, n=16), "emulated")


@pytest.mark.parametrize("lengths", [(1, 1, 0, 2, 5, 40, 0, 1, 90), (8, 120, 8, 0, 0, 3)], ids=str)
@pytest.mark.usefixtures("relayed")
def test_relay_of_short_sequences(lengths: tuple[int, ...]):
    """Several that start and end in one leg, and some that are empty."""
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    inputs = next(case for case in RUN if case.name == "packed").inputs(length=int(offsets[-1]), d=20, n=16)
    inputs["initial_state"] = torch.randn(len(lengths), *inputs["initial_state"].shape[1:])
    check(ops.selective_scan, {**inputs, "cu_seqlens": offsets}, "emulated")


@pytest.mark.parametrize("relay", (False, True))
def test_what_is_not_finite_stays_in_its_sequence(relay: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selective_scan, "relay_pays", lambda b, d, device: relay)
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: 100)
    monkeypatch.setattr(selective_scan, "SHORTEST", 32)
    inputs = next(case for case in RUN if case.name == "packed").inputs(length=150, d=20, n=16)
    inputs["cu_seqlens"] = offsets = torch.tensor([0, 60, 63, 150], dtype=torch.int32)
    inputs["initial_state"] = torch.randn(3, *inputs["initial_state"].shape[1:])
    y, state = ops.selective_scan(**inputs, backend="emulated")
    inputs["x"] = inputs["x"].clone()
    inputs["x"][:, 40] = torch.nan
    y_nan, state_nan = ops.selective_scan(**inputs, backend="emulated")
    assert y_nan[:, 40:60].isnan().all()
    assert state_nan[0].isnan().all()
    assert torch.equal(y_nan[:, :40], y[:, :40])
    assert torch.equal(y_nan[:, offsets[1] :], y[:, offsets[1] :])
    assert torch.equal(state_nan[1:], state[1:])


@pytest.mark.parametrize("name", ("everything", "packed"))
def test_eight_warps(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selective_scan, "warps_for", lambda *sizes: 8)
    case = next(case for case in RUN if case.name == name)
    check(ops.selective_scan, case.inputs(dtype=torch.bfloat16, length=70, b=1, d=150, n=16), "emulated")


def test_groups_of_channels():
    case = next(case for case in CASES["selective_scan"] if case.name == "groups")
    check(ops.selective_scan, case.inputs(length=40, d=192, n=16), "emulated")


def test_slices_of_projections():
    """Neighbours that can and that cannot be read four at a time."""
    case = next(case for case in RUN if case.name == "everything")
    for offset in (1, 4):
        inputs = case.inputs(length=40, b=2, d=20, n=16)
        for key in ("x", "dt", "z", "B", "C"):
            wide = torch.full((*inputs[key].shape[:-1], 2 * inputs[key].shape[-1] + 4), torch.nan)
            part = wide[..., offset : offset + inputs[key].shape[-1]]
            inputs[key] = part.copy_(inputs[key])
        check(ops.selective_scan, inputs, "emulated")


# The convolution, whose backward pass is Triton's: here it is the reference's.


def conv_backward(dy, d_final, x, weight, bias, initial_state, cu_seqlens, silu):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, initial_state)]
    with torch.enable_grad():
        names = ("x", "weight", "bias", "initial_state")
        call = dict(zip(names, leaves, strict=True), cu_seqlens=cu_seqlens, activation="silu" if silu else None)
        outputs = causal_conv.run_reference(**call)
    wanted = [t for t in leaves if t is not None]
    weights = [dy, torch.zeros_like(outputs[1]) if d_final is None else d_final]
    found = iter(torch.autograd.grad(outputs, wanted, weights, allow_unused=True, materialize_grads=True))
    return tuple(None if t is None else next(found) for t in leaves)


causal_conv.register("emulated", convolution.why_not_these)(
    conv_library.custom_op("emulated", conv_library.Kernels(convolution.forward, conv_backward))
)
CONV = [case for case in CASES["causal_conv"] if causal_conv.explain(**case.inputs(length=4, d=24))["emulated"] is None]


def test_there_are_cases_of_the_convolution():
    assert {case.name for case in CONV} >= {"everything", "packed"}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("length", (2, 70))
@pytest.mark.parametrize("case", CONV, ids=lambda case: case.name)
def test_convolution(case: Any, length: int, dtype: torch.dtype):
    check(causal_conv, case.inputs(dtype=dtype, length=length, d=24), "emulated")


@pytest.mark.parametrize("lengths", [(1, 1, 0, 2, 5, 40, 0, 1, 3), (32, 16, 0, 17)], ids=str)
def test_convolution_of_short_sequences(lengths: tuple[int, ...]):
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    inputs = next(case for case in CONV if case.name == "packed").inputs(length=int(offsets[-1]), d=20)
    inputs["initial_state"] = torch.randn(len(lengths), *inputs["initial_state"].shape[1:])
    check(causal_conv, {**inputs, "cu_seqlens": offsets}, "emulated")


def test_convolution_of_a_slice():
    inputs = next(case for case in CONV if case.name == "everything").inputs(length=40, b=2, d=20)
    for offset in (1, 4):
        wide = torch.full((2, 40, 48), torch.nan)
        inputs["x"] = wide[..., offset : offset + 20].copy_(inputs["x"])
        check(causal_conv, inputs, "emulated")
