"""Training: the data, the decaying parameters, a loss that falls, and a folder that nothing leaves broken."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, TrainerCallback

import ophis
from ophis import LanguageModel, LanguageModelConfig
from ophis.files import link_whole, write_whole
from ophis.training import (
    Data,
    Recipe,
    RunFolder,
    Sequences,
    Stream,
    byte_tokenizer,
    decaying,
    encode,
    hold_out,
    model_config,
    parameter_groups,
    read_documents,
    read_tokenizer,
    train,
)

TEXT = "".join(f"{i} times {j} is {i * j}.\n" for i in range(1, 13) for j in range(1, 13))
RECIPE = Recipe(
    steps=20, batch_size=4, length=32, learning_rate=2e-2, log_every=1, evaluate_every=6, save_every=4, held_out=0.1
)  # more than one epoch


def tiny_model(tokenizer) -> LanguageModel:
    torch.manual_seed(0)
    config = model_config(tokenizer, hidden_size=16, layers=2)
    config.mamba2 = dict(headdim=8, d_state=8)
    return LanguageModel(config)


def tiny_run(path: Path, *, resume: bool = False, recipe: Recipe = RECIPE, callbacks=()):
    tokenizer = byte_tokenizer()
    data = Data.of([TEXT], tokenizer, length=recipe.length, held_out=recipe.held_out)
    model, folder = tiny_model(tokenizer), RunFolder(path)
    if not resume:
        folder.begin(model, tokenizer, {})
    return train(model, tokenizer, data, recipe, folder, resume=resume, callbacks=callbacks)


def loss_curve(path: Path) -> list[dict[str, str]]:
    with (path / "losses.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    return path, tiny_run(path)


def test_loss_falls(whole_run):
    path, result = whole_run
    losses = [float(row["loss"]) for row in loss_curve(path) if row["loss"]]
    assert len(losses) == RECIPE.steps
    assert losses[0] == pytest.approx(math.log(257), abs=0.3)
    assert losses[-1] < losses[0] - 1
    assert result.finished
    assert result.held_out_loss is not None
    assert result.held_out_loss < losses[0] - 1


def test_held_out_loss_is_the_models(whole_run):
    path, result = whole_run
    tokenizer = byte_tokenizer()
    data = Data.of([TEXT], tokenizer, length=RECIPE.length, held_out=RECIPE.held_out)
    ids = torch.stack([data.held_out[i] for i in range(len(data.held_out))]).long()
    with torch.no_grad():
        loss = ophis.load(path)(ids, labels=ids).loss.item()
    assert loss == pytest.approx(result.held_out_loss, rel=1e-5)
    assert float(loss_curve(path)[-1]["bits_per_byte"]) == pytest.approx(data.bits_per_byte(loss), rel=1e-5)


def test_keeps_the_last_two_checkpoints(whole_run):
    path, _ = whole_run
    assert RunFolder(path).steps_saved() == [16, 20]
    assert not list(path.rglob(".partial*"))
    last = ophis.load(path / "checkpoints/step-20").state_dict()
    for name, tensor in ophis.load(path).state_dict().items():
        assert torch.equal(tensor, last[name])


def test_resumed_run_equals_uninterrupted_one(whole_run, tmp_path):
    class CtrlC(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:  # in the middle of an epoch, and not where a checkpoint is due
                signal.raise_signal(signal.SIGINT)

    stopped = tiny_run(tmp_path / "run", callbacks=[CtrlC()])
    assert (stopped.step, stopped.finished) == (5, False)
    assert RunFolder(tmp_path / "run").steps_saved() == [4, 5]
    resumed = tiny_run(tmp_path / "run", resume=True)
    assert resumed.finished
    assert loss_curve(tmp_path / "run") == loss_curve(whole_run[0])


def test_second_interrupt_stops_at_once(tmp_path):
    class CtrlCTwice(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 6:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # Python's own, or none where the tests run in the background
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "run", callbacks=[CtrlCTwice()])
    assert RunFolder(tmp_path / "run").steps_saved() == [4]
    assert signal.getsignal(signal.SIGINT) is before


def test_loss_that_is_no_number_stops_the_run(tmp_path):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 6 and model is not None:
                torch.nn.init.constant_(model.backbone.norm_f.weight, math.nan)

    with pytest.raises(FloatingPointError, match="the loss is nan after step 7"):
        tiny_run(tmp_path / "run", callbacks=[Break()])
    assert RunFolder(tmp_path / "run").steps_saved() == [4]


class Killed(BaseException):
    """Stands for kill -9: no handler of the code under test catches it."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("before", [0, 2])
