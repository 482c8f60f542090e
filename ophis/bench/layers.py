"""Whole layers: projections, convolution, recurrence, gate and norm, beside mamba-ssm's with the same weights.

b batch  l length  h heads  p head width  n state size  g groups of heads
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ophis import layers
from ophis.bench import tables, timing
from ophis.bench.peers import imported
from ophis.bench.shapes import FORWARD, TRAINING, products_of_ssd, size
from ophis.bench.tables import Least, Note
from ophis.testing import TOLERANCES, error

# name -> (the layer, mamba-ssm's)
LAYERS: dict[str, tuple[type[nn.Module], str]] = {
    "mamba": (layers.Mamba, "mamba_ssm.modules.mamba_simple:Mamba"),
    "mamba2": (layers.Mamba2, "mamba_ssm.modules.mamba2:Mamba2"),
}
DTYPE = torch.bfloat16  # of the input and of weights, but for those that a layer keeps in float32
FIRST = 2, 64  # batch and length of the call that the time of a larger one is estimated from


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

    def call(self, direction: str) -> timing.Call:
        return self.forward if direction == FORWARD else self.training


def run(
    name: str, device: torch.device, *, quick: bool = False, only: str = "", against: Sequence[dict[str, str]] = ()
) -> Iterator[dict[str, Any] | Note]:
    """The rows of a layer's table as they are measured, and what else there is to tell.

    Args:
        name: of `LAYERS`.
        device: where.
        quick: tiny shapes, to see that it works.
        only: shapes with this in what they are called.
        against: rows of `read_against`, joined where sizes and dtype are the same.
    """
    limits = timing.limits(device, quick)
    of_ours, of_theirs = LAYERS[name]
    theirs, reason = imported(of_theirs)
    if theirs is None:
        yield Note(f"mamba-ssm {reason}: its rows are left out")

    def measure(shape: Shape) -> Iterator[dict[str, Any] | Note]:
        return _measure(shape, device, of_ours, theirs, limits, quick, against)

    yield from tables.of_each(shapes_of(name, quick), measure, device, only)


def _measure(
    shape: Shape,
    device: torch.device,
    of_ours: type[nn.Module],
    of_theirs: type[nn.Module] | None,
    limits: timing.Limits,
    quick: bool,
    against: Sequence[dict[str, str]],
) -> Iterator[dict[str, Any] | Note]:
    torch.manual_seed(0)
    ours: Any = of_ours(shape.width, device=device, dtype=DTYPE)
    x = torch.randn(shape.batch, shape.length, shape.width, device=device, dtype=DTYPE)
    first = min(FIRST[0], shape.batch), min(FIRST[1], shape.length)
    estimate = timing.estimate(
        lambda b, l: Side(ours, x[:b, :l]).call(TRAINING), shape.batch, shape.length, first, device
    )
    if estimate > timing.SLOW:
        yield Note(f"{shape}: it would take {estimate:.0f} s a call, and is left out")
        return
    sides = {"ophis": Side(ours, x)}
    if of_theirs is not None:
        try:
            sides["mamba-ssm"] = Side(_same(of_theirs, ours, shape.width), x)
        except Exception as failed:  # of any kind, here and below: it is somebody else's code
            yield Note(f"{shape}: mamba-ssm fails: {tables.in_a_line(failed)}")
    columns = {
        "op": shape.layer,
        "case": "layer",
        "batch": shape.batch,
        "length": shape.length,
        "d": shape.width,
        "n": ours.d_state,
        "w": "",
        "dtype": str(DTYPE).removeprefix("torch."),
    }
    for direction in (FORWARD, TRAINING):
        results = {"ophis": sides["ophis"].call(direction)()}
        if "mamba-ssm" in sides:
            try:
                results["mamba-ssm"] = sides["mamba-ssm"].call(direction)()
            except Exception as failed:
                if isinstance(failed, torch.OutOfMemoryError):
                    raise
                del sides["mamba-ssm"]
                yield Note(f"{shape}: mamba-ssm fails: {tables.in_a_line(failed)}")
        if direction == FORWARD and "mamba-ssm" in sides:
            off = error(results["mamba-ssm"].float(), results["ophis"].float())
            if not off <= tables.AGREE * TOLERANCES[DTYPE]:
                yield Note(f"{shape}: ophis and mamba-ssm differ by {off:.1e}")
        del results
        yield from tables.timed(
            {**columns, "direction": direction},
            {name: side.call(direction) for name, side in sides.items()},
            least(ours, x, direction),
            device,
            limits,
            ours=["ophis"],
            same=["mamba-ssm"],
            against=against,
            quick=quick,
        )


def _same(of_theirs: type[nn.Module], ours: nn.Module, width: int) -> nn.Module:
    """Their layer with the weights of ours, both rounded to what it keeps: fewer of its parameters are in float32."""
    weight = next(ours.parameters())
    theirs = of_theirs(width, device=weight.device, dtype=DTYPE)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return theirs


def least(layer: Any, x: Tensor, direction: str) -> Least:
    """Input and weights read once, the output written; backward: those and the output's gradient read, gradients
    written. Every linear layer's products, with two more each backward, one for the gradient of each factor."""
    tokens = x.shape[0] * x.shape[1]
    weights = sum(map(size, layer.parameters()))
    flops = sum(2 * tokens * part.weight.numel() for part in layer.modules() if isinstance(part, nn.Linear))
    if isinstance(layer, layers.Mamba2):
        flops += tokens * products_of_ssd(layer.heads, layer.headdim, layer.d_state, layer.ngroups)
        # Decays and softplus, as `ophis.bench.shapes.exponentials`; the convolution's activation; the gate's.
        each = 34 * layer.heads + layer.conv_dim + layer.d_ssm
    else:
        each = layer.d_inner * (layer.d_state + 3)
    if direction == FORWARD:
        return Least(2 * size(x) + weights, tokens * each, flops)
    return Least(5 * size(x) + 3 * weights, 2 * tokens * each, 3 * flops)
