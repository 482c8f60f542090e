"""What transformers' Mamba-family models get wrong and `accelerate_transformers` right: whatever a batch holds beside a
sequence - padding, other sequences - and whatever a cache holds of it, its logits and gradients are its own.

The oracle is transformers itself without the ops, on each sequence by itself and whole.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from mamba_family import (
    FAMILY,
    NEWEST,
    VERSION,
    VOCABULARY,
    assert_same_gradients,
    attends,
    build,
    cache_of,
    cached,
    error,
    plainly,
    tokens,
)
from ophis.integrations.transformers import accelerate_transformers
from ophis.integrations.transformers import packing as packing_module
from ophis.integrations.transformers.sequences import Sequences

LENGTHS = (5, 1, 9, 4)  # of packed documents
Run = Callable[[], float]  # the error of a call's logits

MAMBA = {"mamba", "falcon_mamba", "jamba", "zamba"}
ALL = set(FAMILY)
REFUSED = ALL - {"mamba", "falcon_mamba", "jamba", "mamba2"}  # seq_idx, where it reaches the mixer


@pytest.fixture(params=FAMILY, scope="module")
def model(request):
    return build(request.param)


def documents() -> tuple[Tensor, ...]:
    return tokens(1, sum(LENGTHS)).split(LENGTHS, 1)


def packing(form: str) -> dict[str, Any]:
    lengths = torch.tensor(LENGTHS)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).int()
    return {
        "seq_idx": dict(seq_idx=torch.arange(len(LENGTHS)).repeat_interleave(lengths)[None].int()),
        "position_ids": dict(position_ids=torch.cat([torch.arange(l) for l in LENGTHS])[None]),
        "cu_seq_lens": dict(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=9, max_length_k=9),
    }[form]


# Ways to call a model: each computes what is right, without the ops, and returns the call.


def in_parts(model) -> Run:
    ids = tokens(2, 24)
    expected = plainly(model, ids)

    def run() -> float:
        cache, logits = None, []
        for start, end in itertools.pairwise((0, 5, 6, 20, 24)):
            output = model(ids[:, start:end], use_cache=True, **cached(model, cache))
            cache = cache_of(output)
            logits.append(output.logits)
        return error(torch.cat(logits, 1), expected)

    return run


def packed(form: str) -> Callable[[Any], Run]:
    def way(model) -> Run:
        expected = torch.cat([plainly(model, document) for document in documents()], 1)
        return lambda: error(model(torch.cat(documents(), 1), **packing(form)).logits, expected)

    return way


def padded(sides: str, *parts: Sequence[int]) -> Callable[[Any], Run]:
    """Rows of the given lengths in each part, padded on a side each, as "lr" says; then the cache goes on."""

    def way(model) -> Run:
        rows = [tokens(1, sum(lengths), seed=i) for i, lengths in enumerate(zip(*parts, strict=True))]
        expected = [plainly(model, row)[0] for row in rows]

        def run() -> float:
            cache, found, so_far = None, [[] for _ in rows], torch.zeros(len(rows), 0, dtype=torch.int64)
            read = [0] * len(rows)
            for side, lengths in zip(sides, parts, strict=True):
                ids, mask = torch.zeros(2, len(rows), max(lengths), dtype=torch.int64)
                for row, length in enumerate(lengths):
                    place = slice(0, length) if side == "r" else slice(max(lengths) - length, None)
                    ids[row, place], mask[row, place] = rows[row][0, read[row] : read[row] + length], 1
                so_far = torch.cat([so_far, mask], 1)
                call: dict[str, Any] = dict(attention_mask=mask)
                if attends(model):
                    positions = (mask.cumsum(1) - 1).clamp(min=0) + torch.tensor(read)[:, None]
                    call = dict(attention_mask=so_far, position_ids=positions)
                output = model(ids, use_cache=True, **cached(model, cache), **call)
                cache = cache_of(output)
                for row, length in enumerate(lengths):
                    found[row].append(output.logits[row][mask[row] != 0])
                    read[row] += length
            return max(error(torch.cat(mine), theirs) for mine, theirs in zip(found, expected, strict=True))

        return run

    return way


def within_limits(model) -> Run:
    """Token by token, where step sizes are clamped."""
    kind = model.config.model_type
    limit = dict(time_step_min=0.5) if kind in ("zamba2", "nemotron_h") else dict(time_step_limit=(0.5, 0.8))
    limited = build(kind, **({} if kind in MAMBA else limit))
    ids = tokens(2, 12)
    expected = plainly(limited, ids)

    def run() -> float:
        cache, logits = None, []
        for start, part in enumerate(ids.split(1, 1)):
            positions = dict(position_ids=torch.tensor([[start]])) if attends(limited) else {}
            output = limited(part, use_cache=True, **cached(limited, cache), **positions)
            cache = cache_of(output)
            logits.append(output.logits)
        return error(torch.cat(logits, 1), expected)

    return run


# way -> (the way, models that transformers 5.24 gets it wrong for)
WAYS: dict[str, tuple[Callable[[Any], Run], set[str]]] = {
    "in parts": (in_parts, MAMBA | {"bamba"}),
    "packed, seq_idx": (packed("seq_idx"), ALL),
    "packed, position_ids": (packed("position_ids"), ALL),
    "packed, cu_seq_lens": (packed("cu_seq_lens"), ALL),
    "padded left": (padded("l", (7, 3, 11)), set()),
    "padded left, then a token": (padded("ll", (7, 3, 11), (1, 1, 1)), set()),
    "padded left, then a part": (padded("ll", (7, 3, 11), (4, 4, 4)), MAMBA),
    "padded right, then a token": (padded("rr", (7, 3, 11), (1, 1, 1)), ALL),
    "padded right, then a part": (padded("rr", (7, 3, 11), (4, 4, 4)), ALL),
    "padded parts": (padded("rllr", (7, 3, 11), (2, 5, 1), (3, 4, 2), (1, 6, 2)), ALL),
    "a row of nothing but padding": (padded("rlr", (7, 3, 11), (2, 0, 1), (3, 4, 2)), ALL),
    "token by token within step limits": (within_limits, ALL - MAMBA),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_right(model, way: str):
    run = WAYS[way][0](model)
    with accelerate_transformers():
        assert run() < 1e-5


@pytest.mark.skipif(VERSION != NEWEST, reason="which models get what wrong was found out with transformers 5.24")
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_wrong_without(model, way: str):
    """What the call is there for; once transformers gets one of them right, the call may leave it alone."""
    prepare, wrong = WAYS[way]
    run = prepare(model)
    if model.config.model_type not in wrong:
        assert run() < 1e-5
    elif way == "packed, seq_idx" and model.config.model_type in REFUSED:
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            run()
    else:
        assert run() > 1e-4


# Gradients


def of_documents(model, logits: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss that weighs each logit differently."""
    weights = torch.randn(logits.shape, generator=torch.manual_seed(1))
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_of_packed_documents(model, checkpointing: bool):
    """Checkpointing too: what is computed again in the backward pass must know of the packing."""
    model.train()
    separate = torch.cat([model(document, use_cache=False).logits for document in documents()], 1)
    expected = of_documents(model, separate)
    if checkpointing:
        model.gradient_checkpointing_enable()
    try:
        with accelerate_transformers():
            together = model(torch.cat(documents(), 1), use_cache=False, **packing("position_ids")).logits
            assert_same_gradients(of_documents(model, together), expected)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def test_gradients_of_a_padded_batch(model):
    rows = [tokens(1, length, seed=length) for length in (7, 3, 11)]
    expected = of_documents(model, torch.cat([model(row, use_cache=False).logits[0] for row in rows]))
    for side in ("left", "right"):
        ids = torch.zeros(3, 11, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(0, row.shape[1]) if side == "right" else slice(11 - row.shape[1], None)
            ids[i, place], mask[i, place] = row[0], 1
        positions = dict(position_ids=(mask.cumsum(1) - 1).clamp(min=0)) if attends(model) else {}
        with accelerate_transformers():
            logits = model(ids, attention_mask=mask, use_cache=False, **positions).logits
            assert_same_gradients(of_documents(model, logits[mask != 0]), expected)


# Batches as collators make them


def mean_loss(model, texts: Sequence[Tensor]) -> float:
    """Of all predicted tokens, each text by itself."""
    sums = [F.cross_entropy(plainly(model, text)[0, :-1], text[0, 1:], reduction="sum") for text in texts]
    return (sum(sums) / sum(text.shape[1] - 1 for text in texts)).item()


@pytest.mark.parametrize("described_by", ["position_ids", "everything"])
@torch.no_grad()
def test_flattened_by_transformers(model, described_by: str):
    everything = described_by == "everything"
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=everything, return_seq_idx=everything)
    texts = [tokens(1, length, seed=length) for length in (6, 2, 9)]
    batch = collator([{"input_ids": text[0].tolist()} for text in texts])
    expected = mean_loss(model, texts)
    model.train()
    with accelerate_transformers():
        assert model(**batch, use_cache=False).loss.item() == pytest.approx(expected, rel=1e-5)
    model.eval()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # as TRL still calls it
