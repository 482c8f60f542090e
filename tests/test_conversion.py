"""From each layout to each other: what it can express comes back bit by bit, the rest is refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ophis
from ophis.cli import convert as cli
from ophis.cli import main
from ophis.models import conversion
from ophis.models.conversion import FORMATS
from ophis.models.loading import CheckpointError
from ophis.training import byte_tokenizer

MAMBA2 = dict(headdim=8, d_state=8)
ATTENTION = dict(num_heads=3, head_dim=16, rotary_emb_dim=8, d_conv=4, qkv_proj_bias=False, out_proj_bias=False)
# options, and the layouts of folders that can express them
MODELS = {
    "mamba": (dict(pattern=["mamba"], mamba=dict(d_state=4)), ("ophis", "transformers", "official", "gguf")),
    "mamba2": (
        dict(pattern=["mamba2"], mamba2={**MAMBA2, "ngroups": 2}, tie_word_embeddings=False),
        ("ophis", "transformers", "official", "gguf"),
    ),
    "falcon_mamba": (
        dict(pattern=["mamba"], mamba=dict(norm_bcdt=True, norm_eps=1e-5)), ("ophis", "transformers", "gguf"),
    ),
    "mamba2attn": (
        dict(pattern=["mamba2", "attention"], mamba2=MAMBA2, attention=ATTENTION, pad_vocab_size_multiple=16),
        ("ophis", "official"),
    ),
    "transformerpp": (
        dict(pattern=["attention"], attention=dict(num_heads=4, num_heads_kv=2), intermediate_size=128),
        ("ophis", "official"),
    ),
    "mamba with MLPs": (dict(pattern=["mamba"], intermediate_size=256), ("ophis", "official")),
    "mamba2 with biases": (
        dict(pattern=["mamba2"], mamba2={**MAMBA2, "bias": True, "dt_limit": [0.01, 0.1]}),
        ("ophis", "transformers", "official"),
    ),
    "s4d": (dict(pattern=["s4d"], intermediate_size=64), ("ophis",)),
}  # fmt: skip
PAIRS = [
    (model, *pair) for model, (_, layouts) in MODELS.items() for pair in permutations(layouts, 2) if "gguf" not in pair
]
REFUSED = {
    ("mamba2attn", "transformers"): "its blocks are of attention and mamba2; transformers has Mamba alone and Mamba-2",
    ("mamba2attn", "gguf"): "its blocks are of attention and mamba2; transformers has Mamba alone and Mamba-2 alone",
    ("mamba with MLPs", "transformers"): "it has MLPs (intermediate_size 256), which transformers' Mamba has not",
    ("falcon_mamba", "official"): "its mamba has norm_bcdt=True, which the official one has not",
    ("s4d", "official"): "its blocks are of s4d; the official model has attention and one of mamba or mamba2",
    ("s4d", "transformers"): "its blocks are of s4d; transformers has Mamba alone and Mamba-2 alone",
    ("mamba2 with biases", "gguf"): "its biases are not llama.cpp's, which has one in the convolution, and none in the",
}


def build(name: str, **changes) -> ophis.LanguageModel:
    torch.manual_seed(0)
    options = dict(hidden_size=32, num_hidden_layers=2, vocab_size=257, eos_token_id=256) | MODELS[name][0] | changes
    model = ophis.LanguageModel(ophis.LanguageModelConfig(**options)).eval()
    for p in model.parameters():  # nothing at its initial value of zeros or ones
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], Path]:
    """The folder that `save_pretrained` makes of a model, with a tokenizer."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("saved") / "tiny"
            build(name).save_pretrained(made[name])
            byte_tokenizer().save_pretrained(made[name])
        return made[name]

    return folder


def contents(folder: Path) -> dict:
    """Every tensor, and the rest of the files as they are."""
    held: dict = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            held |= load_file(path)
        elif path.suffix == ".bin":
            held |= torch.load(path, weights_only=True)
        else:
            held[path.name] = path.read_text(encoding="utf-8")
    return held


def essence(folder: Path) -> dict:
    """What a folder's configuration says of the model, its defaults spelled out or not."""
    config = ophis.LanguageModelConfig.from_pretrained(folder)
    sizes = {
        key: getattr(config, key)
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "norm_eps",
            "residual_in_fp32",
            "tie_word_embeddings",
        )
    }
    return sizes | {"mixers": config.mixers} | {kind: config.changed_options(kind) for kind in set(config.mixers)}


def assert_same_contents(actual: Path, expected: Path, *, spelling: bool = True) -> None:
    one, other = contents(actual), contents(expected)
    assert one.keys() == other.keys()
    assert essence(actual) == essence(expected)
    for name, value in other.items():
        if name == "config.json" and not spelling:
            continue
        same = torch.equal(one[name], value) if isinstance(value, torch.Tensor) else one[name] == value
        assert same, f"{name} differs"
        assert not isinstance(value, torch.Tensor) or one[name].dtype == value.dtype, name


