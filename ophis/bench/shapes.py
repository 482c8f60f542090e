"""What `ophis bench OP` measures: shapes, their inputs, and what any implementation must at least do for them.

b batch  l length  d channels, or h heads of p  n state size  w width of the convolution
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ophis.testing import CASES, STEPS, Draw

FORWARD, TRAINING = "forward", "forward + backward"


class Shape(NamedTuple):
    """One call of an op, with inputs from one of its CASES or STEPS."""

    op: str
    case: str  # what the table calls it
    sizes: dict[str, int]
    dtype: torch.dtype = torch.bfloat16
    drawn_as: str = "everything"  # the name there
    without: str = ""  # arguments of that case which are left out
    sliced: bool = False  # x is the first half of something twice as wide, as a projection gives it
    narrow_state: bool = False  # a step's state has the signals' dtype

    @property
    def width(self) -> int:
        """d, the channels in all."""
        return self.sizes["d"] if "d" in self.sizes else self.sizes["h"] * self.sizes["p"]

    @property
    def is_step(self) -> bool:
        return self.op in STEPS

    @property
    def directions(self) -> tuple[str, ...]:
        return (FORWARD,) if self.is_step else (FORWARD, TRAINING)

    @property
    def columns(self) -> dict[str, Any]:
        """What a row says of it."""
        return {
            "op": self.op,
            "case": self.case,
            "batch": self.sizes["b"],
            "length": self.sizes["l"],
            "d": self.width,
            **{letter: self.sizes.get(letter, "") for letter in ("n", "w")},
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def inputs(self, device: torch.device, **smaller: int) -> dict[str, Any]:
        """The arguments of the call, in sizes that may be smaller."""
        sizes = {**self.sizes, **smaller}
        length = sizes.pop("l")
        case = next(case for case in {**CASES, **STEPS}[self.op] if case.name == self.drawn_as)
        call = case.make(DrawThere(device, self.dtype), length, **sizes)
        if "dt_bias" in call:  # a model's raw steps are noise around their bias
            call["dt"].mul_(0.1)
        call = {k: v for k, v in call.items() if k not in self.without.split()}
        if self.narrow_state:
            call["state"] = call["state"].to(self.dtype)
        if self.sliced:
            x = call["x"]
            call["x"] = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., : x.shape[-1]].copy_(x)
        return call

    def __str__(self) -> str:
        state = "".join(f", {letter} {self.sizes[letter]}" for letter in ("n", "w") if letter in self.sizes)
        return f"{self.sizes['b']} x {self.sizes['l']} x {self.width}{state}, {self.case}"


class DrawThere(Draw):
    """The same distributions, drawn on the device that needs them: on the CPU, in float64, the 67M numbers of one
    signal of 16 x 2048 x 2048 take a second."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        super().__init__(dtype, seed=0)
        self.generator = torch.Generator(device).manual_seed(0)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def _uniform(self, low: float, high: float, shape: tuple[int, ...]) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.generator.device)


# What any implementation must at least do. Arithmetic outside matrix products is left out: the scan's 6 flops a state
# and position take a third of the time of its exponential.


def bytes_moved(op: str, inputs: dict[str, Any], outputs: tuple[Tensor, ...], direction: str) -> int:
    """Every input read once, every output written once. Backward: inputs and gradients read, gradients written."""
    read = {k: size(v) for k, v in inputs.items() if isinstance(v, Tensor)}
    total = sum(read.values()) + sum(map(size, outputs))
    if op in STEPS:  # the state is written where it was
        total += read["state"]
    if direction == TRAINING:
        total += sum(map(size, differentiated(op, outputs)))
        if op == "rms_norm" and "residual" in read:  # needs the sum alone, which is as large as the residual
            total -= read["x"]
        total += 2 * sum(read.values())
    return total


def exponentials(op: str, inputs: dict[str, Any], direction: str) -> int:
    """Decays, softplus and gate. The backward pass has its own: keeping those of the scan would take n times x."""
    softplus = bool(inputs.get("dt_softplus"))
    if op.startswith("ssd"):  # in chunks of 64 a position has a decay from 32 others, on average
        each, of = (1 if op in STEPS else 33) + softplus, inputs["dt"].numel()
    elif op.startswith("selective_scan"):
        each, of = inputs["A"].shape[1] + softplus + ("z" in inputs), inputs["x"].numel()
    else:
        each, of = int(op == "gated_rms_norm" or bool(inputs.get("activation"))), inputs["x"].numel()
    return each * of * (2 if direction == TRAINING else 1)


def products(op: str, inputs: dict[str, Any], direction: str) -> int:
    """Floating-point operations of matrix products. Backward each product has two, one for the gradient of each
    factor."""
    if op != "ssd":
        return 0
    (b, l, h, p), (g, n) = inputs["x"].shape, inputs["B"].shape[2:]
    return b * l * products_of_ssd(h, p, n, g) * (3 if direction == TRAINING else 1)


def products_of_ssd(h: int, p: int, n: int, g: int) -> int:
    """Forward, of a position, in chunks of 64, which is near the fewest in all: into the state and out of it, 4 n p a
    head; and in the quadratic form."""
    return 4 * n * p * h + 2 * 64 * (p * h + n * g)


