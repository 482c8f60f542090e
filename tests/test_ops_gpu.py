"""The kernels on a GPU: shapes of models, sizes past 2^31 and 65,535, what PyTorch builds around them, first calls.

Errors are judged by `ophis.testing.check` where the reference in float64 takes seconds at most. A call that a backend
cannot run is skipped with the backend's own reason.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ophis import ops
from ophis.layers import Mamba, Mamba2
from ophis.ops import OPS, use_backend
from ophis.testing import CASES, STEPS, as_step, assert_close, check, evaluate, is_differentiable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]

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


@pytest.mark.parametrize("name", NAMES)
def test_there_are_kernels(name: str):
    """Everything below skips what a backend cannot run: something must."""
    reasons = OPS[name].explain(**fullest(name, dtype=torch.bfloat16))
    assert any(reasons.get(kernel, "absent") is None for kernel in KERNELS), reasons


# Shapes of models


@pytest.mark.parametrize("sizes", [dict(b=3, length=777, d=1536), dict(b=1, length=2049, d=2048)], ids=str)
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_odd_lengths(name: str, backend: str, sizes: dict[str, int]):
    more = {"selective_scan": {"n": 16}, "ssd": {"n": 128}}.get(name, {})
    checked(name, backend, fullest(name, dtype=torch.bfloat16, **sizes, **more))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", OF_SCAN)
def test_scan_of_one_long_row(backend: str, dtype: torch.dtype):
    """Too few channels to fill a GPU: the length is what there is to share out."""
    checked("selective_scan", backend, fullest("selective_scan", dtype=dtype, length=5000, b=1, d=96, n=16))


@pytest.mark.parametrize(("n", "g"), [(1, 1), (8, 2), (16, 4), (24, 1), (64, 2), (128, 1), (256, 1)])
@pytest.mark.parametrize("backend", OF_SCAN)
def test_scan_of_any_state_size(backend: str, n: int, g: int):
    checked(
        "selective_scan", backend, case("selective_scan", "groups", dtype=torch.bfloat16, length=131, d=256, n=n, g=g)
    )


@pytest.mark.parametrize("length", (1, 130, 3000))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "backend"), RECURRENT)
def test_strong_decay(name: str, backend: str, dtype: torch.dtype, length: int):
    """Rates of 0.01 to 1000 and steps of 0.0001 to 100: exponents down to -1e5, and of 1e-6 beside them."""
    sizes = dict(d=96, n=16) if name == "selective_scan" else dict(d=512)
    inputs = case(name, "plain", dtype=dtype, length=length, b=1, **sizes)
    generator = torch.Generator().manual_seed(2)
    rates, steps = (torch.rand(t.shape, generator=generator).to(DEVICE) for t in (inputs["A"], inputs["dt"]))
    inputs.update(A=-(10 ** (5 * rates - 2)), dt=(10 ** (6 * steps - 4)).to(dtype), x=inputs["x"] / 64)
    checked(name, backend, inputs)


@pytest.mark.parametrize(
    "sizes", [dict(n=16), dict(n=64, g=2), dict(n=128), dict(n=80, p=48), dict(n=256, p=128)], ids=str
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", OF_SSD)
def test_ssd_of_any_size(backend: str, dtype: torch.dtype, sizes: dict[str, int]):
    checked("ssd", backend, fullest("ssd", dtype=dtype, length=333, d=384, **sizes))


@pytest.mark.parametrize("which", ("everything", "step limits"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", OF_SSD)
def test_ssd_with_its_other_options(backend: str, dtype: torch.dtype, which: str):
    checked("ssd", backend, case("ssd", which, dtype=dtype, length=500, d=512, n=128))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", OF_SSD)
def test_ssd_of_one_long_row(backend: str, dtype: torch.dtype):
    """In segments, forward and backward."""
    checked("ssd", backend, fullest("ssd", dtype=dtype, length=5000, b=1, d=128, n=128))


@pytest.mark.parametrize("lengths", [(1, 0, 777, 0, 1, 1, 1020, 200), (5, 3000, 60)], ids=str)
@pytest.mark.parametrize(("name", "backend"), [pair for pair in PAIRS if "norm" not in pair[0]])
def test_packed_sequences(name: str, backend: str, lengths: tuple[int, ...]):
    offsets = list(itertools.accumulate(lengths, initial=0))
    inputs = case(name, "packed", dtype=torch.bfloat16, length=offsets[-1], d=256 if name == "ssd" else 192)
    state = inputs["initial_state"]
    inputs["initial_state"] = torch.randn(len(lengths), *state.shape[1:], device=DEVICE)
    inputs["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    checked(name, backend, inputs)


@pytest.mark.parametrize("backend", OF_SCAN)
def test_scan_of_packed_sequences_of_many_channels(backend: str):
    """Enough for 16 on each multiprocessor of an H100, in a relay: sequences start in the midst of a leg."""
    lengths = (1, 0, 777, 0, 1, 1, 520, 100)
    offsets = list(itertools.accumulate(lengths, initial=0))
    inputs = case("selective_scan", "packed", dtype=torch.bfloat16, length=offsets[-1], d=1600, n=16)
    inputs["initial_state"] = torch.randn(len(lengths), *inputs["initial_state"].shape[1:], device=DEVICE)
    inputs["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    checked("selective_scan", backend, inputs)


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_slices_of_projections(name: str, backend: str):
    """As a layer gives them: x and z halves of one projection, B and C parts of another, which begin anywhere."""
    inputs = fullest(name, dtype=torch.bfloat16, length=500, d=320)
    for key in {"x", "z", "dt", "B", "C", "residual"} & set(inputs):
        t = inputs[key]
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 3), torch.nan)
        inputs[key] = wide[..., 1 : 1 + t.shape[-1]].copy_(t)
    checked(name, backend, inputs)


@pytest.mark.parametrize(
    "dtypes",
    [
        dict(
            x=torch.bfloat16, dt=torch.float32, B=torch.bfloat16, C=torch.bfloat16, z=torch.bfloat16
        ),  # under autocast
        dict(x=torch.float32, dt=torch.bfloat16, B=torch.float16, C=torch.float32, z=torch.bfloat16),
        dict(x=torch.float16, dt=torch.float16, B=torch.float32, C=torch.float16, z=torch.float32),
    ],
    ids=lambda dtypes: " ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in dtypes.items()),
)
@pytest.mark.parametrize(("name", "backend"), RECURRENT)
def test_mixed_dtypes(name: str, backend: str, dtypes: dict[str, torch.dtype]):
    inputs = fullest(name, length=300, d=128, n={"selective_scan": 16, "ssd": 128}[name])
    checked(name, backend, {k: v.to(dtypes[k]) if k in dtypes else v for k, v in inputs.items()})


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize(("name", "backend"), [pair for pair in PAIRS if pair not in RECURRENT])
def test_weights_of_another_dtype(name: str, backend: str, dtypes: tuple[torch.dtype, torch.dtype]):
    inputs = fullest(name, dtype=dtypes[0], length=300, d=128)
    checked(name, backend, {k: v.to(dtypes[1]) if k in ("weight", "bias", "z") else v for k, v in inputs.items()})


# Sizes that a 32-bit integer or a grid's second axis does not hold


@pytest.mark.parametrize("sizes", [dict(b=70_000, length=4, d=8), dict(b=1, length=5, d=70_016)], ids=str)
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_more_than_65535(name: str, backend: str, sizes: dict[str, int]):
    more = dict(dtype=torch.bfloat16, d=max(sizes["d"], 64)) if name == "ssd" else {}
    checked(name, backend, fullest(name, **{**sizes, **more}))


@pytest.mark.parametrize("sliced", (False, True))
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_more_than_2_to_the_31(name: str, backend: str, sliced: bool):
    """The last positions, and their gradients, against the same call on the last positions alone.

    What is before them is forgotten: 2048 positions with a mean step of 0.02 and rates of at least 1. Either x has more
    than 2^31 elements, or it is a slice of something that has.
    """
    d, wide, last = (64, 2048, 4096) if sliced else (256, 256, 4096)
    l = 2**31 // wide + 1000
    without = {"initial_state", "dt_bias", "dt_softplus", "z" if name in ("selective_scan", "ssd") else ""}
    small = {k: v for k, v in fullest(name, length=2, b=1, d=d).items() if k not in without}
    inputs, parts = {}, {}  # what has no positions, and what has
    for key, value in small.items():
        if not isinstance(value, Tensor) or value.ndim < (2 if key == "dt" else 3):
            inputs[key] = value
            continue
        width = value[0, 0].numel()
        drawn = torch.empty(1, l, wide if key == "x" else width, dtype=torch.bfloat16, device=DEVICE)
        drawn.uniform_(1e-3, 0.04) if key == "dt" else drawn.normal_()
        parts[key] = drawn[..., :width].unflatten(-1, value.shape[2:])
    skip_unless(name, backend, {**inputs, **parts})
    dy = torch.empty(1, last, *small["x"].shape[2:], dtype=torch.bfloat16, device=DEVICE).normal_()

    def run(part: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        leaves = {k: v.detach().requires_grad_() for k, v in part.items()}
        y = OPS[name](**inputs, **leaves, backend=backend)
        y = y[0] if isinstance(y, tuple) else y
        # Only the last positions have a gradient; it flows back from them.
        weight = torch.zeros(y.shape, dtype=y.dtype, device=DEVICE)
        weight[:, -last:] = dy
        gradients = torch.autograd.grad(y, list(leaves.values()), weight)
        return y[:, -2048:].detach().clone(), [g[:, -2048:].clone() for g in gradients]

    y, gradients = run(parts)
    y_last, gradients_last = run({k: v[:, -last:] for k, v in parts.items()})
    assert_close(y, y_last, name="y")
    for key, actual, expected in zip(parts, gradients, gradients_last, strict=True):
        assert_close(actual, expected, name=f"grad {key}")


@pytest.mark.parametrize(("name", "backend"), RECURRENT)
def test_what_no_kernel_takes_is_an_error_that_says_who_can(name: str, backend: str):
    inputs = case(name, "plain", n=300)
    with pytest.raises(RuntimeError, match=r"n=300\b.*These can: torch, reference"):
        OPS[name](**inputs, backend=backend)
    y, _ = OPS[name](**inputs)
    assert y.isfinite().all()


# What PyTorch builds around an op


# What PyTorch's compilers and transports warn of is their own.
theirs = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """One that would rather fail than compile the same code a second time."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def in_its_dtype(name: str, backend: str) -> torch.dtype:
    """One that the backend is for."""
    return torch.bfloat16 if (name, backend) == ("ssd", "cuda") else torch.float32


