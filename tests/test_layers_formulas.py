"""Attention, rotary positions, blocks, MLP and norms against their textbook formulas, and the handling of states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ophis.layers import S4D, Attention, Block, GatedMLP, GatedRMSNorm, Mamba, Mamba2, RMSNorm

WIDTH = 24


def signal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def turned(x: Tensor, channels: int, base: float) -> Tensor:
    """Rotary positions as what they are: channel pair k of x (b, l, heads, p), the k-th of each half, is a complex
    number that position t multiplies by exp(i t base^(-2k/channels))."""
    half = channels // 2
    z = torch.complex(x[..., :half], x[..., half:channels])
    frequency = base ** (-2 * torch.arange(half, dtype=torch.float64) / channels)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
    z = z * torch.exp(1j * angle)[:, None]
    return torch.cat([z.real, z.imag, x[..., channels:]], -1)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(num_heads_kv=2),
        dict(num_heads_kv=1, head_dim=10, softmax_scale=0.7),
        dict(rotary_emb_dim=6),
        dict(rotary_emb_dim=4, rotary_emb_base=50.0, num_heads_kv=2),
        dict(d_conv=3, rotary_emb_dim=2, num_heads_kv=2),
        dict(qkv_proj_bias=True, out_proj_bias=True, d_conv=4),
    ],
    ids=str,
)
def test_attention_is_softmax_over_the_past(options: dict[str, Any]):
    layer = Attention(WIDTH, **{"num_heads": 4, **options}).double()
    x = signal(2, 11, WIDTH)
    y, _ = layer(x)
    qkv = layer.in_proj(x)
    if layer.conv1d is not None:
        padded = F.pad(qkv.mT, (options["d_conv"] - 1, 0))
        qkv = F.conv1d(padded, layer.conv1d.weight, layer.conv1d.bias, groups=qkv.shape[-1]).mT
    kv_heads, p = options.get("num_heads_kv", 4), options.get("head_dim", WIDTH // 4)
    q, k, v = qkv.unflatten(-1, (-1, p)).split([4, kv_heads, kv_heads], 2)
    q, k = (turned(t, options.get("rotary_emb_dim", 0), options.get("rotary_emb_base", 1e4)) for t in (q, k))
    k, v = (t.repeat_interleave(4 // kv_heads, 2) for t in (k, v))
    heads = []
    for t in range(11):
        scores = torch.einsum("bhp,bshp->bhs", q[:, t], k[:, : t + 1]) * options.get("softmax_scale", p**-0.5)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(torch.einsum("bhs,bshp->bhp", weights, v[:, : t + 1]))
    expected = layer.out_proj(torch.stack(heads, 1).flatten(2))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=4, num_heads_kv=3), "num_heads_kv=3 must divide num_heads=4"),
        (dict(num_heads=5), "num_heads=5 must divide d_model=24, or head_dim be given"),
        (dict(num_heads=4, rotary_emb_dim=3), "rotary_emb_dim=3 must be even and at most 6"),
        (dict(num_heads=4, rotary_emb_dim=8), "rotary_emb_dim=8 must be even and at most 6"),
    ],
    ids=str,
)
def test_attention_refuses_what_does_not_divide(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^Attention: {message}$"):
        Attention(WIDTH, **options)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (Mamba, dict(dt_init="zero"), "Mamba: dt_init is 'zero', expected 'random' or 'constant'"),
        (Mamba, dict(dt_rank="full"), "Mamba: dt_rank is 'full', expected an integer or 'auto'"),
        (Mamba2, dict(headdim=7), "Mamba2: d_ssm=48 .* must be a multiple of headdim=7 and at most the inner width"),
        (Mamba2, dict(headdim=16, d_ssm=64), "Mamba2: d_ssm=64 .* multiple of headdim=16 and at most the inner width"),
        (Mamba2, dict(headdim=16, ngroups=2), "Mamba2: ngroups=2 must divide the number of heads, 3"),
        (S4D, dict(init="hippo"), "s4d_init: kind is 'hippo', expected .*"),
    ],
)
def test_layers_refuse_what_they_do_not_know(layer: type[nn.Module], options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        layer(WIDTH, **options)


@pytest.mark.parametrize(
    ("d_model", "hidden"), [(24, 128), (48, 128), (49, 256), (768, 2048), (1000, 2688), (2560, 6912)]
)
def test_mlp_is_swiglu_of_the_published_width(d_model: int, hidden: int):
    """int(8/3 d_model), rounded up to a multiple of 128."""
    mlp = GatedMLP(d_model)
    assert (mlp.fc1.out_features, mlp.fc2.in_features) == (2 * hidden, hidden)
    assert mlp.fc1.bias is None
    x = torch.randn(2, d_model)
    value, gate = x @ mlp.fc1.weight[:hidden].T, x @ mlp.fc1.weight[hidden:].T
    torch.testing.assert_close(mlp(x), (value * gate / (1 + torch.exp(-gate))) @ mlp.fc2.weight.T)


def test_mlp_options():
    mlp = GatedMLP(8, d_hidden=5, bias=True)
    assert {name: tuple(p.shape) for name, p in mlp.named_parameters()} == {
        "fc1.weight": (10, 8),
        "fc1.bias": (10,),
        "fc2.weight": (8, 5),
        "fc2.bias": (8,),
    }


def rms_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def test_norms():
    x, z = signal(2, 3, 8), signal(2, 3, 8)
    norm = RMSNorm(8, eps=1e-3).double()
    nn.init.uniform_(norm.weight)
    y, stream = norm(x, z)
    assert torch.equal(stream, x + z)
    torch.testing.assert_close(y, rms_normed(x + z, norm.weight, 1e-3), rtol=1e-12, atol=1e-12)
    gated = GatedRMSNorm(8, groups=2, eps=1e-3).double()
    nn.init.uniform_(gated.weight)
    halves = [rms_normed(h, gated.weight.chunk(2)[i], 1e-3) for i, h in enumerate((x * F.silu(z)).chunk(2, -1))]
    torch.testing.assert_close(gated(x, z), torch.cat(halves, -1), rtol=1e-12, atol=1e-12)


def test_a_float32_stream_enters_a_bfloat16_norm_unrounded():
    norm = RMSNorm(64, dtype=torch.bfloat16)
    stream = 100 + torch.randn(4, 64) * 1e-3  # differences that bfloat16 would not see
    y, after = norm(torch.zeros(4, 64, dtype=torch.bfloat16), stream)
    assert y.dtype == torch.bfloat16
    assert torch.equal(after, stream)


@pytest.mark.parametrize("mlp", (None, 16))
def test_block_is_two_residual_steps(mlp: int | None):
    block = Block(
        WIDTH, Mamba(WIDTH, d_state=4), None if mlp is None else GatedMLP(WIDTH, d_hidden=mlp), eps=1e-2
    ).double()
    nn.init.uniform_(block.norm.weight)
    x = signal(2, 9, WIDTH)
    y, state = block(x)
    mixed, expected_state = block.mixer(rms_normed(x, block.norm.weight, 1e-2))
    expected = x + mixed
    if block.mlp is not None and block.norm2 is not None:
        expected = expected + block.mlp(rms_normed(expected, block.norm2.weight, 1e-2))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for actual, same in zip(state, expected_state, strict=True):
        torch.testing.assert_close(actual, same, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mlp", (None, 16))
def test_block_keeps_its_residual_stream_in_float32(mlp: int | None):
    block = Block(
        WIDTH,
        Mamba(WIDTH, d_state=4, dtype=torch.bfloat16),
        None if mlp is None else GatedMLP(WIDTH, d_hidden=mlp, dtype=torch.bfloat16),
        residual_in_fp32=True,
        dtype=torch.bfloat16,
    )
    x = torch.randn(2, 9, WIDTH, dtype=torch.bfloat16)
    y, _ = block(x)
    assert y.dtype == torch.float32
    block.residual_in_fp32 = False
    assert block(x)[0].dtype == torch.bfloat16


LAYERS = {
    "mamba": lambda: Mamba(WIDTH, d_state=4),
    "mamba2": lambda: Mamba2(WIDTH, d_state=4, headdim=8, ngroups=2, learnable_init_states=True),
    "attention": lambda: Attention(WIDTH, num_heads=4, num_heads_kv=2, rotary_emb_dim=4, d_conv=4),
    "s4d": lambda: S4D(WIDTH, d_state=4),
}


def detached(state: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), state)


def assert_same(actual: Any, expected: Any) -> None:
    for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_no_state_is_the_initial_one(name: str):
    layer, x = LAYERS[name]().double(), signal(3, 7, WIDTH)
    assert_same(layer(x, layer.initial_state(3)), layer(x))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_states_are_selected_by_row(name: str):
    """Beam search and continuous batching: rows of a state, in any order and number, go on as those sequences."""
    layer, x, more = LAYERS[name]().double(), signal(4, 7, WIDTH), signal(4, 5, WIDTH)
    _, state = layer(x)
    rows = torch.tensor([2, 0, 2])
    selected = pytree.tree_map_only(Tensor, lambda t: t[rows], state)
    assert_same(layer(more[rows], selected), pytree.tree_map_only(Tensor, lambda t: t[rows], layer(more, state)))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_state_can_be_gone_back_to(name: str):
    """Snapshots: going on from a state leaves it as it was, so that it can be gone on from again."""
    layer = LAYERS[name]().double()
    _, state = layer(signal(2, 7, WIDTH))
    before = detached(state)
    for length in (1, 5):
        x = signal(2, length, WIDTH)
        first = layer(x, state)
        assert_same(state, before)
        assert_same(layer(x, state), first)
    assert_same(layer(x, copy.deepcopy(state)), first)


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("name", LAYERS)
def test_activation_checkpointing(name: str, reentrant: bool):
    layer, x = LAYERS[name](), torch.randn(2, 70, WIDTH)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        y, state = layer(x)
        return y, *state  # the reentrant kind sees tensors at the top level only

    gradients = []
    for run in (call, lambda x: checkpoint(call, x, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        outputs = [t for t in run(leaf) if t.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        gradients.append([leaf.grad, *(p.grad for p in layer.parameters())])
    for expected, actual in zip(*gradients, strict=True):
        assert torch.equal(actual, expected)