def differentiated(op: str, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs whose gradients training brings: the scan's final state is hardly ever among them."""
    return outputs if op == "rms_norm" else outputs[:1]


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def shapes_of(op: str, quick: bool = False) -> list[Shape]:
    return (QUICK if quick else SHAPES)[op]


def _scans(d: int, n: int, *batches_and_lengths: tuple[int, int], **options: Any) -> list[Shape]:
    without = {"gated": "initial_state", "no gate": "initial_state z"}[options.setdefault("case", "gated")]
    sizes = [{"b": b, "l": l, "d": d, "n": n} for b, l in batches_and_lengths]
    return [Shape("selective_scan", sizes=each, without=without, **options) for each in sizes]


def _convs(d: int, *batches_and_lengths: tuple[int, int]) -> list[Shape]:
    return [
        Shape("causal_conv", case, {"b": b, "l": l, "d": d, "w": 4}, without="initial_state", sliced=case != "dense")
        for b, l in batches_and_lengths
        for case in ("dense", "slice of 2 d")
    ]


def _norms(op: str, b: int, l: int, d: int) -> list[Shape]:
    case, drawn_as = {"rms_norm": ("float32 residual", "wide residual"), "gated_rms_norm": ("plain", "plain")}[op]
    return [Shape(op, case, {"b": b, "l": l, "d": d}, drawn_as=drawn_as)]


def _steps(op: str, letter: str, size: int, d: int, *batches: int) -> list[Shape]:
    return [Shape(op, "float32 state", {"b": b, "l": 1, "d": d, letter: size}) for b in batches]


def _ssds(h: int, p: int, n: int, *batches_and_lengths: tuple[int, int]) -> list[Shape]:
    return [
        Shape(
            "ssd",
            "plain",
            {"b": b, "l": l, "h": h, "p": p, "n": n},
            drawn_as="as Mamba-2 calls it",
            without="initial_state",
        )
        for b, l in batches_and_lengths
    ]


def _ssd_steps(h: int, p: int, n: int, *batches: int) -> list[Shape]:
    sizes = [{"b": b, "l": 1, "h": h, "p": p, "n": n} for b in batches]
    return [
        Shape("ssd_step", f"{'bfloat16' if narrow else 'float32'} state", each, drawn_as="plain", narrow_state=narrow)
        for each in sizes
        for narrow in (False, True)
    ]


# 32,768 tokens in several forms, long ones and a short one; then larger states, a wider dtype, and lengths up to a
# million. The widths are those of a model of 1.4 billion parameters (norms and steps: of 2.8).
SHAPES: dict[str, list[Shape]] = {
    "selective_scan": [
        *_scans(2048, 16, (64, 512), (16, 2048), (8, 4096), (1, 2048), (1, 32768), (1, 131072)),
        *_scans(2048, 64, (4, 2048), case="no gate"),
        *_scans(2048, 128, (4, 2048), case="no gate"),
        *_scans(2048, 16, (16, 2048), dtype=torch.float32),
        *_scans(2048, 16, *[(1, 1024 * 4**k) for k in range(6)]),
    ],
    "selective_scan_step": _steps("selective_scan_step", "n", 16, 5120, 1, 64, 256),
    "ssd": [
        *_ssds(32, 64, 128, (32, 1024), (16, 2048), (2, 16384)),
        *_ssds(32, 64, 64, (16, 2048)),
        *_ssds(32, 64, 256, (16, 2048)),
        *[shape for n in (16, 32, 64, 128, 256) for shape in _ssds(32, 64, n, (8, 4096))],
        *_ssds(32, 64, 128, *[(1, 512 * 4**k) for k in range(6)]),
    ],
    "ssd_step": _ssd_steps(80, 64, 128, 1, 64, 256),
    "causal_conv": _convs(2048, (64, 512), (16, 2048), (1, 2048), (1, 32768)),
    "causal_conv_step": _steps("causal_conv_step", "w", 4, 5120, 1, 64, 256),
    "rms_norm": _norms("rms_norm", 4, 2048, 2560),
    "gated_rms_norm": _norms("gated_rms_norm", 4, 2048, 2560),
}
# The same code in seconds, on any machine; its times say nothing.
QUICK: dict[str, list[Shape]] = {
    "selective_scan": [*_scans(32, 4, (2, 64), (1, 64), (1, 128), (1, 256)), *_scans(32, 8, (2, 64), case="no gate")],
    "selective_scan_step": _steps("selective_scan_step", "n", 4, 32, 1, 3),
    "ssd": [*_ssds(4, 8, 4, (2, 64), (1, 64), (1, 128), (1, 256)), *_ssds(4, 8, 8, (1, 64)), *_ssds(4, 8, 16, (1, 64))],
    "ssd_step": _ssd_steps(4, 8, 4, 1, 3),
    "causal_conv": _convs(32, (2, 64)),
    "causal_conv_step": _steps("causal_conv_step", "w", 4, 32, 1, 3),
    "rms_norm": _norms("rms_norm", 2, 16, 64),
    "gated_rms_norm": _norms("gated_rms_norm", 2, 16, 64),
}


def smaller(shape: Shape, device: torch.device) -> dict[str, int]:
    """Sizes at which the reference in float64 takes seconds at most: all channels and states, less of the rest."""
    b, l = shape.sizes["b"], shape.sizes["l"]
    if device.type == "cpu":
        return {"b": min(b, 1), "l": min(l, 64)}
    # Its graph holds some 5 states a position; 2**31 of their entries are 16 GiB.
    states = shape.width * shape.sizes.get("n", 1)
    b = min(b, 2)
    return {"b": b, "l": max(1, min(l, 1024, 2**31 // (5 * states * b)))}
