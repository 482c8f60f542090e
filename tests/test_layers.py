"""Layers over all their options: a prompt, its parts and its tokens give one result; so do packed sequences."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ophis.layers import S4D, Attention, Block, GatedMLP, Mamba, Mamba2

WIDTH = 32

# name -> builds the layer. Small, and odd where a layer allows it.
LAYERS = {
    "mamba": lambda: Mamba(WIDTH, d_state=4),
    "mamba, odd sizes": lambda: Mamba(WIDTH, d_state=3, dt_rank=5, expand=1.5),
    "mamba, biases": lambda: Mamba(WIDTH, d_state=4, bias=True, conv_bias=False),
    "mamba, narrow window": lambda: Mamba(WIDTH, d_state=4, d_conv=2),
    "mamba, wide window": lambda: Mamba(WIDTH, d_state=4, d_conv=7),
    "mamba, normed dt B C": lambda: Mamba(WIDTH, d_state=4, norm_bcdt=True),
    "mamba, constant dt": lambda: Mamba(WIDTH, d_state=4, dt_init="constant", dt_scale=0.5),
    "mamba2": lambda: Mamba2(WIDTH, d_state=8, headdim=16),
    "mamba2, one head": lambda: Mamba2(WIDTH, d_state=8, headdim=64),
    "mamba2, head of 128": lambda: Mamba2(WIDTH, d_state=5, headdim=128, expand=4),
    "mamba2, groups": lambda: Mamba2(WIDTH, d_state=8, headdim=8, ngroups=4),
    "mamba2, D per channel": lambda: Mamba2(WIDTH, d_state=8, headdim=16, D_has_hdim=True),
    "mamba2, no norm": lambda: Mamba2(WIDTH, d_state=8, headdim=16, rmsnorm=False),
    "mamba2, norm before gate": lambda: Mamba2(WIDTH, d_state=8, headdim=16, norm_before_gate=True, ngroups=2),
    "mamba2, with an MLP inside": lambda: Mamba2(WIDTH, d_state=8, headdim=16, d_ssm=32),
    "mamba2, limited dt": lambda: Mamba2(WIDTH, d_state=8, headdim=16, dt_limit=(0.01, 0.05)),
    "mamba2, biases": lambda: Mamba2(WIDTH, d_state=8, headdim=16, bias=True, conv_bias=False, conv_init=0.3),
    "mamba2, wide window": lambda: Mamba2(WIDTH, d_state=8, headdim=16, d_conv=7),
    "mamba2, narrow window": lambda: Mamba2(WIDTH, d_state=8, headdim=16, d_conv=2),
    "mamba2, learnt first state": lambda: Mamba2(WIDTH, d_state=8, headdim=16, learnable_init_states=True),
    "attention": lambda: Attention(WIDTH, num_heads=4),
    "attention, grouped": lambda: Attention(WIDTH, num_heads=4, num_heads_kv=2, rotary_emb_dim=4),
    "attention, one key-value head": lambda: Attention(WIDTH, num_heads=4, num_heads_kv=1, head_dim=6, softmax_scale=1),
    "attention, convolution": lambda: Attention(WIDTH, num_heads=2, d_conv=4, rotary_emb_dim=16),
    "attention, biases": lambda: Attention(WIDTH, num_heads=2, qkv_proj_bias=True, out_proj_bias=True),
    **{f"s4d {i} {d}": lambda i=i, d=d: S4D(WIDTH, d_state=8, init=i, discretization=d)
       for i in ("lin", "inv", "legs", "real") for d in ("zoh", "bilinear")},
    "block": lambda: Block(WIDTH, Mamba2(WIDTH, d_state=8, headdim=16)),
    "block with an MLP": lambda: Block(WIDTH, Mamba(WIDTH, d_state=4), GatedMLP(WIDTH), residual_in_fp32=True),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype)
    for path, parameter in layer.named_parameters():  # what starts constant would hide a mistake
        if path.endswith(("D", "norm.weight", "norm2.weight", "init_states")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def signal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.manual_seed(seed))


def tensors(state: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(state) if isinstance(t, Tensor)]


def assert_equal(actual: Any, expected: Any) -> None:
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def gradients(outputs: Any, leaves: list[Tensor]) -> list[Tensor]:
    """Of one fixed random weighting of everything differentiable that came out."""
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in tensors(outputs) if t.requires_grad]
    generator = torch.manual_seed(3)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in parts]
    total = torch.stack([(t * w).sum() for t, w in zip(parts, weights, strict=True)]).sum()
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("parts", [(1,) * 9, (2, 65, 1, 2), (64, 6), (69, 1)], ids=str)
def test_whole_equals_parts_with_carried_state(name: str, parts: tuple[int, ...]):
    """Values, the last state, and the gradients of the input and of every parameter through the carried states."""
    layer = build(name)
    x = signal(2, sum(parts)).requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    whole = layer(x)
    state, ys = layer.initial_state(2), []
    for part in x.split(parts, 1):
        y, state = layer(part, state)
        ys.append(y)
    pieces = (torch.cat(ys, 1), state)
    assert_equal(pieces, whole)
    for a, b in zip(gradients(pieces, leaves), gradients(whole, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_equals_separate_from_states_of_their_own(name: str):
    layer = build(name)
    lengths = (5, 1, 70, 3)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    x = signal(1, sum(lengths)).requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    # First states of unequal length behind them, from another packed call.
    _, first = layer(signal(1, 19, seed=1), cu_seqlens=torch.tensor([0, 7, 8, 17, 19], dtype=torch.int32))
    first = pytree.tree_map_only(Tensor, torch.Tensor.detach, first)
    packed = layer(x, first, cu_seqlens=offsets)
    ys, row = [], []
    for i, (part, behind) in enumerate(
        zip(x.split(lengths, 1), signal(1, 19, seed=1).split((7, 1, 9, 2), 1), strict=True)
    ):
        with torch.no_grad():
            _, state = layer(behind)
        y, state = layer(part, state)
        ys.append(y)
        row.append(state)
        for of_all, alone in zip(tensors(packed[1]), tensors(state), strict=True):
            last = of_all[i : i + 1]
            if last.shape != alone.shape:  # keys and values: a row's are the last of it
                last = last[:, -alone.shape[1] :]
            torch.testing.assert_close(last, alone, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(packed[0], torch.cat(ys, 1), rtol=1e-9, atol=1e-11)
    for a, b in zip(gradients(packed[0], leaves), gradients(torch.cat(ys, 1), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_backends_agree(name: str):
    from ophis.ops import use_backend

    layer, x = build(name), signal(2, 66)
    with use_backend("reference"):
        expected = layer(x)
    assert_equal(layer(x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_and_half_precision(name: str):
    layer, x = build(name, torch.float32), signal(2, 67).float()
    expected, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    if not isinstance(layer, Attention):  # whose keys and values are activations
        assert all(t.dtype in (torch.float32, torch.complex64) for t in tensors(state))
    assert (y - expected).abs().max() < 0.1 * expected.abs().max()
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    y, state = half(x.to(torch.bfloat16))
    assert y.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_wrapped_linears_are_reached(name: str):
    """What LoRA and quantisation do: every linear layer is called as a module, never by its weights."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear):
            super().__init__()
            self.base = base
            self.delta = nn.Parameter(1e-2 * torch.randn(base.out_features, base.in_features, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + nn.functional.linear(x, self.delta)

    layer, x = build(name), signal(2, 9)
    before, _ = layer(x)
    paths = [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
    assert paths
    for path in paths:
        layer.set_submodule(path, Adapter(layer.get_submodule(path)))
        after, _ = layer(x)
        assert (after - before).abs().max() > 1e-9, path
        before = after
    before.square().sum().backward()
    for path in paths:
        assert layer.get_submodule(path).delta.grad.abs().max() > 0, path


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_parameters_are_read_only_while_their_module_runs(name: str):
    """accelerate's offloading fetches a module's own parameters as it is called, and sends them away after it."""
    layer = build(name)
    offloaded = accelerate.cpu_offload(build(name), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    x, following = signal(2, 9), signal(2, 1, seed=1)
    y, state = layer(x)
    found, found_state = offloaded(x)
    assert_equal((found, found_state), (y, state))
    assert_equal(offloaded(following, found_state), layer(following, state))
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    assert_equal(offloaded(x[:1], cu_seqlens=offsets), layer(x[:1], cu_seqlens=offsets))


@pytest.mark.parametrize("name", LAYERS)
def test_meta_device_then_reset(name: str):
    with torch.device("meta"):
        layer = LAYERS[name]()
    if not hasattr(layer, "reset_parameters"):
        pytest.skip("has no parameters of its own")
    layer = layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.data.fill_(torch.nan)
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_width_is_named(name: str):
    layer = LAYERS[name]()
    with pytest.raises((ValueError, RuntimeError), match=r"has shape \(2, 9, 33\), expected|weight has shape"):
        layer(torch.randn(2, 9, WIDTH + 1))


def test_a_state_of_another_batch_is_refused():
    mamba, attention = LAYERS["mamba"](), LAYERS["attention"]()
    x = torch.randn(2, 9, WIDTH)
    with pytest.raises(ValueError, match=r"initial_state has shape \(3, 3, 64\), expected \(b=2, w-1, d=64\)"):
        mamba(x, mamba.initial_state(3))
    with pytest.raises(ValueError, match="the state is of 3 sequences, x of 2"):
        attention(x, attention.initial_state(3))


def test_whatever_replaces_the_step_projection_adds_its_own_bias():
    """The scan adds a plain one's bias; an adapter or a quantised layer in its place is called like any linear."""

    class Wrapped(nn.Module):
        def __init__(self, base: nn.Module):
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x)

    layer, x = Mamba(12, d_state=4).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    expected, _ = layer(x)
    layer.dt_proj = Wrapped(layer.dt_proj)
    torch.testing.assert_close(layer(x)[0], expected)
