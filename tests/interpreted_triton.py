"""The Triton kernels under Triton's interpreter. Run by test_ops_triton.py, or by hand:

TRITON_INTERPRET=1 python -m pytest tests/interpreted_triton.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import bfloat16_in_interpreter
import pytest
import torch
from test_ops_memory import every_second, reversed_axes, slice_of_something_wider, sum_and_gradients
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ophis.ops import OPS, split
from ophis.ops.triton import INTERPRETED, norm, ssd
from ophis.ops.triton import causal_conv as convolution
from ophis.ops.triton import selective_scan as scan
from ophis.testing import CASES, Case, assert_close, backends, check, evaluate, is_differentiable

assert INTERPRETED, "set TRITON_INTERPRET=1"
# A launch turns Triton's language into NumPy's, and then every function that a kernel calls does so again, which takes
# longer than what it computes. Only Triton's own functions, which see another part of the language, need it.
call_patched = InterpretedFunction.__call__


def call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    if self.fn.__module__.startswith("triton."):
        return call_patched(self, *args, **kwargs)
    return self.rewrite()(*args, **kwargs)


InterpretedFunction.__call__ = call
bfloat16_in_interpreter.install()
# An instruction takes the interpreter some 20 us, masked or not: no more positions at a time than make a loop.
convolution.FORWARD_UNROLL = convolution.BACKWARD_UNROLL = 2

NAMES = ("causal_conv", "rms_norm", "gated_rms_norm", "selective_scan", "ssd")
CALLS = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name in NAMES
    for case in CASES[name]
    if "triton" in backends(OPS[name], case.inputs())
]
PACKED = [call for call in CALLS if "packed" in call.id]
# One call with nearly everything an op can do.
FULLEST = [
    pytest.param(name, next(case for case in CASES[name] if case.name == which), id=name)
    for name, which in (
        ("causal_conv", "everything"),
        ("rms_norm", "wide residual"),
        ("gated_rms_norm", "groups, norm before gate"),
        ("selective_scan", "everything"),
        ("ssd", "everything"),
    )
]


@pytest.mark.parametrize("name", NAMES)
def test_there_are_kernels(name: str):
    assert "triton" in backends(OPS[name], CASES[name][0].inputs())


@pytest.mark.parametrize(
    ("dtype", "length"), [(torch.float32, 1), (torch.float32, 33), (torch.bfloat16, 3), (torch.float16, 3)], ids=str
)
@pytest.mark.parametrize(("name", "case"), CALLS)
def test_cases(name: str, case: Case, dtype: torch.dtype, length: int):
    if name == "ssd" and dtype == torch.bfloat16:
        # The matrix units take factors rounded to bfloat16, and a gradient of three terms may cancel to what that does.
        length = 33
    check(OPS[name], case.inputs(dtype=dtype, length=length), "triton")


@pytest.mark.parametrize("narrow", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "case"), FULLEST)
def test_dtypes_may_be_mixed(name: str, case: Case, narrow: torch.dtype):
    """Every other tensor narrow, and then the rest."""
    inputs = case.inputs(length=3)
    for odd in (0, 1):
        mixed = {
            k: v.to(narrow) if is_differentiable(v) and i % 2 == odd else v for i, (k, v) in enumerate(inputs.items())
        }
        check(OPS[name], mixed, "triton")


@pytest.mark.parametrize("layout", (slice_of_something_wider, reversed_axes, every_second), ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "case"), FULLEST)
def test_strides(name: str, case: Case, layout: Callable[[Tensor], Tensor]):
    inputs = case.inputs(length=5)
    expected = evaluate(OPS[name], inputs, "triton")
    strided = {k: layout(v) if is_differentiable(v) else v for k, v in inputs.items()}
    for key, tensor in evaluate(OPS[name], strided, "triton").items():
        assert_close(tensor, expected[key], name=key)


@pytest.mark.parametrize(("name", "case"), FULLEST)
def test_expanded_inputs_and_gradients(name: str, case: Case):
    inputs = case.inputs(length=5)
    for key, t in inputs.items():
        if is_differentiable(t):
            inputs[key] = t[:, :1].expand_as(t) if t.ndim > 1 else t[:1].expand_as(t)
    dense = {
        k: v.clone(memory_format=torch.contiguous_format) if is_differentiable(v) else v for k, v in inputs.items()
    }
    expected = sum_and_gradients(name, dense, "triton")
    for actual, same in zip(sum_and_gradients(name, inputs, "triton"), expected, strict=True):
        assert_close(actual, same)


@pytest.mark.parametrize("bounds", [(0, 0, 2, 2, 2, 19, 20, 21, 21), (0, 16, 21)], ids=str)
@pytest.mark.parametrize(("name", "case"), PACKED)
def test_packed_sequences(name: str, case: Case, bounds: tuple[int, ...]):
    inputs = case.inputs(length=bounds[-1])
    inputs["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    if "initial_state" in inputs:
        inputs["initial_state"] = torch.randn_like(inputs["initial_state"][:1].repeat_interleave(len(bounds) - 1, 0))
    check(OPS[name], inputs, "triton")


@pytest.mark.parametrize("case", CASES["gated_rms_norm"], ids=lambda case: case.name)
def test_the_gradient_of_a_gate_within_a_row(case: Case, monkeypatch):
    rows: Any = sys.modules["ophis.ops.split"]
    monkeypatch.setattr(rows, "_pays", lambda row, sizes: True)
    inputs = {k: v.detach().requires_grad_() if is_differentiable(v) else v for k, v in case.inputs(length=5).items()}
    dy, z, norm = torch.randn_like(inputs["x"]), inputs["z"], OPS["gated_rms_norm"]
    (expected,) = torch.autograd.grad(norm(**inputs, backend="triton"), z, dy)
    row = torch.nn.functional.pad(z.detach(), (4, 8)).requires_grad_()
    _, z, _ = split(row, 4, z.shape[-1], 8)
    gradient, found = torch.autograd.grad(norm(**{**inputs, "z": z}, backend="triton"), (z, row), dy)
    assert gradient.data_ptr() == found[..., 4:].data_ptr()
    assert torch.equal(found, torch.nn.functional.pad(expected, (4, 8)))


@pytest.mark.parametrize(("bytes_there", "stages"), [(227 * 1024, 3), (99 * 1024, 2), (64 * 1024, 1), (0, 1)])
def test_tiles_on_their_way_fit_shared_memory(bytes_there: int, stages: int, monkeypatch):
    """Of an H100, an RTX 4090, an MI300: beside a tile of 8192 numbers in float32, so many of three in bfloat16."""
    monkeypatch.setattr(norm, "shared_memory", lambda device: bytes_there)
    read = [torch.empty(1, dtype=torch.bfloat16)] * 3
    assert norm.stages(read[0].device, {"ROWS": 1, "WIDTH": 8192}, *read, None) == stages


@pytest.mark.parametrize("w", (1, 16))
def test_narrowest_and_widest_convolution(w: int):
    check(OPS["causal_conv"], CASES["causal_conv"][1].inputs(length=5, b=1, w=w), "triton")


def test_too_wide_a_convolution():
    reasons = OPS["causal_conv"].explain(**CASES["causal_conv"][1].inputs(w=17))
    assert reasons["triton"] == "its kernels are for widths up to w=16, and here w=17"


@pytest.mark.parametrize("sizes", [dict(b=2, d=260, l=1), dict(b=1, d=20, l=40)], ids=str)
@pytest.mark.parametrize("name", ("causal_conv", "rms_norm", "gated_rms_norm"))
def test_more_than_one_block(name: str, sizes: dict[str, int]):
    """Of channels, of rows."""
    options = dict(sizes)
    case = next(call.values[1] for call in FULLEST if call.values[0] == name)
    if name == "gated_rms_norm":
        options["d"] = 3 * sizes["d"]
    check(OPS[name], case.inputs(dtype=torch.bfloat16, length=options.pop("l"), **options), "triton")


@pytest.mark.parametrize(("name", "case"), FULLEST)
def test_gradient_of_one_output_alone(name: str, case: Case):
    inputs = case.inputs(length=5)
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if is_differentiable(v)}
    for which in range(2 if name != "gated_rms_norm" else 1):
        found = []
        for backend in ("triton", "reference"):
            outputs = OPS[name](**inputs, backend=backend)
            output = outputs if isinstance(outputs, Tensor) else outputs[which]
            weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
            found.append(torch.autograd.grad(output, list(leaves.values()), weights, allow_unused=True))
        for key, actual, expected in zip(leaves, *found, strict=True):
            if expected is None:  # PyTorch saw that it does not depend on it, a kernel gives zeros
                assert actual is None or not actual.any()
            else:
                assert_close(actual, expected, name=key)


@pytest.mark.parametrize(("name", "case"), FULLEST)
def test_second_gradients(name: str, case: Case):
    """Of inputs that depend on each other, as a layer's do: x comes into z, and what depends on z is not x's twice."""
    inputs = case.inputs(length=3)
    leaves = [v.requires_grad_() for v in inputs.values() if is_differentiable(v)]
    before = torch.zeros(())
    for key, tensor in inputs.items():
        if is_differentiable(tensor):
            inputs[key] = before = tensor + before.mean()
    found = []
    for backend in ("triton", "reference"):
        outputs = OPS[name](**inputs, backend=backend)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        first = torch.autograd.grad(outputs, leaves, [y.detach() for y in outputs], create_graph=True)
        found.append(torch.autograd.grad([g.square().sum() for g in first], leaves))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize(("name", "case"), [*FULLEST, *[call for call in PACKED if call.id == "causal_conv-packed"]])
@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_for_every_length(name: str, case: Case):
    def call(backend: None, **inputs: Any) -> Any:
        return OPS[name](**inputs, backend="triton")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (7, 8):
        inputs = case.inputs(length=length)
        expected = evaluate(OPS[name], inputs, "triton")
        for key, tensor in evaluate(compiled, inputs).items():
            assert_close(tensor, expected[key], name=key)


@pytest.mark.parametrize("case", [1, -1], ids=("everything", "packed"))
def test_custom_ops_of_the_convolution(case: int):
    """PyTorch's own checks of what an op promises: schema, shapes without data, gradients, symbolic sizes."""
    i = CASES["causal_conv"][case].inputs(length=4)
    names = ("x", "weight", "bias", "initial_state", "cu_seqlens")
    call = (*(i.get(k).requires_grad_() if is_differentiable(i.get(k)) else i.get(k) for k in names), True)
    torch.library.opcheck(torch.ops.ophis.causal_conv_triton, call)
    with torch.no_grad():
        y, state = torch.ops.ophis.causal_conv_triton(*call)
        torch.library.opcheck(torch.ops.ophis.causal_conv_triton_backward, (y, state, *call))
    x, state = torch.randn(2, 6), torch.randn(2, 3, 6)
    torch.library.opcheck(torch.ops.ophis.causal_conv_step_triton, (x, state, torch.randn(6, 4), None, False))


