"""lm-eval on a model of this library: its scores against lm-eval's own model of transformers, and `ophis evaluate`."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import ophis
from ophis.cli import main
from ophis.evaluation.harness import OphisLM
from ophis.training import byte_tokenizer

END = 256  # the byte tokenizer's end of a text


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def folder(request, tmp_path_factory) -> Path:
    """A model that transformers saved, with a tokenizer."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, hidden_size=32, num_hidden_layers=2, state_size=4)
    ends = dict(pad_token_id=END, bos_token_id=END, eos_token_id=END)
    if request.param == "mamba":
        model = MambaForCausalLM(MambaConfig(**sizes, **ends))
    else:
        model = Mamba2ForCausalLM(Mamba2Config(**sizes, **ends, num_heads=8, head_dim=8, n_groups=1))
    path = tmp_path_factory.mktemp("saved") / request.param  # the names that pytest makes end in numbers
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is fetched, and what lm-eval and datasets write or set up ends with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", True)  # it would keep this test's stderr
    # lm-eval's own tasks are 14,000 files, which take seconds to index; none is used here.
    only_ours = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", only_ours)


def requests(kind: str, *arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]  # type: ignore[arg-type]


# Of unequal length, two of one context, one from nothing, one of one token.
PAIRS = requests(
    "loglikelihood",
    ("The quick brown", " fox jumps over the lazy dog"),
    ("The quick brown", " cat"),
    ("", "Größe"),
    ("A much longer context, so that everything beside it in a batch is padded:", "a"),
    ("x", "y"),
)
TEXTS = requests("loglikelihood_rolling", ("Once upon a time. " * 4,), ("x",), ("9 €",))
PROMPTS = requests(
    "generate_until",
    *[
        (prompt, {"until": ["\n"], "max_gen_toks": 12, "do_sample": False})
        for prompt in ("a", "The quick brown fox", "A much longer prompt than the others are")
    ],
)


def scores(lm) -> tuple[list[float], list[bool], list[float], list[str]]:
    pairs = lm.loglikelihood(PAIRS, disable_tqdm=True)
    rolling = lm.loglikelihood_rolling(TEXTS, disable_tqdm=True)
    return [p for p, _ in pairs], [g for _, g in pairs], rolling, lm.generate_until(PROMPTS, disable_tqdm=True)


@pytest.mark.parametrize("max_length", [2048, 40], ids=["whole", "cut short"])
def test_scores_are_those_of_transformers_model_at_every_batch_size(folder, max_length: int):
    options = dict(max_length=max_length, device="cpu")
    theirs = scores(HFLM(pretrained=str(folder), dtype="float32", batch_size=1, **options))
    assert len({round(p, 3) for p in theirs[0]}) == len(PAIRS)
    for batch_size in (1, 2, 64):
        ours = scores(OphisLM(folder, batch_size=batch_size, **options))
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
        assert ours[2] == pytest.approx(theirs[2], rel=1e-5)
        assert (ours[1], ours[3]) == (theirs[1], theirs[3])
        assert all(ours[3])


def test_what_is_saved_here_is_scored_by_lm_eval_alone(folder, tmp_path):
    ophis.load(folder).save_pretrained(tmp_path / "saved")
    byte_tokenizer().save_pretrained(tmp_path / "saved")
    found, expected = (scores(HFLM(pretrained=str(path), dtype="float32", batch_size=2, device="cpu"))
                       for path in (tmp_path / "saved", folder))  # fmt: skip
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[2] == pytest.approx(expected[2], rel=1e-5)
    assert found[3] == expected[3]


def test_scores_are_the_sums_of_log_probabilities(folder):
    """The same from the logits themselves, a pair at a time."""
    model = MambaForCausalLM if "mamba2" not in folder.name else Mamba2ForCausalLM
    theirs = model.from_pretrained(folder).eval()
    for (context, continuation), score in zip(
        [r.args for r in PAIRS], scores(OphisLM(folder, batch_size=4))[0], strict=True
    ):
        context = list(context.encode()) or [END]
        ids = torch.tensor([context + list(continuation.encode())])
        with torch.no_grad():
            log_p = theirs(ids, use_cache=False).logits[0].log_softmax(-1)
        places = range(len(context), ids.shape[1])
        assert score == pytest.approx(sum(log_p[i - 1, ids[0, i]].item() for i in places), rel=1e-5)


def test_a_hybrid_in_any_batch(tmp_path):
    torch.manual_seed(0)
    config = ophis.LanguageModelConfig(
        hidden_size=32,
        num_hidden_layers=2,
        vocab_size=257,
        pattern=["mamba2", "attention"],
        mamba2=dict(headdim=8),
        attention=dict(num_heads=2),
        eos_token_id=END,
    )
    ophis.LanguageModel(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    one, many = (scores(OphisLM(tmp_path, batch_size=size, device="cpu")) for size in (1, 8))
    assert many[0] == pytest.approx(one[0], rel=1e-5)
    assert many[2] == pytest.approx(one[2], rel=1e-5)
    assert many[3] == one[3]


def test_options_of_the_model(folder, tmp_path):
    half = OphisLM(folder, dtype="bfloat16", device="cpu")
    assert half.model.lm_head.weight.dtype == torch.bfloat16
    assert half.max_length == 2048
    assert half.loglikelihood(PAIRS[:1], disable_tqdm=True)[0][0] == pytest.approx(
        OphisLM(folder).loglikelihood(PAIRS[:1], disable_tqdm=True)[0][0], rel=0.05
    )
    with pytest.raises(ValueError, match="takes no peft='adapter'; leave it out of model_args"):
        OphisLM(folder, peft="adapter")
    with pytest.raises(ValueError, match="takes no revision='old'"):
        OphisLM(folder, revision="old")
    larger = byte_tokenizer()
    larger.add_tokens(["fox"])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="the tokenizer has 258 tokens, the model 257"):
        OphisLM(folder, tokenizer=str(tmp_path / "larger"))


