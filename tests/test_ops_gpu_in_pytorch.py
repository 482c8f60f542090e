"""The kernels on a GPU within what PyTorch builds around an op: compilers, checkpoints, autocast, CUDA graphs."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpu_cases import DEVICE, KERNELS, PAIRS, RECURRENT, case, fullest, skip_unless
from ophis import ops
from ophis.layers import Mamba, Mamba2
from ophis.ops import OPS, use_backend
from ophis.testing import STEPS, as_step, assert_close, evaluate, is_differentiable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]

# What PyTorch's compilers and transports warn of is their own.
theirs = pytest.mark.filterwarnings("ignore")


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

name, backend, lengths = sys.argv[1], sys.argv[2], [2048, 3, 1, 777, 2049, 4096, 100, 1000, 64, 16]
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
    own_caches = {**folders, "CUDA_CACHE_DISABLE": "1"}  # NVRTC has one of its own, which other tests may have filled
    seconds = []
    for _ in ("cold", "warm"):
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL, name, backend],
            env={**os.environ, **own_caches},
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
