"""Perplexity of texts, against transformers' models on the same folders, and `ophis evaluate --text`."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import ophis
from ophis.cli import evaluate, main
from ophis.evaluation import TextScore, score_text, tokenizer_of
from ophis.evaluation import perplexity as module
from ophis.generation import check_vocabulary
from ophis.training import byte_tokenizer

TEXT = "Größer als 9 € — the quick brown fox.\n" * 7
END = 256  # the byte tokenizer's end of a text, which also begins one


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def folder(request, tmp_path_factory) -> Path:
    """A model that transformers saved, with a tokenizer."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=END, eos_token_id=END)
    if request.param == "mamba":
        model = MambaForCausalLM(MambaConfig(**sizes))
    else:
        model = Mamba2ForCausalLM(Mamba2Config(**sizes, num_heads=8, head_dim=8, n_groups=1))
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def loaded(folder):
    return ophis.load(folder), tokenizer_of(folder)


@functools.cache
def oracle(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).double().eval()


def losses(folder: Path, ids: list[int], start: int, end: int) -> torch.Tensor:
    """-log p of ids[start+1 : end+1], given ids from `start` on: transformers' full forward in float64."""
    theirs = oracle(folder)
    with torch.no_grad():
        logits = theirs(torch.tensor([ids[start:end]]), use_cache=False).logits[0]
    return -logits.log_softmax(-1)[range(end - start), ids[start + 1 : end + 1]]


def ids_of(text: str) -> list[int]:
    return [END, *text.encode()]


def test_a_carried_state_is_one_pass_over_the_text(folder, loaded, monkeypatch):
    model, tokenizer = loaded
    ids, told = ids_of(TEXT), []
    expected = losses(folder, ids, 0, len(ids) - 1).sum().item()
    for chunk in (1, 7, 64, len(ids) - 1, 4096):
        monkeypatch.setattr(module, "CHUNK", chunk)
        score = score_text(model, tokenizer, TEXT, progress=lambda *at: told.append(at))
        assert score.nats == pytest.approx(expected, rel=1e-6)
        assert (score.tokens, score.bytes) == (len(ids) - 1, len(TEXT.encode()))
        assert told[-1] == (len(ids) - 1, len(ids) - 1)
    assert len(set(told)) == len(ids) - 1  # at chunk 1, of every token
    assert score.nats_per_token == pytest.approx(expected / score.tokens)
    assert score.bits_per_token == pytest.approx(expected / score.tokens / math.log(2))
    assert score.perplexity == pytest.approx(math.exp(expected / score.tokens))


