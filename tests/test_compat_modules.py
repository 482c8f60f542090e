"""The modules of mamba_ssm: against transformers' models on the same weights, their caches, saving and decoding."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import ophis
from ophis import compat
from ophis.compat import InferenceParams, Mamba, Mamba2, MambaLMHeadModel
from ophis.compat.mamba_ssm.models.mixer_seq_simple import _init_weights, create_block
from ophis.compat.mamba_ssm.modules import mamba_simple
from ophis.compat.mamba_ssm.modules.block import Block
from ophis.compat.mamba_ssm.modules.mha import MHA
from ophis.compat.mamba_ssm.modules.mlp import GatedMLP
from ophis.compat.mamba_ssm.utils.generation import sample
from ophis.compat.mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf

VOCABULARY = 48
SSM = {"Mamba1": dict(d_state=4), "Mamba2": dict(layer="Mamba2", d_state=4, headdim=8)}
HYBRID = dict(attn_layer_idx=[1], attn_cfg=dict(causal=True, num_heads=4, head_dim=8, rotary_emb_dim=8, d_conv=3))

# The parameters of a layer in the published checkpoints.
NAMES = {
    "Mamba1": {"in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias",
               "A_log", "D", "out_proj.weight"},
    "Mamba2": {"in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight",
               "out_proj.weight"},
}  # fmt: skip


def config(kind: str, **changes) -> compat.MambaConfig:
    return compat.MambaConfig(**{**dict(d_model=32, n_layer=3, vocab_size=45, ssm_cfg=SSM[kind]), **changes})


def unsettle(model: nn.Module) -> None:
    """Moves what starts constant, which would hide a swapped name."""
    for name, parameter in model.named_parameters():
        if name.endswith(("D", "norm.weight", "norm_f.weight", "bias")):
            parameter.data += 0.2 * torch.randn_like(parameter)


@pytest.fixture(params=["Mamba1", "Mamba2"])
def pair(request):
    """(transformers' model, the one of mamba_ssm's names with its weights)."""
    sizes = dict(hidden_size=32, num_hidden_layers=3, vocab_size=VOCABULARY, state_size=4, tie_word_embeddings=True)
    if request.param == "Mamba1":
        theirs = MambaForCausalLM(MambaConfig(**sizes)).eval()
    else:
        heads = dict(num_heads=8, head_dim=8, n_groups=1, pad_token_id=0, eos_token_id=0)
        theirs = Mamba2ForCausalLM(Mamba2Config(**sizes, **heads)).eval()
    unsettle(theirs)
    ours = MambaLMHeadModel(config(request.param))
    tensors = {k.replace("embeddings", "embedding"): v for k, v in theirs.state_dict().items()}
    assert {k.removeprefix("backbone.layers.0.mixer.") for k in tensors if "layers.0.mixer" in k} == NAMES[
        request.param
    ]
    ours.load_state_dict(tensors)
    return theirs, ours


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 45, shape)


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.1e}"


@torch.no_grad()
def test_logits_are_transformers(pair):
    theirs, ours = pair
    ids = tokens(2, 11)
    expected = theirs(ids, use_cache=False).logits
    assert_same(ours(ids).logits, expected)
    assert_same(ours(ids, None, None, 2).logits, expected[:, -2:])
    assert_same(ours(ids, position_ids=ids, num_last_tokens=1)[0], expected[:, -1:])


@torch.no_grad()
def test_decoding_in_any_parts_is_one_pass(pair):
    theirs, ours = pair
    ids = tokens(2, 12)
    expected = theirs(ids, use_cache=False).logits
    for given in ({}, ours.allocate_inference_cache(2, 12)):
        params = InferenceParams(max_seqlen=12, max_batch_size=2, key_value_memory_dict=given)
        addresses = None
        for part in ids.split([2, 1, 1, 5, 1, 2], 1):  # the first shorter than the convolution
            logits = ours(part, inference_params=params).logits
            at, params.seqlen_offset = params.seqlen_offset, params.seqlen_offset + part.shape[1]
            assert_same(logits, expected[:, at : params.seqlen_offset])
            states = [state.data_ptr() for pair in params.key_value_memory_dict.values() for state in pair]
            assert addresses in (None, states)  # changed in place
            addresses = states
        # from the start again, over whatever the cache holds
        params.reset(12, 2)
        assert_same(ours(ids, inference_params=params).logits, expected)


def test_greedy_generation_is_transformers(pair):
    theirs, ours = pair
    ids = tokens(2, 3)
    options = dict(do_sample=False, max_new_tokens=9, eos_token_id=None, pad_token_id=0)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(ours.generate(ids, 12), expected)
    assert torch.equal(ours.generate(input_ids=ids, max_length=12, cg=True, top_k=1, temperature=0.7), expected)
    penalised = theirs.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=3.0, **options)
    assert torch.equal(ours.generate(ids, 12, repetition_penalty=3.0), penalised)


# Decoding, whatever the layers.


def lm(kind: str = "Mamba1", **changes) -> MambaLMHeadModel:
    torch.manual_seed(0)
    model = MambaLMHeadModel(config(kind, **changes))
    unsettle(model)
    return model


@torch.no_grad()
def test_generate_returns_what_was_asked_for(capsys):
    model, ids = lm(), tokens(2, 3)
    full = model(ids := torch.cat([ids, tokens(2, 5)], 1)).logits
    output = model.generate(ids[:, :3], 8, teacher_outputs=ids, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(output.sequences, ids)  # the teacher's
    assert_same(torch.stack(output.scores, 1), full[:, 2:-1])
    output = model.generate(ids[:, :3], 8, return_dict_in_generate=True, enable_timing=True)
    assert output.scores is None
    assert "Prompt processing + decoding time: " in capsys.readouterr().out
    assert model.generate(ids, 8).shape == (2, 9)  # one token at least
    assert model.generate(ids, 11, vocab_size=2).max() <= max(1, int(ids.max()))
    assert (model.generate(ids, 11, vocab_size=2)[:, 8:] < 2).all()


@torch.no_grad()
def test_generate_ends_when_all_have_ended():
    model, ids = lm(), tokens(2, 3)
    free = model.generate(ids, 12)
    one = free[:1]
    end = int(one[0, 6])
    first = (one[0, 3:] == end).nonzero()[0, 0] + 4
    assert torch.equal(model.generate(ids[:1], 12, eos_token_id=end), one[:, :first])
    only_one = next(int(token) for token in one[0, 3:] if token not in free[1])
    assert torch.equal(model.generate(ids, 12, eos_token_id=only_one), free)


def test_generate_streams():
    class Streamer:
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got.append(value)

        def end(self):
            self.ended = True

    streamer, ids = Streamer(), tokens(1, 3)
    output = lm().generate(ids, 7, streamer=streamer)
    assert torch.equal(torch.cat(streamer.got, 1), output)
    assert streamer.ended
    assert len(streamer.got) == 5


def test_sampling():
    logits = torch.tensor([[4.0, 3, 2, 1, 0], [0, 1, 2, 3, 4]]).repeat(400, 1)
    likely = logits.softmax(-1)

    def share(**options) -> Tensor:
        drawn = F.one_hot(sample(logits, **options), 5).double()
        return torch.stack([drawn[::2].mean(0), drawn[1::2].mean(0)])

    assert torch.equal(sample(logits), logits.argmax(-1))
    assert (share(top_k=0) - likely[:2]).abs().max() < 0.1
    assert (share(top_k=0, temperature=0.5) - (2 * logits[:2]).softmax(-1)).abs().max() < 0.1
    assert (share(top_k=2)[0, 2:] == 0).all()
    assert share(top_k=2)[0, 1] > 0.1
    assert (share(top_k=0, top_p=0.8)[1] > 0).tolist() == [False, False, False, True, True]
    assert (share(top_k=0, top_p=0.3)[1] > 0).tolist() == [False, False, False, False, True]
    assert (share(top_k=0, min_p=0.2)[0] > 0).tolist() == [True, True, False, False, False]


# Caches.


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
@pytest.mark.parametrize("l", [1, 3, 4, 9])
@torch.no_grad()
def test_the_cached_window_is_the_last_inputs(kind, l: int, device: str):
    options = dict(d_state=4, layer_idx=7, device=device, dtype=torch.float64)
    layer = kind(32, **options) if kind is Mamba else kind(32, headdim=8, ngroups=2, d_ssm=48, **options)
    u = torch.randn(2, l + 3, 32, dtype=torch.float64).to(device)
    expected = layer(u)
    inputs = F.linear(u, layer.in_proj.weight)  # x of [x, z], or xBC of [gate, value, z, xBC, dt]
    inputs = inputs[..., :64] if kind is Mamba else inputs[..., 2 * 16 + 48 : 2 * 16 + 48 + 48 + 2 * 2 * 4]
    inputs = F.pad(inputs.mT, (4, 0))
    params = InferenceParams(l + 3, 2)
    y = layer(u[:, :l], inference_params=params)
    assert_same(y, expected[:, :l], 1e-10)
    conv_state, ssm_state = params.key_value_memory_dict[7]
    assert_same(conv_state, inputs[..., l : l + 4], 1e-10)
    for t in range(l, l + 3):
        y, conv, ssm = layer.step(u[:, t : t + 1], conv_state, ssm_state)
        assert conv is conv_state
        assert ssm is ssm_state
        assert_same(y, expected[:, t : t + 1], 1e-10)
        assert_same(conv_state, inputs[..., t + 1 : t + 5], 1e-10)


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_caches_have_the_originals_shapes_and_dtypes(kind):
    layer = kind(32, d_state=4, layer_idx=0, dtype=torch.bfloat16, **({} if kind is Mamba else dict(headdim=8)))
    conv_state, ssm_state = layer.allocate_inference_cache(3, 100)
    assert conv_state.shape == (3, 64 if kind is Mamba else 72, 4)
    assert ssm_state.shape == ((3, 64, 4) if kind is Mamba else (3, 8, 8, 4))
    assert {conv_state.dtype, ssm_state.dtype} == {torch.bfloat16}
    assert {state.dtype for state in layer.allocate_inference_cache(3, 100, torch.float32)} == {torch.float32}
    u = torch.randn(3, 5, 32, dtype=torch.bfloat16)
    params = InferenceParams(9, 3, key_value_memory_dict={0: (conv_state, ssm_state)})
    assert layer(u, inference_params=params).dtype == torch.bfloat16
    params.seqlen_offset = 5
    y = layer(u[:, :1], inference_params=params)  # with gradients on: none stays in the cache
    assert y.requires_grad
    assert not conv_state.requires_grad
    assert not ssm_state.requires_grad


def test_mistakes_with_caches():
    u, params = torch.randn(2, 3, 32), InferenceParams(9, 2)
    with pytest.raises(ValueError, match="Mamba: to decode it needs a layer_idx"):
        Mamba(32)(u, inference_params=params)
    layer = Mamba2(32, headdim=8, layer_idx=0)
    layer(u, inference_params=params)
    with pytest.raises(ValueError, match="the cached state is of 2 sequences, the input of 1"):
        layer(u[:1], inference_params=params)
    with pytest.raises(ValueError, match="give their cu_seqlens as well"):
        layer(u, seq_idx=torch.zeros(2, 3, dtype=torch.int32), inference_params=params)
    with pytest.raises(NotImplementedError, match="leave out process_group"):
        Mamba2(32, headdim=8, process_group=object())


# Packed sequences.

LENGTHS = (3, 1, 6)


@pytest.mark.parametrize("given", ["seq_idx", "cu_seqlens", "both"])
@torch.no_grad()
def test_mamba2_keeps_packed_sequences_apart(given: str, device: str):
    layer = Mamba2(32, d_state=4, headdim=8, ngroups=2, device=device, dtype=torch.float64)
    u = torch.randn(1, 10, 32, dtype=torch.float64).to(device)
    expected = torch.cat([layer(part) for part in u.split(LENGTHS, 1)], 1)
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None].to(device)
    packed = {}
    if given != "cu_seqlens":
        packed["seq_idx"] = seq_idx.int()
    if given != "seq_idx":
        packed["cu_seqlens"] = torch.tensor([0, 3, 4, 10], dtype=torch.int32, device=device)
    assert_same(layer(u, **packed), expected, 1e-10)
    flat = layer(u[0], seqlen=10, **packed)
    assert_same(flat, expected[0], 1e-10)
    if given == "seq_idx":  # rows of their own
        rows = torch.cat([u, u.flip(1)])
        other = torch.cat([layer(part) for part in rows[1:].split([4, 6], 1)], 1)
        ids = torch.cat([seq_idx, torch.tensor([[2] * 4 + [3] * 6], device=device)])
        assert_same(layer(rows, seq_idx=ids), torch.cat([expected, other]), 1e-10)


@pytest.mark.parametrize("padding", [0, 5])
@torch.no_grad()
def test_packed_prompts_then_a_token_each(padding: int):
    model = lm("Mamba2").double()
    ids = tokens(1, 10)
    prompts = ids.split(LENGTHS, 1)
    following = tokens(3, 2)
    params = InferenceParams(12, 3)
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor([*LENGTHS, padding]))[None]
    seq_idx[seq_idx == 3] = -1
    packed = dict(seq_idx=seq_idx.int(), cu_seqlens=torch.tensor([0, 3, 4, 10], dtype=torch.int32))
    first = model(F.pad(ids, (0, padding)), inference_params=params, **packed).logits
    params.seqlen_offset = 1  # whatever, above 0
    then = [model(following[:, i : i + 1], inference_params=params).logits for i in range(2)]
    for i, prompt in enumerate(prompts):
        expected = model(torch.cat([prompt, following[i : i + 1]], 1)).logits[0]
        end = sum(LENGTHS[: i + 1])
        assert_same(first[0, end - len(prompt[0]) : end], expected[:-2], 1e-10)
        assert_same(torch.cat(then, 1)[i], expected[-2:], 1e-10)


# Blocks, attention, MLP.


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_block_is_its_formula(wide: bool, fused: bool):
    class Scaled(nn.Module):  # any mixer
        def forward(self, x, inference_params=None, factor=1):
            return factor * x

    x, before = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    for norm_cls in (nn.LayerNorm, compat.RMSNorm):
        block = Block(8, lambda width: Scaled(), lambda width: GatedMLP(width), norm_cls, fused, wide)
        y, residual = block(x, before, factor=3)
        s = 3 * block.norm(x + before)
        expected = x + before + s
        assert_same(residual, expected)
        assert_same(y, block.mlp(block.norm2(expected)))
        y, residual = block(x)
        assert_same(residual, x + block.norm(x))
        half, residual = block.bfloat16()(x.bfloat16())
        assert residual.dtype == (torch.float32 if wide else torch.bfloat16)
        assert half.dtype == torch.bfloat16
    plain = Block(8, lambda width: Scaled(), nn.Identity)
    assert plain.mlp is None
    assert_same(plain(x, before)[0], plain.norm(x + before))
    old = mamba_simple.Block(8, lambda width: Scaled(), nn.LayerNorm, residual_in_fp32=True)
    assert [*old.state_dict()] == ["norm.weight", "norm.bias"]

    class Halved(nn.Module):  # any norm
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x):
            return x / 2 * self.weight

    y, residual = Block(8, lambda width: Scaled(), nn.Identity, Halved, residual_in_fp32=wide)(x, before)
    assert_same(y, (x + before) / 2)
    with pytest.raises(TypeError, match="norm is nn.LayerNorm or RMSNorm, got Halved"):
        Block(8, lambda width: Scaled(), nn.Identity, Halved, fused_add_norm=True)


def test_mlp_rounds_its_width_up():
    assert GatedMLP(48).fc1.out_features == 2 * 128
    assert GatedMLP(100).fc1.out_features == 2 * 384
    mlp = GatedMLP(8, 130, 5, activation=torch.tanh, bias=True, multiple_of=4)
    x = torch.randn(3, 8)
    y, gate = (x @ mlp.fc1.weight.T + mlp.fc1.bias).split(132, -1)
    assert_same(mlp(x), (y * gate.tanh()) @ mlp.fc2.weight.T + mlp.fc2.bias)


@pytest.mark.parametrize("kind", ["Mamba1", "Mamba2"])
@torch.no_grad()
def test_hybrid_with_attention_and_mlps(kind: str):
    model = lm(kind, **HYBRID, d_intermediate=64, rms_norm=kind == "Mamba2").double()
    ids = tokens(2, 12)
    expected = model(ids).logits
    params = InferenceParams(12, 2)
    for part in ids.split([2, 1, 1, 5, 1, 2], 1):
        at, params.seqlen_offset = params.seqlen_offset, params.seqlen_offset + part.shape[1]
        past = InferenceParams(12, 2, at, key_value_memory_dict=params.key_value_memory_dict)
        assert_same(model(part, inference_params=past).logits, expected[:, at : params.seqlen_offset], 1e-10)
    kv, window = params.key_value_memory_dict[1]
    assert kv.shape == (2, 12, 2, 4, 8)
    assert window.shape == (2, 96, 3)


def test_attention_mistakes():
    options = dict(num_heads=4, layer_idx=0)
    for name, value in (("causal", False), ("mlp_dim", 8), ("rotary_emb_interleaved", True)):
        with pytest.raises(NotImplementedError, match="expected causal=True, mlp_dim=0 and"):
            MHA(32, **{**options, "causal": True, name: value})
    layer, x = MHA(32, causal=True, **options), torch.randn(2, 5, 32)
    with pytest.raises(ValueError, match="holds 4 positions of 2 sequences, expected room for 5 of 2"):
        layer(x, InferenceParams(4, 2))
    with pytest.raises(NotImplementedError, match="lengths_per_sample and batch_size_offset are not read"):
        layer(x, InferenceParams(9, 2, lengths_per_sample=torch.tensor([3, 4])))
    with pytest.raises(ValueError, match="needs a layer_idx"):
        MHA(32, 4, causal=True)(x, InferenceParams(9, 2))


def test_layers_have_the_originals_attributes_and_marks():
    mamba, mamba2 = Mamba(32, layer_idx=3), Mamba2(64, headdim=16, ngroups=2)
    found = {name: getattr(mamba, name) for name in ("d_model", "d_state", "d_conv", "expand", "d_inner", "dt_rank")}
    assert found == dict(d_model=32, d_state=16, d_conv=4, expand=2, d_inner=64, dt_rank=2)
    found = {name: getattr(mamba2, name) for name in ("d_state", "headdim", "nheads", "ngroups", "d_ssm", "d_inner")}
    assert found == dict(d_state=128, headdim=16, nheads=8, ngroups=2, d_ssm=128, d_inner=128)
    assert (mamba.use_fast_path, mamba.layer_idx, mamba2.chunk_size, mamba2.rmsnorm) == (True, 3, 256, True)
    assert mamba.dt_proj.bias._no_reinit
    assert all(p._no_weight_decay for p in (mamba.A_log, mamba.D, mamba2.A_log, mamba2.D, mamba2.dt_bias))
    steps = mamba.dt_proj.bias.clone()
    mamba.in_proj.weight.data.zero_()
    mamba.apply(lambda module: _init_weights(module, n_layer=4))
    assert torch.equal(mamba.dt_proj.bias, steps)  # not zeroed
    assert 0.9 * (64 * 4) ** -0.5 < mamba.out_proj.weight.abs().max() <= (64 * 4) ** -0.5
    assert not mamba.in_proj.weight.any()  # left alone


def test_create_block():
    block = create_block(32, 0, ssm_cfg=dict(layer="Mamba2", headdim=8), attn_layer_idx=[1], layer_idx=0, rms_norm=True)
    assert isinstance(block.mixer, Mamba2)
    assert isinstance(block.norm, compat.RMSNorm)
    assert block.layer_idx == block.mixer.layer_idx == 0
    block = create_block(32, 64, None, [1], dict(causal=True, num_heads=4), layer_idx=1, norm_epsilon=0.1)
    assert isinstance(block.mixer, MHA)
    assert (type(block.norm), block.norm.eps, block.mlp.fc2.in_features) == (nn.LayerNorm, 0.1, 128)
    with pytest.raises(ValueError, match="layer 'Mamba9', expected 'Mamba1' or 'Mamba2'"):
        create_block(32, 0, ssm_cfg=dict(layer="Mamba9"))


# Saved models.


@pytest.mark.parametrize("kind", ["Mamba1", "Mamba2", "hybrid"])
@torch.no_grad()
def test_saved_models_are_read_here_and_by_ophis_load(kind: str, tmp_path):
    model = lm("Mamba2", **HYBRID) if kind == "hybrid" else lm(kind, tie_embeddings=kind == "Mamba1")
    model.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pytorch_model.bin"]
    assert json.loads((folder / "config.json").read_text()) == vars(model.config)
    ids = tokens(2, 7)
    again = MambaLMHeadModel.from_pretrained(str(folder))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.lm_head.weight is again.backbone.embedding.weight) == (kind != "Mamba2")
    assert_same(ophis.load(folder)(ids).logits, model(ids).logits)
    if kind != "hybrid":
        assert again.backbone.layers[0].mixer.A_log._no_weight_decay
    narrow = MambaLMHeadModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert narrow.lm_head.weight.dtype == torch.bfloat16
    assert narrow.backbone.layers[0].mixer.A_log.dtype == torch.float32  # as it stays everywhere here
    assert_same(narrow(ids).logits.float(), model(ids).logits, 0.05)


def test_readers_of_saved_models(tmp_path):
    model = lm()
    model.save_pretrained(tmp_path)
    assert load_config_hf(tmp_path)["d_model"] == 32
    tensors = load_state_dict_hf(str(tmp_path), device="cpu")
    assert {k: v.tolist() for k, v in tensors.items()} == {k: v.tolist() for k, v in model.state_dict().items()}
    (tmp_path / "pytorch_model.bin").unlink()
    del tensors["lm_head.weight"]  # safetensors hold a tied head once
    save_file(tensors, tmp_path / "model.safetensors")
    ids = tokens(1, 5)
    assert torch.equal(MambaLMHeadModel.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    del tensors["backbone.norm_f.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"backbone.norm_f.weight\""):
        MambaLMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match="model_type 'mamba'; expected the layout of the published"):
        MambaLMHeadModel.from_pretrained(tmp_path)
