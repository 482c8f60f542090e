"""Show versions, devices, and the backend of every operator on this machine."""

from __future__ import annotations

import argparse

# What brings something where it is installed: (package, for what).
OPTIONAL = (
    ("triton", "kernels on GPUs"),
    ("cuda-bindings", "faster kernels on NVIDIA GPUs"),
    ("numba", "compiled kernels on CPUs"),
    ("accelerate", "ophis train"),
    ("rich", "ophis train"),
    ("gguf", "ophis convert to and from GGUF"),
    ("lm-eval", "ophis evaluate --tasks"),
    ("matplotlib", "plots"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    import platform

    import torch

    from ophis import __version__

    print(f"{'ophis':21}{__version__}")
    print(f"{'python':21}{platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"{'torch':21}{torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'transformers':21}{version('transformers') or 'not installed'}")
    for line in devices():
        print(f"{'device':21}{line}")
    print(f"\n{'optional':21}{'version':14}for")
    for name, purpose in OPTIONAL:
        print(f"{name:21}{version(name) or 'missing':14}{purpose}")
    device = default_device()
    print(f"\n{'operator':21}{f'on {device}':14}why not another")
    for name, reasons in backends(device):
        runs = next(backend for backend, reason in reasons.items() if reason is None)
        others = [f"{backend}: {reason or 'could, slower'}" for backend, reason in reasons.items() if backend != runs]
        for i, other in enumerate(others or [""]):
            print(f"{'' if i else name:21}{'' if i else runs:14}{other}".rstrip())
    return 0


def version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def default_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def devices() -> list[str]:
    import torch

    found = ["cpu"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i}, {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def backends(device: str) -> list[tuple[str, dict[str, str | None]]]:
    """For each op, its backends, fastest first, and why each would not run the op's plainest case there."""
    import torch

    from ophis.ops import OPS
    from ophis.testing import CASES, STEPS

    calls = {k: cases[0].inputs(device=device, dtype=torch.float32) for k, cases in sorted({**CASES, **STEPS}.items())}
    return [(name, OPS[name].explain(**call)) for name, call in calls.items()]
