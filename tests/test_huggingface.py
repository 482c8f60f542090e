"""The language model among transformers' tools: Auto classes, files, the hub, devices, pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import ophis
from ophis.models import LanguageBackbone, LanguageModelForEmbedding, LanguageModelForSequenceClassification
from ophis.training import byte_tokenizer
from tiny_models import PATTERNS, build, config, tokens

BYTES = dict(vocab_size=257, eos_token_id=256, bos_token_id=256, pad_token_id=256)


@pytest.fixture(params=PATTERNS)
def model(request) -> ophis.LanguageModel:
    return build(request.param)


def save(model: torch.nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["mamba2 with MLPs", "hybrid", "transformer++", "s4d"])
def test_auto_classes_give_back_what_was_saved(name: str, tmp_path: Path):
    model = build(name)
    model.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_diff_dict() == model.config.to_diff_dict()
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is ophis.LanguageModel
    assert not again.training
    ids = tokens(2, 9)
    assert torch.equal(again(ids).logits, model(ids).logits)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is LanguageBackbone
    assert torch.equal(backbone(ids).last_hidden_state, model.backbone(ids).last_hidden_state)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_stored_once_and_shared_again(tied: bool, tmp_path: Path):
    model = build("hybrid", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118 (not a dict)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.backbone.embeddings.weight) is tied
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_shards_and_half_precision(model, tmp_path: Path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    half = ophis.LanguageModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = {name for name, p in model.to(torch.bfloat16).named_parameters() if p.dtype == torch.float32}
    assert {name for name, p in half.named_parameters() if p.dtype == torch.float32} == expected
    assert half(tokens(1, 5)).logits.isfinite().all()


@pytest.mark.parametrize("rows", [40, 70, 72])
@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_is_saved_as_it_is(rows: int, tied: bool, tmp_path: Path):
    model = build("hybrid", pad_vocab_size_multiple=8, tie_word_embeddings=tied)
    ids = torch.randint(40, (1, 9))
    before = model(ids).logits
    model.resize_token_embeddings(rows)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    torch.testing.assert_close(model(ids).logits[..., :40], before[..., :40])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == again.lm_head.weight.shape[0] == rows
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=f"expected 0 to {rows - 1}"):
        again(torch.tensor([[rows]]))


def test_a_classifier_of_a_resized_vocabulary(tmp_path: Path):
    classifier = LanguageModelForSequenceClassification(config("mamba2", pad_vocab_size_multiple=8))
    classifier.resize_token_embeddings(70)
    classifier.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.tensor([[69, 3]])
    assert torch.equal(again(ids).logits, classifier.eval()(ids).logits)


def test_push_to_hub_sends_the_whole_model(monkeypatch, tmp_path: Path):
    def commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, tmp_path / operation.path_in_repo)

    def no_card(*args, **kwargs):
        raise EntryNotFoundError("not there")

    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(ModelCard, "load", no_card)
    model = build("hybrid")
    model.push_to_hub("someone/tiny")
    assert {f.name for f in tmp_path.iterdir()} >= {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "ophis"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens(1, 4)).logits, model(tokens(1, 4)).logits)


@pytest.mark.parametrize("where", ["cpu", "auto", "disk"])
def test_device_map(model, where: str, tmp_path: Path):
    model.save_pretrained(tmp_path / "model")
    places: str | dict[str, str] = where
    if where == "disk":  # every module's own parameters are fetched as it is called, and only then
        names = [*(f"backbone.layers.{i}" for i in range(3)), "backbone.norm_f"]
        places = {**dict.fromkeys(names, "disk"), "backbone.embeddings": "cpu", "lm_head": "cpu"}
    placed = ophis.LanguageModel.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offloaded")
    )
    batch, mask = tokens(2, 9), torch.ones(2, 9)
    mask[0, :4] = 0
    with torch.no_grad():
        found, expected = (m(batch, attention_mask=mask, use_cache=True) for m in (placed, model))
    torch.testing.assert_close(found.logits[mask != 0], expected.logits[mask != 0])
    options = dict(attention_mask=mask.long(), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(placed.generate(batch, **options), model.generate(batch, **options))


def test_text_generation_pipeline(tmp_path: Path):
    folder = save(build("hybrid", **BYTES), tmp_path)
    writer = pipeline("text-generation", model=folder, tokenizer=folder, device="cpu")
    options = dict(max_new_tokens=6, do_sample=False)
    texts = ["It was", "A longer beginning", "x"]
    alone = [writer(text, **options)[0]["generated_text"] for text in texts]
    together = [found[0]["generated_text"] for found in writer(texts, batch_size=3, **options)]
    assert together == alone
    assert all(found.startswith(text) for found, text in zip(alone, texts, strict=True))
    writer.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    answer = writer([{"role": "user", "content": "Hello"}], **options)[0]["generated_text"]
    assert [message["role"] for message in answer] == ["user", "assistant"]


TEXTS = ["a", "several words", "in between"]


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("name", ["mamba", "hybrid"])
def test_heads_see_no_padding_and_no_neighbour(name: str, pooling: str):
    """Padded on either side and packed: one number per text, the same as alone, and the same gradients."""
    torch.manual_seed(0)
    classifier = LanguageModelForSequenceClassification(config(name, num_labels=3, pooling=pooling)).double()
    embedder = LanguageModelForEmbedding(config(name, pooling=pooling)).double()
    embedder.backbone.load_state_dict(classifier.backbone.state_dict())
    texts = [tokens(1, n, seed=n) for n in (3, 12, 1)]
    labels = torch.tensor([0, 2, 1])
    alone = torch.cat([classifier(text).logits for text in texts])
    vectors = torch.cat([embedder(text).embeddings for text in texts])
    hidden = [embedder.backbone(text).last_hidden_state[0] for text in texts]
    expected = torch.stack([h[-1] if pooling == "last" else h.mean(0) for h in hidden])
    torch.testing.assert_close(vectors, expected, rtol=1e-6, atol=1e-7)  # means are taken in float32
    torch.testing.assert_close(alone, expected @ classifier.score.weight.t(), rtol=1e-6, atol=1e-7)
    F.cross_entropy(alone, labels).backward()
    gradients = {n: p.grad.clone() for n, p in classifier.named_parameters()}
    ways = {"packed": (torch.cat(texts, 1), dict(cu_seq_lens_q=torch.tensor([0, 3, 15, 16], dtype=torch.int32)))}
    for side in ("left", "right"):
        pads = [(12 - t.shape[1], 0) if side == "left" else (0, 12 - t.shape[1]) for t in texts]
        batch = torch.cat([F.pad(t, pad) for t, pad in zip(texts, pads, strict=True)])
        mask = torch.cat([F.pad(torch.ones_like(t), pad) for t, pad in zip(texts, pads, strict=True)])
        ways[side] = (batch, dict(attention_mask=mask))
    for batch, arguments in ways.values():
        classifier.zero_grad()
        output = classifier(batch, labels=labels, **arguments)
        torch.testing.assert_close(output.logits, alone, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(embedder(batch, **arguments).embeddings, vectors, rtol=1e-6, atol=1e-7)
        output.loss.backward()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(classifier.get_parameter(parameter).grad, gradient, rtol=1e-5, atol=1e-8)


def test_heads_refuse_what_they_do_not_know():
    classifier = LanguageModelForSequenceClassification(config("mamba2"))
    with pytest.raises(TypeError, match="output_attentions=True"):
        classifier(tokens(1, 4), output_attentions=True)
    with pytest.raises(ValueError, match="pooling is 'max', expected last or mean"):
        config("mamba2", pooling="max")
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        LanguageModelForEmbedding(config("mamba2"))()


@pytest.mark.parametrize(
    ("labels", "classes", "loss"),
    [
        (torch.tensor([2, 0]), 3, lambda logits, y: F.cross_entropy(logits, y)),
        (torch.tensor([0.5, -1.0]), 1, lambda logits, y: F.mse_loss(logits[:, 0], y)),
        (torch.tensor([[1.0, 0, 1], [0, 0, 1]]), 3, lambda logits, y: F.binary_cross_entropy_with_logits(logits, y)),
    ],
    ids=["one class", "a number", "several classes"],
)
def test_losses_of_classification(labels, classes: int, loss):
    classifier = LanguageModelForSequenceClassification(config("mamba2", num_labels=classes))
    output = classifier(tokens(2, 5), labels=labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))


def test_a_classifier_from_a_language_model_and_back_from_its_folder(tmp_path: Path):
    model = build("hybrid", **BYTES)
    folder = save(model, tmp_path / "language")
    names = {0: "prose", 1: "verse", 2: "neither"}
    changes = dict(num_labels=3, id2label=names, pooling="mean")
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, **changes)
    assert type(classifier) is LanguageModelForSequenceClassification
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(classifier.backbone.get_parameter(name), parameter)
    assert 0 < classifier.score.weight.abs().max() <= 32**-0.5
    folder = save(classifier, tmp_path / "classifier")
    judge = pipeline("text-classification", model=folder, tokenizer=folder, device="cpu")
    found = judge(TEXTS, batch_size=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, answer in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            scores = classifier(**tokenizer(text, return_tensors="pt")).logits[0].softmax(0)
        assert answer["label"] == names[int(scores.argmax())]
        assert answer["score"] == pytest.approx(scores.max().item(), rel=1e-5)


def test_embeddings_from_a_language_model(tmp_path: Path):
    folder = save(build("hybrid", **BYTES), tmp_path)
    embedder = LanguageModelForEmbedding.from_pretrained(folder, pooling="mean")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    vectors = embedder(**batch).embeddings
    assert vectors.shape == (3, 32)
    # What a pooling of someone else's takes from the backbone: padding has no output there.
    hidden = AutoModel.from_pretrained(folder)(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    assert not hidden[(mask == 0).expand_as(hidden)].any()
    torch.testing.assert_close((hidden * mask).sum(1) / mask.sum(1), vectors)