@pytest.mark.parametrize(("name", "a", "b"), PAIRS, ids=lambda value: value)
@torch.no_grad()
def test_there_and_back_is_exact(name: str, a: str, b: str, saved, tmp_path):
    first = ophis.convert(saved(name), tmp_path / "first", a)
    second = ophis.convert(first, tmp_path / "second", b)
    third = ophis.convert(second, tmp_path / "third", a)
    assert_same_contents(third, first, spelling=b != "official")  # which spells no defaults, and no tokens' numbers
    ids = torch.randint(257, (2, 9))
    expected = ophis.load(saved(name))(ids).logits
    for folder in (first, second):
        assert torch.equal(ophis.load(folder)(ids).logits, expected)
        assert (folder / "tokenizer.json").read_text() == (saved(name) / "tokenizer.json").read_text()


@pytest.mark.parametrize(("name", "to"), [(name, to) for name in MODELS for to in FORMATS if to not in MODELS[name][1]])
def test_what_a_layout_cannot_express_is_refused(name: str, to: str, saved, tmp_path):
    target = tmp_path / ("x.gguf" if to == "gguf" else "x")
    with pytest.raises(ValueError, match=f"^{saved(name)} cannot be written as {to}: it") as raised:
        ophis.convert(saved(name), target, to)
    assert REFUSED.get((name, to), "") in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "changes", "to", "reason"),
    [
        ("mamba", dict(norm_eps=1e-6), "official", "its norms have an epsilon of 1e-06; the official ones 1e-05"),
        ("mamba with MLPs", dict(intermediate_size=200), "official", "intermediate_size is 200; the official one is a"),
        ("mamba2", dict(pattern=["mamba", "mamba2"]), "official", "its blocks are of mamba and mamba2; the official"),
        ("mamba2", dict(mamba2=dict(headdim=8, norm_eps=1e-3)), "official", "its mamba2 has norm_eps=0.001"),
        ("mamba2", dict(mamba2=dict(headdim=8, norm_eps=1e-3)), "transformers", "1e-05, the gated norms one of 0.001"),
        ("mamba2", dict(mamba2=dict(headdim=8, expand=1.5)), "transformers", "its inner width is 48; transformers' M"),
        ("mamba2", dict(mamba2=dict(headdim=8, D_has_hdim=True)), "transformers", "has D_has_hdim=True, which transf"),
        ("mamba", dict(mamba=dict(expand=3)), "gguf", "its inner width is 96; llama.cpp's Mamba has twice the"),
        ("mamba", dict(mamba=dict(conv_bias=False)), "gguf", "its biases are not llama.cpp's"),
        ("mamba2", dict(mamba2=dict(headdim=8, dt_limit=[0.0, 0.1])), "gguf", "it limits step sizes to 0 to 0.1; ll"),
        (
            "falcon_mamba", dict(mamba=dict(norm_bcdt=True, norm_eps=1e-6)), "gguf",
            "its norms of dt, B and C have an epsilon of 1e-06, the blocks' one of 1e-05; llama.cpp has one for both",
        ),
    ],
)  # fmt: skip
def test_options_that_a_layout_has_not_are_named(name: str, changes: dict, to: str, reason: str, tmp_path):
    build(name, **changes).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="cannot be written") as raised:
        ophis.convert(tmp_path / "model", tmp_path / ("x.gguf" if to == "gguf" else "x"), to)
    assert reason in str(raised.value)


# The official layout, as the official loader has it.

