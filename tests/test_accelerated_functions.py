"""The functions that stand in for those of transformers' modules, against them: what they return and write in place."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from ophis.integrations.transformers import functions

B, D, N, W, H, P, G = 2, 12, 5, 4, 4, 3, 2  # sizes, by their letters
LENGTH = 19


@functools.cache
def originals() -> dict[str, Any]:
    names = ("causal_conv1d_fn", "causal_conv1d_update", "mamba_selective_scan", "mamba_selective_state_update",
             "mamba_inner_fn")  # fmt: skip
    more = ("mamba2_chunk_scan", "mamba2_selective_state_update", "mamba2_split_conv1d_scan_combined")
    return {name: getattr(modeling_mamba, name) for name in names} | {n: getattr(modeling_mamba2, n) for n in more}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


def rates(*shape: int) -> Tensor:
    return -torch.rand(shape) - 0.5


def expanded(t: Tensor, *sizes: int) -> Tensor:
    """One number a head for each of its channels, and states, as Mamba-2's mixers make it."""
    for _ in sizes:
        t = t.unsqueeze(-1)
    return t.expand(*t.shape[: -len(sizes)], *sizes)


def scan(l: int, **more: Any) -> dict[str, Any]:
    return dict(hidden_states=draw(B, D, l), dt=draw(B, D, l), A=rates(D, N), B=draw(B, N, l), C=draw(B, N, l), **more)


def chunk_scan(l: int, **more: Any) -> dict[str, Any]:
    return dict(hidden_states=draw(B, l, H, P), dt=torch.rand(B, l, H), A=rates(H), B=draw(B, l, G, N),
                C=draw(B, l, G, N), chunk_size=8, **more)  # fmt: skip


def update(**more: Any) -> dict[str, Any]:
    return dict(state=draw(B, D, N), hidden_states=draw(B, D), dt=draw(B, D), A=rates(D, N), B=draw(B, N),
                C=draw(B, N), **more)  # fmt: skip


def update2(per_head: bool, **more: Any) -> dict[str, Any]:
    one = (lambda t, *sizes: expanded(t, *sizes)) if per_head else (lambda t, *sizes: draw(*t.shape, *sizes))
    A = expanded(rates(H), P, N) if per_head else rates(H, P, N)
    more = {k: v if v is not None else {"D": draw(H, P), "dt_bias": one(draw(H), P)}[k] for k, v in more.items()}
    return dict(state=draw(B, H, P, N), hidden_states=draw(B, H, P), dt=one(draw(B, H), P), A=A, B=draw(B, G, N),
                C=draw(B, G, N), **more)  # fmt: skip


CALLS: list[tuple[str, str, Any]] = [
    ("causal_conv1d_fn", "plain", lambda: dict(hidden_states=draw(B, D, LENGTH), weight=draw(D, W))),
    ("causal_conv1d_fn", "silu", lambda: dict(hidden_states=draw(B, D, LENGTH), weight=draw(D, W), bias=draw(D),
                                              activation="silu")),
    ("causal_conv1d_fn", "gelu", lambda: dict(hidden_states=draw(B, D, 1), weight=draw(D, W), activation="gelu")),
    *[("causal_conv1d_update", f"{l} of {w}, {a}",
       functools.partial(lambda l, w, a: dict(hidden_states=draw(B, D, l), conv_state=draw(B, D, w), weight=draw(D, w),
                                              bias=draw(D), activation=a), l, w, a))
      for l in (1, 2, 7) for w in (4, 2, 1) for a in (None, "silu", "gelu")],
    ("mamba_selective_scan", "plain", lambda: scan(LENGTH)),
    ("mamba_selective_scan", "everything", lambda: scan(
        LENGTH, D=draw(D), z=draw(B, D, LENGTH), delta_bias=draw(D), delta_softplus=True, return_last_state=True)),
    ("mamba_selective_scan", "one position", lambda: scan(1, delta_softplus=True, return_last_state=True)),
    ("mamba_selective_state_update", "plain", lambda: update()),
    ("mamba_selective_state_update", "everything", lambda: update(
        D=draw(D), dt_bias=draw(D), dt_softplus=True, z=draw(B, D))),
    ("mamba2_chunk_scan", "plain", lambda: chunk_scan(LENGTH)),
    ("mamba2_chunk_scan", "everything", lambda: chunk_scan(
        LENGTH, D=draw(H), dt_bias=draw(H), dt_softplus=True, dt_limit=(0.1, 1.0), initial_states=draw(B, H, P, N),
        return_final_states=True)),
    ("mamba2_chunk_scan", "one position", lambda: chunk_scan(1, dt_softplus=True, return_final_states=True)),
    *[("mamba2_selective_state_update", f"{'per head' if per_head else 'per channel'}, {len(more)} more",
       functools.partial(lambda per_head, more: update2(per_head, **more), per_head, more))
      for per_head in (True, False)
      for more in ({}, dict(D=None, dt_bias=None, dt_softplus=True),
                   dict(D=None, dt_softplus=True, z=torch.ones(B, H, P)))],
]  # fmt: skip


