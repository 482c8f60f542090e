"""What `save_pretrained` writes: what transformers, vLLM, llama.cpp and mlx-lm read where they have the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import ophis
from ophis.models.language import LanguageBackbone
from ophis.training import byte_tokenizer

PURE = {
    "mamba": dict(pattern=["mamba"], mamba=dict(d_state=4)),
    "mamba2": dict(pattern=["mamba2"], mamba2=dict(headdim=8, d_state=8)),
    "falcon_mamba": dict(pattern=["mamba"], mamba=dict(d_state=4, norm_bcdt=True), tie_word_embeddings=False),
}
# What each reader takes from config.json without a default, or with one that is not the model's; by type.
COMMON = dict(
    architectures=list, model_type=str, vocab_size=int, pad_vocab_size_multiple=int, hidden_size=int,
    intermediate_size=int, expand=int, state_size=int, conv_kernel=int, num_hidden_layers=int, layer_norm_epsilon=float,
    use_bias=bool, use_conv_bias=bool, hidden_act=str, tie_word_embeddings=bool, time_step_rank=int, dtype=str,
    bos_token_id=int, eos_token_id=int, pad_token_id=int, residual_in_fp32=bool, use_cache=bool,
    rescale_prenorm_residual=bool,
)  # fmt: skip
KEYS = {
    "mamba": COMMON,
    "mamba2": {
        **COMMON,
        "num_heads": int,
        "head_dim": int,
        "n_groups": int,
        "chunk_size": int,
        "time_step_limit": list,
    },
    "falcon_mamba": {**COMMON, "mixer_rms_eps": float},
}
# Each has something that no model of transformers' has.
OTHER = {
    "hybrid": dict(pattern=["mamba2", "attention"], mamba2=dict(headdim=8), attention=dict(num_heads=4)),
    "two kinds": dict(pattern=["mamba2", "mamba"], mamba2=dict(headdim=8)),
    "attention": dict(pattern=["attention"], attention=dict(num_heads=4), intermediate_size=64),
    "s4d": dict(pattern=["s4d"]),
    "MLPs": dict(pattern=["mamba"], intermediate_size=64),
    "D per channel": dict(pattern=["mamba2"], mamba2=dict(headdim=8, D_has_hdim=True)),
    "no gated norm": dict(pattern=["mamba2"], mamba2=dict(headdim=8, rmsnorm=False)),
    "norm before the gate": dict(pattern=["mamba2"], mamba2=dict(headdim=8, norm_before_gate=True)),
    "initial states": dict(pattern=["mamba2"], mamba2=dict(headdim=8, learnable_init_states=True)),
    "two epsilons": dict(pattern=["mamba2"], mamba2=dict(headdim=8, norm_eps=1e-3)),
    "a part through the recurrence": dict(pattern=["mamba2"], mamba2=dict(headdim=8, d_ssm=32)),
    "one and a half times the width": dict(pattern=["mamba2"], mamba2=dict(headdim=8, expand=1.5)),
}


def build(**options) -> ophis.LanguageModel:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, vocab_size=50)
    model = ophis.LanguageModel(ophis.LanguageModelConfig(**{**sizes, **options})).eval()
    for p in model.parameters():  # nothing at its initial value of zeros or ones
        p.data += 0.1 * torch.randn_like(p)
    return model


def saved(folder: Path) -> dict:
    """config.json, which is strict JSON: readers in other languages know no Infinity."""
    return json.loads((folder / "config.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    tensors = actual.state_dict()
    assert tensors.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("kind", PURE)
@torch.no_grad()
def test_a_pure_model_is_saved_as_one_of_transformers(kind: str, tmp_path):
    model = build(**PURE[kind])
    model.save_pretrained(tmp_path)
    fields = saved(tmp_path)
    assert {key: type(fields.get(key)) for key in KEYS[kind]} == KEYS[kind]
    name = {"mamba": "Mamba", "mamba2": "Mamba2", "falcon_mamba": "FalconMamba"}[kind]
    assert (fields["model_type"], fields["architectures"]) == (kind, [f"{name}ForCausalLM"])
    assert fields["vocab_size"] == 56 == fields["pad_vocab_size_multiple"] * 7
    assert fields["intermediate_size"] == fields["expand"] * fields["hidden_size"]

    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["backbone.layers.0.mixer.conv1d.weight"].shape[1:] == (1, 4)
    assert ("lm_head.weight" in tensors) == (not model.config.tie_word_embeddings)
    assert tensors["backbone.embeddings.weight"].shape[0] == fields["vocab_size"]

    ids = torch.randint(50, (2, 9))
    expected = model(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__module__.startswith("transformers.models.")
    assert type(theirs).__name__ == f"{name}ForCausalLM"
    assert_same_weights(theirs, model)
    assert (theirs(ids, use_cache=False).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    for again in (ophis.load(tmp_path), ophis.LanguageModel.from_pretrained(tmp_path)):
        assert type(again) is ophis.LanguageModel
        assert_same_weights(again, model)
        assert torch.equal(again(ids).logits, expected)


@pytest.mark.parametrize("options", OTHER.values(), ids=OTHER)
@torch.no_grad()
def test_any_other_model_is_saved_as_our_own(options: dict, tmp_path):
    model = build(**options)
    model.save_pretrained(tmp_path)
    assert (saved(tmp_path)["model_type"], saved(tmp_path)["architectures"]) == ("ophis", ["LanguageModel"])
    ids = torch.randint(50, (2, 9))
    by_class = (ophis.LanguageModel.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path))
    for again in (ophis.load(tmp_path), *by_class):
        assert type(again) is ophis.LanguageModel
        assert_same_weights(again, model)
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_an_inner_width_that_is_no_multiple(tmp_path):
    """transformers' Mamba has any inner width, beside an integer for expand."""
    model = build(pattern=["mamba"], mamba=dict(expand=1.6))
    model.save_pretrained(tmp_path)
    assert (saved(tmp_path)["expand"], saved(tmp_path)["intermediate_size"]) == (2, 51)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert_same_weights(ophis.load(tmp_path), model)