OFFICIAL_KEYS = {
    "d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm",
    "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in MODELS if "official" in MODELS[name][1]])
def test_the_official_layout_is_what_its_loader_takes(name: str, saved, tmp_path):
    folder = ophis.convert(saved(name), tmp_path / "official", "official")
    fields = json.loads((folder / "config.json").read_text())
    assert fields.keys() == OFFICIAL_KEYS  # the loader's class takes no others
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert {"lm_head.weight", "backbone.embedding.weight"} <= tensors.keys()
    tied = tensors["lm_head.weight"].data_ptr() == tensors["backbone.embedding.weight"].data_ptr()
    assert tied == fields["tie_embeddings"]
    stored = sum(p.nbytes for p in ophis.load(saved(name)).parameters())
    assert stored < (folder / "pytorch_model.bin").stat().st_size < 1.1 * stored + 20_000  # nothing twice


def test_special_tokens_survive_a_layout_without_them(saved, tmp_path):
    """The official config.json has no place for their numbers; `ophis train`'s folder has no generation_config.json."""
    shutil.copytree(saved("mamba"), tmp_path / "x")
    (tmp_path / "x/generation_config.json").unlink()
    official = ophis.convert(tmp_path / "x", tmp_path / "official", "official")
    assert ophis.load(official).generation_config.eos_token_id == 256
    again = ophis.convert(official, tmp_path / "transformers", "transformers")
    assert AutoModelForCausalLM.from_pretrained(again).generation_config.eos_token_id == 256


def test_published_configurations_are_written_as_published(tmp_path):
    fields = conversion.fields_to_official(ophis.preset("mamba2attn-2.7b"))
    attention = {"causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 30, "rotary_emb_dim": 64}
    assert fields["attn_cfg"] == {**attention, "out_proj_bias": False, "qkv_proj_bias": False}
    assert (fields["ssm_cfg"], fields["attn_layer_idx"]) == ({"layer": "Mamba2"}, [9, 18, 27, 36, 45, 56])
    assert (fields["d_model"], fields["n_layer"], fields["vocab_size"]) == (2560, 64, 50288)
    assert conversion.fields_to_official(ophis.preset("mamba-130m"))["ssm_cfg"] == {}


# Files


@torch.no_grad()
def test_shards(saved, tmp_path):
    folder = ophis.convert(saved("mamba"), tmp_path / "shards", "transformers", max_shard_size="20KB")
    shards = list(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert max(path.stat().st_size for path in shards if len(load_file(path)) > 1) < 22_000
    ids = torch.randint(257, (2, 9))
    expected = ophis.load(saved("mamba"))(ids).logits
    assert torch.equal(ophis.load(folder)(ids).logits, expected)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert (theirs(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="official has one file of weights, never shards"):
        ophis.convert(saved("mamba"), tmp_path / "x", "official", max_shard_size="20KB")


def test_types_are_kept_as_stored(tmp_path):
    """Reading widens A_log for computing; a conversion does not."""
    model = build("mamba")
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    (tmp_path / "half").mkdir()
    torch.save(
        {conversion.to_official(name): tensor for name, tensor in tensors.items()}, tmp_path / "half/pytorch_model.bin"
    )
    (tmp_path / "half/config.json").write_text(json.dumps(conversion.fields_to_official(model.config)))
    folder = ophis.convert(tmp_path / "half", tmp_path / "ours", "transformers")
    written = load_file(folder / "model.safetensors")
    assert all(torch.equal(written[name], tensors[name]) and written[name].dtype == torch.half for name in written)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert_same_contents(
        ophis.convert(folder, tmp_path / "back", "official"),
        ophis.convert(tmp_path / "half", tmp_path / "same", "official"),
    )


def test_a_target_is_replaced_only_when_asked(saved, tmp_path):
    target = ophis.convert(saved("mamba"), tmp_path / "x", "ophis", max_shard_size="20KB")
    with pytest.raises(FileExistsError, match=f"{target} is not empty: it holds config.json, .* by --overwrite"):
        ophis.convert(saved("mamba"), target, "transformers")
    ophis.convert(saved("mamba2"), target, "transformers", overwrite=True)
    assert_same_contents(
        target, ophis.convert(saved("mamba2"), tmp_path / "y", "transformers")
    )  # no shard is left over
    for name in (".git", "README.md", "notes.txt"):
        (target / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"holds more than a saved model: .*{name}.* It is not replaced"):
            ophis.convert(saved("mamba"), target, "ophis", overwrite=True)
    with pytest.raises(FileExistsError, match="notes.txt is a file, expected a folder"):
        ophis.convert(saved("mamba"), target / "notes.txt", "ophis")
    (tmp_path / "empty").mkdir()
    ophis.convert(saved("mamba"), tmp_path / "empty", "ophis")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "x", "y"]


def test_a_folder_may_be_converted_in_place(saved, tmp_path):
    shutil.copytree(saved("mamba"), tmp_path / "x")
    ophis.convert(tmp_path / "x", tmp_path / "x", "official", overwrite=True)
    assert_same_contents(tmp_path / "x", ophis.convert(saved("mamba"), tmp_path / "y", "official"))


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("to", ["transformers", "official", "gguf"])
def test_an_interrupted_conversion_leaves_nothing(to: str, error: BaseException, saved, tmp_path):
    target = tmp_path / ("x.gguf" if to == "gguf" else "x")
    ophis.convert(saved("mamba"), target, to)
    before = target.read_bytes() if to == "gguf" else contents(target)

    def stop(written: int) -> None:
        raise error

    for place in (target, tmp_path / ("new.gguf" if to == "gguf" else "new")):
        with pytest.raises(type(error)):
            ophis.convert(saved("mamba2"), place, to, overwrite=True, progress=lambda total: stop)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    after = target.read_bytes() if to == "gguf" else contents(target)
    assert str(after) == str(before)


def test_progress_counts_every_byte(saved, tmp_path):
    for to in FORMATS:
        totals, parts = [], []

        def progress(total: int, totals=totals, parts=parts):
            totals.append(total)
            return parts.append

        ophis.convert(saved("mamba2"), tmp_path / f"{to}.gguf", to, progress=progress)
        stored = sum(p.nbytes for p in ophis.load(saved("mamba2")).parameters())
        assert totals == [stored]
        assert stored <= sum(parts) < 1.2 * stored + 20_000  # a pickle is a little more than its tensors


# The tokenizer


def test_another_tokenizer_goes_along(saved, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(saved("mamba") / name, tmp_path / "tokenizer" / name)
    ophis.load(saved("mamba")).save_pretrained(tmp_path / "bare")
    folder = ophis.convert(tmp_path / "bare", tmp_path / "with", "official", tokenizer=tmp_path / "tokenizer")
    assert (folder / "tokenizer.json").read_text() == (saved("mamba") / "tokenizer.json").read_text()
    with pytest.raises(FileNotFoundError, match="bare holds no tokenizer"):
        ophis.convert(saved("mamba"), tmp_path / "x", "official", tokenizer=tmp_path / "bare")


def test_the_tokenizer_of_another_model_is_refused(saved, tmp_path):
    build("mamba", vocab_size=250).save_pretrained(tmp_path / "small")
    with pytest.raises(
        ValueError, match=r"tokenizer.json has tokens up to number 256, the model rows for 0 to 255; it is"
    ):
        ophis.convert(tmp_path / "small", tmp_path / "x", "official", tokenizer=saved("mamba"))
    assert not (tmp_path / "x").exists()


# The command


@pytest.fixture
def command(capsys):
    """Runs `ophis convert`: (exit code, standard output, standard error)."""

    def run(*arguments) -> tuple[int, str, str]:
        try:
            code = main(["convert", *map(str, arguments)])
        except SystemExit as stop:  # argparse's
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_command(saved, tmp_path, command):
    assert cli.LAYOUTS == FORMATS
    code, out, err = command(saved("mamba"), tmp_path / "x", "--to", "official")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'x'}: 0.")
    assert_same_contents(tmp_path / "x", ophis.convert(saved("mamba"), tmp_path / "y", "official"))
    code, out, _ = command(saved("mamba"), tmp_path / "x.gguf", "--to", "gguf", "--type", "q8_0")
    assert (code, out) == (0, f"{tmp_path / 'x.gguf'}: {(tmp_path / 'x.gguf').stat().st_size / 1e6:,.1f} MB\n")


def test_a_terminal_sees_how_far_it_is(saved, tmp_path, command, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code, _, err = command(saved("mamba"), tmp_path / "x", "--to", "official")
    assert code == 0
    assert "0%|" in err


def test_mistakes_cost_one_line(saved, tmp_path, command):
    def error(*arguments) -> str:
        code, _, err = command(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        return err.removeprefix("ophis: error: ").strip()

    here, there = saved("mamba"), tmp_path / "x"
    assert "required: --to" in error(here, there)
    assert "invalid choice: 'onnx'" in error(here, there, "--to", "onnx")
    assert error(tmp_path / "absent", there, "--to", "ophis") == f"no folder {tmp_path / 'absent'}"
    assert "has no config.json" in error(tmp_path, there, "--to", "ophis")
    assert "s4d; transformers has Mamba alone" in error(saved("s4d"), there, "--to", "transformers")
    assert "expected the name of a file that ends in .gguf" in error(here, there, "--to", "gguf")
    assert error(here, tmp_path / "x.gguf", "--to", "gguf", "--type", "q4").startswith("the type is 'q4'; GGUF files")
    assert "the type is 'f16'; GGUF files have one" in error(here, there, "--to", "ophis", "--type", "f16")
    assert "5 potatoes" in error(here, there, "--to", "ophis", "--max-shard-size", "5 potatoes")
    assert "the target is ., expected the name of a new folder" in error(here, ".", "--to", "ophis")
    assert not there.exists()
    with pytest.raises(ValueError, match="there is no layout 'onnx'; there are ophis, transformers, official, gguf"):
        ophis.convert(here, there, "onnx")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text((here / "config.json").read_text())
    (tmp_path / "broken/model.safetensors").write_bytes(b"{")
    with pytest.raises(CheckpointError, match="is damaged or cut short"):
        ophis.convert(tmp_path / "broken", there, "ophis")


def test_gguf_without_its_extra(saved, tmp_path, command, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    code, _, err = command(saved("mamba"), tmp_path / "x.gguf", "--to", "gguf")
    assert (code, err) == (2, "ophis: error: GGUF files need the gguf package: pip install 'ophis[gguf]'\n")
