"""GGUF files: keys, names, shapes and types are those of llama.cpp's converter, written down here by hand.

Beside that, the names are held against the `gguf` package's table, and a file against transformers' reader of Mamba's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType as Type
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ophis
from ophis.generation import load_tokenizer
from ophis.models import gguf_tokenizer
from ophis.models.conversion import FORMATS
from ophis.models.gguf_format import gguf_name
from ophis.models.loading import CheckpointError
from ophis.training import byte_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, and the dog over the fox\n" * 3
ROWS = 288

# width 64, inner width 128, 2 blocks; step rank 4; 8 heads of 16, 2 groups
MODELS = {
    "mamba": dict(pattern=["mamba"], mamba=dict(d_state=4)),
    "falcon": dict(pattern=["mamba"], mamba=dict(d_state=4, norm_bcdt=True, norm_eps=1e-5)),
    "mamba2": dict(pattern=["mamba2"], mamba2=dict(headdim=16, d_state=8, ngroups=2), tie_word_embeddings=False),
}
MATRIX, F16, F32 = "as asked for", "F16", "F32"
ENDS = {"token_embd.weight": ((ROWS, 64), MATRIX), "output_norm.weight": ((64,), F32)}
BLOCKS = {
    "mamba": {
        "attn_norm.weight": ((64,), F32),
        "ssm_in.weight": ((256, 64), MATRIX),
        "ssm_conv1d.weight": ((128, 4), F32),
        "ssm_conv1d.bias": ((128,), F32),
        "ssm_x.weight": ((4 + 4 + 4, 128), MATRIX),
        "ssm_dt.weight": ((128, 4), MATRIX),
        "ssm_dt.bias": ((128,), F32),
        "ssm_a": ((128, 4), F32),
        "ssm_d": ((128,), F32),
        "ssm_out.weight": ((64, 128), MATRIX),
    },
    "mamba2": {
        "attn_norm.weight": ((64,), F32),
        "ssm_in.weight": ((128 + 128 + 2 * 16 + 8, 64), MATRIX),
        "ssm_conv1d.weight": ((128 + 2 * 16, 4), F32),
        "ssm_conv1d.bias": ((128 + 2 * 16,), F32),
        "ssm_dt.bias": ((8,), F32),
        "ssm_a": ((8, 1), F32),
        "ssm_d": ((8, 1), F32),
        "ssm_norm.weight": ((2, 64), F32),
        "ssm_out.weight": ((64, 128), MATRIX),
    },
}
BLOCKS["falcon"] = BLOCKS["mamba"]


def keys(arch: str, own: dict, file_type: int) -> dict:
    """All but the tokenizer's lists: (type, value)."""
    return {
        "general.architecture": (Type.STRING, arch),
        "general.type": (Type.STRING, "model"),
        "general.name": (Type.STRING, "Tiny Model"),
        "general.file_type": (Type.UINT32, file_type),
        "general.quantization_version": (Type.UINT32, 2),
        f"{arch}.context_length": (Type.UINT32, 2**20),
        f"{arch}.embedding_length": (Type.UINT32, 64),
        f"{arch}.feed_forward_length": (Type.UINT32, 0),
        f"{arch}.attention.head_count": (Type.UINT32, 0),
        f"{arch}.attention.layer_norm_rms_epsilon": (Type.FLOAT32, np.float32(1e-5)),
        f"{arch}.block_count": (Type.UINT32, 2),
        f"{arch}.ssm.conv_kernel": (Type.UINT32, 4),
        f"{arch}.ssm.inner_size": (Type.UINT32, 128),
        **{f"{arch}.ssm.{key}": value for key, value in own.items()},
        "tokenizer.ggml.model": (Type.STRING, "gpt2"),
        "tokenizer.ggml.pre": (Type.STRING, "gpt-2"),
        "tokenizer.ggml.bos_token_id": (Type.UINT32, 0),
        "tokenizer.ggml.eos_token_id": (Type.UINT32, 0),
        "tokenizer.ggml.padding_token_id": (Type.UINT32, 1),
    }


