"""The ops inside what PyTorch builds around them: torch.compile, the checks of custom ops, activation checkpointing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ophis.ops import OPS
from ophis.ops.torch.selective_scan import scan_backward_op, scan_op
from ophis.testing import CASES, Case, assert_close, evaluate, is_differentiable, widened

COMPILED = ("selective_scan", "ssd", "causal_conv", "rms_norm", "gated_rms_norm", "long_conv")
CALLS = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name in COMPILED
    for case in CASES[name]
    # PyTorch takes some 20 s to trace a chunked SSD for any length; these two pass every line of it.
    if name != "ssd" or case.name in ("everything", "packed")
]


@pytest.mark.parametrize(("name", "case"), CALLS)
@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_for_every_length(name: str, case: Case):
    """fullgraph: no break. dynamic: no second compilation for another length. The same numbers, gradients too."""

    def call(**inputs: Any) -> Any:
        return OPS[name](**inputs, backend="torch")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)

    def run(length: int) -> Callable[..., Any]:
        def marked(backend: None, **inputs: Any) -> Any:
            for tensor in inputs.values():
                if isinstance(tensor, Tensor):
                    for axis, size in enumerate(tensor.shape):
                        if size != length:  # in a model the other sizes are constants, and tracing is faster for it
                            torch._dynamo.mark_static(tensor, axis)
            return compiled(**inputs)

        return marked

    for length in (201, 333):
        inputs = case.inputs(length=length)
        expected, plain = evaluate(OPS[name], widened(inputs), "torch"), evaluate(OPS[name], inputs, "torch")
        for key, tensor in evaluate(run(length), inputs).items():
            assert_close(tensor, expected[key], plain[key], name=key)


FIRST_CALL = """
import torch
from ophis.layers import Mamba

layer = Mamba(16, d_state=4)
y, _ = torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(1, 9, 16))
"""


def test_an_ops_first_call_may_be_compiled():
    """In a fresh process, where the backends' files are yet to be imported."""
    subprocess.run([sys.executable, "-W", "error", "-c", FIRST_CALL], check=True)


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("complex", (False, True))
def test_custom_ops_keep_what_they_promise(complex: bool, packed: bool):
    """PyTorch's own checks: schema, shapes without data, gradients, tracing with symbolic sizes."""
    b, l, d, g, n = 1 if packed else 2, 40, 4, 2, 3
    offsets = torch.tensor([0, 1, 40], dtype=torch.int32) if packed else None
    matrix = torch.complex64 if complex else torch.float32
    x, dt, dy = torch.randn(b, l, d), torch.rand(b, l, d) / 10, torch.randn(b, l, d)
    A = -torch.rand(d, n).to(matrix)
    B, C = torch.randn(2, b, l, g, n, dtype=matrix)
    state = torch.randn(len(offsets) - 1 if offsets is not None else b, d, n, dtype=matrix)
    forward = [t.requires_grad_() for t in (x, dt, A, B, C, state)]
    torch.library.opcheck(scan_op, (*forward, offsets))
    with torch.no_grad():
        kept = scan_op(*forward, offsets)[2]
        torch.library.opcheck(scan_backward_op, (dy, state, x, dt, A, B, C, kept, state, offsets))


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("name", ("selective_scan", "ssd", "causal_conv", "s4d"))
def test_activation_checkpointing_gives_the_same_gradients(name: str, reentrant: bool):
    for case in CASES[name]:
        inputs = case.inputs(length=70)
        names = [k for k, v in inputs.items() if is_differentiable(v)]

        def call(*tensors: Tensor, names=names, inputs=inputs) -> Any:
            return OPS[name](**{**inputs, **dict(zip(names, tensors, strict=True))})

        gradients = []
        for run in (call, lambda *tensors, call=call: checkpoint(call, *tensors, use_reentrant=reentrant)):
            leaves = [inputs[k].detach().requires_grad_() for k in names]
            y, state = run(*leaves)
            torch.autograd.backward([y, state], [torch.ones_like(y), torch.ones_like(state)])
            gradients.append([leaf.grad for leaf in leaves])
        for key, expected, actual in zip(names, *gradients, strict=True):
            assert torch.equal(actual, expected), f"{case.name}: {key}"