def layer_of(name: str, backend: str) -> torch.nn.Module:
    if name == "ssd":
        return Mamba2(128, d_state=64, device=DEVICE, dtype=in_its_dtype(name, backend))
    return Mamba(64, d_state=8, device=DEVICE)


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
@pytest.mark.parametrize(("name", "backend"), RECURRENT)
@theirs
@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_for_every_length(name: str, backend: str, compiler: str):
    """Norm, convolution, recurrence and gated norm in one graph, forward and backward, for every length."""

    def chosen(other: str) -> str | None:
        return backend if (other, backend) in PAIRS else None

    def call(**inputs: Any) -> Any:
        inputs.pop("backend")
        x, weight = inputs.pop("x"), inputs.pop("weight")
        axes, x = x.shape[2:], x.flatten(2)
        x, _ = ops.rms_norm(x, weight[:, 0], backend=chosen("rms_norm"))
        x, _ = ops.causal_conv(x, weight, activation="silu", backend=chosen("causal_conv"))
        y, state = OPS[name](x.unflatten(-1, axes), **inputs, backend=backend)
        return ops.gated_rms_norm(y.flatten(2), x, weight[:, 1], backend=chosen("gated_rms_norm")), state

    compiled = torch.compile(call, backend=compiler, fullgraph=True, dynamic=True)
    for length in (201, 333):
        dtype = in_its_dtype(name, backend)
        inputs = fullest(name, dtype=dtype, length=length, d=64, n={"selective_scan": 16, "ssd": 64}[name])
        inputs["weight"] = fullest("causal_conv", dtype=dtype, d=64)["weight"]
        skip_unless(name, backend, {k: v for k, v in inputs.items() if k != "weight"})
        expected = evaluate(call, inputs)

        def marked(**inputs: Any) -> Any:
            for tensor in inputs.values():
                if isinstance(tensor, Tensor):
                    for axis, size in enumerate(tensor.shape):
                        if size != length:  # noqa: B023 (called at once)
                            torch._dynamo.mark_static(tensor, axis)
            return compiled(**inputs)

        for key, tensor in evaluate(marked, inputs).items():
            assert_close(tensor, expected[key], name=key, dtype=dtype)


