"""What the tests on a GPU share: the kernels that there are, their inputs, and what they are checked by."""

from __future__ import annotations

from typing import Any

import pytest

from ophis.ops import OPS
from ophis.testing import CASES, check

DEVICE = "cuda"
KERNELS = ("cuda", "triton")
NAMES = ("selective_scan", "ssd", "causal_conv", "rms_norm", "gated_rms_norm")
PAIRS = [(name, b.name) for name in NAMES for b in OPS[name].backends if b.name in KERNELS]
OF_SCAN = [backend for name, backend in PAIRS if name == "selective_scan"]
OF_SSD = [backend for name, backend in PAIRS if name == "ssd"]
RECURRENT = [pair for pair in PAIRS if pair[0] in ("selective_scan", "ssd")]
FULLEST = {"ssd": "as Mamba-2 calls it", "rms_norm": "wide residual", "gated_rms_norm": "norm before gate"}


def case(name: str, which: str, **options: Any) -> dict[str, Any]:
    """The inputs of a case, by its name. SSD's channels, d, are heads of 64 if they can be."""
    if name == "ssd":
        d, n = options.pop("d", 256), options.pop("n", 64)
        p = options.pop("p", next(p for p in (64, 32, 16, 8, 4, 2, 1) if d % p == 0))
        options |= dict(h=d // p, p=p, n=n)
    inputs = next(c for c in CASES[name] if c.name == which).inputs(DEVICE, **options)
    if name == "ssd" and which == "packed":  # the gate is the norm's, so that every backend is for it
        del inputs["z"]
        inputs["D"] = inputs["D"][:, 0] if inputs["D"].ndim == 2 else inputs["D"]
    return inputs


def fullest(name: str, **options: Any) -> dict[str, Any]:
    """The inputs of the op's case with the most options that is not packed; of SSD's without a gate."""
    return case(name, FULLEST.get(name, "everything"), **options)


def skip_unless(name: str, backend: str, inputs: dict[str, Any]) -> None:
    if reason := OPS[name].explain(**inputs)[backend]:
        pytest.skip(f"{backend}: {reason}")


def checked(name: str, backend: str, inputs: dict[str, Any]) -> None:
    skip_unless(name, backend, inputs)
    check(OPS[name], inputs, backend)
