"""The published initial values, and that neither casts nor frameworks disturb them.

Distributions are tested by Kolmogorov and Smirnov's statistic on some thousand draws. The seed is fixed, so that a test
passes always or never; a sample of the right distribution fails at a probability of one in a thousand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ophis import ops
from ophis.layers import S4D, Mamba, Mamba2
from ophis.layers.ssm_parameters import SSMParameters

LAYERS: dict[str, Callable[..., SSMParameters]] = {
    "mamba": lambda **factory: Mamba(64, **factory),
    "mamba2": lambda **factory: Mamba2(64, d_state=8, headdim=16, learnable_init_states=True, **factory),
    "s4d": lambda **factory: S4D(64, d_state=8, **factory),
}
FLOAT32 = {  # by the path of the parameter: what stays float32 in half precision
    "mamba": {"A_log", "D", "dt_proj.bias"},
    "mamba2": {"A_log", "D", "dt_bias", "init_states"},
    "s4d": {"log_dt", "A_log", "A_imag", "B", "C", "D"},
}


def assert_distributed(sample: Tensor, distribution) -> None:
    p = scipy.stats.kstest(sample.detach().double().flatten().numpy(), distribution.cdf).pvalue
    assert p > 1e-3, f"p = {p:.1e}"


def uniform(low: float, high: float):
    return scipy.stats.uniform(low, high - low)


def test_mamba():
    layer = Mamba(1024, d_state=5, dt_rank=16)
    assert torch.equal(layer.A_log, torch.arange(1, 6).float().log().expand(2048, 5))
    assert torch.equal(layer.D, torch.ones(2048))
    assert_distributed(F.softplus(layer.dt_proj.bias), scipy.stats.loguniform(1e-3, 0.1))
    assert_distributed(layer.dt_proj.weight, uniform(-0.25, 0.25))
    for linear in (layer.in_proj, layer.x_proj, layer.out_proj):  # PyTorch's default
        bound = linear.in_features**-0.5
        assert_distributed(linear.weight, uniform(-bound, bound))
    assert_distributed(layer.conv1d.weight, uniform(-0.5, 0.5))
    assert layer.conv1d.bias is not None
    assert_distributed(layer.conv1d.bias, uniform(-0.5, 0.5))


def test_mamba_published_sizes():
    layer = Mamba(100)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "A_log": (200, 16),
        "D": (200,),
        "in_proj.weight": (400, 100),
        "conv1d.weight": (200, 1, 4),
        "conv1d.bias": (200,),
        "x_proj.weight": (7 + 2 * 16, 200),  # dt_rank "auto" is 100 / 16, rounded up
        "dt_proj.weight": (200, 7),
        "dt_proj.bias": (200,),
        "out_proj.weight": (100, 200),
    }


def test_mamba_step_options():
    layer = Mamba(1024, dt_rank=16, dt_init="constant", dt_scale=2.0, dt_min=0.01, dt_max=0.5)
    assert torch.equal(layer.dt_proj.weight, torch.full((2048, 16), 0.5))
    assert_distributed(F.softplus(layer.dt_proj.bias), scipy.stats.loguniform(0.01, 0.5))
    assert_distributed(Mamba(1024, dt_rank=4, dt_scale=0.5).dt_proj.weight, uniform(-0.25, 0.25))
    floored = F.softplus(Mamba(1024, dt_init_floor=0.05).dt_proj.bias)
    assert floored.min().item() == pytest.approx(0.05, rel=1e-5)
    assert_distributed(floored[floored > 0.0501], scipy.stats.loguniform(0.0501, 0.1))


def test_mamba2():
    layer = Mamba2(4096, d_state=4, headdim=4, ngroups=1)  # 2048 heads
    assert_distributed(layer.A_log.exp(), uniform(1, 16))
    assert_distributed(F.softplus(layer.dt_bias), scipy.stats.loguniform(1e-3, 0.1))
    assert torch.equal(layer.D, torch.ones(2048))
    assert_distributed(layer.conv1d.weight, uniform(-0.5, 0.5))
    assert layer.norm is not None
    assert torch.equal(layer.norm.weight, torch.ones(8192))


def test_mamba2_options():
    layer = Mamba2(
        4096,
        d_state=4,
        headdim=4,
        A_init_range=(2, 3),
        conv_init=0.1,
        dt_min=0.2,
        dt_max=0.3,
        D_has_hdim=True,
        learnable_init_states=True,
    )
    assert_distributed(layer.A_log.exp(), uniform(2, 3))
    assert_distributed(layer.conv1d.weight, uniform(-0.1, 0.1))
    assert_distributed(F.softplus(layer.dt_bias), scipy.stats.loguniform(0.2, 0.3))
    assert torch.equal(layer.D, torch.ones(8192))
    assert layer.init_states is not None
    assert torch.equal(layer.init_states, torch.zeros(2048, 4, 4))


def test_mamba2_published_sizes():
    layer = Mamba2(128)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "in_proj.weight": (2 * 256 + 2 * 128 + 4, 128),
        "conv1d.weight": (256 + 2 * 128, 1, 4),
        "conv1d.bias": (256 + 2 * 128,),
        "norm.weight": (256,),
        "out_proj.weight": (128, 256),
    }


@pytest.mark.parametrize("init", ("lin", "inv", "legs", "real"))
def test_s4d(init: str):
    layer = S4D(2048, d_state=8, init=init)
    dt, A, B, C = layer.system()
    expected, b = ops.s4d_init(init, 8)
    assert_distributed(dt, scipy.stats.loguniform(1e-3, 0.1))
    torch.testing.assert_close(A, expected.expand_as(A))
    torch.testing.assert_close(B, b.expand_as(B))
    assert_distributed(layer.D, scipy.stats.norm())
    for part in [C] if init == "real" else [C.real, C.imag]:
        assert_distributed(part, scipy.stats.norm(scale=1 if init == "real" else np.sqrt(0.5)))


def sensitive(name: str, layer: nn.Module) -> dict[str, Tensor]:
    found = {path: p for path, p in layer.named_parameters() if path in FLOAT32[name]}
    assert found.keys() == FLOAT32[name]
    return found


@pytest.mark.parametrize(
    "cast",
    [
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer.half(),
        lambda layer: layer.bfloat16().to("cpu").half(),
        lambda layer: copy.deepcopy(layer).to(device="cpu", dtype=torch.float16),
        lambda layer: nn.Sequential(nn.Linear(2, 2), layer).to(torch.bfloat16)[1],
    ],
    ids=["to bfloat16", "half", "twice", "copy", "inside another module"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_casts_to_half_precision_leave_the_recurrence_in_float32(name: str, cast: Callable[[nn.Module], nn.Module]):
    layer = LAYERS[name]()
    before = {path: p.detach().clone() for path, p in layer.named_parameters()}
    layer = cast(layer)
    for path, parameter in layer.named_parameters():
        if path in FLOAT32[name]:
            assert parameter.dtype == torch.float32, path
            assert torch.equal(parameter, before[path]), path
        else:
            assert parameter.dtype in (torch.bfloat16, torch.float16), path


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_made_in_half_precision_has_its_recurrence_in_float32(name: str):
    layer = LAYERS[name](dtype=torch.bfloat16)
    assert {p.dtype for p in sensitive(name, layer).values()} == {torch.float32}
    assert {p.dtype for path, p in layer.named_parameters() if path not in FLOAT32[name]} == {torch.bfloat16}
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    y, state = layer(x)
    assert y.dtype == torch.bfloat16
    assert {t.dtype.to_real() for t in state} == {torch.float32}


@pytest.mark.parametrize("name", LAYERS)
def test_double_precision_is_double_everywhere(name: str):
    for layer in (
        LAYERS[name]().double(),
        LAYERS[name](dtype=torch.float64),
        copy.deepcopy(LAYERS[name]()).to(torch.float64),
    ):
        assert {p.dtype for p in layer.parameters()} == {torch.float64}
        y, state = layer(torch.randn(2, 5, 64, dtype=torch.float64))
        assert y.dtype == torch.float64
        assert {t.dtype.to_real() for t in state} == {torch.float64}


@pytest.mark.parametrize("name", LAYERS)
def test_a_cast_takes_gradients_along(name: str):
    layer = LAYERS[name]()
    layer(torch.randn(2, 5, 64))[0].sum().backward()
    before = {path: p.grad.clone() for path, p in sensitive(name, layer).items() if p.grad is not None}
    layer.to(torch.bfloat16)
    for path, parameter in layer.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype, path
    for path, gradient in before.items():
        assert torch.equal(sensitive(name, layer)[path].grad, gradient), path


def steps(name: str, layer: nn.Module) -> Tensor:
    found = sensitive(name, layer)
    if name == "s4d":
        return found["log_dt"].exp()
    return F.softplus(found["dt_proj.bias" if name == "mamba" else "dt_bias"])


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_every_way_to_reset_gives_the_initial_values(name: str):
    """As frameworks do after a start on the meta device: the layer's own method, or every module's, parents first."""
    expected = sensitive(name, LAYERS[name]())
    for of_all in (False, True):
        layer = LAYERS[name](device="meta").to_empty(device="cpu")
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
        for module in layer.modules() if of_all else [layer]:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert all(p.isfinite().all() for p in layer.parameters())
        found = sensitive(name, layer)
        for path in ("D", "A_log") if name == "mamba" else ("D",) if name == "mamba2" else ("A_log", "A_imag", "B"):
            assert torch.equal(found[path], expected[path]), path
        dt = steps(name, layer)
        assert 0.9999e-3 < dt.min() <= dt.max() < 0.10001


@torch.no_grad()
def test_every_modules_own_reset_keeps_the_options():
    mamba = Mamba(64, dt_rank=16, dt_init="constant", dt_scale=2.0)
    mamba2 = Mamba2(64, d_state=8, headdim=16, conv_init=0.01)
    for layer in (mamba, mamba2):
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    assert torch.equal(mamba.dt_proj.weight, torch.full((128, 16), 0.5))
    assert mamba2.conv1d.weight.abs().max() <= 0.01
