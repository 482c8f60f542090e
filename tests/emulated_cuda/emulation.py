"""A stand-in for NVRTC, the driver and the GPU: CUDA kernels are compiled for the CPU and run there, thread by thread.

Nothing of this is fast, and it says nothing about races within a warp; but every line of the kernels runs, on poisoned
shared memory, and what lies around each tensor that they write is looked at afterwards. The tests beside this file hold
them against the float64 reference; tests/test_ops_cuda.py runs them, in a process of their own, for what is imported
here is put in the place of the GPU's packages.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch

for name in ("cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.bindings.nvrtc"):
    sys.modules[name] = types.ModuleType(name)
driver = types.SimpleNamespace(CUmodule=object, cuCtxGetCurrent=lambda: (0, 1))  # every thread has a context
sys.modules["cuda.bindings"].__dict__.update(driver=driver, nvrtc=types.SimpleNamespace())

from ophis.ops.cuda import plans, runtime

HERE = Path(__file__).parent
LAUNCH = """
extern "C" void launch_{name}(long blocks, int threads, long shared, const Params* p) {{
  if (shared < (long){shared}) std::abort();
  run(blocks, threads, [&] {{ {name}(*p); }});
}}
"""
NAMES = {
    "selective_scan_forward.cu": ("outputs", "states", "gradients", "pass_states", "pass_gradients"),
    "selective_scan_relay.cu": ("relay",),
    "selective_scan_backward.cu": ("backward", "gather"),
    "ssd_steps.cu": ("steps", "d_steps", "add_chunks", "add_splits"),
    "ssd_forward.cu": ("outputs", "states", "ends", "flows", "flow_ends", "pass_states", "pass_flows"),
    "ssd_backward.cu": ("backward", "backward_later"),
    "causal_conv_forward.cu": ("convolve",),
    "causal_conv_backward.cu": ("convolve_back", "add_up"),
}
# What has `Shared` of its own, by kernel where they differ.
SHARED = {name: f"Shared<{name.upper()}>" for name in ("outputs", "states", "ends", "flows", "flow_ends")}
WITHOUT_SHARED = {"gather", "convolve", "convolve_back", "add_up", "add_chunks", "add_splits"}
FOLDER = Path(tempfile.mkdtemp())


@functools.cache
def load(file: str, macros: runtime.Macros, device: torch.device) -> ctypes.CDLL:
    launches = [LAUNCH.format(name=name, shared=shared_of(file, name)) for name in NAMES[file]]
    return compiled(f'#include <cstdlib>\n#include "{file}"\n' + "".join(launches), macros)


def compiled(source: str, macros: runtime.Macros = ()) -> ctypes.CDLL:
    """C++ that may include the kernels' files."""
    folder = Path(tempfile.mkdtemp(dir=FOLDER))
    for file in (*runtime.FOLDER.glob("*.cu*"), *HERE.glob("*.cuh")):  # the latter in the place of the former
        (folder / file.name).write_text(file.read_text())
    (folder / "source.cu").write_text(source)
    options = ["-O1", "-std=c++20", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    # A GPU reads 8 or 16 bytes only where a multiple of so many begins; this processor would read them anywhere.
    options += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    options += [f"-D{name}={value}" for name, value in macros]
    command = ["g++", *options, "-x", "c++", str(folder / "source.cu"), "-o", str(folder / "kernels.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "kernels.so"))


def shared_of(file: str, name: str) -> str:
    """The size of the shared memory that a kernel takes, in C++."""
    if name in WITHOUT_SHARED or name.startswith("pass_"):
        return "0"
    return f"sizeof({SHARED[name]})" if file == "ssd_forward.cu" else "sizeof(Shared)"


class Kernel:
    def __init__(self, module: ctypes.CDLL, name: str, threads: int, shared: int):
        self.function = getattr(module, f"launch_{name}")
        self.threads, self.shared = threads, shared

    def __call__(self, blocks: int, arguments: int, stream: int) -> None:
        parameters = ctypes.c_void_p.from_address(arguments)
        self.function(ctypes.c_long(blocks), self.threads, ctypes.c_long(self.shared), parameters)
        whole = all((part == UNTOUCHED).all() for memory in guarded for part in (memory[:GUARD], memory[-GUARD:]))
        if not whole:
            guarded.clear()  # the next test is not to blame
        assert whole, "written past a tensor"


GUARD, UNTOUCHED = 4096, 0xFF  # bytes before and after each tensor, and what all of it holds: NaN in every dtype
guarded: collections.deque[torch.Tensor] = collections.deque(maxlen=64)  # memory lately handed out


def new_empty(self: torch.Tensor, *size: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
    dtype = dtype or self.dtype
    memory = torch.full((2 * GUARD + shape.numel() * dtype.itemsize,), UNTOUCHED, dtype=torch.uint8)
    guarded.append(memory)
    return memory[GUARD : memory.numel() - GUARD].view(dtype).view(shape)


def allocate(self: plans.Scratch, like: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
    """Each part by itself, since the next one would hide what is written past the end."""
    if not self.numbers:
        return [], []
    parts = [new_empty(like, (size,), dtype=torch.float32) for size in self.sizes]
    return parts, [part.data_ptr() if size else 0 for part, size in zip(parts, self.sizes, strict=True)]


torch.Tensor.new_empty = new_empty  # type: ignore[assignment]
plans.empty_like = lambda t: new_empty(t, t.shape)
plans.Scratch.allocate = allocate  # type: ignore[method-assign]
runtime.load, runtime.Kernel = load, Kernel  # type: ignore[assignment]
torch._C._cuda_getDevice = lambda: None  # type: ignore[attr-defined]  # as the index of the CPU's is
runtime.stream = lambda: 0
runtime.multiprocessors = lambda device: 1