# The command line.


@pytest.fixture
def tasks(tmp_path) -> Path:
    """Tasks of each kind, with their data, in files here."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    rows = [
        dict(question=" ".join(words[: 1 + i % 7]) + "?", choices=[f" {words[(i + j) % 9]}" for j in (0, 2, 5)],
             answer=i % 3, text=" ".join(words[i:] * 3), target=words[i])
        for i in range(6)
    ]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    common = dict(dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(data))), test_split="test")
    mean = dict(aggregation="mean", higher_is_better=True)
    kinds = {
        "tiny_choice": dict(
            output_type="multiple_choice", doc_to_text="{{question}}", doc_to_target="answer",
            doc_to_choice="{{choices}}", target_delimiter="", metric_list=[dict(metric="acc", **mean)],
        ),
        "tiny_text": dict(
            output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
            metric_list=[dict(metric="bits_per_byte"), dict(metric="word_perplexity")],
        ),
        "tiny_answer": dict(
            output_type="generate_until", doc_to_text="{{question}}", doc_to_target="{{target}}",
            generation_kwargs=dict(until=["\n"], max_gen_toks=5, do_sample=False),
            metric_list=[dict(metric="exact_match", **mean)],
        ),
    }  # fmt: skip
    for name, fields in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(dict(task=name, **common, **fields)))
    return folder


NAMES = "tiny_choice,tiny_text,tiny_answer"


def results_in(folder: Path) -> dict:
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text())["results"]


def samples_in(folder: Path) -> dict[str, list]:
    found = {path.name.removeprefix("samples_").rpartition("_")[0]: path for path in folder.rglob("samples_*.jsonl")}
    return {name: [json.loads(row)["resps"] for row in path.read_text().splitlines()] for name, path in found.items()}


def test_evaluate_runs_local_tasks_offline_as_lm_eval_does(folder, tasks, capsys, monkeypatch):
    options = ["--tasks", NAMES, "--include_path", str(tasks), "--log_samples"]
    command = ["evaluate", str(folder), *options, "--batch_size", "3", "--device", "cpu", "--output_path", "ours"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"ophis ({{'pretrained': '{folder}', 'dtype': 'auto'}}), ")
    for name in NAMES.split(","):
        assert f"|{name}" in printed.out
    assert "Running loglikelihood requests: 100%" in printed.err  # how far it is

    # The same folder by lm-eval alone: plain `lm_eval --model hf` takes what is saved in transformers' layout.
    args = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", *options]
    monkeypatch.setattr(sys, "argv", [*args, "--batch_size", "1", "--device", "cpu", "--output_path", "theirs"])
    cli_evaluate()
    ours, theirs = results_in(Path("ours")), results_in(Path("theirs"))
    assert set(ours) == set(NAMES.split(","))
    for name, metrics in theirs.items():
        numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
        assert {key: ours[name][key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
    assert samples_in(Path("ours"))["tiny_answer"] == samples_in(Path("theirs"))["tiny_answer"]


def test_evaluate_hands_on_what_it_is_given(folder, tasks, capsys):
    command = ["evaluate", str(folder), "--include_path", str(tasks), "--tasks", "tiny_choice", "--limit", "2"]
    before = list(sys.argv)
    assert main([*command, "--model_args", "max_length=16", "--dtype", "bfloat16", "--tokenizer", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "'dtype': 'bfloat16', 'max_length': 16" in printed
    assert "limit: 2.0" in printed
    assert sys.argv == before


def test_evaluate_mistakes(folder, tasks, capsys):
    def error(*arguments: str) -> str:
        capsys.readouterr()
        code = 0
        try:
            code = main(["evaluate", *arguments])
        except SystemExit as stop:  # lm-eval's argparse
            code = stop.code
        assert code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    tiny = ["--tasks", "tiny_choice", "--include_path", str(tasks)]
    assert error(str(folder), "--tasks", "nosuch") == "ophis: error: Tasks not found: nosuch"
    assert "nowhere" in error("nowhere", *tiny)
    assert error(str(folder), *tiny, "--model", "hf").startswith("ophis: error: the model is the first argument")
    assert "takes no peft='x'" in error(str(folder), *tiny, "--model_args", "peft=x")
    assert error(str(folder), *tiny, "--nosuch", "3").endswith("unrecognized arguments: --nosuch 3")
    assert "dtype is 'int8', expected float32" in error(str(folder), *tiny, "--dtype", "int8")