@pytest.mark.parametrize("narrow", (False, True))
def test_custom_ops_of_the_norms(narrow: bool):
    x, z, s, weight = torch.randn(2, 3, 6), torch.randn(2, 3, 6), torch.randn(2, 3, 6), torch.ones(6)
    x = x.bfloat16() if narrow else x
    for residual in (None, s.requires_grad_()):
        torch.library.opcheck(torch.ops.ophis.rms_norm_triton, (x.requires_grad_(), residual, weight, 1e-5))
    gated = (x, z, weight.requires_grad_(), 1e-5, 2, narrow)
    torch.library.opcheck(torch.ops.ophis.gated_rms_norm_triton, gated)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.ophis.rms_norm_triton_backward, (x, s, s, weight, x.dtype, 1e-5))
        torch.library.opcheck(torch.ops.ophis.gated_rms_norm_triton_backward, (x, *gated))


# The scan, whose programs share out the length as well


SCANS = [call.values[1] for call in CALLS if call.values[0] == "selective_scan"]


@pytest.fixture(params=[(4, 1), (4, 2), (4, 64)], ids=lambda p: f"chunks of {p[0]}, up to {p[1]} segments")
def segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short chunks, in several segments: what only long rows see otherwise."""
    chunk, most = request.param
    monkeypatch.setattr(scan, "CHUNK", dict.fromkeys(scan.CHUNK, chunk))
    monkeypatch.setattr(scan, "MOST_SEGMENTS", most)
    for name, value in (("PROGRAMS", 1000), ("LEAST", 2)):
        monkeypatch.setattr(scan, f"FORWARD_{name}", value)
        monkeypatch.setattr(scan, f"BACKWARD_{name}", value)


@pytest.mark.parametrize("case", SCANS, ids=lambda case: case.name)
@pytest.mark.usefixtures("segments")
def test_segments(case: Case):
    check(OPS["selective_scan"], case.inputs(length=11, b=1, d=3, n=2), "triton")


@pytest.mark.parametrize("bounds", [(0, 4, 8, 11), (0, 0, 3, 4, 4, 5, 11, 11), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)], ids=str)
@pytest.mark.parametrize("initial", (False, True))
@pytest.mark.usefixtures("segments")
def test_sequences_that_start_within_segments_and_with_them(bounds: tuple[int, ...], initial: bool):
    inputs = CASES["selective_scan"][1].inputs(length=bounds[-1], b=1, d=3, n=3)
    inputs["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    inputs["initial_state"] = torch.randn(len(bounds) - 1, 3, 3)
    if not initial:
        del inputs["initial_state"]
    check(OPS["selective_scan"], inputs, "triton")


@pytest.mark.usefixtures("segments")
def test_strong_decay_and_padding():
    """Rates of -1000, steps from nothing to 30, and padding at both ends: exact zeros, and nothing that overflows."""
    inputs = CASES["selective_scan"][1].inputs(length=11, b=1, d=3)
    inputs["A"][0] = -1000
    inputs["dt"][:, 3], inputs["dt"][:, 4] = -40, 30
    inputs["dt"][:, :2] = inputs["dt"][:, -3:] = -torch.inf
    inputs["x"][:, :2] = inputs["x"][:, -3:] = 0
    check(OPS["selective_scan"], inputs, "triton")


@pytest.mark.parametrize("n", (1, 5, 17, 64, 256))
def test_state_sizes(n: int):
    check(OPS["selective_scan"], CASES["selective_scan"][1].inputs(length=3, b=1, d=9, n=n), "triton")


def test_too_large_a_state():
    reasons = OPS["selective_scan"].explain(**CASES["selective_scan"][0].inputs(length=2, n=257))
    assert reasons["triton"] == "its kernels hold states of up to n=256, and here n=257"


@pytest.mark.parametrize("d", (70, 140))
def test_more_than_one_tile_of_channels(d: int):
    check(OPS["selective_scan"], CASES["selective_scan"][2].inputs(length=2, b=1, d=d, n=2, g=2), "triton")


@torch.no_grad()
def test_a_single_position_without_gradients_is_a_step():
    for case in SCANS:
        inputs = case.inputs(length=1)
        before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
        found, expected = (OPS["selective_scan"](**inputs, backend=name) for name in ("triton", "torch"))
        assert_close(found[0], expected[0])
        assert_close(found[1], expected[1])
        assert all(torch.equal(inputs[k], v) for k, v in before.items())


@pytest.mark.parametrize("case", [1, 2, -3], ids=("everything", "groups", "packed"))
def test_custom_ops_of_the_scan(case: int):
    # 96 channels: whole blocks of 32, so that all of what is kept is written and can be compared.
    i = CASES["selective_scan"][case].inputs(length=2, d=96, n=2)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    i = {k: i[k][:, :, None] if k in "BC" and i[k].ndim == 3 else i.get(k) for k in (*names, "cu_seqlens")}
    call = (*(None if i[k] is None else i[k].requires_grad_() for k in names), i["cu_seqlens"], True)
    torch.library.opcheck(torch.ops.ophis.selective_scan_triton, (*call, True))
    with torch.no_grad():
        y, state, kept = torch.ops.ophis.selective_scan_triton(*call, True)
        torch.library.opcheck(torch.ops.ophis.selective_scan_triton_backward, (y, state, *call, kept))


def test_custom_op_of_a_step_of_the_scan():
    x, dt, z, matrix = torch.randn(2, 6), torch.rand(2, 6), torch.randn(2, 6), torch.randn(2, 1, 3)
    call = (x, dt, -torch.rand(6, 3), matrix, matrix, None, z, None, torch.randn(2, 6, 3), True)
    torch.library.opcheck(torch.ops.ophis.selective_scan_step_triton, call)


# SSD, in chunks and segments of chunks


SSDS = [call.values[1] for call in CALLS if call.values[0] == "ssd"]


@pytest.fixture(params=[1, 64])
def chunks_of_16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short chunks, in up to so many segments; and the heads of a group shared out."""
    tiles = {key: tile._replace(positions=16) for key, tile in ssd.TILES.items()}
    monkeypatch.setattr(ssd, "TILES", tiles)
    most = request.param
    monkeypatch.setattr(ssd.Plan, "segments", segments_up_to(most))
    monkeypatch.setattr(ssd, "BACKWARD_PROGRAMS", 1 if most == 1 else 1000)


