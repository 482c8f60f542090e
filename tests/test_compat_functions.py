"""The functions of mamba_ssm and causal_conv1d against the papers' equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from equations import assert_same, conv_equation, r, scan_equation, ssd_equation
from ophis import compat
from ophis.compat.causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
)
from ophis.compat.causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
from ophis.compat.mamba_ssm.ops.selective_scan_interface import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)
from ophis.compat.mamba_ssm.ops.triton import layer_norm, layernorm_gated
from ophis.compat.mamba_ssm.ops.triton.selective_state_update import (
    selective_state_update,
    selective_state_update_ref,
)
from ophis.compat.mamba_ssm.ops.triton.ssd_combined import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)

# The selective scan.

B, D, L, N, G = 2, 6, 7, 3, 2


def matrix(kind: str, is_complex: bool, device: str) -> tuple[Tensor, Tensor]:
    """B or C as the function takes it, and as (b, d, n, l)."""
    dtype = torch.complex128 if is_complex else torch.float64
    if kind == "d n":
        given = r(D, N, dtype=dtype, device=device)
        return given, given[None, :, :, None].expand(B, -1, -1, L)
    full = r(B, G if kind == "b g n l" else 1, N, L, dtype=dtype, device=device)
    given = torch.view_as_real(full).flatten(-2) if is_complex else full
    return given if kind == "b g n l" else given[:, 0], full.repeat_interleave(D // full.shape[1], 1)


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("of_B", ["d n", "b n l", "b g n l"])
@pytest.mark.parametrize("of_C", ["d n", "b n l", "b g n l"])
def test_selective_scan(is_complex: bool, of_B: str, of_C: str, device: str):
    (given_B, full_B), (given_C, full_C) = (matrix(kind, is_complex, device) for kind in (of_B, of_C))
    A = -torch.rand(D, N, dtype=torch.float64).to(device)
    if is_complex:
        A = torch.complex(A, r(D, N, device=device))
    u, delta, z = (r(B, D, L, device=device) for _ in range(3))
    skip, bias = r(D, device=device), r(D, device=device)
    expected = scan_equation(u, F.softplus(delta + bias[:, None]), A, full_B, full_C, skip, z)
    for function in (selective_scan_fn, selective_scan_ref):
        y, state = function(u, delta, A, given_B, given_C, skip, z, bias, True, True)
        assert_same(y, expected[0])
        assert_same(state, expected[1])
        assert y.is_contiguous()
        assert torch.equal(function(u, delta, A, given_B, given_C, skip, z, bias, True), y)


def test_selective_scan_keeps_dtypes_and_gives_gradients():
    u, delta = r(B, D, L, dtype=torch.bfloat16), r(B, D, L, dtype=torch.bfloat16)
    A, matrices = -torch.rand(D, N), r(B, N, L, dtype=torch.bfloat16)
    y, state = selective_scan_fn(u, delta, A, matrices, matrices, return_last_state=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    inputs = [t.requires_grad_() for t in (r(1, 2, 3), r(1, 2, 3), -torch.rand(2, 2).double(), r(1, 2, 3), r(1, 2, 3))]
    assert torch.autograd.gradcheck(
        lambda *call: selective_scan_fn(*call, delta_softplus=True, return_last_state=True), inputs
    )


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
def test_mamba_inner(is_complex: bool, device: str):
    rank, width, w = 2, 5, 4
    parts = N * (2 if is_complex else 1)
    A = -torch.rand(D, N, dtype=torch.float64).to(device)
    A = torch.complex(A, r(D, N, device=device)) if is_complex else A
    xz, conv, conv_bias = r(B, 2 * D, L, device=device), r(D, 1, w, device=device), r(D, device=device)
    x_proj, dt_proj = r(rank + 2 * parts, D, device=device), r(D, rank, device=device)
    out, out_bias, skip, bias = (r(*s, device=device) for s in ((width, D), (width,), (D,), (D,)))
    b_bias, c_bias, b_rms, dt_rms = (r(*s, device=device) for s in ((parts,), (parts,), (parts,), (D,)))

    x, z = xz.chunk(2, 1)
    x = conv_equation(x, conv[:, 0], conv_bias, "silu")
    projected = torch.einsum("rd,bdl->brl", x_proj, x)
    delta = torch.einsum("dr,brl->bdl", dt_proj, projected[:, :rank])
    b, c = projected[:, rank : rank + parts] + b_bias[:, None], projected[:, rank + parts :] + c_bias[:, None]

    def rms(t, weight):
        return t / (t.square().mean(1, keepdim=True) + 1e-3).sqrt() * weight[:, None]

    def run(delta, b, c):
        if is_complex:
            b, c = (torch.complex(t[:, ::2], t[:, 1::2]) for t in (b, c))
        full = [t[:, None].expand(-1, D, -1, -1) for t in (b, c)]
        y, _ = scan_equation(x, F.softplus(delta + bias[:, None]), A, *full, skip, z)
        return torch.einsum("md,bdl->blm", out, y) + out_bias

    call = (xz, conv, conv_bias, x_proj, dt_proj, out, out_bias, A, None, None, skip, bias, b_bias, c_bias)
    for function in (mamba_inner_fn, mamba_inner_ref):
        assert_same(function(*call), run(delta, b, c))
    normed = mamba_inner_fn(*call, b_rms_weight=b_rms, dt_rms_weight=dt_rms, b_c_dt_rms_eps=1e-3)
    assert_same(normed, run(rms(delta, dt_rms), rms(b, b_rms), c))
    # B and C given rather than projected, as selective_scan_fn takes them
    given = matrix("b n l", is_complex, device)[0]
    y = mamba_inner_fn(*call[:3], x_proj[:rank], *call[4:8], given, given, skip, bias)
    lengths = given.unflatten(-1, (-1, 2)).permute(0, 1, 3, 2).flatten(1, 2) if is_complex else given
    assert_same(y, run(delta, lengths, lengths))
    with pytest.raises(ValueError, match="for a B and C projected"):
        mamba_inner_fn(*call[:8], given, None, b_rms_weight=b_rms)


@pytest.mark.parametrize("heads", [False, True], ids=["channels", "heads"])
def test_selective_state_update(heads: bool, device: str):
    shape = (4, 3) if heads else (6,)
    x, dt, z = (r(B, *shape, device=device) for _ in range(3))
    A, skip, bias = -torch.rand(*shape, N).double().to(device), r(*shape, device=device), r(*shape, device=device)
    b, c = ((r(B, 2, N, device=device) if heads else r(B, N, device=device)) for _ in range(2))
    before = r(B, *shape, N, device=device)
    wide_b, wide_c = ((t.repeat_interleave(2, 1)[:, :, None] if heads else t[:, None]) for t in (b, c))
    step = F.softplus(dt + bias)[..., None]
    after = torch.exp(step * A) * before + step * wide_b * x[..., None]
    y = ((after * wide_c).sum(-1) + skip * x) * F.silu(z)

    apart = torch.empty(B, *shape[::-1], N, device=device, dtype=torch.float64)  # heads and channels do not join
    apart = apart.transpose(1, 2) if heads else apart
    pool, places = r(5, *shape, N, device=device), torch.tensor([3, 0], device=device)
    for state in (before.clone(), apart.copy_(before)):
        for function in (selective_state_update, selective_state_update_ref):
            state.copy_(before)
            assert_same(function(state, x, dt, A, b, c, skip, z, bias, True), y)
            assert_same(state, after)
    untouched = pool[1].clone()
    pool[places] = before
    got = selective_state_update(pool, x, dt, A, b, c, skip, z, bias, True, state_batch_indices=places.int())
    assert_same(got, y)
    assert_same(pool[places], after)
    assert torch.equal(pool[1], untouched)
    x.requires_grad_()  # a step has no gradient, and says nothing of it
    assert not selective_state_update(before.clone(), x, dt, A, b, c, skip, z, bias, True).requires_grad


# The convolution.

IDS = torch.tensor([[4, 4, 4, 5, 5, 5, 5, 5, 5], [7, 8, 8, 8, 8, 8, 9, -1, -1]])


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("w", [1, 2, 4])
def test_causal_conv(activation: str | None, w: int, device: str):
    ids = IDS.to(device)
    x, weight, bias, window = (r(*s, device=device) for s in ((B, D, 9), (D, w), (D,), (B, D, w - 1)))
    for start in (None, window):
        expected = conv_equation(x, weight, bias, activation, None, start)
        last = torch.cat([torch.zeros_like(window) if start is None else start, x], -1)[..., 9:]
        out = torch.full_like(window, torch.nan)
        for function in (causal_conv1d_fn, causal_conv1d_ref):
            call = dict(initial_states=start, activation=activation)
            assert_same(function(x, weight, bias, **call), expected)
            y, state = function(x, weight, bias, return_final_states=True, **call)
            assert_same(y, expected)
            assert torch.equal(state, last)
            _, state = function(x, weight, bias, return_final_states=True, final_states_out=out, **call)
            assert state is out
            assert torch.equal(out, last)
            packed = function(x, weight, bias, seq_idx=ids.int(), **call)
            assert_same(packed, conv_equation(x, weight, bias, activation, ids, start))
        short, state = causal_conv1d_fn(x[..., :1], weight, bias, initial_states=start, return_final_states=True)
        assert_same(short, conv_equation(x[..., :1], weight, bias, None, None, start))
        before = torch.zeros_like(window) if start is None else start
        assert torch.equal(state, torch.cat([before, x[..., :1]], -1)[..., 1:])


def test_causal_conv_keeps_the_layout_in_memory():
    weight = r(D, 4)
    first, last = r(B, D, 9), r(B, 9, D).transpose(1, 2)
    assert causal_conv1d_fn(first, weight).is_contiguous()
    assert causal_conv1d_fn(last, weight).stride() == last.stride()
    y, state = causal_conv1d_fn(last.bfloat16(), weight, return_final_states=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16)


def test_causal_conv_mistakes():
    x, weight = r(B, D, 9), r(D, 4)
    with pytest.raises(ValueError, match="there is no one final state"):
        causal_conv1d_fn(x, weight, seq_idx=IDS, return_final_states=True)
    with pytest.raises(ValueError, match="activation is 'gelu', expected None or 'silu'"):
        causal_conv1d_fn(x, weight, activation="gelu")
    with pytest.raises(ValueError, match=r"seq_idx has shape \(2, 9\), but the input \(batch, length\) \(2, 8\)"):
        causal_conv1d_fn(x[..., 1:], weight, seq_idx=IDS)
    with pytest.raises(ValueError, match="expected integers"):
        causal_conv1d_fn(x, weight, seq_idx=IDS.float())
    with pytest.raises(ValueError, match="holds 2 inputs, expected at least w-1=3"):
        causal_conv1d_update(x[..., 0], r(B, D, 2), weight)


@pytest.mark.parametrize("s", [3, 4, 6])
@pytest.mark.parametrize("l", [None, 1, 2, 8])
def test_causal_conv_update(s: int, l: int | None, device: str):
    weight, bias, before = r(D, 4, device=device), r(D, device=device), r(B, D, s, device=device)
    x = r(B, D, l or 1, device=device)
    given = x[..., 0] if l is None else x
    expected = conv_equation(x, weight, bias, "silu", None, before[..., s - 3 :])
    after = torch.cat([before, x], -1)[..., -s:]
    for function in (causal_conv1d_update, causal_conv1d_update_ref):
        state = before.clone()
        assert_same(function(given, state, weight, bias, "silu"), expected[..., 0] if l is None else expected)
        assert torch.equal(state, after)

    # As a ring: input i stands at i mod s.
    seen = torch.tensor([5, 11], dtype=torch.int32, device=device)
    ring, ring_after = torch.empty_like(before), torch.empty_like(before)
    for row in range(B):
        past = [int(seen[row]) - s + i for i in range(s)]
        for i, place in enumerate(past):
            ring[row, :, place % s] = before[row, :, i]
        for i in range(s):
            ring_after[row, :, (int(seen[row]) + x.shape[-1] - s + i) % s] = after[row, :, i]
    y = causal_conv1d_update(given, ring, weight, bias, "silu", cache_seqlens=seen)
    assert_same(y.view_as(expected), expected)
    assert torch.equal(ring, ring_after)

    pool, places = r(4, D, s, device=device), torch.tensor([2, -1], dtype=torch.int32, device=device)
    pool[2] = before[0]
    others = pool[[0, 1, 3]].clone()
    y = causal_conv1d_update(given, pool, weight, bias, "silu", conv_state_indices=places)
    assert_same(y[0].view_as(expected[0]), expected[0])
    assert not y[1].any()
    assert torch.equal(pool[2], after[0])
    assert torch.equal(pool[[0, 1, 3]], others)


def test_causal_conv_varlen_states():
    x = torch.arange(1.0, 8)[:, None] * torch.tensor([1.0, -1])
    states = causal_conv1d_varlen_states(x, torch.tensor([0, 1, 6, 6], dtype=torch.int32), 3)
    assert states[:, 0].tolist() == [[0, 0, 1], [4, 5, 6], [0, 0, 0]]
    assert torch.equal(states[:, 1], -states[:, 0])


# State space duality.

H, P = 4, 3


def duality(device: str) -> dict[str, Tensor]:
    shapes = dict(x=(B, 9, H, P), dt=(B, 9, H), z=(B, 9, H, P), B=(B, 9, G, N), C=(B, 9, G, N), D=(H, P), dt_bias=(H,))
    call = {name: r(*shape, device=device) for name, shape in shapes.items()}
    return {**call, "A": -torch.rand(H, dtype=torch.float64).to(device)}


def duality_expected(call: dict[str, Tensor], starts, before, limit=(0.0, math.inf)) -> tuple[Tensor, Tensor]:
    dt = F.softplus(call["dt"] + call["dt_bias"]).clamp(*limit)
    wide = [call[name].repeat_interleave(H // G, 2) for name in "BC"]
    skip = call["D"] if call["D"].ndim == 2 else call["D"][:, None].expand(-1, P)
    y, states = ssd_equation(call["x"], dt, call["A"], *wide, skip, starts, before)
    return y * F.silu(call["z"]) if call.get("z") is not None else y, states


@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.3, 0.9)])
def test_chunk_scan(limit: tuple[float, float], device: str):
    call, before = duality(device), r(B, H, P, N, device=device)
    options = dict(chunk_size=4, dt_softplus=True, dt_limit=limit)
    whole = [["given", *[None] * 8]] * B
    y, states = duality_expected(call, whole, before, limit)
    got, final = mamba_chunk_scan_combined(**call, **options, initial_states=before, return_final_states=True)
    assert_same(got, y)
    assert_same(final, states[:, -1])
    call["D"] = call["D"][:, 0]  # one a head
    y, states = duality_expected(call, whole, torch.zeros_like(before), limit)
    assert_same(mamba_chunk_scan_combined(**call, **options), y)


def test_chunk_scan_of_packed_sequences(device: str):
    call, before = duality(device), r(B, H, P, N, device=device)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [3, 4, 4, 4, 4, 4, 9, -1, -1]], device=device)
    options = dict(chunk_size=4, dt_softplus=True, return_final_states=True)
    o, s = None, "zero"
    starts = [["given", o, o, s, o, o, o, o, o], [s, s, o, o, o, o, s, s, o]]
    y, states = duality_expected(call, starts, before)
    got, final = mamba_chunk_scan_combined(**call, **options, seq_idx=ids.int(), initial_states=before)
    assert_same(got, y)
    assert_same(final, states[:, -1])
    # one row, and the states at the ends of its sequences: the last is empty, and then there is padding
    one = {name: t[:1] if name not in ("A", "D", "dt_bias") else t for name, t in call.items()}
    cu_seqlens = torch.tensor([0, 3, 7, 7], dtype=torch.int32, device=device)
    y, states = duality_expected(one, [[s, o, o, s, o, o, o, s, o]], before[:1])
    marks = torch.tensor([[5, 5, 5, 6, 6, 6, 6, -1, -1]], device=device)
    for seq_idx in (None, marks):
        packed = dict(seq_idx=seq_idx, cu_seqlens=cu_seqlens, return_varlen_states=True)
        got, final, ends = mamba_chunk_scan_combined(**one, **options, **packed)
        assert_same(got, y)
        assert_same(final, states[:, -1])
        assert_same(ends, torch.stack([states[0, 2], states[0, 6], torch.zeros_like(states[0, 0])]))
        got, ends = mamba_chunk_scan_combined(**one, chunk_size=4, dt_softplus=True, **packed)
        assert_same(got, y)
        assert len(ends) == 3
    alone, _ = mamba_chunk_scan_combined(**one, **options, cu_seqlens=cu_seqlens)  # then nobody reads them
    assert_same(alone, duality_expected(one, [[s, *[o] * 8]], before[:1])[0])
    with pytest.raises(ValueError, match="needs cu_seqlens"):
        mamba_chunk_scan_combined(**one, chunk_size=4, return_varlen_states=True)
    with pytest.raises(ValueError, match="offsets into one row, got a batch of 2"):
        mamba_chunk_scan_combined(**call, chunk_size=4, cu_seqlens=cu_seqlens, return_varlen_states=True)


def test_chunk_scan_gives_gradients():
    call, before = duality("cpu"), r(B, H, P, N)
    tensors = {**call, "initial_states": before}
    names = list(tensors)
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])

    def run(*values):
        options = dict(chunk_size=4, seq_idx=seq_idx, dt_softplus=True, return_final_states=True)
        return mamba_chunk_scan_combined(**dict(zip(names, values, strict=True)), **options)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in tensors.values()], fast_mode=True)


@pytest.mark.parametrize("before_gate", [True, False])
@pytest.mark.parametrize("mlp", [0, 2])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_split_conv_chunk_scan(before_gate: bool, mlp: int, norm: bool, device: str):
    ids = IDS.to(device)
    width, channels = H * P, H * P + 2 * G * N
    zxbcdt = r(B, 9, 2 * mlp + width + channels + H, device=device)
    conv, conv_bias, out, out_bias = (
        r(*s, device=device) for s in ((channels, 4), (channels,), (5, mlp + width), (5,))
    )
    bias, skip, weight = r(H, device=device), r(H, device=device), r(width, device=device)
    A = -torch.rand(H, dtype=torch.float64).to(device)

    gate, value, z, xBC, dt = zxbcdt.split([mlp, mlp, width, channels, H], -1)
    xBC = conv_equation(xBC.transpose(1, 2), conv, conv_bias, "silu", ids).transpose(1, 2)
    x, b, c = xBC.split([width, G * N, G * N], -1)
    call = dict(x=x.unflatten(-1, (H, P)), dt=dt, B=b.unflatten(-1, (G, N)), C=c.unflatten(-1, (G, N)), D=skip,
                dt_bias=bias, A=A)  # fmt: skip
    o, s = None, "zero"
    starts = [[s, o, o, s, o, o, o, o, o], [s, s, o, o, o, o, s, s, o]]
    y, states = duality_expected(call, starts, r(B, H, P, N, device=device))
    y = y.flatten(2)
    silu = F.silu(z)

    def normed(t):
        t = t.unflatten(-1, (G, -1))
        return (t / (t.square().mean(-1, keepdim=True) + 1e-4).sqrt()).flatten(-2) * weight

    y = (normed(y) * silu if before_gate else normed(y * silu)) if norm else y * silu
    y = torch.cat([F.silu(gate) * value, y], -1)
    options = dict(seq_idx=ids, headdim=P, ngroups=G, norm_before_gate=before_gate, return_final_states=True,
                   rmsnorm_weight=weight if norm else None, rmsnorm_eps=1e-4)  # fmt: skip
    arguments = (zxbcdt, conv, conv_bias, bias, A, skip, 4)
    got, final = mamba_split_conv1d_scan_combined(*arguments, **options, outproj_weight=out, outproj_bias=out_bias)
    assert_same(got, y @ out.T + out_bias)
    assert_same(final, states[:, -1])
    assert_same(mamba_split_conv1d_scan_combined(*arguments, **options)[0], y)


def test_split_conv_chunk_scan_mistakes():
    call = (r(B, 9, 2 * 12 + 2 * G * N + H), r(12 + 2 * G * N, 4), None, r(H), -torch.rand(H), r(H), 4)
    with pytest.raises(ValueError, match="headdim must be given"):
        mamba_split_conv1d_scan_combined(*call, ngroups=G)
    with pytest.raises(ValueError, match="zxbcdt has width 40, expected 16 \\+ 24 \\+ 4"):
        mamba_split_conv1d_scan_combined(*call, headdim=4, ngroups=G)
    with pytest.raises(ValueError, match="outproj_bias without outproj_weight"):
        mamba_split_conv1d_scan_combined(*call, headdim=3, ngroups=G, outproj_bias=r(5))


# Norms.


@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer norm"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_norm(rms: bool, biased: bool, device: str):
    x, residual, x1, scale = (r(*s, device=device) for s in ((B, L, D), (B, L, D), (B, L, D), (B, L)))
    weight, weight1, bias1 = (r(D, device=device) for _ in range(3))
    bias = r(D, device=device) if biased else None

    def expected(s, weight, bias):
        s = s if rms else s - s.mean(-1, keepdim=True)
        y = s / (s.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight
        return y if bias is None else y + bias

    def run(**options):
        if rms:
            return layer_norm.rms_norm_fn(x, weight, bias, eps=1e-2, **options)
        return layer_norm.layer_norm_fn(x, weight, bias, eps=1e-2, **options)

    assert_same(run(), expected(x, weight, bias))
    y, s = run(residual=residual, prenorm=True)
    assert_same(y, expected(x + residual, weight, bias))
    assert_same(s, x + residual)
    y, s = run(rowscale=scale, prenorm=True)
    assert_same(y, expected(x * scale[..., None], weight, bias))
    assert_same(s, x * scale[..., None])
    y, y1, s = run(x1=x1, weight1=weight1, bias1=bias1, residual=residual, prenorm=True)
    assert_same(y, expected(x + x1 + residual, weight, bias))
    assert_same(y1, expected(x + x1 + residual, weight1, bias1))
    y, s, mask, mask1 = run(x1=x1, dropout_p=0.4, prenorm=True, return_dropout_mask=True)
    assert_same(s, (x * mask + x1 * mask1) / 0.6)
    assert_same(y, expected(s, weight, bias))
    assert 0 < mask.double().mean() < 1
    assert not torch.equal(mask, mask1)
    y, mask, mask1 = run(return_dropout_mask=True)
    assert mask is mask1 is None
    with pytest.raises(ValueError, match="rowscale scales x alone"):
        run(x1=x1, rowscale=scale)


@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [True, False])
def test_norm_dtypes(residual: torch.dtype | None, wide: bool):
    x, weight = r(B, L, D, dtype=torch.bfloat16), torch.ones(D, dtype=torch.bfloat16)
    stream = None if residual is None else r(B, L, D, dtype=residual)
    for bias in (None, torch.zeros_like(weight)):
        for rms in (True, False):
            y, s = layer_norm.layer_norm_fn(
                x, weight, bias, residual=stream, prenorm=True, residual_in_fp32=wide, is_rms_norm=rms
            )
            assert y.dtype == torch.bfloat16
            assert s.dtype == (residual or (torch.float32 if wide else torch.bfloat16))


def test_norm_module_drops_in_training_only():
    norm = compat.RMSNorm(D, dropout_p=0.5)
    x = torch.ones(B, L, D)
    assert (norm(x, prenorm=True)[1] == 0).any()
    assert torch.equal(norm.eval()(x, prenorm=True)[1], x)
    assert (norm.bias, norm.eps, [*norm.state_dict()]) == (None, 1e-5, ["weight"])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("before_gate", [True, False])
@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer norm"])
def test_gated_norm(gated: bool, size: int | None, before_gate: bool, rms: bool, device: str):
    x, z, weight, bias = (r(*s, device=device) for s in ((B, L, D), (B, L, D), (D,), (D,)))
    silu = F.silu(z) if gated else torch.ones_like(z)

    def expected(bias):
        s = (x if before_gate else x * silu).unflatten(-1, (-1, size or D))
        s = s if rms else s - s.mean(-1, keepdim=True)
        y = (s / (s.square().mean(-1, keepdim=True) + 1e-2).sqrt()).flatten(-2) * weight + bias
        return y * silu if before_gate else y

    options = dict(z=z if gated else None, eps=1e-2, group_size=size, norm_before_gate=before_gate)
    for given in (bias, None):
        y = layernorm_gated.layernorm_fn(x, weight, given, is_rms_norm=rms, **options)
        assert_same(y, expected(torch.zeros_like(bias) if given is None else given))
    norm_class = layernorm_gated.RMSNorm if rms else layernorm_gated.LayerNorm
    norm = norm_class(D, eps=1e-2, group_size=size, norm_before_gate=before_gate, device=device, dtype=torch.float64)
    norm.weight.data.copy_(weight)
    if not rms:
        norm.bias.data.copy_(bias)
    assert_same(norm(x, options["z"]), expected(torch.zeros_like(bias) if rms else bias))
    with pytest.raises(ValueError, match="group_size=4 must divide the width d=6"):
        layernorm_gated.rmsnorm_fn(x, weight, None, group_size=4)