@pytest.mark.parametrize("options", [dict(packing=True, max_length=32), dict(padding_free=True, max_length=None)])
@pytest.mark.parametrize("name", ["mamba", "zamba", "mamba2", "bamba"])
def test_packed_by_trl(name: str, options: dict[str, Any], tmp_path):
    """A step of its trainer, which checkpoints, and goes past the language model to the stack of layers below it."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from trl import SFTConfig, SFTTrainer

    model = build(name)
    texts = [tokens(1, length, seed=length) for length in (6, 2, 9, 5)]
    expected = mean_loss(model, texts)
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    config = SFTConfig(tmp_path, max_steps=1, per_device_train_batch_size=4, logging_steps=1, report_to="none",
                       save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, **options)  # fmt: skip
    with accelerate_transformers():
        trainer = SFTTrainer(
            model,
            config,
            train_dataset=Dataset.from_list([{"input_ids": text[0].tolist()} for text in texts]),
            processing_class=transformers.PreTrainedTokenizerFast(
                tokenizer_object=words, pad_token="0", eos_token="2"
            ),
        )  # fmt: skip
        assert trainer.train().training_loss == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_rows_of_packed_documents(model):
    """More than one row, some of them one document."""
    ids = tokens(3, 10)
    seq_idx = torch.tensor([[0] * 4 + [1] * 6, [0] * 10, [7] * 1 + [3] * 2 + [4] * 7])
    expected = [torch.cat([plainly(model, part[None])[0] for part in row.split(lengths)])
                for row, lengths in zip(ids, ([4, 6], [10], [1, 2, 7]), strict=True)]  # fmt: skip
    with accelerate_transformers():
        assert error(model(ids, use_cache=False, seq_idx=seq_idx).logits, torch.stack(expected)) < 1e-5


# What cannot be


def test_what_does_not_fit_is_refused(model):
    ids = torch.cat(documents(), 1)
    packed = packing("seq_idx")
    with accelerate_transformers(), torch.no_grad():
        mask = torch.ones_like(ids)
        model(ids, attention_mask=mask, **packed)
        mask[0, -1] = 0
        with pytest.raises(ValueError, match="attention_mask has zeros beside "):
            model(ids, attention_mask=mask, **packed)
        with pytest.raises(ValueError, match=r"^seq_idx has shape \(1, 18\), expected \(1, 19\)$"):
            model(ids, seq_idx=packed["seq_idx"][:, 1:])
        with pytest.raises(ValueError, match="cu_seq_lens_q describes one packed row, but the batch has 2"):
            model(ids.expand(2, -1), **packing("cu_seq_lens"))
        cache = cache_of(model(ids, use_cache=True))
        if attends(model):
            with pytest.raises(ValueError, match="packed sequences beside a cache"):
                model(ids, **cached(model, cache), **packed)
        with pytest.raises(TypeError, match="input_ids"):
            model.get_decoder()(ids, input_ids=ids)


@pytest.mark.parametrize("form", ["seq_idx", "position_ids"])
def test_flash_attention_is_told_the_offsets(form: str):
    """It takes no mask. Its kernels need a GPU, so this looks at what they would be given."""
    model = build("granitemoehybrid")
    model.config._attn_implementation = "flash_attention_2"
    call = packing_module.packed(model, dict(input_ids=torch.cat(documents(), 1), **packing(form)), attends=True)
    expected = packing("cu_seq_lens")
    for key, value in expected.items():
        assert torch.equal(torch.as_tensor(call[key]), torch.as_tensor(value)), key
    assert call["attention_mask"] == {"full_attention": None, "linear_attention": None}
    assert torch.equal(call["position_ids"], packing("position_ids")["position_ids"])


def test_a_mask_has_a_place_for_each_position():
    x = torch.zeros(2, 5, 3)
    for shape in ((2, 4), (1, 5), (2, 5, 1)):
        expected = f"attention_mask has shape {shape}, expected (2, 5), or longer beside a cache"
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            Sequences.of(x, torch.ones(shape), None)


def test_a_mask_is_looked_at_again_when_it_has_changed():
    """The latest one is remembered, since each layer asks for it."""
    x, mask = torch.zeros(2, 5, 3), torch.ones(2, 5)
    assert Sequences.of(x, mask, None) is None
    mask[1, :2] = 0
    once, again = (Sequences.of(x, mask, None) for _ in range(2))
    assert once is again is not None
    assert once.cu_seqlens.tolist() == [0, 5, 8]
    assert Sequences.of(x[:, 2:], mask, None) is None
    with torch.inference_mode():  # where changes are not counted
        mask = torch.ones(2, 5)
        assert Sequences.of(x, mask, None) is None
        mask[0] = 0
        assert Sequences.of(x, mask, None) is not None


@torch.no_grad()
def test_a_cache_goes_on_with_packed_documents():
    """Where there is no attention: the first goes on from the cache, and the last is what the cache is left with."""
    model = build("mamba2")
    first, *others = documents()
    before, after = tokens(1, 6, seed=1), tokens(1, 3, seed=2)
    expected = [plainly(model, torch.cat([before, first], 1))[:, 6:], *(plainly(model, text) for text in others)]
    expected_after = plainly(model, torch.cat([others[-1], after], 1))[:, -3:]
    with accelerate_transformers():
        state = cached(model, cache_of(model(before, use_cache=True)))
        packed = model(torch.cat(documents(), 1), use_cache=True, **state, **packing("seq_idx")).logits
        assert error(packed, torch.cat(expected, 1)) < 1e-5
        assert error(model(after, use_cache=True, **state).logits, expected_after) < 1e-5
