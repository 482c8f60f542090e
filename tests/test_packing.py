"""Packed sequences under every name that collators have for them, with padding and without, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DataCollatorWithFlattening

import ophis
from ophis.models.packing import Packing
from tiny_models import PATTERNS, build, close, tokens

LENGTHS = (5, 1, 20, 3)
DOCUMENTS = [tokens(1, n, seed=n) for n in LENGTHS]
OFFSETS = torch.tensor([0, 5, 6, 26, 29], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
NUMBERS = torch.repeat_interleave(torch.arange(4, dtype=torch.int32), torch.tensor(LENGTHS))[None]

# The same four documents in a row, said in each way.
NAMES: dict[str, dict[str, Any]] = {
    "cu_seqlens": dict(cu_seqlens=OFFSETS),
    "flash attention's": dict(cu_seq_lens_q=OFFSETS, cu_seq_lens_k=OFFSETS, max_length_q=20, max_length_k=20),
    "seq_idx": dict(seq_idx=NUMBERS),
    "seq_idx without a batch": dict(seq_idx=NUMBERS[0]),
    "position_ids": dict(position_ids=POSITIONS),
    "positions from 2 on": dict(position_ids=POSITIONS + 2),
    "a collator's": dict(DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
        [{"input_ids": d[0].tolist()} for d in DOCUMENTS]
    )),
}  # fmt: skip


@pytest.fixture(params=PATTERNS)
def model(request) -> ophis.LanguageModel:
    return build(request.param).double()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_equal_each_alone(name: str):
    model = build("hybrid").double()
    arguments = {k: v for k, v in NAMES[name].items() if k not in ("input_ids", "labels")}
    packed = torch.cat(DOCUMENTS, 1)
    outputs = model(packed, labels=packed, **arguments)
    outputs.loss.backward()
    together = gradients(model)
    alone = [model(d) for d in DOCUMENTS]
    for found, expected in zip(outputs.logits.split(LENGTHS, 1), alone, strict=True):
        close(found, expected.logits)
    assert outputs.past_key_values.rows == 4
    # Of every token that follows another of its document. transformers takes the loss in float32.
    losses = [
        F.cross_entropy(o.logits[0, :-1].float(), d[0, 1:], reduction="sum")
        for o, d in zip(alone, DOCUMENTS, strict=True)
    ]
    loss = sum(losses) / (sum(LENGTHS) - 4)
    torch.testing.assert_close(outputs.loss, loss)
    loss.backward()
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(together[parameter], gradient, rtol=1e-5, atol=1e-8)
    # The state of each document is the one after its last token.
    following = tokens(4, 3, seed=9)
    after = model(following, past_key_values=outputs.past_key_values).logits
    for i, output in enumerate(alone):
        close(after[i], model(following[i : i + 1], past_key_values=output.past_key_values).logits[0])


@pytest.mark.parametrize("form", ["seq_idx", "position_ids"])
@pytest.mark.parametrize("padding", ["none", "right", "left", "within"])
def test_documents_packed_in_the_rows_of_a_padded_batch(model, form: str, padding: str):
    rows = [[3, 4], [7], [1, 5, 1]]
    batch, mask, numbers = (torch.zeros(3, 10, dtype=torch.long) for _ in range(3))
    places, documents = [], []
    if padding == "none":
        rows = [[3, 7], [10], [1, 8, 1]]
    for r, lengths in enumerate(rows):
        at = 10 - sum(lengths) if padding == "left" else 0
        for i, n in enumerate(lengths):
            documents.append(tokens(1, n, seed=10 * r + i))
            places.append((r, slice(at, at + n)))
            batch[places[-1]], mask[places[-1]] = documents[-1][0], 1
            numbers[places[-1]] = i if form == "seq_idx" else torch.arange(n)
            at += n + (padding == "within")
    # No label is hidden: those at padding and at beginnings have no loss all the same.
    arguments = {form: numbers} if padding == "none" else {form: numbers, "attention_mask": mask}
    outputs = model(batch, labels=batch, **arguments)
    alone = [model(d).logits for d in documents]
    for place, logits in zip(places, alone, strict=True):
        close(outputs.logits[place], logits[0])
    pairs = zip(alone, documents, strict=True)
    losses = [F.cross_entropy(y[0, :-1].float(), d[0, 1:], reduction="sum") for y, d in pairs]
    torch.testing.assert_close(outputs.loss, sum(losses) / sum(d.shape[1] - 1 for d in documents))


def test_offsets_and_a_mask_together():
    model = build("hybrid").double()
    documents, mask = [tokens(1, 4), tokens(1, 6, seed=2)], torch.ones(1, 12)
    mask[:, 10:] = 0
    row = F.pad(torch.cat(documents, 1), (0, 2))
    outputs = model(row, attention_mask=mask, cu_seqlens=torch.tensor([0, 4, 12], dtype=torch.int32))
    close(outputs.logits[:, :4], model(documents[0]).logits)
    close(outputs.logits[:, 4:10], model(documents[1]).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_padded_batch_is_that_of_its_texts(model, side: str):
    texts = [tokens(1, 4), tokens(1, 9, seed=2)]
    pad = (5, 0) if side == "left" else (0, 5)
    batch = torch.cat([F.pad(texts[0], pad), texts[1]])
    mask = torch.cat([F.pad(torch.ones_like(texts[0]), pad), torch.ones_like(texts[1])])
    model(batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100)).loss.backward()
    padded = gradients(model)
    sum(model(text, labels=text).loss * (text.shape[1] - 1) for text in texts).div(3 + 8).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(padded[name], gradient, rtol=1e-5, atol=1e-8)


def test_the_loss_of_a_text_with_padding_within():
    """As of a prompt padded on the right and its continuation: what comes behind the padding has no neighbour."""
    model, text = build("hybrid").double(), tokens(1, 9)
    gap = torch.cat([text[:, :5], torch.zeros(1, 3, dtype=torch.long), text[:, 5:]], 1)
    mask = torch.ones_like(gap)
    mask[:, 5:8] = 0
    losses = F.cross_entropy(model(text).logits[0, :-1].float(), text[0, 1:], reduction="none")
    losses = torch.cat([losses[:4], losses[5:]])  # but for the token behind the gap
    torch.testing.assert_close(model(gap, attention_mask=mask, labels=gap).loss, losses.mean())


def test_what_says_nothing_new_changes_nothing():
    ones, positions = torch.ones(2, 6), torch.arange(6).expand(2, 6)
    assert Packing.of(2, 6, ones, {}) is None
    assert Packing.of(2, 6, None, dict(position_ids=positions)) is None
    assert Packing.of(2, 6, None, dict(position_ids=positions[:1] + 40)) is None  # goes on from a state
    assert Packing.of(2, 6, ones.bool(), dict(seq_idx=torch.zeros(2, 6))) is None
    assert Packing.of(2, 1, None, dict(position_ids=torch.tensor([[7], [3]]))) is None
    assert Packing.of(2, 6, None, dict(output_attentions=False, head_mask=None, is_causal=True)) is None
    # Positions counted over a left-padded mask, as `generate` makes them.
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    packing = Packing.of(2, 4, mask, dict(position_ids=torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])))
    assert packing is not None
    assert not packing.documents
    assert packing.cu_seqlens.tolist() == [0, 2, 6]


def test_labels_of_an_empty_sequence_at_the_end():
    packing = Packing.of(1, 4, None, dict(cu_seqlens=torch.tensor([0, 2, 4, 4], dtype=torch.int32)))
    assert packing is not None
    assert packing.mask_labels(torch.tensor([[1, 2, 3, 4]])).tolist() == [[-100, 2, -100, 4]]


@torch.no_grad()
def test_padding_alone_leaves_the_state(model):
    before = model(tokens(2, 5)).past_key_values
    nothing = dict(attention_mask=torch.zeros(2, 3), output_hidden_states=True)
    outputs = model(tokens(2, 3, seed=2), past_key_values=before, **nothing)
    after = model(tokens(2, 3, seed=3), past_key_values=outputs.past_key_values).logits
    close(after, model(tokens(2, 3, seed=3), past_key_values=before).logits)
    assert outputs.hidden_states[-1].shape == (2, 3, 32)
    # Also before the first token, where a mask may begin with nothing but padding.
    begun = model(tokens(2, 3, seed=2), **nothing).past_key_values
    close(model(tokens(2, 3), past_key_values=begun).logits, model(tokens(2, 3)).logits)


@torch.no_grad()
def test_one_token_at_a_time_through_padding(model):
    """A mask counts for calls of one position too: one row's padding may be another's text."""
    texts = [tokens(1, 2), tokens(1, 5, seed=2)]
    batch = torch.cat([F.pad(texts[0], (3, 0)), texts[1]])
    mask = torch.cat([F.pad(torch.ones_like(texts[0]), (3, 0)), torch.ones_like(texts[1])])
    state = None
    for t in range(5):
        outputs = model(batch[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=state)
        state = outputs.past_key_values
    close(outputs.logits[0, -1], model(texts[0]).logits[0, -1])
    close(outputs.logits[1, -1], model(texts[1]).logits[0, -1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(seq_ids=torch.zeros(1, 6)), r"seq_ids=<tensor of shape \(1, 6\)> .*; did you mean 'seq_idx'"),
        (dict(output_attentions=True), "output_attentions=True is not something that this model can do"),
        (dict(is_causal=False), "is_causal=False is not something"),
        (dict(token_type_ids=torch.zeros(2, 6)), "token_type_ids=<tensor"),
    ],
)
def test_unknown_arguments_are_refused(arguments: dict[str, Any], message: str):
    model = build("mamba2")
    for part in (model, model.backbone):
        with pytest.raises(TypeError, match=message):
            part(tokens(2, 6), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(attention_mask=torch.ones(2, 1, 6, 6)), r"has shape \(2, 1, 6, 6\), expected \(b=2, l=6\)"),
        (dict(attention_mask=torch.ones(2, 9)), r"attention_mask has shape \(2, 9\), expected \(b=2, l=6\);"),
        (dict(attention_mask=torch.tensor([[1, 1, 2, 2, 0, 0]] * 2)), "values other than 0 and 1.*seq_idx"),
        (dict(cu_seqlens=OFFSETS), "in a batch of 1, got 2 rows; several rows take seq_idx or position_ids"),
        (dict(seq_idx=torch.zeros(2, 5)), r"seq_idx has shape \(2, 5\), expected \(b=2, l=6\)"),
        (dict(position_ids=torch.zeros(3, 2, 6)), r"position_ids has shape \(3, 2, 6\)"),
    ],
)
def test_forms_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str):
    model = build("mamba2")
    for part in (model, model.backbone):
        with pytest.raises(ValueError, match=message):
            part(tokens(2, 6), **arguments)


def test_queries_and_keys_packed_differently_are_refused():
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k differ"):
        build("mamba2")(tokens(1, 29), cu_seq_lens_q=OFFSETS, cu_seq_lens_k=OFFSETS + 1)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize("name", PATTERNS)
def test_on_a_gpu_as_on_the_cpu(name: str):
    """Padded, packed in rows, in chunks with rows of nothing but padding, and the gradients, by the GPU's kernels."""
    expected, found = build(name).double(), build(name).cuda()
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :9], mask[1, :5] = 0, 0
    ids, numbers = tokens(3, 12), torch.tensor([0] * 7 + [1] * 5).expand(3, 12)
    for arguments in (dict(attention_mask=mask), dict(seq_idx=numbers), dict(attention_mask=mask, seq_idx=numbers)):
        outputs = [
            m(ids.to(m.device), labels=ids.to(m.device), **{k: v.to(m.device) for k, v in arguments.items()})
            for m in (expected, found)
        ]
        torch.testing.assert_close(outputs[1].logits.double().cpu(), outputs[0].logits, rtol=1e-3, atol=1e-3)
        for output in outputs:
            output.loss.backward()
        for a, b in zip(expected.parameters(), found.parameters(), strict=True):
            torch.testing.assert_close(b.grad.double().cpu(), a.grad, rtol=1e-2, atol=1e-4)
            a.grad = b.grad = None
    options = dict(attention_mask=mask, max_new_tokens=4, do_sample=False, output_logits=True, eos_token_id=None)
    options["return_dict_in_generate"] = True
    whole = expected.generate(ids, **options)
    options["attention_mask"] = mask.cuda()
    for chunk in (None, 1, 4):
        parts = found.generate(ids.cuda(), prefill_chunk_size=chunk, **options)
        torch.testing.assert_close(torch.stack(parts.logits).cpu(), torch.stack(whole.logits), rtol=1e-3, atol=1e-3)
