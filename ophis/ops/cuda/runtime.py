"""From CUDA C++ to a kernel that can be launched: NVRTC, the driver, and a cache on disk."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc  # pyright: ignore[reportMissingImports]

FOLDER = Path(__file__).parent
Macros = tuple[tuple[str, int], ...]


class Kernel:
    """One function of a compiled file, on one device."""

    def __init__(self, module: driver.CUmodule, name: str, threads: int, shared: int):
        self.function = _ok(driver.cuModuleGetFunction(module, name.encode()))
        self.threads, self.shared = threads, shared
        if shared > 48 * 1024:  # more than that a kernel has to ask for
            dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _ok(driver.cuFuncSetAttribute(self.function, dynamic, shared))

    def __call__(self, blocks: int, arguments: int, stream: int) -> None:
        """Launches it; `arguments` is the address of what `Parameters.filled` gave."""
        result = driver.cuLaunchKernel(
            self.function, blocks, 1, 1, self.threads, 1, 1, self.shared, stream, arguments, 0
        )
        if result[0]:
            _ok(result)


class Parameters:
    """The struct that is a kernel's only argument: pointers, which a call brings, and after them numbers of 64 bits,
    which are the same for many. The pointers are to tensors, some of which may be left out at the end, and to parts of
    scratch memory.

    In memory its own address comes before it: what a launch takes is a list of arguments' addresses.
    """

    def __init__(self, numbers: Sequence[int], tensors: int, left_out: int = 0, parts: int = 0):
        self.pointers = struct.Struct(f"{1 + tensors}q{8 * left_out}x{parts}q")
        self.template = bytes(self.pointers.size) + struct.pack(f"{len(numbers)}q", *numbers)
        self.type = ctypes.c_char * len(self.template)

    def filled(self, *addresses: int) -> ctypes.Array[ctypes.c_char]:
        memory = self.type.from_buffer_copy(self.template)
        self.pointers.pack_into(memory, 0, ctypes.addressof(memory) + 8, *addresses)
        return memory


def why_not_on(device: torch.device) -> str | None:
    """The kernels take up to 213 KB of shared memory a block, which most GPUs lack, and were measured on an H200."""
    capability = _capability(device)
    if capability == (9, 0):
        return None
    return f"{device} has compute capability {capability[0]}.{capability[1]}, and its kernels are for 9.0 (H100, H200)"


# Run, not traced, by torch.compile: see `_load_backends` in ophis/ops/_op.py.
why_not_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a function that launches kernels: they run on the current device, which need not be the first tensor's, and
    in its context. A thread may be without one though the device is current: autograd's, before it has launched
    anything itself.
    """

    @functools.wraps(function)
    def on_that_of(x: torch.Tensor, *others: Any) -> Any:
        index = x.device.index
        if index != torch._C._cuda_getDevice():
            with torch.cuda.device(x.device):
                return on_that_of(x, *others)
        if index not in _thread.devices:
            if not int(_ok(driver.cuCtxGetCurrent())):
                _ok(driver.cuCtxSetCurrent(_ok(driver.cuDevicePrimaryCtxRetain(_ok(driver.cuDeviceGet(index))))))
            _thread.devices.add(index)
        return function(x, *others)

    return on_that_of


class _Thread(threading.local):
    """A copy for each thread."""

    def __init__(self):
        self.devices: set[int] = set()  # that have a context here


_thread = _Thread()


def stream() -> int:
    """The current one of the current device. By the functions that Triton calls, too: PyTorch's own takes 7 us."""
    return torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def load(file: str, macros: Macros, device: torch.device) -> driver.CUmodule:
    """A file of this folder, compiled with these macros for this device, which must be the current one."""
    major, minor = _capability(device)
    # "a": with the instructions that later architectures lack, the tensor cores' for a warpgroup among them.
    options = (f"--gpu-architecture=sm_{major}{minor}a", "--std=c++17", "-default-device")
    options += tuple(f"-D{name}={value}" for name, value in macros)
    text, headers = _sources(file)
    version = _ok(nvrtc.nvrtcVersion(), 2)
    key = hashlib.sha256(repr((version, options, text, headers)).encode()).hexdigest()[:32]
    path = cache_folder() / f"{Path(file).stem}-{key}.cubin"
    with contextlib.suppress(OSError, RuntimeError):  # no such file, or a damaged one, which is made anew
        return _ok(driver.cuModuleLoadData(path.read_bytes()))
    binary = _compile(file, text, headers, options)
    _keep(path, binary)
    return _ok(driver.cuModuleLoadData(binary))


def cache_folder() -> Path:
    """$OPHIS_CACHE_DIR, or the user's cache folder."""
    if folder := os.environ.get("OPHIS_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ophis"


@functools.cache
def _sources(file: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    headers = sorted(FOLDER.glob("*.cuh"))
    return (FOLDER / file).read_text(encoding="utf-8"), tuple((h.name, h.read_text(encoding="utf-8")) for h in headers)


def _compile(file: str, text: str, headers: tuple[tuple[str, str], ...], options: tuple[str, ...]) -> bytes:
    names, texts = [name.encode() for name, _ in headers], [header.encode() for _, header in headers]
    program = _ok(nvrtc.nvrtcCreateProgram(text.encode(), file.encode(), len(headers), texts, names))
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _ok(nvrtc.nvrtcGetProgramLogSize(program))
        _ok(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{file} did not compile with {' '.join(options)}:\n{log.decode()}")
    binary = b" " * _ok(nvrtc.nvrtcGetCUBINSize(program))
    _ok(nvrtc.nvrtcGetCUBIN(program, binary))
    _ok(nvrtc.nvrtcDestroyProgram(program))
    return binary


def _keep(path: Path, binary: bytes) -> None:
    """Written beside and renamed, since several processes may compile the same file; without a cache all works too."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(binary)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError:
        pass


def _ok(result: tuple[Any, ...], values: int = 1) -> Any:
    """The values of a call of the driver or of NVRTC, whose first one is an error code."""
    error, *rest = result
    if int(error):
        raise RuntimeError(f"CUDA: {error.name}, from a kernel of ophis.ops.cuda")
    return (rest[0] if rest else None) if values == 1 else tuple(rest)