def segments_up_to(most: int) -> Callable[..., tuple[int, int]]:
    def segments(self: ssd.Plan, x: Tensor, programs: int) -> tuple[int, int]:
        length = -(-self.chunks_a_row // most)
        return -(-self.chunks_a_row // length), length

    return segments


@pytest.mark.parametrize("case", SSDS, ids=lambda case: case.name)
@pytest.mark.usefixtures("chunks_of_16")
def test_segments_of_ssd(case: Case):
    check(OPS["ssd"], case.inputs(length=37, b=1), "triton")


@pytest.mark.parametrize("bounds", [(0, 16, 37), (0, 0, 3, 4, 4, 30, 37, 37), (0, 1, 2, 3, 4, 5, 6, 7)], ids=str)
@pytest.mark.parametrize("initial", (False, True))
@pytest.mark.usefixtures("chunks_of_16")
def test_sequences_that_start_within_segments_of_ssd_and_with_them(bounds: tuple[int, ...], initial: bool):
    inputs = CASES["ssd"][7].inputs(length=bounds[-1], h=2)
    inputs["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    inputs["initial_state"] = torch.randn(len(bounds) - 1, 2, 3, 5)
    if not initial:
        del inputs["initial_state"]
    check(OPS["ssd"], inputs, "triton")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.usefixtures("chunks_of_16")
def test_strong_decay_and_padding_in_ssd(dtype: torch.dtype):
    """Rates of -1000, steps from nothing to 30, and padding at both ends: exact zeros, and nothing that overflows."""
    inputs = CASES["ssd"][1].inputs(dtype=dtype, length=37, b=1)
    inputs["A"][0] = -1000
    inputs["dt"][:, 3::7], inputs["dt"][:, 4::9] = -40, 30
    inputs["dt"][:, :18] = inputs["dt"][:, -3:] = -torch.inf
    inputs["x"][:, :18] = inputs["x"][:, -3:] = 0
    check(OPS["ssd"], inputs, "triton")


@pytest.mark.parametrize(("p", "n"), [(1, 16), (16, 17), (70, 5), (20, 256)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_widths_of_heads_and_states(p: int, n: int, dtype: torch.dtype):
    check(OPS["ssd"], CASES["ssd"][1].inputs(dtype=dtype, length=3, b=1, p=p, n=n), "triton")


def test_too_wide_a_state_of_ssd():
    reasons = OPS["ssd"].explain(**CASES["ssd"][0].inputs(length=2, n=257))
    assert reasons["triton"] == "its kernels hold states of up to n=256, and here n=257"


@torch.no_grad()
def test_a_single_position_of_ssd_without_gradients_is_a_step():
    for case in SSDS:
        inputs = case.inputs(length=1)
        before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
        found, expected = (OPS["ssd"](**inputs, backend=name) for name in ("triton", "torch"))
        assert_close(found[0], expected[0])
        assert_close(found[1], expected[1])
        assert all(torch.equal(inputs[k], v) for k, v in before.items())


@pytest.mark.parametrize("case", [1, 7], ids=("everything", "packed"))
def test_custom_ops_of_ssd(case: int):
    i = CASES["ssd"][case].inputs(length=4)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    call = (*(i[k].requires_grad_() for k in names), i.get("cu_seqlens"), True, [0.0, torch.inf])
    torch.library.opcheck(torch.ops.ophis.ssd_triton, call)
    with torch.no_grad():
        y, state = torch.ops.ophis.ssd_triton(*call)
        torch.library.opcheck(torch.ops.ophis.ssd_triton_backward, (y, state, *call))


def test_custom_op_of_a_step_of_ssd():
    x, matrix = torch.randn(2, 4, 6), torch.randn(2, 2, 3)
    call = (x, torch.rand(2, 4), -torch.rand(4), matrix, matrix, None, x, None, torch.randn(2, 4, 6, 3), True)
    torch.library.opcheck(torch.ops.ophis.ssd_step_triton, (*call, [0.0, 0.1]))