@pytest.mark.parametrize(
    ("inner", "width"), [(inner, width) for width in (7, 37, 49, 768) for inner in (width + 1, 58)]
)
def test_every_inner_width_is_read_back(inner: int, width: int):
    fields = MambaConfig(hidden_size=width, intermediate_size=inner).to_dict()
    config = ophis.LanguageModelConfig(**ophis.models.config.arguments(fields))
    assert int(config.options("mamba")["expand"] * width) == inner


def test_keys_of_published_folders():
    """The config.json of state-spaces/mamba-*-hf and tiiuae/falcon-mamba-7b have more than transformers' own keys."""
    mamba = {
        "architectures": ["MambaForCausalLM"], "d_inner": 1536, "d_model": 768, "n_layer": 24, "ssm_cfg": {},
        "fused_add_norm": True, "rms_norm": True, "conv_kernel": 4, "expand": 2, "hidden_size": 768,
        "intermediate_size": 1536, "model_type": "mamba", "num_hidden_layers": 24, "pad_vocab_size_multiple": 8,
        "state_size": 16, "time_step_rank": 48, "torch_dtype": "float32", "vocab_size": 50280, "use_mambapy": False,
        "transformers_version": "4.39.0.dev0",
    }  # fmt: skip
    ours, preset = ophis.LanguageModelConfig(**ophis.models.config.arguments(mamba)), ophis.preset("mamba-130m")
    assert (ours.mixers, ours.vocab_size, ours.hidden_size) == (preset.mixers, preset.vocab_size, preset.hidden_size)
    assert ours.changed_options("mamba") == {}
    falcon = {
        "architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "eos_token_id": 11,
        "expand": 16, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 8192, "layer_norm_epsilon": 1e-05,
        "mixer_rms_eps": 1e-06, "model_type": "falcon_mamba", "num_hidden_layers": 64, "pad_token_id": 11,
        "state_size": 16, "tie_word_embeddings": False, "time_step_rank": 256, "torch_dtype": "bfloat16",
        "use_falcon_mambapy": False, "vocab_size": 65024,
    }  # fmt: skip
    ours = ophis.LanguageModelConfig(**ophis.models.config.arguments(falcon))
    assert ours.changed_options("mamba") == {"norm_bcdt": True}
    assert (ours.options("mamba")["expand"], ours.eos_token_id, ours.tie_word_embeddings) == (2, 11, False)


def test_initial_values_that_transformers_has_not_are_kept(tmp_path):
    options = dict(headdim=8, A_init_range=[1, 4], conv_init=0.25, dt_min=0.01)
    build(pattern=["mamba2"], mamba2=options, initializer_range=0.05).save_pretrained(tmp_path)
    assert saved(tmp_path)["model_type"] == "mamba2"
    config = ophis.LanguageModelConfig.from_pretrained(tmp_path)
    assert {key: config.options("mamba2")[key] for key in options} == options
    assert config.initializer_range == 0.05


def test_step_limits_are_finite_numbers(tmp_path):
    build(pattern=["mamba2"], mamba2=dict(headdim=8)).save_pretrained(tmp_path / "none")
    assert saved(tmp_path / "none")["time_step_limit"] == [0.0, torch.finfo(torch.float32).max]
    assert ophis.load(tmp_path / "none").backbone.layers[0].mixer.dt_limit == (0.0, float("inf"))
    build(pattern=["mamba2"], mamba2=dict(headdim=8, dt_limit=(0.01, 0.2))).save_pretrained(tmp_path / "some")
    assert saved(tmp_path / "some")["time_step_limit"] == [0.01, 0.2]
    assert ophis.load(tmp_path / "some").backbone.layers[0].mixer.dt_limit == (0.01, 0.2)