@pytest.mark.parametrize(("name", "backend"), RECURRENT)
@theirs
def test_export(name: str, backend: str):
    """A layer as one graph for every length; the kernel is in it by its name."""
    layer = layer_of(name, backend)
    x = torch.randn(2, 100, layer.d_model, device=DEVICE, dtype=in_its_dtype(name, backend))
    with use_backend(backend, name), torch.no_grad():
        length = torch.export.Dim("length", min=64, max=4096)
        exported = torch.export.export(layer, (x,), dynamic_shapes=({1: length},))
        assert f"ophis.{name}_{backend}" in str(exported.graph)
        longer = torch.randn(2, 333, layer.d_model, device=DEVICE, dtype=x.dtype)
        assert_close(exported.module()(longer)[0], layer(longer)[0])


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_activation_checkpointing_gives_the_same_gradients(name: str, backend: str, reentrant: bool):
    inputs = fullest(name, dtype=torch.bfloat16, length=200)
    skip_unless(name, backend, inputs)
    names = [k for k, v in inputs.items() if is_differentiable(v)]

    def call(*tensors: Tensor) -> Any:
        return OPS[name](**{**inputs, **dict(zip(names, tensors, strict=True))}, backend=backend)

    def kept(*tensors: Tensor) -> Any:
        return checkpoint(call, *tensors, use_reentrant=reentrant)

    gradients = []
    for run in (call, kept):
        leaves = [inputs[k].detach().requires_grad_() for k in names]
        outputs = run(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        gradients.append([leaf.grad for leaf in leaves])
    for key, expected, actual in zip(names, *gradients, strict=True):
        assert torch.equal(actual, expected), key


def outputs_and_gradients(layer: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y, _ = layer(x)
    y.float().square().mean().mul(100).backward()  # 100: float16 loses gradients that are too small
    assert x.grad is not None
    return {"y": y.detach(), "grad x": x.grad, **{k: p.grad for k, p in layer.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(("name", "backend"), RECURRENT)
def test_autocast_around_a_layer(name: str, backend: str, dtype: torch.dtype):
    """At most twice the error that PyTorch's ops make in the same layer under the same autocast."""
    if (name, backend, dtype) == ("ssd", "cuda", torch.float16):
        pytest.skip("cuda: its kernels for SSD are for bfloat16")
    layer = Mamba2(256, device=DEVICE) if name == "ssd" else Mamba(256, device=DEVICE)
    x = torch.randn(2, 700, 256, device=DEVICE)
    with use_backend("torch"):
        expected = outputs_and_gradients(layer, x)
    with use_backend("torch"), torch.autocast(DEVICE, dtype):
        plain = outputs_and_gradients(layer, x)
    with use_backend(backend, name), torch.autocast(DEVICE, dtype):
        actual = outputs_and_gradients(layer, x)
    assert actual["y"].dtype == dtype
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        assert_close(tensor.float(), expected[key], plain[key].float(), dtype=dtype, name=key)


@pytest.mark.parametrize("transport", ("gloo", "nccl"))
@pytest.mark.parametrize(("name", "backend"), RECURRENT)
@theirs
def test_distributed_data_parallel(name: str, backend: str, transport: str):
    if not dist.is_backend_available(transport):
        pytest.skip(f"this PyTorch is without {transport}")
    layer = layer_of(name, backend)
    x = torch.randn(2, 70, layer.d_model, device=DEVICE, dtype=in_its_dtype(name, backend))
    dist.init_process_group(transport, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with use_backend(backend, name):
            expected = outputs_and_gradients(layer, x)
            wrapped = torch.nn.parallel.DistributedDataParallel(layer)
            actual = outputs_and_gradients(wrapped, x)
    finally:
        dist.destroy_process_group()
    for key, tensor in actual.items():
        assert_close(tensor, expected[key.removeprefix("module.")], name=key, dtype=x.dtype)


@pytest.mark.parametrize("length", (70, 3000))
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_twice_the_same_bits(name: str, backend: str, length: int):
    inputs = fullest(name, dtype=torch.bfloat16, length=length, d=512)
    skip_unless(name, backend, inputs)
    torch.use_deterministic_algorithms(True)  # an error where PyTorch has nothing deterministic
    try:
        first, *others = (evaluate(OPS[name], inputs, backend) for _ in range(3))
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
    for key, other in itertools.product(first, others):
        assert torch.equal(first[key], other[key]), key


# CUDA graphs


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


@pytest.mark.parametrize("length", (70, 3000))
@pytest.mark.parametrize(("name", "backend"), PAIRS)
@torch.no_grad()
def test_forward_in_a_graph(name: str, backend: str, length: int):
    """Captured once, replayed on other numbers."""
    inputs, others = (fullest(name, dtype=torch.bfloat16, length=length, seed=seed) for seed in (0, 1))
    skip_unless(name, backend, inputs)
    graph, outputs = captured(lambda: OPS[name](**inputs, backend=backend))
    for key, value in others.items():
        if isinstance(value, Tensor):
            inputs[key].copy_(value)
    graph.replay()
    expected = OPS[name](**others, backend=backend)
    outputs, expected = ((t,) if isinstance(t, Tensor) else t for t in (outputs, expected))
    for actual, other in zip(outputs, expected, strict=True):
        assert torch.equal(actual, other)


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, b.name) for name in STEPS for b in OPS[name].backends if b.name in KERNELS],
)
@torch.no_grad()
def test_steps_in_a_graph_are_the_sequence(name: str, backend: str):
    """Replayed for each position, a step gives what the op gives for all of them, in y and in the state."""
    of = name.removesuffix("_step")
    sequence = case(of, "everything", length=20, b=3, d=512)
    signals = [k for k in ("x", "dt", "B", "C", "z") if k in sequence]
    inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in as_step(sequence).items()}
    state = inputs["state"]
    skip_unless(name, backend, inputs)
    graph, y = captured(lambda: OPS[name](**inputs, backend=backend))
    state.copy_(sequence["initial_state"])  # it was stepped while warming up
    ys = []
    for t in range(20):
        for key in signals:
            inputs[key].copy_(sequence[key][:, t])
        graph.replay()
        ys.append(y.clone())
    expected, final = OPS[of](**sequence, backend="reference")
    assert_close(torch.stack(ys, 1), expected, name="y")
    assert_close(state, final, name="state")


# Compilation

FIRST_CALL = """
import os, sys, time, torch
from pathlib import Path

name, backend, lengths = sys.argv[1], sys.argv[2], [2048, 777, 1, 2049, 4096, 3, 100, 1000, 64, 16]
d, n = 2048, {"selective_scan": 16, "ssd": 128}[name]
torch.zeros(1, device="cuda").add_(1)
torch.cuda.synchronize()
start = time.perf_counter()
from ophis import ops

def compiled():
    return sum(len(list(Path(os.environ[k]).rglob("*.cubin"))) for k in ("TRITON_CACHE_DIR", "OPHIS_CACHE_DIR"))

def chosen(name):
    return backend if backend in [b.name for b in ops.OPS[name].backends] else None

def draw(*shape, dtype=torch.bfloat16):
    return torch.rand(shape, dtype=dtype, device="cuda").requires_grad_()

def parameters(*shape):
    return -draw(*shape, dtype=torch.float32), *(draw(shape[0], dtype=torch.float32) for _ in range(2))

for i, l in enumerate(lengths):
    x, _ = ops.causal_conv(draw(1, l, d), draw(d, 4), draw(d), activation="silu", backend=chosen("causal_conv"))
    own = backend if l > 1 else "triton"
    if name == "ssd":
        A, D, bias = parameters(d // 64)
        y, _ = ops.ssd(x.unflatten(-1, (-1, 64)), draw(1, l, d // 64), A, draw(1, l, 1, n), draw(1, l, 1, n), D=D,
                       dt_bias=bias, dt_softplus=True, backend=own)
    else:
        A, D, bias = parameters(d, n)
        y, _ = ops.selective_scan(x, draw(1, l, d), A, draw(1, l, n), draw(1, l, n), D=D, z=draw(1, l, d),
                                  dt_bias=bias, dt_softplus=True, backend=own)
    y.sum().backward()
    torch.cuda.synchronize()
    if i == 0:
        seconds = time.perf_counter() - start
    if i == 2:  # a row in parts, a row in one part, a single position: all kernels there are
        kernels = compiled()
print(seconds, kernels, compiled())
"""


@pytest.mark.parametrize(("name", "backend"), RECURRENT)
def test_first_calls_and_new_lengths(name: str, backend: str, tmp_path):
    """In fresh processes: convolution and recurrence, forward and backward, take seconds once, hardly any the next
    time, and no length compiles anything anew. Importing PyTorch and starting CUDA are not counted."""
    skip_unless(name, backend, fullest(name, dtype=torch.bfloat16, d=2048, n={"selective_scan": 16, "ssd": 128}[name]))
    folders = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "OPHIS_CACHE_DIR": str(tmp_path / "ophis")}
    seconds = []
    for _ in ("cold", "warm"):
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL, name, backend],
            env={**os.environ, **folders},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        took, before, after = done.stdout.split()
        assert int(before) > 0
        assert after == before, f"{int(after) - int(before)} kernels compiled for new lengths"
        seconds.append(float(took))
    cold, warm = seconds
    print(f"{name}, {backend}: first call after {cold:.1f} s cold, {warm:.2f} s warm")
    assert cold < {"selective_scan": 15, "ssd": 20}[name]
    assert warm < 2
