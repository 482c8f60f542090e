"""Names on the Hugging Face hub: its cache is read as `huggingface_hub` fills it, and every way of failing is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, errors

import ophis
from ophis.cli import main
from ophis.generation import load_tokenizer
from ophis.models import hub
from ophis.training import byte_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def put(cache: Path, name: str, commit: str = COMMIT, branch: str = "main") -> Path:
    """The folder of a name's commit in the cache."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    return repository / "snapshots" / commit


def model(seed: int = 0) -> ophis.LanguageModel:
    torch.manual_seed(seed)
    config = ophis.LanguageModelConfig(
        hidden_size=32, num_hidden_layers=1, vocab_size=257, pattern=["mamba"], eos_token_id=256
    )
    return ophis.LanguageModel(config).eval()


@pytest.mark.parametrize("layout", ["ophis", "transformers", "official"])
def test_a_name_in_the_cache(layout: str, cache, tmp_path):
    model().save_pretrained(tmp_path / "saved")
    ophis.convert(tmp_path / "saved", tmp_path / "converted", layout)
    shutil.copytree(tmp_path / "converted", put(cache, "someone/tiny"), dirs_exist_ok=True)
    loaded = ophis.load("someone/tiny", dtype=torch.bfloat16)
    assert loaded.backbone.embeddings.weight.dtype == torch.bfloat16
    assert loaded.name_or_path == "someone/tiny"
    assert torch.equal(ophis.load("someone/tiny").lm_head.weight, model().lm_head.weight)
    by_class = ophis.LanguageModel.from_pretrained("someone/tiny", local_files_only=True)
    assert torch.equal(by_class.lm_head.weight, model().lm_head.weight)
    ophis.convert("someone/tiny", tmp_path / "again", "ophis")
    assert torch.equal(ophis.load(tmp_path / "again").lm_head.weight, model().lm_head.weight)


def test_revisions(cache):
    model(seed=1).save_pretrained(put(cache, "someone/tiny"))
    model(seed=2).save_pretrained(put(cache, "someone/tiny", commit=COMMIT[::-1], branch="other"))
    for revision, seed in ((None, 1), ("main", 1), ("other", 2)):
        weight = ophis.load("someone/tiny", revision=revision).lm_head.weight
        assert torch.equal(weight, model(seed).lm_head.weight), revision


def test_a_folder_comes_before_a_name(cache, tmp_path):
    model(seed=1).save_pretrained(put(cache, "someone/tiny"))
    model(seed=2).save_pretrained(tmp_path / "someone/tiny")
    assert torch.equal(ophis.load("someone/tiny").lm_head.weight, model(2).lm_head.weight)


def test_generation_by_name(cache, capsys):
    """The model from one name, the tokenizer, as for the state-spaces models, from another."""
    model().save_pretrained(put(cache, "someone/tiny"))
    byte_tokenizer().save_pretrained(put(cache, "someone/bytes"))
    assert load_tokenizer("someone/bytes")("a").input_ids == [97]
    arguments = ["generate", "someone/tiny", "--prompt", "a", "--max-new-tokens", "2"]
    assert main(arguments) == 2
    assert "someone/tiny has no tokenizer.json" in (error := capsys.readouterr().err)
    assert "name a tokenizer by --tokenizer, EleutherAI/gpt-neox-20b" in error
    assert main([*arguments, "--tokenizer", "someone/bytes"]) == 0
    assert capsys.readouterr().out.startswith("a")


def test_the_tokenizer_of_another_model(cache, tmp_path, capsys):
    small = ophis.LanguageModelConfig(hidden_size=32, num_hidden_layers=1, vocab_size=100, pattern=["mamba"])
    ophis.LanguageModel(small).save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    assert main(["generate", str(tmp_path / "small"), "--prompt", "a"]) == 2
    assert "the tokenizer has 257 tokens, the model 104 rows for them; it is another model's" in capsys.readouterr().err


def test_offline(cache, capsys):
    expected = (
        "there is no folder someone/tiny here, and the hub's someone/tiny is not whole in the cache, "
        f"{cache}, nor can be fetched: HF_HUB_OFFLINE is set"
    )
    with pytest.raises(FileNotFoundError) as raised:
        ophis.load("someone/tiny")
    assert str(raised.value) == expected
    assert main(["convert", "someone/tiny", "x", "--to", "ophis"]) == 2
    assert capsys.readouterr().err == f"ophis: error: {expected}\n"


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "/absent/folder", "./someone/tiny", "some one/tiny", "absent/"])
def test_what_cannot_be_a_name_is_a_folder(name: str, cache, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=f"no folder {name}"):
        ophis.load(name)
    with pytest.raises(FileNotFoundError, match="no folder someone/tiny"):
        ophis.load(Path("someone/tiny"))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (errors.RepositoryNotFoundError, "no folder someone/tiny here, and no model of that name on the hub"),
        (errors.GatedRepoError, "someone/tiny is given out on conditions: accept them on its page on the hub"),
        (errors.RevisionNotFoundError, "someone/tiny has no revision 'v9' on the hub"),
        (errors.HfHubHTTPError, "the hub's someone/tiny could not be fetched: it said no"),
        (RuntimeError, "the hub's someone/tiny could not be fetched: it said no"),  # the HTTP client's are neither
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_failures_of_the_hub(failure, message: str, cache, monkeypatch):
    response = {"response": SimpleNamespace(headers={}, request=None)}

    def fail(*args, **kwargs):
        raise failure("it said\nno", **(response if issubclass(failure, errors.HfHubHTTPError) else {}))

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(OSError, match=message):
        ophis.load("someone/tiny", revision="v9")


def test_only_what_is_needed_is_fetched(cache, tmp_path, monkeypatch):
    """Of a repository with weights twice, the safetensors; of one with a pickle alone, that."""
    calls = []
    folder = tmp_path / COMMIT
    model().save_pretrained(tmp_path / "saved")

    def download(name, *, revision, allow_patterns):
        calls.append((revision, set(allow_patterns)))
        shutil.copytree(tmp_path / layout, folder, dirs_exist_ok=True)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    layout = "saved"
    ophis.load("someone/tiny", revision="v1")
    ((revision, patterns),) = calls
    assert revision == "v1"
    assert {"config.json", "tokenizer.json", "model.safetensors", "model-*.safetensors"} <= patterns
    assert not any("bin" in pattern or pattern.startswith(("*", "consolidated")) for pattern in patterns)

    shutil.rmtree(folder)
    calls.clear()
    layout = ophis.convert(tmp_path / "saved", tmp_path / "official", "official")
    ophis.load("someone/tiny", revision="v1")
    assert [revision for revision, _ in calls] == ["v1", "v1"]
    assert {"config.json", "pytorch_model.bin"} <= calls[1][1]