def test_a_resized_vocabulary(tmp_path):
    """llama.cpp rounds vocab_size up to a multiple of pad_vocab_size_multiple, or of 8 or 16 where there is none."""
    model = build(**PURE["mamba2"])
    model.resize_token_embeddings(61)
    model.save_pretrained(tmp_path)
    assert (saved(tmp_path)["vocab_size"], saved(tmp_path)["pad_vocab_size_multiple"]) == (61, 1)
    assert_same_weights(ophis.load(tmp_path), model)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_the_backbone_alone(tmp_path):
    backbone = build(**PURE["mamba2"]).backbone
    backbone.save_pretrained(tmp_path)
    assert saved(tmp_path)["architectures"] == ["Mamba2Model"]
    assert_same_weights(AutoModel.from_pretrained(tmp_path), backbone)
    assert_same_weights(LanguageBackbone.from_pretrained(tmp_path), backbone)


class WithAnotherHead(ophis.LanguageModel):
    pass


def test_a_head_that_transformers_has_not(tmp_path):
    WithAnotherHead(build(**PURE["mamba"]).config).save_pretrained(tmp_path)
    assert (saved(tmp_path)["model_type"], saved(tmp_path)["architectures"]) == ("ophis", ["WithAnotherHead"])


def test_a_configuration_of_no_model(tmp_path):
    config = ophis.LanguageModelConfig(**PURE["mamba"])
    config.save_pretrained(tmp_path)
    assert saved(tmp_path)["model_type"] == "ophis"
    assert ophis.LanguageModelConfig.from_pretrained(tmp_path).mixers == config.mixers


def test_saving_where_the_weights_were_read_from(tmp_path):
    model = build(**PURE["mamba"])
    model.save_pretrained(tmp_path)
    again = ophis.load(tmp_path)  # its memory is the file's
    again.save_pretrained(tmp_path)
    assert_same_weights(again, model)
    assert_same_weights(ophis.load(tmp_path), model)


def test_half_precision(tmp_path):
    build(**PURE["mamba2"]).bfloat16().save_pretrained(tmp_path)
    assert saved(tmp_path)["dtype"] == "bfloat16"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    for again in (ophis.load(tmp_path), ophis.LanguageModel.from_pretrained(tmp_path)):
        mixer = again.backbone.layers[0].mixer
        assert (mixer.in_proj.weight.dtype, mixer.A_log.dtype) == (torch.bfloat16, torch.float32)


def test_generation_settings_come_back(tmp_path):
    model = build(**PURE["mamba"])
    model.generation_config.eos_token_id = [3, 7]
    model.save_pretrained(tmp_path)
    again = ophis.load(tmp_path)
    assert again.generation_config.eos_token_id == [3, 7]
    assert again.name_or_path == again.config.name_or_path == str(tmp_path)  # which an adapter saved later names


def test_the_tokenizer_beside_it_is_read_as_it_is(tmp_path):
    """transformers has a class of tokenizers for model_type mamba, GPT-NeoX's; it must not be taken for these files."""
    build(**{**PURE["mamba2"], "vocab_size": 257}).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The  quick,\n\n don't", "über 日本 🙂", "fin<|endoftext|>"):
        assert again(text).input_ids == tokenizer(text).input_ids
        assert again.decode(again(text).input_ids) == text


def test_transformers_own_classes_stay_registered():
    assert type(AutoConfig.for_model("mamba")) is MambaConfig
    assert type(AutoConfig.for_model("mamba2")) is Mamba2Config
    with torch.device("meta"):
        sizes = dict(hidden_size=32, num_hidden_layers=1, vocab_size=8)
        assert type(AutoModelForCausalLM.from_config(MambaConfig(**sizes))) is MambaForCausalLM
        mamba2 = Mamba2Config(**sizes, num_heads=4, head_dim=16, n_groups=1, pad_token_id=0, eos_token_id=0)
        assert type(AutoModelForCausalLM.from_config(mamba2)) is Mamba2ForCausalLM


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            "it has model_type 'gpt2', expected one of 'ophis', 'mamba', 'mamba2', 'falcon_mamba'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; the published blocks, and these, use 'silu'"),
        ({"hidden_size": "32"}, "Validation error for field 'hidden_size': TypeError: .* expected int, got str"),
        ({"num_heads": 3}, r"hidden_size \* expand \(64\) must equal num_heads \* head_dim \(24\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("read", [ophis.load, ophis.LanguageModel.from_pretrained], ids=["load", "from_pretrained"])
def test_configurations_that_cannot_be_read(read, changes: dict, message: str, tmp_path):
    build(**PURE["mamba2"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**saved(tmp_path), **changes}))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