@pytest.mark.parametrize(("window", "stride"), [(20, 5), (20, None), (20, 20), (64, 1), (1, 1), (4096, None)])
def test_windows_are_each_read_from_nothing(folder, loaded, window: int, stride: int | None):
    model, tokenizer = loaded
    text = TEXT[:70]
    ids = ids_of(text)
    expected, end = 0.0, 0
    while end < len(ids) - 1:
        counted, end = end, min(end + (stride or window // 2), len(ids) - 1) if end else min(window, len(ids) - 1)
        expected += losses(folder, ids, max(0, end - window), end)[counted - end :].sum().item()
    scores = [
        score_text(model, tokenizer, text, window=window, stride=stride, batch_size=size).nats for size in (1, 3, 100)
    ]
    assert scores == pytest.approx([expected] * 3, rel=1e-6)


def test_a_hybrid_carries_its_attention_along():
    torch.manual_seed(0)
    config = ophis.LanguageModelConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=257, pattern=["mamba", "attention"], attention=dict(num_heads=2)
    )
    model, ids = ophis.LanguageModel(config).eval(), torch.tensor([ids_of(TEXT[:90])])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    whole = module.CHUNK
    try:
        module.CHUNK = 11
        assert score_text(model, byte_tokenizer(), TEXT[:90]).nats_per_token == pytest.approx(expected, rel=1e-6)
    finally:
        module.CHUNK = whole


def test_scores_of_several_texts_add_up():
    one, other = TextScore(10.0, 4, 8), TextScore(6.0, 4, 24)
    both = one + other
    assert both == TextScore(16.0, 8, 32)
    assert both.nats_per_byte == 0.5
    assert both.bits_per_byte == pytest.approx(0.5 / math.log(2))
    assert TextScore(1e6, 1, 1).perplexity == math.inf


def test_mistakes(loaded):
    model, tokenizer = loaded
    for options, message in (
        (dict(text=""), "the text is empty"),
        (dict(text="a", stride=3), "a stride is for windows"),
        (dict(text="a", window=0), "the window is 0 tokens, expected at least 1"),
        (dict(text="a", window=4, stride=5), "the stride is 5 tokens, expected 1 to the window's 4"),
        (dict(text="a", window=4, batch_size=0), "the batch size is 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            score_text(model, tokenizer, **options)
    tokenizer.add_tokens(["one more"])
    with pytest.raises(
        ValueError, match="the tokenizer has 258 tokens, the model 257 rows for them; it is another model"
    ):
        check_vocabulary(model, tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has 258 tokens"):
        score_text(model, tokenizer, "a")
    nameless = byte_tokenizer()
    nameless.bos_token = nameless.eos_token = None
    with pytest.raises(ValueError, match="no token that begins or ends a text"):
        score_text(model, nameless, "a")


# ophis evaluate --text


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # `ophis evaluate` sets it where nobody did
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("fox.txt").write_text(TEXT)
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("One text.")
    Path("texts/b.txt").write_text("Another text.")
    Path("texts/c.bin").write_bytes(b"\xff\0")


def evaluated(capsys, *arguments: str) -> dict[str, list[float]]:
    """Name of a row -> its numbers."""
    assert main(["evaluate", *arguments]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    columns = ["text", "tokens", "bytes", "nats/token", "bits/token", "nats/byte", "bits/byte", "perplexity"]
    assert header.split() == columns
    cells = [row.rsplit(maxsplit=len(columns) - 1) for row in rows]
    return {name: [float(number.replace(",", "")) for number in numbers] for name, *numbers in cells}


def test_evaluate_texts(folder, loaded, capsys):
    fox = score_text(*loaded, TEXT)
    found = evaluated(capsys, str(folder), "--text", "fox.txt")
    columns = [fox.tokens, fox.bytes, *(getattr(fox, name) for name in evaluate.COLUMNS)]
    assert found == {"fox.txt": pytest.approx(columns, abs=1e-4)}
    both = score_text(*loaded, "One text.") + score_text(*loaded, "Another text.")
    found = evaluated(capsys, str(folder), "--text", "fox.txt", "--text", "texts")
    assert [*found] == ["fox.txt", "texts (2 texts, 1 file skipped, not UTF-8 text)", "total"]
    assert found["total"][2] == pytest.approx((fox + both).nats_per_token, abs=1e-4)
    assert [*found.values()][1][2] == pytest.approx(both.nats_per_token, abs=1e-4)


def test_evaluate_texts_in_windows_and_half_precision(folder, loaded, capsys):
    options = ["--window", "50", "--stride", "10", "--batch_size", "4"]
    expected = score_text(*loaded, TEXT, window=50, stride=10).nats_per_token
    assert evaluated(capsys, str(folder), "--text", "fox.txt", *options)["fox.txt"][2] == pytest.approx(
        expected, abs=1e-4
    )
    half = evaluated(capsys, str(folder), "--text", "fox.txt", "--dtype", "bfloat16", "--device", "cpu")["fox.txt"][2]
    assert half == pytest.approx(score_text(*loaded, TEXT).nats_per_token, rel=0.02)


def test_evaluate_texts_with_another_folders_tokenizer(folder, loaded, capsys, tmp_path):
    bare = tmp_path / "bare"
    loaded[0].save_pretrained(bare)
    error = error_of(["evaluate", str(bare), "--text", "fox.txt"], capsys)
    assert error.endswith("bare has no tokenizer.json; say which tokenizer its model was trained with, by --tokenizer")
    found = evaluated(capsys, str(bare), "--text", "fox.txt", "--tokenizer", str(folder))
    assert found == evaluated(capsys, str(folder), "--text", "fox.txt")


def test_evaluate_shows_how_far_it_is(folder, capsys, monkeypatch):
    import tqdm

    shown = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "delay": 0, "mininterval": 0})

        def update(self, n=1):
            super().update(n)
            shown.append((self.n, self.total))

    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr(module, "CHUNK", 100)
    evaluated(capsys, str(folder), "--text", "fox.txt")
    size = len(TEXT.encode())
    assert shown == [(100, size), (200, size), *[(n, size) for n in range(300, size, 100)], (size, size)]


def error_of(command: list[str], capsys) -> str:
    """The one line that a mistake costs."""
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("ophis: error: ")
    assert error.count("\n") == 1
    return error.removeprefix("ophis: error: ").strip()


def test_evaluate_mistakes(folder, capsys, tmp_path):
    model = str(folder)
    Path("empty.txt").write_text("")

    def error(*arguments: str) -> str:
        return error_of(["evaluate", *arguments], capsys)

    assert error(model).startswith("what is it to be measured by? Say --text PATH, or --tasks NAME")
    assert error(model, "--text", "nowhere.txt") == "no file or folder nowhere.txt"
    assert error(model, "--text", "empty.txt").endswith("empty.txt: it is empty")
    assert "nothere" in error("nothere", "--text", "fox.txt")
    assert error(model, "--text", "fox.txt", "--tokenizer", "nothere").startswith("no tokenizer nothere: ")
    assert error(model, "--text", "fox.txt", "--window", "0") == "the window is 0 tokens, expected at least 1"
    assert "--window is for texts" in error(model, "--window", "9")
    assert "--batch_size is 'auto', expected the number" in error(model, "--text", "fox.txt", "--batch-size", "auto")
    assert "unrecognized arguments: --tasks piqa (options of lm-eval are for its tasks" in error(
        model, "--text", "fox.txt", "--tasks", "piqa"
    )
    assert "dtype is 'float33', expected float32," in error(model, "--text", "fox.txt", "--dtype", "float33")
    assert "device is 'gpu', expected cpu, cuda" in error(model, "--text", "fox.txt", "--device", "gpu")
    if not torch.cuda.is_available():
        assert "this machine has no CUDA device" in error(model, "--text", "fox.txt", "--device", "cuda")
    larger = byte_tokenizer()
    larger.add_tokens(["fox"])
    larger.save_pretrained(tmp_path / "larger")
    assert "it is another model's" in error(model, "--text", "fox.txt", "--tokenizer", "larger")


def test_evaluate_without_its_extra(folder, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = error_of(["evaluate", str(folder), "--tasks", "piqa"], capsys)
    assert error == "tasks of lm-eval need lm_eval and accelerate: pip install 'ophis[evaluate]'"
