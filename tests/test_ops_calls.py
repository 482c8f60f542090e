"""What a call refuses, in which words, and who runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ophis import ops
from ophis.ops import OPS, use_backend
from ophis.ops._op import Op, op
from ophis.testing import CASES, backends


def refused(name: str, error: type[Exception], message: str, **changes: Any) -> None:
    """The first case of the op with some arguments changed raises exactly this."""
    inputs = {**CASES[name][0].inputs(length=4), **changes}
    for backend in (None, *backends(OPS[name], CASES[name][0].inputs(length=4))):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            OPS[name](**inputs, backend=backend)


zeros = torch.zeros


# Sizes of the plain cases: selective_scan b=2 l=4 d=6 n=4; ssd b=2 l=4 h=4 p=3 g=1 n=5; causal_conv b=2 l=4 d=6 w=4.
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ssd", dict(B=zeros(2, 3, 1, 5)), "ssd: B has shape (2, 3, 1, 5), expected (b=2, l=4, g, n)"),
        ("ssd", dict(x=zeros(2, 4, 12)), "ssd: x has shape (2, 4, 12), expected (b, l, h, p)"),
        ("ssd", dict(A=zeros(5)), "ssd: A has shape (5,), expected (h=4,)"),
        ("ssd", dict(C=zeros(2, 4, 2, 5)), "ssd: C has shape (2, 4, 2, 5), expected (b=2, l=4, g=1, n=5)"),
        ("ssd", dict(D=zeros(4, 2)), "ssd: D has shape (4, 2), expected (h=4,) or (h=4, p=3)"),
        (
            "ssd",
            dict(initial_state=zeros(1, 4, 3, 5)),
            "ssd: initial_state has shape (1, 4, 3, 5), expected (b=2, h=4, p=3, n=5)",
        ),
        (
            "ssd",
            dict(B=zeros(2, 4, 3, 5), C=zeros(2, 4, 3, 5)),
            "ssd: g=3 groups cannot share h=4 evenly; g must divide h",
        ),
        (
            "selective_scan",
            dict(B=zeros(2, 4, 4, 5), C=zeros(2, 4, 4, 5), A=zeros(6, 5)),
            "selective_scan: g=4 groups cannot share d=6 evenly; g must divide d",
        ),
        (
            "selective_scan",
            dict(B=zeros(4, 4)),
            "selective_scan: B has shape (4, 4), expected (b=2, l=4, n=4) or (b=2, l=4, g, n=4) or (d=6, n=4)",
        ),
        ("selective_scan", dict(x=zeros(2, 0, 6), dt=zeros(2, 0, 6), B=zeros(6, 4), C=zeros(6, 4)),
         "selective_scan: x has length 0, expected at least 1"),
        ("causal_conv", dict(weight=zeros(5, 4)), "causal_conv: weight has shape (5, 4), expected (d=6, w)"),
        (
            "causal_conv",
            dict(initial_state=zeros(2, 4, 6)),
            "causal_conv: initial_state has shape (2, 4, 6), expected (b=2, w-1, d=6)",
        ),
        ("causal_conv", dict(activation="relu"), "causal_conv: activation is 'relu', expected None or 'silu'"),
        ("rms_norm", dict(weight=zeros(47)), "rms_norm: weight has shape (47,), expected (d=48,)"),
        ("gated_rms_norm", dict(groups=5), "gated_rms_norm: groups=5 must divide the width d=48"),
        ("s4d", dict(C=zeros(4, 6)), "s4d: C has shape (4, 6), expected (d=4, n=5)"),
        ("long_conv", dict(kernel=zeros(4, 4)), "long_conv: kernel has shape (4, 4), expected (d=5, k)"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)  # fmt: skip
def test_wrong_shapes_and_options(name: str, changes: dict[str, Any], message: str):
    refused(name, ValueError, message, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ssd", dict(x=zeros(2, 4, 4, 3, dtype=torch.int64)), "ssd: x has dtype int64, expected a floating dtype"),
        ("ssd", dict(A=zeros(4) * 1j), "ssd: A has dtype complex64, expected a floating dtype"),
        (
            "selective_scan",
            dict(A=zeros(6, 4, dtype=torch.int32)),
            "selective_scan: A has dtype int32, expected a floating or complex dtype",
        ),
        ("ssd", dict(dt=0.1), "ssd: dt is a float, expected a tensor of shape (b=2, l=4, h=4)"),
        ("ssd", dict(B=None), "ssd: B is None, expected a tensor of shape (b=2, l=4, g, n)"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_wrong_types(name: str, changes: dict[str, Any], message: str):
    refused(name, TypeError, message, **changes)


def test_wrong_device():
    B = torch.zeros(2, 4, 1, 5, device="meta")
    refused("ssd", ValueError, "ssd: B is on meta, expected cpu, where x is", B=B)


@pytest.mark.parametrize(
    ("offsets", "got"),
    [
        (torch.tensor([0, 4]), "int64 of shape (2,)"),
        (torch.tensor([4], dtype=torch.int32), "int32 of shape (1,)"),
        (torch.tensor([[0, 4]], dtype=torch.int32), "int32 of shape (1, 2)"),
        ([0, 4], "a list"),
        (torch.tensor([0, 3], dtype=torch.int32), "[0, 3]"),
        (torch.tensor([1, 4], dtype=torch.int32), "[1, 4]"),
        (torch.tensor([0, 3, 2, 4], dtype=torch.int32), "[0, 3, 2, 4]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ("selective_scan", "ssd", "causal_conv", "s4d"))
def test_wrong_offsets(name: str, offsets: Any, got: str):
    inputs = {k: v[:1] if isinstance(v, Tensor) and v.shape[:1] == (2,) else v for k, v in first(name).items()}
    with pytest.raises(
        ValueError, match=re.escape(f"{name}: cu_seqlens must be int32 offsets (0, ..., l=4), one more ")
    ) as e:
        OPS[name](**inputs, cu_seqlens=offsets)
    assert str(e.value).endswith(f"than sequences; got {got}")


def first(name: str) -> dict[str, Any]:
    return CASES[name][0].inputs(length=4)


def test_packing_needs_batch_1_and_a_state_for_each_sequence():
    offsets = torch.tensor([0, 1, 4], dtype=torch.int32)
    message = "ssd: packed sequences (cu_seqlens) need batch 1, got b=2"
    refused("ssd", ValueError, message, cu_seqlens=offsets)
    inputs = {k: v[:1] if v.ndim > 1 else v for k, v in first("ssd").items()}
    with pytest.raises(ValueError, match=r"^ssd: initial_state has shape \(1, 4, 3, 5\), expected"):
        ops.ssd(**inputs, cu_seqlens=offsets, initial_state=zeros(1, 4, 3, 5))


def test_a_repeated_call_is_checked_again_where_it_differs():
    """Calls that fitted are remembered; one that differs in a dtype or in a missing tensor only is another call."""
    inputs = first("ssd")
    ops.ssd(**inputs)
    refused("ssd", TypeError, "ssd: A has dtype int64, expected a floating dtype", A=zeros(4, dtype=torch.int64))
    refused("ssd", ValueError, "ssd: D has shape (3,), expected (h=4,) or (h=4, p=3)", D=zeros(3))


def test_python_names_the_argument_that_is_missing_or_unknown():
    inputs = first("ssd")
    with pytest.raises(TypeError, match="unexpected keyword argument 'bias'"):
        ops.ssd(**inputs, bias=None)
    del inputs["C"]
    with pytest.raises(TypeError, match="missing a required argument: 'C'"):
        ops.ssd(**inputs)


@pytest.mark.parametrize("first", ["rms_norm", "gated_rms_norm"])
def test_backends_are_in_order_whichever_op_of_a_file_is_called_first(first: str):
    code = f"from ophis.ops import OPS; OPS['{first}'].backends; print(*(b.name for b in OPS['rms_norm'].backends))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["triton", "torch", "reference"]


def test_unknown_backend():
    inputs = first("ssd")
    names = ", ".join(b.name for b in ops.ssd.backends)
    for call in (lambda: ops.ssd(**inputs, backend="abacus"), lambda: within("abacus", inputs)):
        with pytest.raises(ValueError, match=f"^ssd: no backend 'abacus'; it has {names}$"):
            call()
    with (
        pytest.raises(ValueError, match="^use_backend: no op 'sdd'; there are causal_conv, .*, ssd, ssd_step$"),
        use_backend("x", "sdd"),
    ):
        pass


def within(backend: str, inputs: dict[str, Any], *names: str) -> Any:
    with use_backend(backend, *names):
        return ops.ssd(**inputs)


@pytest.fixture
def double() -> Iterator[Op[..., Any]]:
    """An op with a fast backend that takes only short inputs, and a slow one. Each marks its result."""

    @op(x="b l d")
    def double(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, str]:
        return 2 * x, "reference"

    @double.register("fast", why_not=lambda call: "x is longer than 3" if call["x"].shape[1] > 3 else None)
    def fast(x: Tensor):
        return 2 * x, "fast"

    @double.register("slow")
    def slow(x: Tensor):
        return 2 * x, "slow"

    yield double
    del OPS["double"]


SHORT, LONG = torch.zeros(1, 3, 2), torch.zeros(1, 4, 2)


def test_left_alone_the_first_that_can_runs(double: Op[..., Any]):
    assert [b.name for b in double.backends] == ["fast", "slow", "reference"]
    assert double(SHORT)[1] == "fast"
    assert double(LONG)[1] == "slow"


def test_asked_for_by_name_it_never_falls_back(double: Op[..., Any]):
    assert double(LONG, backend="reference")[1] == "reference"
    message = "^double: backend 'fast' cannot run this call: x is longer than 3. These can: slow, reference$"
    with pytest.raises(RuntimeError, match=message):
        double(LONG, backend="fast")
    with use_backend("fast"), pytest.raises(RuntimeError, match=message):
        double(LONG)
    with use_backend("fast", "double"):
        assert double(SHORT)[1] == "fast"
        with pytest.raises(RuntimeError, match=message):
            double(LONG)


def test_the_nearest_wish_counts(double: Op[..., Any]):
    """The argument before the context for this op, before the context for all; and each context ends."""
    with use_backend("reference"):
        assert double(SHORT)[1] == "reference"
        with use_backend("slow", "double"):
            assert double(SHORT)[1] == "slow"
            assert double(SHORT, backend="fast")[1] == "fast"
        assert double(SHORT)[1] == "reference"
        with use_backend("torch", "ssd"):
            assert double(SHORT)[1] == "reference"
    assert double(SHORT)[1] == "fast"


def test_explain_lists_every_backend_and_its_reason(double: Op[..., Any]):
    assert double.explain(SHORT) == {"fast": None, "slow": None, "reference": None}
    assert double.explain(LONG) == {"fast": "x is longer than 3", "slow": None, "reference": None}
    with pytest.raises(ValueError, match=r"^double: x has shape \(2,\), expected \(b, l, d\)$"):
        double.explain(torch.zeros(2))


@pytest.mark.parametrize("name", CASES)
def test_every_op_explains_itself(name: str):
    reasons = OPS[name].explain(**first(name))
    assert [*reasons][-1] == "reference"
    assert reasons["torch"] is None
    assert reasons["reference"] is None
    assert all(reason is None or reason for reason in reasons.values())


ENVIRONMENT = """
import torch
from ophis import ops
from ophis.testing import CASES, backends

ops.ssd.backends  # the first look at them imports their files
for name in [b.name for b in ops.ssd.backends]:
    ops.ssd.register(name)(lambda name=name, **call: (call["x"], name))
print(ops.ssd(**CASES["ssd"][0].inputs())[1])
"""


@pytest.mark.parametrize("backend", [b.name for b in ops.ssd.backends])
def test_the_environment_chooses(backend: str):
    assert in_environment(backend).stdout.strip() == backend


def test_the_environment_never_falls_back_either():
    process = in_environment("abacus")
    assert process.returncode
    assert "ValueError: ssd: no backend 'abacus'" in process.stderr


def in_environment(backend: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OPHIS_BACKEND": backend}
    return subprocess.run(
        [sys.executable, "-c", ENVIRONMENT], env=environment, capture_output=True, text=True, check=False
    )
