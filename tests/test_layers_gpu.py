"""Whole layers on a GPU: as far from float64 as plain PyTorch at most, and gradients written where they belong."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from test_ops_split import in_place
from torch import Tensor, nn

from ophis.layers import Mamba, Mamba2
from ophis.ops import use_backend
from ophis.testing import assert_close

# autograd's thread meets cuBLAS before anything else of CUDA's, where PyTorch sets the context up and says so
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")]

DEVICE = "cuda"
rows: Any = sys.modules["ophis.ops.split"]
# And which slices of the layer's rows are written in place, going backward: in Mamba-2 all but the steps, two bytes a
# head.
LAYERS = {
    "Mamba": (lambda **to: Mamba(128, **to), [[True, True]]),
    "Mamba-2": (lambda **to: Mamba2(256, d_state=64, **to), [[True] * 3, [True, True, False]]),
    "Mamba-2, n = 256": (lambda **to: Mamba2(256, d_state=256, **to), [[True] * 3, [True, True, False]]),
    "Mamba-2, two groups": (lambda **to: Mamba2(256, d_state=64, ngroups=2, **to), [[True] * 3, [True, True, False]]),
}


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    x = x.detach().requires_grad_()
    y, _ = layer(x)
    torch.manual_seed(1)
    weight = torch.randn(y.shape, device=y.device).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], weight)]


@pytest.mark.parametrize("name", LAYERS)
def test_as_near_as_plain_pytorch(name: str):
    make, _ = LAYERS[name]
    torch.manual_seed(0)
    layer = make(device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(2, 300, layer.d_model, device=DEVICE, dtype=torch.bfloat16)
    with use_backend("torch"):
        plain = gradients(layer, x)
        expected = gradients(copy.deepcopy(layer).double(), x.double())
    names = ("y", "x", *(name for name, _ in layer.named_parameters()))
    for what, actual, exact, other in zip(names, gradients(layer, x), expected, plain, strict=True):
        assert_close(actual, exact, other, dtype=torch.bfloat16, name=what)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_written_side_by_side(name: str, monkeypatch):
    make, expected_in_place = LAYERS[name]
    torch.manual_seed(0)
    layer = make(device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(2, 300, layer.d_model, device=DEVICE, dtype=torch.bfloat16)
    expected = gradients(layer, x)  # too few to pay
    seen = in_place(monkeypatch)
    monkeypatch.setattr(rows, "LARGE", 0)
    for one, other in zip(gradients(layer, x), expected, strict=True):
        assert torch.equal(one, other)
    assert seen == expected_in_place
