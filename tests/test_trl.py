"""TRL's SFTTrainer: LoRA learns a chat, packed and padding-free batches lose what padded ones do, resuming works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import ophis
from ophis.models import LanguageModelForEmbedding
from ophis.training import byte_tokenizer
from tiny_models import build, close, config

pytestmark = [
    # TRL and PEFT use names that transformers is about to change.
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
    # PEFT, saving the adapter of a model that is on no hub.
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]

BYTES = dict(vocab_size=257, eos_token_id=256, bos_token_id=256, pad_token_id=256)
CHAT = {"Capital of France?": "Paris", "Capital of Italy?": "Rome", "And of Spain?": "Madrid", "2 + 2?": "4"}
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}Q: {{ message['content'] }}\n"
    "{% else %}A: {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


def chat() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
            for q, a in CHAT.items()
        ]
    )


def trainer(model, tokenizer, folder: Path, peft_config: LoraConfig | None = None, **changes: Any) -> SFTTrainer:
    settings = dict(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
    )
    return SFTTrainer(
        model, args=SFTConfig(**{**settings, **changes}), train_dataset=chat(), processing_class=tokenizer,
        peft_config=peft_config,
    )  # fmt: skip


def losses(run: SFTTrainer) -> list[float]:
    return [logs["loss"] for logs in run.state.log_history if "loss" in logs]


def answer(model, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("packing", [False, True])
def test_lora_learns_the_answers_of_a_chat(tokenizer, packing: bool, tmp_path: Path):
    # A head that stays as it is must be able to be sure of something: its rows are as long as a trained one's.
    model = build("hybrid", hidden_size=64, initializer_range=0.2, **BYTES)
    lora = LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM")
    run = trainer(model, tokenizer, tmp_path, lora, max_steps=40, packing=packing, max_length=256)
    run.train()
    assert losses(run)[-1] < 0.05
    assert {q: answer(run.model, tokenizer, q) for q in CHAT} == CHAT
    merged = run.model.merge_and_unload()
    assert type(merged) is ophis.LanguageModel
    assert {q: answer(merged, tokenizer, q) for q in CHAT} == CHAT


def test_a_model_by_the_name_of_its_folder(tokenizer, tmp_path: Path):
    model = build("hybrid", **BYTES)
    model.save_pretrained(tmp_path / "model")
    run = trainer(str(tmp_path / "model"), tokenizer, tmp_path / "run", max_steps=1)
    assert type(run.model) is ophis.LanguageModel
    for name, parameter in model.named_parameters():
        assert torch.equal(run.model.get_parameter(name), parameter)


@pytest.mark.parametrize("adapters", [False, True], ids=["all parameters", "LoRA"])
def test_packed_and_padding_free_batches_lose_what_padded_ones_do(tokenizer, adapters: bool, tmp_path: Path):
    """Every step sees all four documents, so that the curves agree if and only if none sees another."""
    ways = {
        "padded": dict(),
        "padding-free": dict(padding_free=True, max_length=None),
        "packed": dict(packing=True, max_length=64),
        "packed and cut": dict(packing=True, packing_strategy="bfd_split", max_length=64),
    }
    curves = {}
    for name, changes in ways.items():
        lora = LoraConfig(r=4, task_type="CAUSAL_LM") if adapters else None
        run = trainer(build("hybrid", **BYTES), tokenizer, tmp_path, lora, **changes)
        run.train()
        curves[name] = losses(run)
    for curve in curves.values():
        assert curve == pytest.approx(curves["padded"], rel=1e-4)


def test_wrapped_packing_is_one_text_cut_anywhere(tokenizer, tmp_path: Path):
    """It says nothing about where documents end: they read on, as in pretraining, with padding at the end at most."""
    wrapped = dict(packing=True, packing_strategy="wrapped", max_length=32)
    run = trainer(build("hybrid", **BYTES), tokenizer, tmp_path, **wrapped)
    batch = next(iter(run.get_train_dataloader()))
    assert "seq_idx" not in batch
    model = build("hybrid", **BYTES)
    expected = model(**{k: v for k, v in batch.items() if k != "labels"}, labels=batch["labels"]).loss
    run.train()
    assert losses(run)[0] == pytest.approx(expected.item(), rel=1e-4)
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize("multiple", [None, 16])
def test_what_the_collator_says_is_understood_everywhere(multiple: int | None):
    """By the backbone, which TRL calls itself, by the language model, and by the heads."""
    documents = [{"input_ids": [3, 4, 5, 6, 7]}, {"input_ids": [8, 9]}, {"input_ids": [10, 11, 12]}]
    batch = DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=multiple)(documents)
    labels = batch.pop("labels")
    model = build("hybrid").double()
    together = model.base_model(**batch, use_cache=False).last_hidden_state[:, :10]
    alone = [model.base_model(torch.tensor([d["input_ids"]])).last_hidden_state for d in documents]
    close(together, torch.cat(alone, 1))
    loss = model(**batch, labels=labels).loss
    for name in {"position_ids", "seq_idx", "cu_seq_lens_q"} & set(batch):  # older versions say less
        assert model(batch["input_ids"], labels=labels, **{name: batch[name]}).loss == loss
    embedder = LanguageModelForEmbedding(config("hybrid")).double()
    embedder.backbone.load_state_dict(model.backbone.state_dict())
    vectors = embedder(**batch).embeddings
    close(vectors[:3], torch.stack([hidden[0, -1] for hidden in alone]))


def test_lora_resumes_with_the_same_losses(tokenizer, tmp_path: Path):
    def start(name: str, **changes: Any) -> SFTTrainer:
        lora = LoraConfig(r=4, task_type="CAUSAL_LM", lora_dropout=0.1)
        options = dict(max_steps=6, per_device_train_batch_size=2, **changes)
        return trainer(build("hybrid", **BYTES), tokenizer, tmp_path / name, lora, **options)

    whole = start("whole")
    whole.train()
    start("parts", save_strategy="steps", save_steps=2).train()
    resumed = start("parts")
    torch.nn.init.ones_(next(p for n, p in resumed.model.named_parameters() if "lora_B" in n))  # to be replaced
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)


def test_with_activation_checkpointing_as_trl_sets_it(tokenizer, tmp_path: Path):
    curves = []
    for enabled in (False, True):
        lora = LoraConfig(r=4, task_type="CAUSAL_LM")
        run = trainer(build("hybrid", **BYTES), tokenizer, tmp_path, lora, gradient_checkpointing=enabled)
        run.train()
        curves.append(losses(run))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
