"""transformers' own `Trainer` on the language model and on a classifier: it learns, and resumes as if never stopped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

import ophis
from ophis.models import LanguageModelForSequenceClassification
from ophis.training import byte_tokenizer
from tiny_models import build, config

BYTES = dict(vocab_size=257, eos_token_id=256, bos_token_id=256, pad_token_id=256)
CHAT = {"Capital of France?": " Paris", "Capital of Italy?": " Rome", "And of Spain?": " Madrid", "2 + 2?": " 4"}
TOKENIZER = byte_tokenizer()


def examples() -> list[dict[str, list[int]]]:
    """Questions without a loss, answers with one."""
    found = []
    for question, answer in CHAT.items():
        asked, answered = TOKENIZER(question).input_ids, [*TOKENIZER(answer).input_ids, TOKENIZER.eos_token_id]
        found.append({"input_ids": asked + answered, "labels": [-100] * len(asked) + answered})
    return found


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = dict(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return TrainingArguments(**{**settings, **changes})


def trainer(model: torch.nn.Module, folder: Path, padding_free: bool = False, **changes: Any) -> Trainer:
    collator = DataCollatorWithFlattening() if padding_free else DataCollatorForSeq2Seq(TOKENIZER)
    return Trainer(
        model=model, args=arguments(folder, **changes), train_dataset=examples(), eval_dataset=examples(),
        data_collator=collator,
    )  # fmt: skip


def losses(run: Trainer) -> list[float]:
    return [logs["loss"] for logs in run.state.log_history if "loss" in logs]


def answer(model: ophis.LanguageModel, question: str) -> str:
    prompt = TOKENIZER(question, return_tensors="pt").to(model.device)
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    return TOKENIZER.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["mamba", "hybrid"])
def test_full_fine_tuning_learns_the_answers(name: str, tmp_path: Path):
    model = build(name, **BYTES)
    run = trainer(model, tmp_path, max_steps=60, per_device_train_batch_size=4)
    run.train()
    assert losses(run)[-1] < 0.05
    assert run.evaluate()["eval_loss"] < 0.05
    assert {question: answer(model, question) for question in CHAT} == CHAT
    # And so does what was saved.
    run.save_model(str(tmp_path / "done"))
    again = ophis.load(tmp_path / "done")
    assert {question: answer(again, question) for question in CHAT} == CHAT


def test_resuming_gives_the_same_losses(tmp_path: Path):
    whole = trainer(build("hybrid", **BYTES), tmp_path / "whole", max_steps=8)
    whole.train()
    trainer(build("hybrid", **BYTES), tmp_path / "parts", max_steps=8, save_strategy="steps", save_steps=3).train()
    other = build("hybrid", **BYTES)
    torch.nn.init.zeros_(other.backbone.embeddings.weight)  # to be replaced by the checkpoint's
    resumed = trainer(other, tmp_path / "parts", max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert len(losses(resumed)) == 8  # the first three from the checkpoint
    assert losses(resumed) == losses(whole)


def test_accumulated_parts_equal_one_batch(tmp_path: Path):
    """Although the parts have different numbers of answered tokens: the mean is over the tokens of the step."""
    runs = []
    for size, parts in ((4, 1), (1, 4)):
        run = trainer(
            build("hybrid", **BYTES), tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=parts
        )
        run.train()
        runs.append(losses(run))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_without_padding_equals_padded(tmp_path: Path):
    """transformers' padding-free collator packs by position_ids."""
    runs = []
    for padding_free in (False, True):
        run = trainer(build("hybrid", **BYTES), tmp_path, padding_free=padding_free, per_device_train_batch_size=4)
        run.train()
        runs.append(losses(run))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_checkpointing_of_activations_changes_nothing(tmp_path: Path):
    runs = []
    for enabled in (False, True):
        model = build("hybrid", **BYTES)
        if enabled:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        run = trainer(model, tmp_path)
        run.train()
        runs.append(losses(run))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_predictions_carry_no_states(tmp_path: Path):
    run = trainer(build("hybrid", **BYTES), tmp_path)
    found = run.predict(examples())
    assert found.predictions.shape[-1] == 257
    assert found.metrics["test_loss"] == pytest.approx(run.evaluate()["eval_loss"], rel=1e-5)


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = TOKENIZER.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


@pytest.mark.parametrize("labels", [[0.5, 1.5, -1.0, 0.0], [0, 1, 2, 1]], ids=["numbers", "classes"])
def test_accumulated_parts_of_a_classifier_equal_one_batch(labels: list[Any], tmp_path: Path):
    data = [{"input_ids": TOKENIZER(q).input_ids, "labels": y} for q, y in zip(CHAT, labels, strict=True)]
    runs = []
    for size, parts in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        classes = 1 if isinstance(labels[0], float) else 3
        run = Trainer(
            model=LanguageModelForSequenceClassification(config("mamba2", num_labels=classes, **BYTES)),
            args=arguments(tmp_path, max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=parts),
            train_dataset=data,
            data_collator=collate,
        )
        run.train()
        runs.append(losses(run))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_a_classifier_learns(tmp_path: Path):
    torch.manual_seed(0)
    classifier = LanguageModelForSequenceClassification(config("mamba2", num_labels=2, pooling="mean", **BYTES))
    texts = ["up and up", "upwards", "going up", "down there", "downhill", "go down"]
    data = [{"input_ids": TOKENIZER(t).input_ids, "labels": int("down" in t)} for t in texts]

    before = copy.deepcopy(classifier.score.weight)
    run = Trainer(
        model=classifier,
        args=arguments(tmp_path, max_steps=30, per_device_train_batch_size=6),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    )
    run.train()
    assert run.evaluate()["eval_accuracy"] == 1
    assert not torch.equal(before, classifier.score.weight)
