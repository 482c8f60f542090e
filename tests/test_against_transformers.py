"""The language model against transformers' Mamba family on the same random weights, through saved folders.

The oracle is transformers' full forward on the CPU. Its cache is not one: there, a chunk after a cached prompt starts
Mamba-1's scan from zeros.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

import ophis

MAMBA = {
    "default": dict(),
    "odd sizes": dict(hidden_size=37, state_size=5, time_step_rank=3, vocab_size=61),
    "one state": dict(hidden_size=24, state_size=1, num_hidden_layers=1),
    "biases": dict(use_bias=True, hidden_size=40, conv_kernel=3),
    "no conv bias": dict(use_conv_bias=False, conv_kernel=2, expand=3),
    "untied": dict(tie_word_embeddings=False, state_size=9, hidden_size=50, residual_in_fp32=False),
    "intermediate size": dict(intermediate_size=72, hidden_size=48, layer_norm_epsilon=1e-3),
}
MAMBA2 = {
    "default": dict(num_heads=8, head_dim=16, n_groups=1),
    "groups": dict(num_heads=8, head_dim=16, n_groups=4, state_size=11),
    "odd sizes": dict(hidden_size=35, num_heads=10, head_dim=7, n_groups=2, state_size=13, vocab_size=61),
    "one head": dict(hidden_size=24, num_heads=1, head_dim=48, n_groups=1, chunk_size=8, num_hidden_layers=1),
    "biases": dict(num_heads=16, head_dim=8, n_groups=2, use_bias=True, conv_kernel=3),
    "no conv bias": dict(num_heads=4, head_dim=48, expand=3, n_groups=1, use_conv_bias=False, conv_kernel=2),
    "step limits": dict(num_heads=8, head_dim=16, n_groups=1, time_step_limit=(0.01, 0.05), tie_word_embeddings=True),
}
FALCON_MAMBA = {
    "default": dict(),
    "epsilons": dict(mixer_rms_eps=1e-2, layer_norm_epsilon=1e-3, tie_word_embeddings=False),
    "odd sizes": dict(hidden_size=37, state_size=5, time_step_rank=3, vocab_size=61, use_bias=True),
}
KINDS = {"mamba": MAMBA, "mamba2": MAMBA2, "falcon_mamba": FALCON_MAMBA}
CASES = [(kind, name, options) for kind, cases in KINDS.items() for name, options in cases.items()]
LENGTHS = (1, 2, 3, 257)

# Up to 5.17 at least, transformers took the gated norm over all groups at once, which no published layer does.
GROUPED_NORM = "group_size" in inspect.signature(MambaRMSNormGated).parameters


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}", scope="module")
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from the folder it saved)."""
    kind, _, options = request.param
    if options.get("n_groups", 1) > 1 and not GROUPED_NORM:
        pytest.skip("this version of transformers does not normalise by groups")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 16, **options}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    theirs = AutoModelForCausalLM.from_config(config)
    for name, parameter in theirs.named_parameters():  # what starts constant would hide a swapped name
        if name.endswith(("D", "norm.weight", "norm_f.weight", "bias")):
            parameter.data += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(folder)
    return theirs.eval(), ophis.load(folder)


def tokens(model, length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.manual_seed(length))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"relative error {error:.1e}"


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_logits(pair, length: int):
    theirs, ours = pair
    ids = tokens(theirs, length)
    assert_same(ours(ids).logits, theirs(ids, use_cache=False).logits)


@torch.no_grad()
def test_prompt_then_cached_decoding(pair):
    theirs, ours = pair
    ids = tokens(theirs, 70)
    expected = theirs(ids, use_cache=False).logits
    state, logits = None, []
    for part in (ids[:, :1], ids[:, 1:3], ids[:, 3:60], *ids[:, 60:].split(1, 1)):
        output = ours(part, past_key_values=state)
        state = output.past_key_values
        logits.append(output.logits)
    assert_same(torch.cat(logits, 1), expected)


def test_loss_and_gradients(pair):
    theirs, ours = pair
    ids = tokens(theirs, 65)
    losses = [model(ids, labels=ids).loss for model in (theirs, ours)]
    assert_same(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    scale = max(g.abs().max() for g in expected.values())
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - expected[name]).abs().max()
        # Within 1e-5 of the largest gradient, or 1e-4 of its own.
        assert error < max(1e-5 * scale, 1e-4 * expected[name].abs().max()), name
    theirs.zero_grad()
    ours.zero_grad()


@torch.no_grad()
def test_greedy_text(pair):
    theirs, ours = pair
    ids = tokens(theirs, 9)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = theirs.generate(ids, use_cache=False, **options)
    assert torch.equal(ours.generate(ids, **options), expected)


@pytest.mark.parametrize("read", [ophis.load, ophis.LanguageModel.from_pretrained], ids=["load", "from_pretrained"])
@torch.no_grad()
def test_a_folder_saved_here_is_one_of_theirs(pair, read, tmp_path):
    """theirs -> ours -> theirs: the same class, configuration and bits."""
    theirs, ours = pair
    read(ours.name_or_path).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(theirs)
    expected, actual = theirs.state_dict(), again.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    ids = tokens(theirs, 9)
    assert_same(again(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits)
    before, after = theirs.config.to_dict(), again.config.to_dict()
    # Where it is, how it is computed, and what other readers of the folder ask for.
    added = {"_name_or_path", "chunk_size", *({"pad_vocab_size_multiple", "intermediate_size"} - before.keys())}
    if before.get("time_step_limit") == [0.0, float("inf")]:
        before["time_step_limit"] = [0.0, torch.finfo(torch.float32).max]  # JSON has no infinity
    assert {k: v for k, v in after.items() if k not in added} == {k: v for k, v in before.items() if k not in added}
    once_more = ophis.load(tmp_path)
    assert all(torch.equal(once_more.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    once_more.config.name_or_path = ours.config.name_or_path
    assert once_more.config == ours.config


@torch.no_grad()
def test_published_sizes_have_the_published_shapes():
    """The 130M presets against transformers' models of those configurations, shape by shape."""
    with torch.device("meta"):
        mamba = MambaForCausalLM(MambaConfig(num_hidden_layers=24))
        mamba2 = Mamba2ForCausalLM(Mamba2Config(vocab_size=50288, hidden_size=768, num_hidden_layers=24, num_heads=24,
                                                n_groups=1, tie_word_embeddings=True))  # fmt: skip
        for name, theirs in (("mamba-130m", mamba), ("mamba2-130m", mamba2)):
            ours = ophis.LanguageModel(ophis.preset(name))
            assert {k: v.shape for k, v in ours.state_dict().items()} == {
                k: v.shape for k, v in theirs.state_dict().items()
            }
