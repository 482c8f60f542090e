"""Whole layers: projections, convolution, recurrence, gate and norm, beside mamba-ssm's with the same weights.

b batch  l length  h heads  p head width  n state size  g groups of heads
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ophis import layers
from ophis.bench import tables, timing
from ophis.bench.peers import imported
from ophis.bench.shapes import FORWARD, TRAINING, size
from ophis.bench.tables import Least, Note
from ophis.testing import TOLERANCES, error

# name -> (the layer, mamba-ssm's)
LAYERS: dict[str, tuple[type[nn.Module], str]] = {
    "mamba": (layers.Mamba, "mamba_ssm.modules.mamba_simple:Mamba"),
    "mamba2": (layers.Mamba2, "mamba_ssm.modules.mamba2:Mamba2"),
}
AGREE = 8  # times the floor in TOLERANCES: so far may two results in bfloat16 be from each other


class Shape(NamedTuple):
    """One call of a layer, of its default sizes but for the width."""

    layer: str
    batch: int
    length: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length} x {self.width}"


# 32,768 tokens at the width of a model of 370 million parameters, as the operators' shapes; and of 2.8 billion.
SIZES = [(16, 2048, 1024), (1, 32768, 1024), (1, 2048, 1024), (4, 2048, 2560)]
QUICK = [(2, 64, 32)]


def shapes_of(layer: str, quick: bool = False) -> list[Shape]:
    return [Shape(layer, *sizes) for sizes in (QUICK if quick else SIZES)]


class Side:
    """One layer and its input."""

    def __init__(self, layer: nn.Module, x: Tensor):
        self.layer, self.x = layer, x
        self.leaves = [x.detach().requires_grad_(), *layer.parameters()]
        self.weight = torch.randn_like(x)  # the gradient of what comes out

    def output(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.output(self.x)

    def training(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.output(self.leaves[0]), self.leaves, self.weight)

    def call(self, direction: str) -> Callable[[], Any]:
        return self.forward if direction == FORWARD else self.training


def run(
    name: str, device: torch.device, *, quick: bool = False, only: str = "", dtype: torch.dtype = torch.bfloat16
) -> Iterator[dict[str, Any] | Note]:
    """The rows of a layer's table as they are measured, and what else there is to tell.

    Args:
        name: of `LAYERS`.
        device: where.
        quick: tiny shapes, to see that it works.
        only: shapes with this in what they are called.
        dtype: of the input and of weights, but for those that a layer keeps in float32.
    """
    limits = timing.limits(device, quick)
    of_ours, of_theirs = LAYERS[name]
    theirs, reason = imported(of_theirs)
    if theirs is None:
        yield Note(f"mamba-ssm {reason}: its rows are left out")
    for shape in shapes_of(name, quick):
        if only in str(shape):
            yield from _measure(shape, device, dtype, of_ours, theirs, limits, quick)


def _measure(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    of_ours: type[nn.Module],
    of_theirs: type[nn.Module] | None,
    limits: timing.Limits,
    quick: bool,
) -> Iterator[dict[str, Any] | Note]:
    torch.manual_seed(0)
    ours: Any = of_ours(shape.width, device=device, dtype=dtype)
    x = torch.randn(shape.batch, shape.length, shape.width, device=device, dtype=dtype)
    sides = {"ophis": Side(ours, x)}
    if of_theirs is not None:
        theirs = of_theirs(shape.width, device=device, dtype=dtype)
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())  # which keeps fewer parameters in float32
        sides["mamba-ssm"] = Side(theirs, x)
        try:
            off = error(sides["mamba-ssm"].forward().float(), sides["ophis"].forward().float())
        except Exception as failed:  # of any kind: it is somebody else's code
            del sides["mamba-ssm"]
            text = str(failed).strip().partition(chr(10))[0]
            yield Note(f"{shape}: mamba-ssm fails: {type(failed).__name__}: {text}")
        else:
            if not off <= AGREE * TOLERANCES[dtype]:
                yield Note(f"{shape}: ophis and mamba-ssm differ by {off:.1e}")
    columns = {
        "op": shape.layer,
        "case": "layer",
        "batch": shape.batch,
        "length": shape.length,
        "d": shape.width,
        "n": ours.d_state,
        "w": "",
        "dtype": str(dtype).removeprefix("torch."),
    }
    for direction in (FORWARD, TRAINING):
        calls = {name: side.call(direction) for name, side in sides.items()}
        for call in calls.values():
            call()
        yield from tables.timed(
            {**columns, "direction": direction},
            calls,
            least(ours, x, direction),
            device,
            limits,
            ours=["ophis"],
            same=["mamba-ssm"],
            quick=quick,
        )


def least(layer: Any, x: Tensor, direction: str) -> Least:
    """Input and weights read once, the output written; backward: those and the output's gradient read, gradients
    written. Every linear layer's products, with two more each backward, one for the gradient of each factor."""
    tokens = x.shape[0] * x.shape[1]
    weights = sum(map(size, layer.parameters()))
    flops = sum(2 * tokens * part.weight.numel() for part in layer.modules() if isinstance(part, nn.Linear))
    if isinstance(layer, layers.Mamba2):
        h, p, n, g = layer.heads, layer.headdim, layer.d_state, layer.ngroups
        flops += tokens * (4 * n * p * h + 2 * 64 * (p * h + n * g))  # as `ophis.bench.shapes.products`
        each = 34 * h + layer.conv_dim + layer.d_ssm  # decays and softplus; the convolution's activation; the gate's
    else:
        each = layer.d_inner * (layer.d_state + 3)
    if direction == FORWARD:
        return Least(2 * size(x) + weights, tokens * each, flops)
    return Least(5 * size(x) + 3 * weights, 2 * tokens * each, 3 * flops)
