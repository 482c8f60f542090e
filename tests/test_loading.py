"""Saved folders: round trips, precision, and every way in which one can be broken."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ophis
from ophis.models.loading import CheckpointError


@pytest.fixture
def model() -> ophis.LanguageModel:
    torch.manual_seed(0)
    config = ophis.LanguageModelConfig(
        hidden_size=32,
        num_hidden_layers=3,
        vocab_size=50,
        pattern=["mamba2", "mamba", "attention"],
        mamba2=dict(headdim=8, d_state=8, dt_limit=(0.0, float("inf"))),
        attention=dict(num_heads=4),
    )
    return ophis.LanguageModel(config).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def edit(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def test_round_trip_is_exact(model, folder):
    ids = torch.randint(50, (2, 9))
    by_class = (ophis.LanguageModel.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder))
    for again in (ophis.load(folder), ophis.load(str(folder)), *by_class):
        assert not again.training
        assert again.lm_head.weight is again.backbone.embeddings.weight
        assert again.config.to_diff_dict() == model.config.to_diff_dict() or again.config.mixers == model.config.mixers
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_tied_head_is_stored_once_and_an_untied_one_as_itself(folder, tmp_path):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    config = ophis.LanguageModelConfig(
        hidden_size=16, num_hidden_layers=1, vocab_size=20, tie_word_embeddings=False, mamba2=dict(headdim=8)
    )
    untied = ophis.LanguageModel(config)
    untied.save_pretrained(tmp_path / "untied")
    again = ophis.load(tmp_path / "untied")
    assert torch.equal(again.lm_head.weight, untied.lm_head.weight)
    assert again.lm_head.weight is not again.backbone.embeddings.weight


def test_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = ophis.load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    with pytest.raises(FileNotFoundError, match="model-00001-of-.* is missing"):
        ophis.load(tmp_path)


def test_the_recurrence_keeps_its_precision_in_bfloat16(folder):
    model = ophis.load(folder, dtype=torch.bfloat16)
    wide = {name.rpartition("mixer.")[2] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "D", "dt_bias", "dt_proj.bias"}
    model.save_pretrained(folder)
    exact = load_file(folder / "model.safetensors")["backbone.layers.0.mixer.A_log"]
    assert torch.equal(exact, model.backbone.layers[0].mixer.A_log)
    assert ophis.load(folder).backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        ophis.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no config.json, so it is not a saved model"):
        ophis.load(tmp_path)


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights: model.safetensors is missing"):
        ophis.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 10_000])
def test_truncated_weights(folder, keep: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or cut short"):
        ophis.load(folder)


def test_damaged_config(folder):
    (folder / "config.json").write_text('{"model_type": "oph')
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        ophis.load(folder)


def test_wrong_architecture(folder):
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "model_type": "gpt2"}))
    with pytest.raises(
        CheckpointError, match="model_type 'gpt2', expected one of 'ophis', 'mamba', 'mamba2', 'falcon_mamba'"
    ):
        ophis.load(folder)
    path.write_text(json.dumps({**fields, "d_modle": 3}))
    with pytest.raises(ValueError, match="unknown key 'd_modle'"):
        ophis.load(folder)


def test_missing_extra_and_misshapen_tensors_are_named(folder):
    edit(folder, lambda t: t.pop("backbone.layers.1.mixer.A_log"))
    with pytest.raises(CheckpointError, match=r"backbone.layers.1.mixer.A_log is missing"):
        ophis.load(folder)
    edit(
        folder,
        lambda t: t.update({"backbone.layers.1.mixer.A_log": torch.zeros(3, 2), "backbone.bogus": torch.ones(1)}),
    )
    with pytest.raises(CheckpointError, match=r"bogus is not part of .*A_log has shape \(3, 2\), expected \(64, 16\)"):
        ophis.load(folder)


def test_an_absurd_configuration_takes_no_memory(folder):
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="1000000000 layers; there are not as many tensors"):
        ophis.load(folder)
    path.write_text(json.dumps({**fields, "hidden_size": 10**7, "mamba2": {"headdim": 8}}))
    with pytest.raises(CheckpointError, match=r"embeddings.weight has shape \(56, 32\), expected \(56, 10000000\)"):
        ophis.load(folder)


def test_an_index_cannot_lead_out_of_the_folder(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="is missing"):
        ophis.load(folder)
