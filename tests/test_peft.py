"""PEFT's adapters and quantised linear layers on every projection."""

from __future__ import annotations

import copy
import sys

import peft.utils.constants
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ophis
from ophis.models import LanguageModelForEmbedding, LanguageModelForSequenceClassification
from ophis.models.adapters import ADAPTER_TARGETS, register_adapter_targets
from tiny_models import PATTERNS, build, close, config, tokens

# PEFT uses names that transformers is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")

IDS = tokens(2, 20)
# What each kind of layer has of them.
PROJECTIONS = {
    "mamba": {"in_proj", "x_proj", "dt_proj", "out_proj"},
    "mamba2": {"in_proj", "out_proj"},
    "mamba2 with MLPs": {"in_proj", "out_proj", "fc1", "fc2"},
    "hybrid": {"in_proj", "x_proj", "dt_proj", "out_proj"},
    "transformer++": {"in_proj", "out_proj", "fc1", "fc2"},
    "s4d": {"output_linear", "fc1", "fc2"},
}


def adapted(model: ophis.LanguageModel, **options) -> nn.Module:
    """With adapters that are not zero at the start, as PEFT's are."""
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, **options))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped.eval()


def untrained(model: nn.Module) -> list[str]:
    """Trainable parameters that the last backward pass did not reach."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    return [n for n, p in trained if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("name", PATTERNS)
def test_lora_without_targets_reaches_every_projection(name: str):
    model = build(name)
    wrapped = adapted(model)
    found = {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in wrapped.named_parameters() if "lora_A" in n}
    assert found == PROJECTIONS[name]
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    adapters = [n for n, _ in wrapped.named_parameters() if "lora_A" in n]
    assert len(adapters) == len(linears)
    output = wrapped(IDS, labels=IDS)
    assert (output.logits - model(IDS).logits).abs().max() > 0.01
    output.loss.backward()
    assert untrained(wrapped) == []


@pytest.mark.parametrize(("name", "target"), [(n, t) for n in PATTERNS for t in sorted(PROJECTIONS[n])])
def test_an_adapter_on_one_projection_alone_counts(name: str, target: str):
    """Were a raw weight read anywhere, the adapter on it would do nothing, in silence."""
    model = build(name).double()
    wrapped = adapted(model, target_modules=[target])
    output = wrapped(IDS, labels=IDS)
    assert (output.logits - model(IDS).logits).abs().max() > 1e-7
    output.loss.backward()
    assert untrained(wrapped) == []


@pytest.mark.parametrize("name", PATTERNS)
def test_merging_gives_the_same_logits(name: str):
    wrapped = adapted(build(name).double())
    with torch.no_grad():
        expected = wrapped(IDS).logits
        merged = wrapped.merge_and_unload()
        assert type(merged) is ophis.LanguageModel
        close(merged(IDS).logits, expected)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in build(name).named_parameters()}


def test_generation_and_saving_with_an_adapter(tmp_path):
    model = build("hybrid", eos_token_id=None, pad_token_id=None)
    model.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    wrapped = adapted(model)
    options = dict(input_ids=IDS, max_new_tokens=6, do_sample=False)
    written = wrapped.generate(**options)
    assert torch.equal(written, wrapped.generate(use_cache=False, **options))
    assert torch.equal(written, wrapped.generate(prefill_chunk_size=6, **options))
    wrapped.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(again(IDS).logits, wrapped(IDS).logits)


def test_packed_documents_stay_apart_under_adapters():
    wrapped = adapted(build("hybrid").double())
    parts = [tokens(1, 7), tokens(1, 4, seed=2)]
    packed = wrapped(torch.cat(parts, 1), cu_seq_lens_q=torch.tensor([0, 7, 11], dtype=torch.int32)).logits
    for found, part in zip(packed.split([7, 4], 1), parts, strict=True):
        close(found, wrapped(part).logits)


def test_checkpointing_of_activations_with_adapters():
    wrapped = adapted(build("hybrid")).train()
    gradients = []
    for enabled in (False, True):
        if enabled:
            base = wrapped.get_base_model()
            getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
            base.enable_input_require_grads()
        wrapped.zero_grad()
        wrapped(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_convolution_is_trained_whole():
    """It has four weights a channel; PEFT refuses a rank that is no multiple of the channels, and says so."""
    model = build("hybrid")
    wrapped = adapted(model, modules_to_save=["conv1d"])
    wrapped(IDS, labels=IDS).loss.backward()
    assert untrained(wrapped) == []
    assert sum("conv1d.modules_to_save" in n for n, p in wrapped.named_parameters() if p.requires_grad) == 3 * 2
    expected = wrapped(IDS).logits
    torch.testing.assert_close(wrapped.merge_and_unload()(IDS).logits, expected)
    with pytest.raises(ValueError, match="rank is divisible by groups"), pytest.warns(UserWarning, match="groups > 1"):
        adapted(model, target_modules=["conv1d"])


def test_heads_take_adapters_and_train_their_own_matrix():
    torch.manual_seed(0)
    classifier = LanguageModelForSequenceClassification(config("hybrid", num_labels=3))
    wrapped = get_peft_model(classifier, LoraConfig(task_type=TaskType.SEQ_CLS, r=4))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    wrapped(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    assert untrained(wrapped) == []
    assert any("score" in name for name, p in wrapped.named_parameters() if p.requires_grad)
    embedder = LanguageModelForEmbedding(config("hybrid"))
    before = embedder(IDS).embeddings
    wrapped = get_peft_model(embedder, LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4))
    assert torch.equal(wrapped(input_ids=IDS).embeddings, before)  # adapters begin as nothing


def test_defaults_are_entered_when_peft_asks_for_them(monkeypatch):
    """Whichever of the two was imported first, and without importing PEFT for it."""
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.delitem(table, "ophis", raising=False)
    wrapped = get_peft_model(build("mamba2"), LoraConfig())
    assert wrapped.peft_config["default"].target_modules == set(ADAPTER_TARGETS)
    monkeypatch.setitem(table, "ophis", ["in_proj"])  # someone's own choice stays
    assert get_peft_model(build("mamba2"), LoraConfig()).peft_config["default"].target_modules == {"in_proj"}
    monkeypatch.delitem(sys.modules, "peft.utils.constants")
    register_adapter_targets()
    assert "peft.utils.constants" not in sys.modules


class QuantisedLinear(nn.Linear):
    """An 8-bit linear layer, as bitsandbytes and its like have them: the parameter is of no use by itself."""

    @classmethod
    def of(cls, linear: nn.Linear) -> QuantisedLinear:
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        layer.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        layer.register_buffer("scale", scale)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return layer

    def dequantised(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.dequantised(), self.bias)


def quantise(model: nn.Module) -> nn.Module:
    """Every linear layer of every block replaced, dt_proj as well."""
    for parent in list(model.backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, QuantisedLinear.of(child))
    return model


@pytest.mark.parametrize("name", PATTERNS)
def test_quantised_layers_are_called(name: str):
    quantised = quantise(build(name))
    rounded = build(name)
    for path, module in quantised.named_modules():
        if isinstance(module, QuantisedLinear):
            rounded.get_submodule(path).weight.data = module.dequantised()
    torch.testing.assert_close(quantised(IDS).logits, rounded(IDS).logits)
    options = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(quantised.generate(IDS, **options), rounded.generate(IDS, **options))


@pytest.mark.parametrize("name", PATTERNS)
def test_adapters_on_quantised_layers_learn(name: str):
    model = quantise(build(name))
    wrapped = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=4))
    before = [p.clone() for n, p in wrapped.named_parameters() if not p.requires_grad]
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = wrapped(IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert untrained(wrapped) == []
    assert losses[-1] < losses[0] - 0.3
    frozen = [p for n, p in wrapped.named_parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
