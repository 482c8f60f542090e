"""The published state-spaces/* layout: names, shapes, every form of file, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ophis
from ophis.models.language import LanguageBackbone
from ophis.models.loading import CheckpointError
from ophis.models.official_format import fields_from_official, to_official

# config.json, and the tensors' names and shapes, written by hand.

COMMON = {"d_model": 32, "n_layer": 2, "vocab_size": 50, "rms_norm": True, "residual_in_fp32": True}
ATTENTION = {
    "causal": True, "d_conv": 4, "head_dim": 16, "num_heads": 3, "out_proj_bias": False, "qkv_proj_bias": False,
    "rotary_emb_dim": 8,
}  # fmt: skip
OFFICIAL_CONFIGS = {
    # As the first were published: without the keys that came with Mamba-2.
    "mamba": {**COMMON, "ssm_cfg": {}, "fused_add_norm": True, "pad_vocab_size_multiple": 8},
    "mamba2": {
        **COMMON, "d_intermediate": 0, "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 16, "chunk_size": 64},
        "attn_layer_idx": [], "attn_cfg": {}, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    },
    "mamba2attn": {
        **COMMON, "d_intermediate": 0, "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 16},
        "attn_layer_idx": [1], "attn_cfg": ATTENTION, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    },
    "transformerpp": {
        **COMMON, "d_intermediate": 100, "ssm_cfg": {}, "attn_layer_idx": [0, 1],
        "attn_cfg": {"causal": True, "num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 8}, "fused_add_norm": True,
        "pad_vocab_size_multiple": 16, "tie_embeddings": False, "norm_epsilon": 1e-6,
    },
}  # fmt: skip


def ends(rows: int) -> dict[str, tuple[int, ...]]:
    return {"backbone.embedding.weight": (rows, 32), "backbone.norm_f.weight": (32,), "lm_head.weight": (rows, 32)}


def mamba2_block(i: int) -> dict[str, tuple[int, ...]]:
    return {
        f"backbone.layers.{i}.norm.weight": (32,),
        f"backbone.layers.{i}.mixer.in_proj.weight": (64 + 64 + 16 + 16 + 8, 32),
        f"backbone.layers.{i}.mixer.conv1d.weight": (64 + 16 + 16, 1, 4),
        f"backbone.layers.{i}.mixer.conv1d.bias": (64 + 16 + 16,),
        f"backbone.layers.{i}.mixer.dt_bias": (8,),
        f"backbone.layers.{i}.mixer.A_log": (8,),
        f"backbone.layers.{i}.mixer.D": (8,),
        f"backbone.layers.{i}.mixer.norm.weight": (64,),
        f"backbone.layers.{i}.mixer.out_proj.weight": (32, 64),
    }


OFFICIAL_SHAPES = {
    "mamba": ends(56)
    | {
        f"backbone.layers.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "norm.weight": (32,),
            "mixer.in_proj.weight": (128, 32),
            "mixer.conv1d.weight": (64, 1, 4),
            "mixer.conv1d.bias": (64,),
            "mixer.x_proj.weight": (2 + 16 + 16, 64),
            "mixer.dt_proj.weight": (64, 2),
            "mixer.dt_proj.bias": (64,),
            "mixer.A_log": (64, 16),
            "mixer.D": (64,),
            "mixer.out_proj.weight": (32, 64),
        }.items()
    },
    "mamba2": ends(64) | mamba2_block(0) | mamba2_block(1),
    "mamba2attn": ends(64)
    | mamba2_block(0)
    | {
        "backbone.layers.1.norm.weight": (32,),
        "backbone.layers.1.mixer.in_proj.weight": (3 * 48, 32),
        "backbone.layers.1.mixer.conv1d.weight": (3 * 48, 1, 4),
        "backbone.layers.1.mixer.conv1d.bias": (3 * 48,),
        "backbone.layers.1.mixer.out_proj.weight": (32, 48),
    },
    "transformerpp": ends(64)
    | {
        f"backbone.layers.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "norm.weight": (32,),
            "mixer.in_proj.weight": (32 + 16 + 16, 32),
            "mixer.in_proj.bias": (32 + 16 + 16,),
            "mixer.out_proj.weight": (32, 32),
            "mixer.out_proj.bias": (32,),
            "norm2.weight": (32,),
            "mlp.fc1.weight": (2 * 128, 32),
            "mlp.fc2.weight": (32, 128),
        }.items()
    },
}
KINDS = tuple(OFFICIAL_CONFIGS)


def official_config(fields: dict) -> ophis.LanguageModelConfig:
    return ophis.LanguageModelConfig(**fields_from_official(fields))


def official_model(kind: str) -> ophis.LanguageModel:
    torch.manual_seed(0)
    model = ophis.LanguageModel(official_config(OFFICIAL_CONFIGS[kind])).eval()
    for p in model.parameters():  # nothing at its initial value of zeros or ones
        p.data += 0.1 * torch.randn_like(p)
    return model


def official_tensors(model: ophis.LanguageModel) -> dict[str, torch.Tensor]:
    return {to_official(name): tensor for name, tensor in model.state_dict().items()}


def write_official(folder: Path, kind: str, tensors: dict[str, torch.Tensor], how: str = "pickle") -> None:
    (folder / "config.json").write_text(json.dumps(OFFICIAL_CONFIGS[kind]))
    name = "pytorch_model.bin" if "pickle" in how else "model.safetensors"
    shards = {name: tensors}
    if "sharded" in how:
        stem, suffix = name.split(".")
        shards = {f"{stem}-{i + 1:05}-of-00002.{suffix}": dict(list(tensors.items())[i::2]) for i in range(2)}
        index = {"weight_map": {key: shard for shard, held in shards.items() for key in held}}
        (folder / f"{name}.index.json").write_text(json.dumps(index))
    for shard, held in shards.items():
        if name.endswith(".bin"):
            torch.save(held, folder / shard, _use_new_zipfile_serialization="old" not in how)
        else:
            save_file({key: tensor.clone() for key, tensor in held.items()}, folder / shard)


@pytest.fixture
def official(tmp_path):
    """A folder of the hybrid, and the tensors in it."""
    tensors = official_tensors(official_model("mamba2attn"))
    write_official(tmp_path, "mamba2attn", tensors)
    return tmp_path, tensors


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", KINDS)
def test_official_names_and_shapes(kind: str):
    tensors = official_tensors(official_model(kind))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == OFFICIAL_SHAPES[kind]


@pytest.mark.parametrize("how", ["pickle", "old pickle", "sharded pickle", "safetensors", "sharded safetensors"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_official_round_trip_is_exact(kind: str, how: str, tmp_path):
    model = official_model(kind)
    tensors = official_tensors(model)
    write_official(tmp_path, kind, tensors, how)
    again = ophis.load(tmp_path)
    assert not again.training
    assert again.config.mixers == model.config.mixers
    assert (again.lm_head.weight is again.backbone.embeddings.weight) == (kind != "transformerpp")
    back = official_tensors(again)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name
    ids = torch.randint(50, (2, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "ours")
    assert torch.equal(ophis.load(tmp_path / "ours")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("how", ["pickle", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_official_folders_through_from_pretrained(kind: str, how: str, tmp_path):
    model = official_model(kind)
    write_official(tmp_path, kind, official_tensors(model), how)
    again, report = ophis.LanguageModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    ids = torch.randint(50, (2, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "ours")  # under the names here, whatever they were read from
    assert torch.equal(ophis.load(tmp_path / "ours")(ids).logits, model(ids).logits)
    backbone = LanguageBackbone.from_pretrained(tmp_path)
    assert torch.equal(backbone.embeddings.weight, model.backbone.embeddings.weight)


def test_official_weights_can_be_cast_trained_and_go_without_a_tied_head(official):
    folder, tensors = official
    half = {name: tensor.half() for name, tensor in tensors.items() if name != "lm_head.weight"}
    write_official(folder, "mamba2attn", half)
    before = (folder / "pytorch_model.bin").read_bytes()
    model = ophis.load(folder, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model = ophis.load(folder)
    assert model.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert model.backbone.layers[0].mixer.in_proj.weight.dtype == torch.float16
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert (folder / "pytorch_model.bin").read_bytes() == before  # the mapping is private


@pytest.mark.parametrize(
    ("name", "rows", "extra"),
    [
        ("mamba-130m", 50280, {"ssm_cfg": {}, "pad_vocab_size_multiple": 8}),
        ("mamba-2.8b", 50280, {"ssm_cfg": {}}),  # 8 is the default
        ("mamba2-130m", 50288, {"ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16}),
        (
            "mamba2attn-2.7b",
            50288,
            {
                "ssm_cfg": {"layer": "Mamba2"},
                "attn_layer_idx": [9, 18, 27, 36, 45, 56],
                "attn_cfg": {**ATTENTION, "head_dim": 128, "num_heads": 30, "rotary_emb_dim": 64},
                "pad_vocab_size_multiple": 16,
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_configurations_are_the_presets(name: str, rows: int, extra: dict):
    ours = ophis.preset(name)
    config = official_config(
        {"d_model": ours.hidden_size, "n_layer": ours.num_hidden_layers, "vocab_size": 50277, "rms_norm": True, **extra}
    )
    assert config.vocab_size == ours.vocab_size == rows
    assert config.mixers == ours.mixers
    biases = {"qkv_proj_bias": False, "out_proj_bias": False} if "attention" in ours.mixers else {}
    assert config.options("attention") == {**ours.options("attention"), **biases}
    for kind in ("mamba", "mamba2"):
        assert config.options(kind) == ours.options(kind)
    for key in ("hidden_size", "intermediate_size", "norm_eps", "residual_in_fp32", "tie_word_embeddings"):
        assert getattr(config, key) == getattr(ours, key), key


def test_official_options_reach_the_layers():
    config = official_config(
        {**COMMON, "ssm_cfg": {"dt_rank": 3, "d_conv": 2, "bias": True, "use_fast_path": False}, "norm_epsilon": 1e-6}
    )
    assert (config.norm_eps, config.vocab_size) == (1e-6, 56)
    mixer = ophis.LanguageModel(config).backbone.layers[1].mixer
    assert (mixer.dt_rank, mixer.conv1d.kernel_size, mixer.in_proj.bias is None) == (3, (2,), False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_modle": 3}, "unknown key 'd_modle', expected some of d_model, n_layer"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg has layer 'Mamba3', expected 'Mamba1' or 'Mamba2'"),
        ({"ssm_cfg": {"layer": ["Mamba2"]}}, r"ssm_cfg has layer \['Mamba2'\], expected"),
        ({"ssm_cfg": {"headdim": 8}}, "ssm_cfg has 'headdim', which Mamba1 does not know; it knows d_state, "),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_rank": 8}}, "ssm_cfg has 'dt_rank', which Mamba2 does not know"),
        ({"ssm_cfg": ["Mamba2"]}, r"ssm_cfg is \['Mamba2'\], expected a mapping of options"),
        ({"attn_cfg": {**ATTENTION, "window": 8}}, "attn_cfg has 'window', which attention does not know"),
        ({"attn_cfg": {"num_heads": 4}}, "attn_cfg has causal False; attention here has True only"),
        ({"attn_cfg": {**ATTENTION, "mlp_dim": 256}}, "attn_cfg has mlp_dim 256; attention here has 0 only"),
        ({"attn_cfg": {**ATTENTION, "rotary_emb_interleaved": True}}, "attn_cfg has rotary_emb_interleaved True"),
        ({"attn_cfg": {"causal": True}}, "attn_cfg has no num_heads"),
        ({"attn_cfg": 7}, "attn_cfg is 7, expected a mapping"),
        ({"attn_layer_idx": [2]}, r"attn_layer_idx is \[2\], expected a list of numbers from 0 to n_layer - 1"),
        ({"attn_layer_idx": 1}, "attn_layer_idx is 1, expected a list"),
        ({"rms_norm": False}, "rms_norm is False; the published models, and this library's, have RMSNorm"),
        ({"d_model": "32"}, "d_model is '32', expected an integer of at least 1"),
        ({"n_layer": 0}, "n_layer is 0, expected an integer of at least 1"),
        ({"n_layer": 10**9}, "n_layer is 1000000000, expected at most 10000"),
        ({"n_layer": 5000}, "5000 layers; there are not as many tensors"),
        ({"vocab_size": None}, "vocab_size is None, expected an integer"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0, expected an integer of at least 1"),
        ({"d_intermediate": -1}, "d_intermediate is -1, expected an integer of at least 0"),
        ({"tie_embeddings": "yes"}, "tie_embeddings is 'yes', expected a bool"),
        ({"norm_epsilon": "small"}, "norm_epsilon is 'small', expected a float"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_official_configurations_that_cannot_be_read(official, changes: dict, message: str):
    folder, _ = official
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as raised:
        ophis.load(folder)
    assert str(folder) in str(raised.value)


def test_a_configuration_of_no_known_layout(official):
    folder, _ = official
    (folder / "config.json").write_text(json.dumps({"d_model": 32}))
    with pytest.raises(CheckpointError, match="has no model_type, and not the d_model and n_layer of an official"):
        ophis.load(folder)


def test_official_tensors_that_do_not_fit_are_named_as_in_the_file(official):
    folder, tensors = official

    def load_with(**changes):
        held = {**tensors, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
        write_official(folder, "mamba2attn", {name: tensor for name, tensor in held.items() if tensor is not None})
        ophis.load(folder)

    with pytest.raises(CheckpointError, match=r"backbone\.embedding\.weight is missing$"):
        load_with(backbone__embedding__weight=None)
    with pytest.raises(CheckpointError, match=r"backbone\.layers\.1\.mixer\.conv1d\.bias is missing$"):
        load_with(backbone__layers__1__mixer__conv1d__bias=None)
    with pytest.raises(CheckpointError, match=r"backbone\.bogus is not part of this architecture$"):
        load_with(backbone__bogus=torch.ones(1))
    with pytest.raises(CheckpointError, match=r"backbone\.embeddings\.weight is not part of this architecture$"):
        load_with(backbone__embeddings__weight=torch.ones(1))  # the name here, which the layout does not have
    with pytest.raises(CheckpointError, match=r"embedding\.weight has shape \(50, 32\), expected \(64, 32\)"):
        load_with(backbone__embedding__weight=torch.ones(50, 32))  # not padded
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to the embedding; the one stored is another"):
        load_with(lm_head__weight=torch.ones(64, 32))
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to the embedding; the one stored is another"):
        load_with(lm_head__weight=tensors["lm_head.weight"].double())


def test_an_untied_official_head_is_not_optional(tmp_path):
    tensors = official_tensors(official_model("transformerpp"))
    tensors.pop("lm_head.weight")
    write_official(tmp_path, "transformerpp", tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        ophis.load(tmp_path)


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(official, zipped: bool):
    folder, tensors = official
    held = {**tensors, "payload": Malicious(folder / "ran")}
    torch.save(held, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is not a pickle of tensors alone; to read it could"):
        ophis.load(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("held", [[1, 2], {"model": {"a": 1}}, {"step": 3}])
def test_a_pickle_of_something_else(official, held):
    folder, _ = official
    torch.save(held, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin does not hold tensors by name"):
        ophis.load(folder)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 5, 100, 10_000])
def test_truncated_pickle(official, keep: int, zipped: bool):
    folder, tensors = official
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is (damaged or cut short|not a pickle)"):
        ophis.load(folder)


def test_missing_pickles(official):
    folder, tensors = official
    write_official(folder, "mamba2attn", tensors, "sharded pickle")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights: pytorch_model-00002-of-00002\.bin is missing"):
        ophis.load(folder)
    (folder / "pytorch_model.bin.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin\.index\.json is damaged"):
        ophis.load(folder)
    (folder / "pytorch_model.bin.index.json").unlink()
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights: model.safetensors is missing"):
        ophis.load(folder)


def test_safetensors_come_before_a_pickle(official):
    folder, tensors = official
    write_official(folder, "mamba2attn", tensors, "safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert torch.equal(ophis.load(folder).lm_head.weight, tensors["lm_head.weight"])