def test_killed_at_any_moment_of_saving(tmp_path, monkeypatch, before: int):
    """Every call that changes the folder is in turn the last one that happens, with so many checkpoints before."""
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer)

    def save(folder: RunFolder, step: int) -> None:
        written = folder.unfinished / f"checkpoint-{step}"
        model.save_pretrained(written)
        (written / "trainer_state.json").write_text("{}")
        folder.publish(written, step, keep=2)

    calls = 0
    last_call = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > last_call:
                raise Killed
            return function(*args, **kwargs)

        return call

    finished = False
    while not finished:
        folder = RunFolder(tmp_path / str(last_call))
        folder.begin(model, tokenizer, {})
        for step in range(1, before + 1):
            save(folder, step)
        calls = 0
        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "link", "unlink", "rmdir", "fsync"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                save(folder, 3)
                finished = True
            except Killed:
                pass
        last = folder.last_checkpoint()
        if before or last is not None:
            ophis.load(folder.path)
        for step in folder.steps_saved():
            assert (folder.checkpoint(step) / "trainer_state.json").exists()
            ophis.load(folder.checkpoint(step))
        folder.recover()
        if last is not None:
            assert (folder.path / "model.safetensors").samefile(last / "model.safetensors")
        assert not list(folder.path.rglob(".partial*"))
        last_call += 1
    assert last_call > 10


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_process_leaves_a_model(tmp_path, how):
    (tmp_path / "text.txt").write_text(TEXT)
    command = [sys.executable, "-m", "ophis", "train", "text.txt", "--out", "run", "--steps", "1000000"]
    options = ["--save-every", "3", "--hidden-size", "32", "--layers", "1", "--length", "32", "--batch-size", "2"]
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, *options], cwd=tmp_path, env=environment, stdout=pipe, text=True) as run:
        folder = RunFolder(tmp_path / "run")
        deadline = time.monotonic() + 120
        while not folder.steps_saved() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        run.send_signal(how)
        output, _ = run.communicate(timeout=60)
    last = folder.last_checkpoint()
    assert last is not None
    ophis.load(tmp_path / "run")
    ophis.load(last)
    if how == signal.SIGINT:
        assert run.returncode == 130
        assert output.splitlines()[-1] == (
            f"Stopped. The last checkpoint is {last.relative_to(tmp_path)}. Go on by: ophis train --out run --resume"
        )


def test_write_whole(tmp_path):
    write_whole(tmp_path / "file", "old")
    write_whole(tmp_path / "file", "new")
    link_whole(tmp_path / "file", tmp_path / "other")
    assert (tmp_path / "other").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]


# Data


def test_documents(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.md").write_bytes(b"\xef\xbb\xbfthree \xc3\xa9")
    (tmp_path / "a.txt").write_text("one\r\n", newline="")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "zeros.txt").write_bytes(b"text\0")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/losses.csv").write_text("1,2")
    assert read_documents(tmp_path, leave_out=tmp_path / "run") == (["one\r\n", "two", "three é"], 2)
    assert read_documents(tmp_path / "b.txt") == (["two"], 0)


def test_no_documents(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_documents(tmp_path / "absent")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"no text in .*empty\.txt: it is empty"):
        read_documents(tmp_path / "empty.txt")
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="1 files that are not UTF-8 text, 1 empty ones"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_documents(tmp_path / "binary")


