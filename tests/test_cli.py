"""The command line: what it prints, how it fails, and that mistakes cost one line."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ophis
from ophis.bench.layers import LAYERS
from ophis.bench.shapes import SHAPES
from ophis.cli import info, main
from ophis.generation import TextStreamer, generate_text, load_tokenizer
from ophis.ops import OPS
from ophis.training import RunFolder, byte_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 30
TINY = shlex.split("--hidden-size 32 --layers 1 --length 32 --batch-size 2 --evaluate-every 2 --save-every 2 --steps 4")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # `ophis train` sets it where nobody did
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    Path("fox.txt").write_text(TEXT)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a trained model."""
    path = tmp_path_factory.mktemp("models")
    (path / "fox.txt").write_text(TEXT)
    assert main(["train", str(path / "fox.txt"), "--out", str(path / "fox"), *TINY]) == 0
    return path / "fox"


def error_of(command: list[str], capsys) -> str:
    """The one line that a mistake costs."""
    capsys.readouterr()
    try:
        code = main(command)
    except SystemExit as stop:  # argparse's
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("ophis: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("ophis: error: ").strip()


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys, ophis.cli; ophis.cli.parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.stdout == "False\n"


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"ophis {ophis.__version__}\n"


def test_python_m_ophis(tmp_path):
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-m", "ophis", "--version"], cwd=root, capture_output=True, text=True)
    assert done.stdout == f"ophis {ophis.__version__}\n"


def test_unknown_command_and_option(capsys):
    assert "invalid choice: 'trian'" in error_of(["trian"], capsys)
    assert "unrecognized arguments: --stpes 3" in error_of(["train", "x", "--out", "y", "--stpes", "3"], capsys)
    assert "required: COMMAND" in error_of([], capsys)


def test_info_lists_every_op(capsys):
    assert main(["info"]) == 0
    words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert set(OPS) <= words


# train


def test_train_and_resume_and_overwrite(capsys):
    train = ["train", "fox.txt", "--out", "run", *TINY]
    assert main(train) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "1 document, 1,283 tokens, and 69 held out" in printed.out
    assert "step 4/4   loss " in printed.out
    assert printed.out.endswith("Now: ophis generate run\n")
    ophis.load("run")

    assert error_of(train, capsys) == (
        "run already holds a run. Go on with it by --resume, discard it by --overwrite, or choose another folder"
    )
    assert main([*train, "--resume"]) == 0
    assert capsys.readouterr().out == "The run in run is finished: 4 steps of 4.\n"
    assert "--steps is 5, but the run in run began with 4" in error_of([*train, "--resume", "--steps", "5"], capsys)

    Path("fox.txt").write_text(TEXT.replace("fox", "cat"))
    assert "is not what the run in run began with" in error_of(["train", "--out", "run", "--resume"], capsys)
    before = Path("run/model.safetensors").read_bytes()
    assert main([*train, "--overwrite"]) == 0
    assert Path("run/model.safetensors").read_bytes() != before


def test_train_goes_on_from_the_last_checkpoint(capsys):
    assert main(["train", "fox.txt", "--out", "run", *TINY]) == 0
    whole = Path("run/losses.csv").read_text()
    folder = RunFolder("run")
    last = folder.last_checkpoint()
    assert last is not None
    last.rename("elsewhere")  # as if the run had been killed before it
    capsys.readouterr()
    assert main(["train", "--out", "run", "--resume"]) == 0
    assert "from step 2 on" in capsys.readouterr().out
    assert Path("run/losses.csv").read_text() == whole


def test_train_mistakes(capsys):
    Path("empty.txt").write_text("")
    Path("run").mkdir()
    Path("run/config.json").write_text("{}")
    out = ["--out", "new"]
    assert "which text?" in error_of(["train", *out], capsys)
    assert error_of(["train", "absent.txt", *out], capsys).endswith("absent.txt")
    assert error_of(["train", "empty.txt", *out], capsys).endswith("empty.txt: it is empty")
    assert "too short" in error_of(["train", "fox.txt", *out, "--length", "5000"], capsys)
    assert "no model 'mamba9'" in error_of(["train", "fox.txt", *out, "--preset", "mamba9"], capsys)
    assert "expected some of mamba" in error_of(["train", "fox.txt", *out, "--pattern", "mamba,lstm"], capsys)
    assert "must be a multiple of headdim" in error_of(["train", "fox.txt", *out, "--hidden-size", "33"], capsys)
    assert "steps is 0" in error_of(["train", "fox.txt", *out, "--steps", "0"], capsys)
    assert "no tokenizer file x" in error_of(["train", "fox.txt", *out, "--tokenizer", "x"], capsys)
    assert "holds no run" in error_of(["train", *out, "--resume"], capsys)
    assert "already holds config.json" in error_of(["train", "fox.txt", "--out", "run"], capsys)
    assert "is a file" in error_of(["train", "fox.txt", "--out", "fox.txt"], capsys)
    assert not Path("new").exists()


def test_train_without_its_extra(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'ophis[train]'" in error_of(["train", "fox.txt", "--out", "run"], capsys)


# generate


def test_generate_is_the_models_own_generation(model, capsys):
    assert main(["generate", str(model), "--prompt", "The", "--max-new-tokens", "40", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded, tokenizer = ophis.load(model, device=device), load_tokenizer(model)
    ids = torch.tensor([list(b"The")], device=device)
    torch.manual_seed(3)
    options = dict(max_new_tokens=40, do_sample=True, temperature=0.8, top_k=0)
    output = loaded.generate(ids, **options)[0]  # type: ignore[misc]
    expected = str(tokenizer.decode(output, skip_special_tokens=True))
    assert printed == expected + "\n" * (not expected.endswith("\n"))


def test_generate_same_seed_same_text(model):
    loaded, tokenizer = ophis.load(model), load_tokenizer(model)
    texts = [generate_text(loaded, tokenizer, "a", max_new_tokens=30, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [generate_text(loaded, tokenizer, "a", max_new_tokens=30, temperature=0) for _ in range(2)]
    assert greedy[0] == greedy[1]


def test_generate_writes_what_it_returns(model):
    loaded, tokenizer = ophis.load(model), load_tokenizer(model)
    pieces: list[str] = []
    text = generate_text(loaded, tokenizer, "", max_new_tokens=30, temperature=2.0, seed=0, write=pieces.append)
    assert "".join(pieces) == text


def test_prompt_from_file_and_standard_input(model, capsys, monkeypatch):
    Path("prompt.txt").write_text("über\n")
    greedy = ["generate", str(model), "--max-new-tokens", "5", "--temperature", "0"]
    assert main([*greedy, "--prompt", "über"]) == 0
    expected = capsys.readouterr().out
    assert expected.startswith("über")
    assert main([*greedy, "--prompt-file", "prompt.txt"]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("über\n".encode())))
    assert main(greedy) == 0
    assert capsys.readouterr().out == expected


def test_streamed_characters_are_whole():
    tokenizer = byte_tokenizer()
    pieces: list[str] = []
    streamer = TextStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([list(b"prompt")]))
    for byte in "aé日🙂".encode() + b"\xff b\xe2\x82":  # ends within a character
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert pieces == ["a", "é", "日", "🙂", "\ufffd ", "b", "\ufffd"]
    assert streamer.text == "".join(pieces)


def test_generate_mistakes(model, capsys):
    assert error_of(["generate", "absent"], capsys) == "no folder absent"
    Path("empty").mkdir()
    assert "has no config.json" in error_of(["generate", "empty"], capsys)
    assert "temperature is -1.0" in error_of(["generate", str(model), "--temperature", "-1"], capsys)
    assert "top-p is 0.0" in error_of(["generate", str(model), "--top-p", "0"], capsys)
    assert "new tokens is 0" in error_of(["generate", str(model), "--max-new-tokens", "0"], capsys)
    assert "absent.txt" in error_of(["generate", str(model), "--prompt-file", "absent.txt"], capsys)


def test_generate_from_damaged_folder(model, capsys):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        Path("copy").mkdir(exist_ok=True)
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
            data = (model / file).read_bytes()
            Path("copy", file).write_bytes(data[: len(data) // 2] if file == name else data)
        assert f"{name} is damaged" in error_of(["generate", "copy"], capsys)
    Path("copy/model.safetensors").unlink()
    assert "model.safetensors is missing" in error_of(["generate", "copy"], capsys)


# bench; what it measures is in test_bench.py


def test_bench_mistakes(capsys):
    quick = ["bench", "rms_norm", "--quick", "--device", "cpu"]
    error = error_of(["bench", "selective_sacn", "--quick"], capsys)
    assert error.startswith("no operator or layer 'selective_sacn' to measure; there are selective_scan, ")
    assert "no operator or layer 's4d' to measure" in error_of(["bench", "rms_norm", "s4d"], capsys)
    error = error_of([*quick, "--backend", "tritno"], capsys)
    assert error.startswith("no backend 'tritno' of rms_norm; there are ")
    assert error.endswith("torch")
    error = error_of([*quick, "--model", "mamba-130m"], capsys)
    assert error == "--model is for the language models, which are measured where no operator is named"
    assert error_of([*quick, "--work", "forward"], capsys).startswith("--work is for the language models")
    assert error_of([*quick, "--accelerated"], capsys).startswith("--accelerated is for the language models")
    assert error_of(["bench", "--quick"], capsys) == "--quick is for operators, and none is named"
    assert error_of(["bench", "--model", "mamba-130m", "--backend", "torch"], capsys).startswith("--backend is for")
    assert "no 'mamba-131m' to measure; there are 'mamba-130m', " in error_of(
        ["bench", "--model", "mamba-131m"], capsys
    )
    assert "no 'sleep' to measure" in error_of(["bench", "--work", "sleep"], capsys)
    assert error_of([*quick, "--out", "table.csv"], capsys) == "--out is table.csv, expected a folder"
    assert error_of([*quick, "--out", "fox.txt"], capsys) == "--out is fox.txt, expected a folder"
    assert "absent.csv" in error_of([*quick, "--against", "absent.csv"], capsys)
    assert "fox.txt: no column " in error_of([*quick, "--against", "fox.txt"], capsys)
    assert "invalid choice: 'tpu'" in error_of(["bench", "rms_norm", "--device", "tpu"], capsys)
    if not torch.cuda.is_available():
        assert error_of(["bench", "rms_norm", "--device", "cuda"], capsys) == "this machine has no CUDA device"


def test_bench_names_its_operators(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"any of {', '.join(SHAPES)}; of layers, {' and '.join(LAYERS)} " in printed


def test_bench_without_matplotlib(capsys, monkeypatch):
    version = info.version
    monkeypatch.setattr("ophis.cli.info.version", lambda name: None if name == "matplotlib" else version(name))
    assert main(["bench", "rms_norm", "--quick", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("written to rms_norm_cpu.csv; for its plots: pip install 'ophis[bench]'\n")
    assert [path.name for path in Path().glob("rms_norm*")] == ["rms_norm_cpu.csv"]