def same(actual: Any, expected: Any) -> None:
    assert isinstance(actual, tuple) == isinstance(expected, tuple)
    pairs = zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize(("name", "make"), [pytest.param(n, m, id=f"{n}, {c}") for n, c, m in CALLS])
def test_as_the_original(name: str, make: Any, grad: bool):
    """Also where gradients are recorded, which a step in place does not allow."""
    call = make()
    written = [key for key in ("conv_state", "state") if key in call]
    calls = [{k: v.clone() if k in written else v for k, v in call.items()} for _ in range(2)]
    with torch.set_grad_enabled(grad):
        if grad:
            call["hidden_states"].requires_grad_()
        actual, expected = (f(**c) for f, c in zip((getattr(functions, name), originals()[name]), calls, strict=True))
    same(actual, expected)
    for key in written:
        assert not torch.equal(calls[0][key], call[key])
        same(calls[0][key], calls[1][key])
    if grad:
        outputs = [y[0] if isinstance(y, tuple) else y for y in (actual, expected)]
        weights = torch.randn_like(outputs[0])
        gradients = [torch.autograd.grad((y * weights).sum(), call["hidden_states"])[0] for y in outputs]
        same(*gradients)


@pytest.mark.parametrize("name", ["mamba_inner_fn", "mamba2_split_conv1d_scan_combined"])
def test_what_is_fused_elsewhere_is_not_here(name: str):
    nothing = [None] * 8
    assert originals()[name](*nothing) is None
    assert getattr(functions, name)(*nothing) is None


@torch.no_grad()
def test_packed_sequences():
    seq_idx = torch.tensor([[0] * 7 + [1] * 12, [0] * 19])
    x, weight, z = draw(B, D, LENGTH), draw(D, W), draw(B, LENGTH, H, P)
    y = functions.causal_conv1d_fn(x, weight, activation="silu", seq_idx=seq_idx)
    parts = [
        functions.causal_conv1d_fn(part, weight, activation="silu") for part in (x[:1, :, :7], x[:1, :, 7:], x[1:])
    ]
    same(y, torch.cat([torch.cat(parts[:2], 2), parts[2]]))

    call = chunk_scan(LENGTH, dt_softplus=True, return_final_states=True)
    signals = ("hidden_states", "dt", "B", "C", "z")
    initial_states = draw(B, H, P, N)
    y, states = functions.mamba2_chunk_scan(**call, z=z, seq_idx=seq_idx, initial_states=initial_states)
    parts = []
    for row, place, initial in ((0, slice(0, 7), initial_states[:1]), (0, slice(7, None), None),
                                (1, slice(None), initial_states[1:])):  # fmt: skip
        part = {k: v[row : row + 1, place] if k in signals else v for k, v in {**call, "z": z}.items()}
        parts.append(functions.mamba2_chunk_scan(**part, initial_states=initial))
    same(y, torch.cat([torch.cat([parts[0][0], parts[1][0]], 1), parts[2][0]]))
    same(states, torch.cat([parts[1][1], parts[2][1]]))