def test_hold_out():
    train_part, tail = hold_out(["a" * 90 + "b" * 10], 0.1)
    assert (train_part, tail) == (["a" * 90], ["b" * 10])
    texts = [f"document {i}" for i in range(100)]
    split = hold_out(texts, 0.1)
    assert len(split.held_out) in (9, 10)  # whole ones
    assert sorted(split.train + split.held_out) == sorted(texts)
    assert hold_out(texts, 0.1) == split
    assert len(hold_out(["a" * 10**7], 0.5).held_out[0]) == 2**17


def test_sequences_predict_every_token_once():
    stream = Stream(torch.arange(100, dtype=torch.int32), 100)
    sequences = Sequences(stream, 12)
    predicted = torch.cat([sequences[i][1:] for i in range(len(sequences))])
    assert predicted.tolist() == list(range(1, 100))
    assert {len(sequences[i]) for i in range(len(sequences))} == {12}


def test_text_too_short():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="the text is too short: 19 tokens to train on and 3 held out"):
        Data.of(["x" * 20], tokenizer, length=32, held_out=0.1)


def test_byte_tokenizer(tmp_path):
    tokenizer = byte_tokenizer()
    text = "Zwölf  Boxkämpfer .\r\n\t日本🙂"
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode()) == encode(tokenizer, text).tolist()
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 256
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba2"}))
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == ids


def test_other_tokenizer(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "words.json"))
    tokenizer = read_tokenizer(tmp_path / "words.json")
    assert tokenizer.eos_token_id == 3
    assert model_config(tokenizer).vocab_size == 16
    text = "a b\nc " * 30_000  # more than one piece
    assert encode(tokenizer, text).tolist() == [0, 1, 2] * 30_000
    data = Data.of([text], tokenizer, length=16)
    tokens, size = len(data.held_out.stream.ids), data.held_out.stream.size
    assert data.bits_per_byte(1.0) == pytest.approx(tokens / size / math.log(2))
    (tmp_path / "damaged.json").write_text("{")
    with pytest.raises(ValueError, match="not a file of the tokenizers library"):
        read_tokenizer(tmp_path / "damaged.json")


# Model and optimiser


def test_which_parameters_decay():
    model = LanguageModel(
        LanguageModelConfig(
            vocab_size=16,
            hidden_size=16,
            num_hidden_layers=4,
            pattern=["mamba", "mamba2", "attention", "s4d"],
            mamba2=dict(headdim=8, d_state=8, learnable_init_states=True),
            attention=dict(num_heads=2, qkv_proj_bias=True),
            intermediate_size=32,
        )
    )
    leaves = {name.split(".", 3)[-1] for name in decaying(model)}  # without "backbone.layers.0."
    matrices = {"in_proj", "x_proj", "dt_proj", "out_proj", "conv1d", "output_linear"}
    assert leaves == {
        "weight",  # of the embeddings; the head is the same
        *(f"mixer.{name}.weight" for name in matrices),
        "mlp.fc1.weight",
        "mlp.fc2.weight",
    }
    spared = {name.split(".", 3)[-1] for name, _ in model.named_parameters()} - leaves
    assert {"mixer.A_log", "mixer.D", "mixer.dt_bias", "mixer.init_states", "mixer.C", "mixer.log_dt"} < spared
    assert {"norm.weight", "mixer.norm.weight", "mixer.in_proj.bias", "mixer.conv1d.bias"} < spared
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_model_config():
    tokenizer = byte_tokenizer()
    config = model_config(tokenizer, "mamba2-130m", layers=3, pattern=["mamba2", "mamba2", "attention"])
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (768, 3, 272)
    assert config.attention == {"num_heads": 12, "head_dim": 64, "rotary_emb_dim": 32}
    assert config.eos_token_id == 256
    with pytest.raises(ValueError, match="no model 'mamba3'"):
        model_config(tokenizer, "mamba3")


def test_recipe_refuses_nonsense():
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        Recipe(steps=0)
    with pytest.raises(ValueError, match="learning_rate is -1, expected more than 0"):
        Recipe(learning_rate=-1)


def test_missing_extra(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"training needs accelerate and rich: pip install 'ophis\[train\]'"):
        tiny_run(tmp_path / "run")
