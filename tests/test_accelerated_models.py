"""transformers' Mamba-family models on the ops give the same logits, text and gradients.

The oracle is transformers itself without the ops, in what it gets right: the forward of whole sequences.
"""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_family import (
    FAMILY,
    assert_same_gradients,
    attends,
    build,
    cache_of,
    cached,
    error,
    gradients,
    plainly,
    tokens,
)
from ophis.integrations.transformers import accelerate_transformers, acceleration
from ophis.integrations.transformers.families import FAMILIES


@pytest.fixture(params=FAMILY, scope="module")
def model(request):
    return build(request.param)


@pytest.fixture(params=["all of it", "functions alone"])
def accelerate(request, monkeypatch):
    """The call; also as in a version of transformers whose mixers have changed, which leaves the functions."""
    if request.param == "functions alone":
        changed = [f._replace(kind=f.kind._replace(known=frozenset())) for f in FAMILIES]
        monkeypatch.setattr(acceleration, "FAMILIES", changed)
    return accelerate_transformers


def test_logits_and_gradients(model, accelerate):
    shapes = [(2, 1), (2, 3), (1, 37), (3, 70)]
    expected = [plainly(model, tokens(*shape)) for shape in shapes]
    ids = tokens(2, 37)
    expected_gradients = gradients(model, input_ids=ids, labels=ids)
    with accelerate():
        for shape, logits in zip(shapes, expected, strict=True):
            assert error(plainly(model, tokens(*shape)), logits) < 1e-5
        assert_same_gradients(gradients(model, input_ids=ids, labels=ids), expected_gradients)


def positions(model, start: int, end: int) -> dict[str, Tensor]:
    """As `generate` gives them to the models that take them."""
    return {"position_ids": torch.arange(start, end)[None]} if attends(model) else {}


@torch.no_grad()
def test_cached_decoding(model, accelerate):
    ids, cache, logits = tokens(2, 24), None, []
    expected = plainly(model, ids)
    with accelerate():
        for start, end in itertools.pairwise([0, 16, *range(17, 25)]):
            output = model(ids[:, start:end], use_cache=True, **cached(model, cache), **positions(model, start, end))
            cache = cache_of(output)
            logits.append(output.logits)
    assert error(torch.cat(logits, 1), expected) < 1e-5


@pytest.mark.parametrize("ops_first", [True, False])
@torch.no_grad()
def test_the_cache_is_transformers_own(model, accelerate, ops_first: bool):
    """What the ops left in it, transformers can go on with, and the other way round: here in turns."""
    ids, cache, logits = tokens(2, 20), None, []
    expected = plainly(model, ids)
    for i, (start, end) in enumerate(itertools.pairwise([0, 15, *range(16, 21)])):
        with accelerate() if (i % 2 == 0) == ops_first else contextlib.nullcontext():
            output = model(ids[:, start:end], use_cache=True, **cached(model, cache), **positions(model, start, end))
        cache = cache_of(output)
        logits.append(output.logits)
    assert error(torch.cat(logits, 1), expected) < 1e-5


def generate(model, ids: Tensor, mask: Tensor, **options) -> Tensor:
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8, min_new_tokens=8, **options)


def test_generated_text(model):
    """Greedy and by beams, from a batch padded on the left."""
    ids = tokens(3, 12)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 7)):
        ids[row, :padding] = mask[row, :padding] = 0
    expected = [generate(model, ids, mask, num_beams=beams) for beams in (1, 3)]
    with accelerate_transformers():
        for beams, text in zip((1, 3), expected, strict=True):
            assert torch.equal(generate(model, ids, mask, num_beams=beams), text)
        alone = generate(model, ids[1:2, 4:], mask[1:2, 4:])
    assert torch.equal(alone, expected[0][1:2, 4:])


def test_gradients_through_a_cache(model):
    """Of a text in parts, through the states that pass from one to the next: those of the text read whole."""
    ids = tokens(2, 12)
    weights = torch.randn(2, 12, build(model.config.model_type).config.vocab_size)
    (plain,) = torch.autograd.grad((model(ids, use_cache=False).logits * weights).sum(), embedding(model))
    with accelerate_transformers():
        cache, total = None, torch.zeros(())
        for start, end in ((0, 7), (7, 8), (8, 12)):
            output = model(ids[:, start:end], use_cache=True, **cached(model, cache))
            cache = cache_of(output)
            total = total + (output.logits * weights[:, start:end]).sum()
        (in_parts,) = torch.autograd.grad(total, embedding(model))
    assert error(in_parts, plain) < 1e-5


def embedding(model) -> Tensor:
    return model.get_input_embeddings().weight


# From 5.23 on it has another name too, which older versions do not know.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_gradient_checkpointing(model, accelerate):
    ids = tokens(2, 21)
    expected = gradients(model, input_ids=ids, labels=ids)
    model.gradient_checkpointing_enable()
    try:
        with accelerate():
            assert_same_gradients(gradients(model, input_ids=ids, labels=ids), expected)
    finally:
        model.gradient_checkpointing_disable()


class Adapted(nn.Module):
    """What stands where a linear layer stood, as PEFT's layers do: its weight and bias are there to be read."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias
        self.delta = nn.Parameter(0.1 * torch.randn_like(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(x, self.delta)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba"])
def test_an_adapter_on_the_step_projection(name: str):
    """It counts, and gradients reach it: the same as with its weights added to the layer's."""
    model, ids = build(name), tokens(1, 9)
    merged = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "dt_proj"):
            module.dt_proj = Adapted(module.dt_proj)
    deltas = {name: p for name, p in model.named_parameters() if name.endswith("delta")}
    with torch.no_grad():
        for name, delta in deltas.items():
            merged.get_parameter(name.replace("delta", "weight")).add_(delta)
    expected = plainly(merged, ids)
    with accelerate_transformers():
        logits = model(ids, use_cache=False).logits
        assert error(logits.detach(), expected) < 1e-5
        assert all(g.any() for g in torch.autograd.grad(logits.sum(), list(deltas.values())))
        (last,) = model(ids[:, -1:], use_cache=True, **cached(model, prefix(model, ids[:, :-1]))).logits[:, 0]
    assert error(last.detach(), expected[0, -1]) < 1e-5


@torch.no_grad()
def prefix(model, ids: Tensor):
    return cache_of(model(ids, use_cache=True))


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
@torch.no_grad()
def test_bfloat16(model, accelerate, autocast: bool):
    """As near to float32 as transformers is: up to 1.25 times its root mean square error."""
    ids = tokens(2, 37)
    exact = plainly(model, ids)
    narrow = model if autocast else build(model.config.model_type).bfloat16()

    def off(*bounds: int) -> float:
        cache, logits = None, []
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for start, end in itertools.pairwise(bounds):
                call = dict(use_cache=True, **cached(model, cache), **positions(model, start, end))
                output = narrow(ids[:, start:end], **call)
                cache = cache_of(output)
                logits.append(output.logits.float())
        return (torch.cat(logits, 1) - exact).square().mean().sqrt().item()

    allowed = 1.25 * off(0, 37)
    with accelerate():
        assert off(0, 37) < allowed
        assert off(0, *range(30, 38)) < allowed
