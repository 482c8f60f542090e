"""The language model by itself: sizes, initial values, states, padding, packing, generation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import ophis
from ophis.models import ModelState
from tiny_models import PATTERNS, VOCABULARY, build, close, tokens


@pytest.fixture(params=PATTERNS)
def model(request) -> ophis.LanguageModel:
    return build(request.param).double()


# Counts of the papers' tables, recomputed from the layers' shapes by hand (vocabulary 50280 and 50288, head tied).
COUNTS = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
}


@pytest.mark.parametrize("name", ophis.models.PRESETS)
def test_presets_have_the_published_parameter_counts(name: str):
    with torch.device("meta"):
        model = ophis.LanguageModel(ophis.preset(name))
    count = sum(p.numel() for p in model.parameters())
    if name in COUNTS:
        assert count == COUNTS[name]
    elif name == "mamba2attn-2.7b":
        d, heads, width = 2560, 30, 128  # six of 64 Mamba-2 blocks give way to attention with a convolution
        attention = 4 * d * heads * width + 3 * heads * width * 5
        mamba2 = d * (2 * 5120 + 256 + 80) + 5 * (5120 + 256) + 3 * 80 + 5120 + 5120 * d
        assert count == COUNTS["mamba2-2.7b"] + 6 * (attention - mamba2)
    else:
        assert count == 50288 * 2560 + 32 * (4 * 2560**2 + 3 * 2560 * 6912 + 2 * 2560) + 2560


@torch.no_grad()
def test_chunks_and_tokens_with_carried_state_equal_the_whole(model):
    ids = tokens(2, 75)
    whole = model(ids)
    state, logits = None, []
    for part in (ids[:, :2], ids[:, 2:67], *ids[:, 67:].split(1, 1)):
        output = model(part, past_key_values=state)
        state = output.past_key_values
        logits.append(output.logits)
    close(torch.cat(logits, 1), whole.logits)
    assert state.length == whole.past_key_values.length == 75


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_logits_nor_gradients(model, side: str):
    lengths = (7, 12, 1, 9)
    documents = [tokens(1, n, seed=n) for n in lengths]
    batch, mask = torch.zeros(4, 12, dtype=torch.long), torch.zeros(4, 12, dtype=torch.long)
    where = [slice(12 - n, 12) if side == "left" else slice(0, n) for n in lengths]
    for i, (document, place) in enumerate(zip(documents, where, strict=True)):
        batch[i, place], mask[i, place] = document[0], 1
    padded = model(batch, attention_mask=mask, use_cache=True)
    weights = torch.randn(4, 12, VOCABULARY, dtype=torch.float64, generator=torch.manual_seed(0))
    (padded.logits * weights * mask[..., None]).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    alone = [model(document, use_cache=True) for document in documents]
    for i, (output, place) in enumerate(zip(alone, where, strict=True)):
        close(padded.logits[i, place], output.logits[0])
        (output.logits[0] * weights[i, place]).sum().backward()
    for name, parameter in model.named_parameters():
        close(gradients[name], parameter.grad)
    # The state is the one after the last real position, on either side: the next token agrees as well.
    following = tokens(4, 3, seed=5)
    after = model(following, past_key_values=padded.past_key_values).logits
    for i, output in enumerate(alone):
        close(after[i], model(following[i : i + 1], past_key_values=output.past_key_values).logits[0])


def test_packed_documents_never_see_each_other(model):
    lengths = (5, 1, 70, 3)
    documents = [tokens(1, n, seed=n) for n in lengths]
    offsets = torch.tensor([0, 5, 6, 76, 79], dtype=torch.int32)
    packed = torch.cat(documents, 1)
    output = model(packed, cu_seqlens=offsets, labels=packed)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for document, logits in zip(documents, output.logits.split(lengths, 1), strict=True):
        close(logits, model(document).logits)
    # The mean over the tokens that follow a token of their own document.
    losses = [F.cross_entropy(model(d).logits[0, :-1], d[0, 1:], reduction="sum") for d in documents if d.shape[1] > 1]
    loss = torch.stack(losses).sum() / (sum(lengths) - len(lengths))
    # transformers takes the loss in float32.
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-6, atol=0)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_generation_with_state_equals_generation_without(model):
    ids = tokens(2, 8)
    options = dict(max_new_tokens=10, eos_token_id=None, pad_token_id=0)
    for more in (dict(do_sample=False), dict(do_sample=False, num_beams=3), dict(do_sample=True, top_p=0.9)):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            texts.append(model.generate(ids, use_cache=use_cache, **options, **more))
        assert torch.equal(*texts), more


@torch.no_grad()
def test_a_state_is_a_snapshot(model):
    ids = tokens(1, 20)
    kept = model(ids).past_key_values
    first = model(tokens(1, 4, seed=7), past_key_values=kept).logits
    model(tokens(1, 9, seed=8), past_key_values=kept)  # another continuation of the same state
    close(model(tokens(1, 4, seed=7), past_key_values=kept).logits, first)
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    begun = model.generate(ids, **options)
    assert begun.past_key_values.length == 23  # the last token has not been read yet
    resumed = model.generate(begun.sequences, past_key_values=begun.past_key_values, **options)
    assert torch.equal(resumed.sequences, model.generate(ids, **{**options, "max_new_tokens": 8}).sequences)


@torch.no_grad()
def test_a_kept_state_keeps_nothing_else_in_memory(model):
    tensors = pytree.tree_leaves(model(tokens(2, 300)).past_key_values.layers)
    for tensor in tensors:  # a view of the whole sequence would
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_gradients_flow_through_states_and_detach_cuts_them(model):
    embedded = model.get_input_embeddings()(tokens(1, 6)).detach().requires_grad_()
    state = model(inputs_embeds=embedded, use_cache=True).past_key_values
    following = tokens(1, 3, seed=4)
    model(following, past_key_values=state).logits.square().sum().backward(retain_graph=True)
    assert embedded.grad is not None
    assert embedded.grad.abs().sum(-1).min() > 0  # every earlier position matters
    embedded.grad = None
    model(following, past_key_values=state.detach()).logits.square().sum().backward()
    assert embedded.grad is None


def test_state_selects_and_moves_rows():
    model = build("hybrid")
    state = model(tokens(3, 5)).past_key_values
    picked = state.select(torch.tensor([2, 0]))
    assert isinstance(picked, ModelState)
    a = model(tokens(1, 1), past_key_values=picked.select(torch.tensor([0]))).logits
    b = model(tokens(1, 1), past_key_values=model(tokens(3, 5)[2:]).past_key_values).logits
    torch.testing.assert_close(a, b)
    assert picked.to(torch.device("cpu")).length == 5


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(model, reentrant: bool):
    ids = tokens(2, 40)
    model.train()
    gradients = []
    for enabled in (False, True):
        if enabled:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable(dict(use_reentrant=reentrant))
            assert model.backbone.gradient_checkpointing
        model.zero_grad()
        model.backbone(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for n, p in model.named_parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        close(a, b)


@torch.no_grad()
def test_a_model_is_one_graph_for_every_length():
    """The layers are compiled in tests of their own; here it is what stands around them."""
    model = build("mamba", num_hidden_layers=1).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for length in (7, 12):
        found, expected = compiled(tokens(2, length)), model(tokens(2, length))
        close(found.logits, expected.logits)
        assert torch.equal(found.past_key_values.fingerprint, expected.past_key_values.fingerprint)


def test_initial_values_are_the_published_ones():
    model = build("mamba2 with MLPs", hidden_size=128, num_hidden_layers=6, vocab_size=2000, mamba2=dict(headdim=16))
    assert model.backbone.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for block in model.backbone.layers:
        # Kaiming-uniform with a = sqrt(5) is uniform in 1 / sqrt(fan_in); two residuals a block, six blocks.
        for weight in (block.mixer.out_proj.weight, block.mlp.fc2.weight):
            bound = weight.shape[1] ** -0.5 / math.sqrt(2 * 6)
            assert bound * 0.98 < weight.abs().max().item() <= bound
        steps = F.softplus(block.mixer.dt_bias)
        assert steps.min() >= 1e-3 * 0.999
        assert steps.max() <= 0.1 * 1.001
        assert block.mixer.in_proj.weight.abs().max().item() <= 128**-0.5


def test_initial_values_survive_a_second_initialisation_and_keep_what_was_loaded():
    model = build("mamba", num_hidden_layers=2)
    model.backbone.layers[0].mixer.D.data.fill_(7)
    model.backbone.layers[0].mixer.D._is_hf_initialized = True
    model.apply(model._init_weights)
    for block in model.backbone.layers:
        steps = F.softplus(block.mixer.dt_proj.bias)
        assert steps.min() >= 1e-3 * 0.999
        assert steps.max() <= 0.1 * 1.001
        torch.testing.assert_close(block.mixer.A_log.exp(), torch.arange(1.0, 5).expand(64, 4))
    assert (model.backbone.layers[0].mixer.D == 7).all()
    assert (model.backbone.layers[1].mixer.D == 1).all()


@pytest.mark.parametrize("name", PATTERNS)
def test_bfloat16_is_finite_and_close(name: str):
    model = build(name)
    ids = tokens(2, 130)
    with torch.no_grad():
        expected = model(ids).logits
        cast = build(name).to(torch.bfloat16)
        actual = cast(ids)
    assert (actual.logits - expected).abs().max() < 0.05 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_what_a_tired_person_types():
    with pytest.raises(ValueError, match="unknown key 'hiden_size'; did you mean 'hidden_size'"):
        ophis.LanguageModelConfig(hiden_size=32)
    with pytest.raises(ValueError, match="mamba2 has no option 'head_dim'; did you mean 'headdim'"):
        ophis.LanguageModelConfig(mamba2=dict(head_dim=32))
    with pytest.raises(ValueError, match="pattern names 'mamba3', expected some of mamba, mamba2, attention, s4d"):
        ophis.LanguageModelConfig(pattern=["mamba3"])
    with pytest.raises(ValueError, match=r"attention needs num_heads: attention=\{'num_heads': ...\}"):
        ophis.LanguageModelConfig(pattern=["attention"])
    with pytest.raises(ValueError, match=r"no model 'mamba-3b'; there are mamba-130m"):
        ophis.preset("mamba-3b")
    model = build("mamba2")
    with pytest.raises(ValueError, match=r"token ids run from 3 to 61, expected 0 to 60; is this the tokenizer"):
        model(torch.tensor([[3, 61]]))
    with pytest.raises(ValueError, match=r"shape \(3,\) and dtype torch.int64, expected integers of shape \(batch"):
        model(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="cache_implementation='static' is for attention caches"):
        model.generate(tokens(1, 3), cache_implementation="static", max_new_tokens=2)