MAMBA_KEYS = {"state_size": (Type.UINT32, 4), "time_step_rank": (Type.UINT32, 4)}
KEYS = {
    "mamba": ("mamba", {**MAMBA_KEYS, "dt_b_c_rms": (Type.BOOL, False)}),
    "falcon": ("mamba", {**MAMBA_KEYS, "dt_b_c_rms": (Type.BOOL, True)}),
    "mamba2": (
        "mamba2",
        {"state_size": (Type.UINT32, 8), "time_step_rank": (Type.UINT32, 8), "group_count": (Type.UINT32, 2)},
    ),
}


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """In the form of GPT-NeoX's: NFC, two special tokens first, runs of spaces added at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|padding|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (3, 2)])
    ends = dict(bos_token=special[0], eos_token=special[0], pad_token=special[1])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **ends)


def build(name: str, **changes) -> ophis.LanguageModel:
    torch.manual_seed(0)
    options = dict(hidden_size=64, num_hidden_layers=2, vocab_size=ROWS) | MODELS[name] | changes
    model = ophis.LanguageModel(ophis.LanguageModelConfig(**options)).eval()
    for p in model.parameters():  # nothing at its initial value of zeros or ones
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Each model as `save_pretrained` saves it, with a tokenizer."""
    made = {}
    for name in MODELS:
        made[name] = tmp_path_factory.mktemp(name) / "tiny-model"
        build(name).save_pretrained(made[name])
        bpe_tokenizer().save_pretrained(made[name])
    return made


def read(path: Path) -> tuple[dict, dict]:
    """({key: (type, value)}, {name: (shape, type, data)})"""
    reader = gguf.GGUFReader(path)
    fields = {name: (field.types[0], field.contents()) for name, field in reader.fields.items()}
    tensors = {t.name: (tuple(t.shape.tolist()[::-1]), t.tensor_type.name, np.array(t.data)) for t in reader.tensors}
    return {name: value for name, value in fields.items() if not name.startswith("GGUF.")}, tensors


LISTS = ("tokens", "token_type", "merges")


@pytest.mark.parametrize(("file_type", "number"), [("f32", 0), ("f16", 1), ("q8_0", 7)])
@pytest.mark.parametrize("name", MODELS)
def test_keys_names_shapes_and_types(name: str, file_type: str, number: int, folders, tmp_path):
    ophis.convert(folders[name], tmp_path / "x.gguf", "gguf", file_type=file_type)
    fields, tensors = read(tmp_path / "x.gguf")
    lists = [fields.pop(f"tokenizer.ggml.{key}")[0] for key in LISTS]
    assert lists == [Type.ARRAY] * 3
    count = sum(np.prod(shape) for shape, _, _ in tensors.values())
    assert fields.pop("general.size_label") == (Type.STRING, f"{round(count / 1000)}K")
    assert fields == keys(*KEYS[name], number)

    asked = file_type.upper()
    expected = ENDS | ({"output.weight": ((ROWS, 64), MATRIX)} if name == "mamba2" else {})
    expected |= {f"blk.{i}.{key}": value for i in range(2) for key, value in BLOCKS[name].items()}
    types = {key: asked if kind == MATRIX else kind for key, (_, kind) in expected.items()}
    if file_type == "q8_0":  # whose blocks are 32 numbers of a row; these rows have 4
        types |= {key: F16 for key in types if key.endswith("ssm_dt.weight")}
    assert {key: (shape, kind) for key, (shape, kind, _) in tensors.items()} == {
        key: (shape, types[key]) for key, (shape, _) in expected.items()
    }


@pytest.mark.parametrize(("name", "arch"), [("mamba", gguf.MODEL_ARCH.MAMBA), ("mamba2", gguf.MODEL_ARCH.MAMBA2)])
def test_names_are_the_packages(name: str, arch):
    table = gguf.get_tensor_name_map(arch, 2)
    for ours in build(name).state_dict():
        theirs = ours.replace("mixer.dt_bias", "mixer.dt_proj.bias")  # the converter's first step with Mamba-2
        suffixes = (".weight", ".bias")
        assert gguf_name(ours) == table.get_name(theirs, try_suffixes=suffixes)


@pytest.mark.parametrize("name", MODELS)
def test_values(name: str, folders, tmp_path):
    ophis.convert(folders[name], tmp_path / "x.gguf", "gguf")
    _, tensors = read(tmp_path / "x.gguf")
    model = build(name).state_dict()
    block = "backbone.layers.1.mixer."
    for ours, theirs in (("A_log", "ssm_a"), ("D", "ssm_d"), ("conv1d.weight", "ssm_conv1d.weight")):
        expected = model[block + ours].numpy()
        expected = -np.exp(expected) if ours == "A_log" else expected
        np.testing.assert_allclose(tensors[f"blk.1.{theirs}"][2].ravel(), expected.ravel(), rtol=2e-7)
    steps = model[block + ("dt_bias" if name == "mamba2" else "dt_proj.bias")]
    assert np.array_equal(tensors["blk.1.ssm_dt.bias"][2], steps)
    assert np.array_equal(tensors["blk.1.ssm_in.weight"][2], model[block + "in_proj.weight"])
    assert np.array_equal(tensors["token_embd.weight"][2], model["backbone.embeddings.weight"])


def test_q8_0_is_off_by_half_a_step_at_most(folders, tmp_path):
    ophis.convert(folders["mamba"], tmp_path / "x.gguf", "gguf", file_type="q8_0")
    data = read(tmp_path / "x.gguf")[1]["blk.0.ssm_in.weight"][2].reshape(-1, 34)
    scale = data[:, :2].copy().view(np.float16).astype(np.float64)  # 2 bytes, before 32 signed bytes
    values = scale * data[:, 2:].view(np.int8)
    exact = build("mamba").state_dict()["backbone.layers.0.mixer.in_proj.weight"].double().numpy().reshape(-1, 32)
    np.testing.assert_allclose(scale[:, 0], np.abs(exact).max(1) / 127, rtol=2**-11)  # float16's
    assert (np.abs(values - exact) <= scale / 2 + 127 * scale * 2**-11).all()


@torch.no_grad()
def test_transformers_reads_the_file(folders, tmp_path):
    ophis.convert(folders["mamba"], tmp_path / "x.gguf", "gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf")
    ids = torch.randint(ROWS, (2, 9))
    expected = ophis.load(folders["mamba"])(ids).logits
    assert (theirs(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()


# There and back


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_file_is_read_back(name: str, folders, tmp_path):
    ophis.convert(folders[name], tmp_path / "x.gguf", "gguf")
    again, model = ophis.load(tmp_path / "x.gguf"), ophis.load(folders[name])
    assert (again.config.mixers, again.config.norm_eps) == (model.config.mixers, 1e-5)
    assert again.config.pad_token_id == 1
    for key, tensor in model.state_dict().items():
        if key.endswith("A_log"):  # the logarithm of an exponential, each rounded to float32: a neighbour at most
            step = torch.finfo(torch.float32).eps * tensor.abs().clamp(min=1)
            assert ((again.state_dict()[key] - tensor).abs() <= step).all()
        else:
            assert torch.equal(again.state_dict()[key], tensor), key
    ids = torch.randint(ROWS, (2, 9))
    expected = model(ids).logits
    assert (again(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert ophis.load(tmp_path / "x.gguf", dtype=torch.bfloat16).backbone.embeddings.weight.dtype == torch.bfloat16


BETWEEN = [(name, to) for name in MODELS for to in FORMATS if (name, to) != ("falcon", "official")]  # has no such model


@pytest.mark.parametrize(("name", "to"), BETWEEN)
@pytest.mark.parametrize("file_type", ["f32", "f16", "q8_0"])
def test_from_a_file_and_back_is_exact(name: str, file_type: str, to: str, folders, tmp_path):
    first = tmp_path / "tiny-model.gguf"
    ophis.convert(folders[name], first, "gguf", file_type=file_type)
    between = ophis.convert(first, tmp_path / "between" / ("tiny-model" + ".gguf" * (to == "gguf")), to)
    ophis.convert(between, tmp_path / "back.gguf", "gguf", file_type=file_type)
    fields, tensors = read(first)
    fields_after, tensors_after = read(tmp_path / "back.gguf")
    assert fields_after == fields
    assert tensors_after.keys() == tensors.keys()
    for key, (shape, kind, data) in tensors.items():
        assert tensors_after[key][:2] == (shape, kind)
        assert np.array_equal(tensors_after[key][2], data), key


# The tokenizer


def test_the_tokenizer(folders, tmp_path):
    ophis.convert(folders["mamba"], tmp_path / "x.gguf", "gguf")
    fields, _ = read(tmp_path / "x.gguf")
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{key}"][1] for key in LISTS)
    tokenizer = bpe_tokenizer()
    assert len(tokens) == len(kinds) == ROWS
    assert tokens[:3] == ["<|endoftext|>", "<|padding|>", "!"]
    assert tokens[len(tokenizer) - 2 :] == ["   ", "  ", *(f"[PAD{i}]" for i in range(len(tokenizer), ROWS))]
    unused = ROWS - len(tokenizer)
    assert kinds == [3, 3] + [1] * (ROWS - 4 - unused) + [4, 4] + [5] * unused  # control, normal, user-defined, unused
    assert merges == [" ".join(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]

    ophis.convert(tmp_path / "x.gguf", tmp_path / "back", "ophis")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|padding|>")
    for text in (TEXT, "über   日本 🙂  the<|endoftext|>fox"):
        assert again(text).input_ids == tokenizer(text).input_ids
        assert again.decode(again(text).input_ids) == text


def test_bytes(tmp_path):
    """A token for each byte and no merges, which llama.cpp's own converter does not know."""
    build("mamba", vocab_size=257).save_pretrained(tmp_path / "bytes")
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    ophis.convert(tmp_path / "bytes", tmp_path / "x.gguf", "gguf")
    fields, _ = read(tmp_path / "x.gguf")
    assert fields["tokenizer.ggml.eos_token_id"] == (Type.UINT32, 256)
    (merge,) = fields["tokenizer.ggml.merges"][1]
    vocabulary = byte_tokenizer().get_vocab()
    assert [vocabulary[letter] for letter in merge.split()] == [0xC0, 0xC1]  # which no UTF-8 text has
    ophis.convert(tmp_path / "x.gguf", tmp_path / "back", "ophis")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")
    text = "über 日本 ÀÁ<|endoftext|>"
    for tokenizer in (again, load_tokenizer(tmp_path / "x.gguf")):
        assert tokenizer(text).input_ids == byte_tokenizer()(text).input_ids


def test_gpt_neox_gets_the_name_that_the_converter_finds(folders, tmp_path, monkeypatch):
    vocabulary = json.loads((folders["mamba"] / "tokenizer.json").read_text())["model"]["vocab"]
    monkeypatch.setattr(gguf_tokenizer, "GPT_NEOX", gguf_tokenizer._digest(vocabulary))
    ophis.convert(folders["mamba"], tmp_path / "x.gguf", "gguf")
    assert read(tmp_path / "x.gguf")[0]["tokenizer.ggml.pre"] == (Type.STRING, "olmo")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t["model"].update(type="Unigram"), "its tokenizer is a Unigram model"),
        (lambda t: t["model"].update(byte_fallback=True), "its tokenizer has byte_fallback"),
        (lambda t: t["model"].update(ignore_merges=True), "its tokenizer has ignore_merges"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "its tokenizer splits text by Whitespace"),
        (lambda t: t.update(pre_tokenizer=None), "its tokenizer splits text by nothing"),
        (lambda t: t["pre_tokenizer"].update(use_regex=False), "its tokenizer does not split text"),
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "its tokenizer puts a space before a text"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "its tokenizer changes text by Lowercase"),
        (
            lambda t: t["added_tokens"][0].update(id=ROWS),
            f"tokens up to number {ROWS}, the model rows for 0 to {ROWS - 1}",
        ),
        (lambda t: t.pop("model"), "tokenizer.json is damaged, or not a file of the tokenizers library"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tokenizers_that_are_refused(change, reason: str, folders, tmp_path):
    shutil.copytree(folders["mamba"], tmp_path / "x")
    contents = json.loads((tmp_path / "x/tokenizer.json").read_text())
    change(contents)
    (tmp_path / "x/tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=reason):
        ophis.convert(tmp_path / "x", tmp_path / "x.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_no_tokenizer(folders, tmp_path):
    build("mamba").save_pretrained(tmp_path / "x")
    advice = "name another by --tokenizer; that of the state-spaces models is EleutherAI/gpt-neox-20b"
    with pytest.raises(ValueError, match=f"has no tokenizer.json, and a GGUF file holds its tokenizer: {advice}"):
        ophis.convert(tmp_path / "x", tmp_path / "x.gguf", "gguf")
    ophis.convert(tmp_path / "x", tmp_path / "x.gguf", "gguf", tokenizer=folders["mamba2"])
    assert len(read(tmp_path / "x.gguf")[0]["tokenizer.ggml.tokens"][1]) == ROWS


# What cannot be read


def rewritten(path: Path, source: Path, drop: str = "", keep: int | None = None, **values) -> Path:
    """A copy of a file with keys or tensors changed: `values` by key, dots as __; None removes."""
    reader = gguf.GGUFReader(source)
    changes = {name.replace("__", "."): value for name, value in values.items()}
    arch = changes.pop("general.architecture", reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(path, arch)
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "general.")) or changes.get(name, 0) is None:
            continue
        writer.add_key_value(name, changes.get(name, field.contents()), field.types[0])
    for tensor in reader.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, np.array(tensor.data)[:keep])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(general__architecture="llama"), "it is of architecture 'llama', expected 'mamba' or 'mamba2'"),
        (dict(mamba__ssm__state_size=None), "it has no key mamba.ssm.state_size"),
        (dict(mamba__ssm__state_size=5), r"blk.0.ssm_x.weight has shape \(12, 128\), expected \(14, 128\)"),
        (dict(mamba__block_count=3), "blk.2.attn_norm.weight is missing"),
        (dict(mamba__block_count=1), "blk.1.ssm_a is not part of this architecture"),
        (dict(mamba__block_count=10**6), "its configuration says 1000000 layers; there are not as many tensors"),
        (dict(drop="blk.1.ssm_a"), "blk.1.ssm_a is missing"),
        (dict(drop="token_embd.weight"), "token_embd.weight is missing"),
        (dict(keep=3), r"blk.0.attn_norm.weight has shape \(3,\), expected \(64,\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_cannot_be_read(changes: dict, message: str, folders, tmp_path):
    ophis.convert(folders["mamba"], tmp_path / "whole.gguf", "gguf")
    with pytest.raises(CheckpointError, match=f"x.gguf: .*{message}"):
        ophis.load(rewritten(tmp_path / "x.gguf", tmp_path / "whole.gguf", **changes))


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -1])
def test_truncated_file(keep: int, folders, tmp_path):
    path = tmp_path / "x.gguf"
    ophis.convert(folders["mamba"], path, "gguf")
    path.write_bytes(path.read_bytes()[: keep if keep >= 0 else -200])
    with pytest.raises(CheckpointError, match="x.gguf is damaged or cut short"):
        ophis.load(path)


def test_a_tokenizer_that_cannot_be_taken_along(folders, tmp_path):
    ophis.convert(folders["mamba"], tmp_path / "whole.gguf", "gguf")
    path = rewritten(tmp_path / "x.gguf", tmp_path / "whole.gguf", tokenizer__ggml__pre="llama-bpe")
    assert ophis.load(path).config.mixers == ["mamba", "mamba"]
    with pytest.raises(ValueError, match="its tokenizer is of kind 'gpt2' 'llama-bpe', and 'gpt2' 'gpt-2' can be read"):
        ophis.convert(path, tmp_path / "x", "ophis")
    for change in (dict(tokenizer__ggml__token_type=None), dict(tokenizer__ggml__merges=["t zebra"])):
        damaged = rewritten(tmp_path / "damaged.gguf", tmp_path / "whole.gguf", **change)
        with pytest.raises(ValueError, match="its tokenizer is damaged"):
            ophis.convert(damaged, tmp_path / "x", "ophis")
    ophis.convert(path, tmp_path / "x", "ophis", tokenizer=folders["mamba"])
    assert (tmp_path / "x/tokenizer.json").is_file()
    assert load_file(tmp_path / "x/model.safetensors")["backbone.embeddings.weight"].shape == (ROWS, 64)
