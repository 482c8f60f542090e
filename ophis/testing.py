"""What every implementation of an op is checked with: its inputs (`CASES`) and how close is close (`check`).

    for case in CASES["ssd"]:
        check(ops.ssd, case.inputs(dtype=torch.bfloat16, length=200), backend="torch")

The rule: let plain PyTorch be the reference run in the dtype of the call. A backend's error, against the reference run
in float64 on the same (rounded) inputs, may be at most twice that of plain PyTorch, plus a floor from `TOLERANCES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ophis.ops._op import Op

# Twice the error of plain PyTorch says little where plain PyTorch is lucky: a sum of two terms, a product that happens
# to be exact. The floor is what rounding costs any implementation, by the narrowest dtype among the inputs.
#
# - bfloat16, float16: eps. Rounding the result costs up to eps / 2 of it, and so does rounding one factor on its way to
#   a matrix unit; the sums themselves are in float32.
# - float32, float64: 64 eps. There is no narrow step, but there are sums over the length: the rounding errors of l
#   additions, each up to eps / 2 of the sum so far, add up like a random walk to sqrt(l) eps / 2. That is 64 eps at
#   16384 positions.
TOLERANCES: dict[torch.dtype, float] = {
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
    torch.float32: 64 * torch.finfo(torch.float32).eps,
    torch.float64: 64 * torch.finfo(torch.float64).eps,
}


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute error, relative to the largest expected entry; NaN where `actual` is not finite.

    To the largest entry, not to each its own: an entry that cancels to nearly nothing carries the rounding errors of
    the large terms it came from.
    """
    if not expected.numel():  # as the state of a convolution of width 1
        return 0.0
    difference = (actual.to(expected.dtype) - expected).abs().max().item()
    scale = expected.abs().max().item()
    return difference / scale if scale else difference * math.inf if difference else 0.0


def assert_close(
    actual: Tensor,
    expected: Tensor,
    plain: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    name: str = "result",
) -> None:
    """Holds `actual` to the rule at the top of this file.

    Args:
        actual: what an implementation gave.
        expected: the same in float64 (or complex128).
        plain: the same from the reference in the dtype of the call. Without it, plain PyTorch is taken to be off by the
            floor: that is what the reference itself is held to.
        dtype: the narrowest dtype among the inputs, which says which floor; that of `actual` when None.
        name: of the tensor, for the message.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    floor = TOLERANCES[(dtype or actual.dtype).to_real()]
    of_plain = floor if plain is None else error(plain, expected)
    found = error(actual, expected)
    if not found <= 2 * of_plain + floor:  # so written, NaN fails
        raise AssertionError(
            f"{name} is off by {found:.1e} of its largest entry; "
            f"allowed are twice plain PyTorch's {of_plain:.1e} and the floor {floor:.1e}"
        )


def check(op: Op[..., Any], inputs: dict[str, Any], backend: str) -> None:
    """Raises AssertionError unless `backend` runs this call by the rule: every output, every gradient, every dtype."""
    expected = evaluate(op, widened(inputs), "reference")
    plain = evaluate(op, inputs, "reference")
    actual = plain if backend == "reference" else evaluate(op, inputs, backend)
    narrowest = max(
        (t.dtype.to_real() for t in inputs.values() if is_differentiable(t)), key=lambda dtype: torch.finfo(dtype).eps
    )
    for name, tensor in actual.items():
        what = f"{op.name}, backend {backend!r}: {name}"
        if tensor.dtype != plain[name].dtype:
            raise AssertionError(f"{what} is {tensor.dtype}, expected {plain[name].dtype}")
        of_plain = None if backend == "reference" else plain[name]
        assert_close(tensor, expected[name], of_plain, dtype=narrowest, name=what)


def evaluate(op: Callable[..., Any], inputs: dict[str, Any], backend: str | None = None) -> dict[str, Tensor]:
    """The outputs of a call, "y" and "state", and the gradient of every tensor in it, "grad x" and so on.

    The gradients are of one sum over all outputs with random weights, so that they flow through the final state too.
    The weights are multiples of 1/8: every dtype holds them exactly.
    """
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if is_differentiable(v)}
    outputs = op(**{**inputs, **leaves}, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [(torch.randint(-16, 17, y.shape, generator=generator) / 8).to(y.device, y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    named = dict(zip(("y", "state"), (y.detach() for y in outputs), strict=False))
    return {**named, **{f"grad {k}": g for k, g in zip(leaves, gradients, strict=True)}}


def backends(op: Op[..., Any], inputs: dict[str, Any]) -> list[str]:
    """The names of those that can run the call, fastest first."""
    return [name for name, reason in op.explain(**inputs).items() if reason is None]


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64 and complex128."""
    return {
        k: v.to(torch.promote_types(v.dtype, torch.float64)) if is_differentiable(v) else v for k, v in inputs.items()
    }


def is_differentiable(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


class Case(NamedTuple):
    """A way to call an op. The first case of an op is its plainest."""

    name: str
    make: Callable[..., dict[str, Any]]

    def inputs(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        length: int | None = None,
        seed: int = 0,
        **sizes: int,
    ) -> dict[str, Any]:
        """The keyword arguments of the call, the same on every device.

        Args:
            device: where the tensors are.
            dtype: of the signals, which come and go with the positions. Parameters and states are float32 or wider.
            length: positions, 64 when None.
            seed: of the random numbers.
            sizes: other sizes by their letter in the op's shapes, as `b=8, d=1536`; small where not given.
        """
        inputs = self.make(Draw(dtype, seed), 64 if length is None else length, **sizes)
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


class Draw:
    """Random tensors, drawn in float64 on the CPU, then rounded: the same numbers in every dtype, on every device."""

    def __init__(self, dtype: torch.dtype, seed: int):
        self.narrow = dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.generator = torch.Generator().manual_seed(seed)

    def signal(self, *shape: int) -> Tensor:
        return self._normal(shape).to(self.narrow)

    def parameter(self, *shape: int, complex: bool = False) -> Tensor:
        if complex:
            return torch.complex(self.parameter(*shape), self.parameter(*shape))
        return self._normal(shape).to(self.wide)

    def steps(self, *shape: int) -> Tensor:
        """Log-uniform in 0.001..0.1, as models start and mostly stay."""
        return torch.exp(self._uniform(math.log(1e-3), math.log(0.1), shape)).to(self.wide)

    def rates(self, *shape: int, complex: bool = False) -> Tensor:
        """The diagonal of A: decays of 1 to 16, with turns of up to 16 as well where it is complex."""
        decays = -self._uniform(1, 16, shape).to(self.wide)
        return torch.complex(decays, self._uniform(-16, 16, shape).to(self.wide)) if complex else decays

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _uniform(self, low: float, high: float, shape: tuple[int, ...]) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)


def packing(l: int) -> Tensor:
    """Offsets of up to four sequences, two of them of a single position, in l positions."""
    return torch.tensor(sorted({0, 1, l // 3, l // 3 + 1, l}), dtype=torch.int32)


# Each function below draws the inputs of one op. `optional` names the arguments that have a default, apart by spaces.


def _selective_scan(
    draw: Draw, l: int, *, b=2, d=6, n=4, g=3, B="b l n", C="b l n", complex="", optional=""
) -> dict[str, Any]:  # fmt: skip
    offsets = packing(l)
    b, rows = (1, len(offsets) - 1) if "cu_seqlens" in optional else (b, b)
    sizes = {"b": b, "l": l, "d": d, "n": n, "g": g}

    def matrix(name: str, axes: str) -> Tensor:
        shape = [sizes[letter] for letter in axes.split()]
        constant_or_complex = "l" not in axes or name in complex
        return draw.parameter(*shape, complex=name in complex) if constant_or_complex else draw.signal(*shape)

    inputs = {
        "x": draw.signal(b, l, d),
        **_steps(draw, (b, l, d), optional),
        "A": draw.rates(d, n, complex="A" in complex),
        "B": matrix("B", B),
        "C": matrix("C", C),
        "D": draw.parameter(d),
        "z": draw.signal(b, l, d),
        "initial_state": draw.parameter(rows, d, n, complex=complex not in ("", "C")),
        "cu_seqlens": offsets,
    }
    return _only(inputs, optional, ("D", "z", "initial_state", "cu_seqlens"))


def _ssd(
    draw: Draw, l: int, *, b=2, h=4, p=3, g=1, n=5, per_channel=False, dt_limit=None, optional=""
) -> dict[str, Any]:
    offsets = packing(l)
    b, rows = (1, len(offsets) - 1) if "cu_seqlens" in optional else (b, b)
    inputs = {
        "x": draw.signal(b, l, h, p),
        **_steps(draw, (b, l, h), optional),
        "A": draw.rates(h),
        "B": draw.signal(b, l, g, n),
        "C": draw.signal(b, l, g, n),
        "D": draw.parameter(h, p) if per_channel else draw.parameter(h),
        "z": draw.signal(b, l, h, p),
        "initial_state": draw.parameter(rows, h, p, n),
        "cu_seqlens": offsets,
        **({"dt_limit": dt_limit} if dt_limit else {}),
    }
    return _only(inputs, optional, ("D", "z", "initial_state", "cu_seqlens"))


def _steps(draw: Draw, shape: tuple[int, ...], optional: str) -> dict[str, Any]:
    """Step sizes themselves, or what becomes them after the bias and softplus."""
    if "dt_bias" not in optional:
        return {"dt": draw.steps(*shape).to(draw.narrow)}
    bias = torch.log(torch.expm1(draw.steps(shape[-1])))  # the inverse of softplus
    return {"dt": draw.signal(*shape), "dt_bias": bias, "dt_softplus": True}


def _causal_conv(draw: Draw, l: int, *, b=2, d=6, w=4, activation=None, optional="") -> dict[str, Any]:
    offsets = packing(l)
    b, rows = (1, len(offsets) - 1) if "cu_seqlens" in optional else (b, b)
    inputs = {
        "x": draw.signal(b, l, d),
        "weight": draw.signal(d, w),
        "bias": draw.signal(d),
        "initial_state": draw.parameter(rows, w - 1, d),
        "cu_seqlens": offsets,
        "activation": activation,
    }
    return _only(inputs, optional, ("bias", "initial_state", "cu_seqlens"))


def _rms_norm(draw: Draw, l: int, *, b=2, d=48, residual="", **options: Any) -> dict[str, Any]:
    inputs = {"x": draw.signal(b, l, d), "weight": draw.signal(d), **options}
    if residual:
        inputs["residual"] = draw.parameter(b, l, d) if residual == "wide" else draw.signal(b, l, d)
    return inputs


def _gated_rms_norm(draw: Draw, l: int, *, b=2, d=48, **options: Any) -> dict[str, Any]:
    return {"x": draw.signal(b, l, d), "z": draw.signal(b, l, d), "weight": draw.signal(d), **options}


def as_step(call: dict[str, Any]) -> dict[str, Any]:
    """A call on sequences as one of the op's step on their first position: no axis of the length, and a state."""
    step = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in call.items()}
    step["state"] = step.pop("initial_state")
    return step


def _step(draw: Draw, l: int, *, of: Callable[..., dict[str, Any]], optional="", **sizes: Any) -> dict[str, Any]:
    return as_step(of(draw, 1, optional=f"initial_state {optional}", **sizes))


def _s4d(draw: Draw, l: int, *, b=2, d=4, n=5, complex="A B C", optional="", **options: Any) -> dict[str, Any]:
    offsets = packing(l)
    b, rows = (1, len(offsets) - 1) if "cu_seqlens" in optional else (b, b)
    inputs = {
        "x": draw.signal(b, l, d),
        **_s4d_system(draw, d, n, complex),
        "D": draw.parameter(d),
        "initial_state": draw.parameter(rows, d, n, complex=bool(complex)),
        "cu_seqlens": offsets,
        **options,
    }
    return _only(inputs, optional, ("D", "initial_state", "cu_seqlens"))


def _s4d_kernel(draw: Draw, l: int, *, d=4, n=5, complex="A B C", **options: Any) -> dict[str, Any]:
    return {**_s4d_system(draw, d, n, complex), "length": l, **options}


def _s4d_system(draw: Draw, d: int, n: int, complex: str) -> dict[str, Tensor]:
    return {
        "dt": draw.steps(d),
        "A": draw.rates(d, n, complex="A" in complex),
        "B": draw.parameter(d, n, complex="B" in complex),
        "C": draw.parameter(d, n, complex="C" in complex),
    }


def _long_conv(draw: Draw, l: int, *, b=2, d=5, k: int | None = None, optional="") -> dict[str, Any]:
    inputs = {"x": draw.signal(b, l, d), "kernel": draw.parameter(d, l if k is None else k), "D": draw.parameter(d)}
    return _only(inputs, optional, ("D",))


def _only(inputs: dict[str, Any], optional: str, choices: tuple[str, ...]) -> dict[str, Any]:
    """Drops the choices that were not asked for. They were drawn all the same, which keeps the other numbers alike."""
    return {k: v for k, v in inputs.items() if k not in choices or k in optional.split()}


CASES: dict[str, list[Case]] = {
    "selective_scan": [
        Case("plain", _selective_scan),
        Case("everything", partial(_selective_scan, optional="D z dt_bias initial_state")),
        Case("groups", partial(_selective_scan, B="b l g n", C="b l g n", optional="D dt_bias")),
        Case("constant B", partial(_selective_scan, B="d n", C="b l g n")),
        Case("constant B and C", partial(_selective_scan, B="d n", C="d n", optional="initial_state")),
        Case("complex", partial(_selective_scan, complex="A B C", optional="D z dt_bias initial_state")),
        Case("complex A", partial(_selective_scan, complex="A", B="b l g n", optional="initial_state")),
        Case("complex B and C", partial(_selective_scan, complex="B C", B="d n", optional="initial_state")),
        Case("complex C", partial(_selective_scan, complex="C", optional="initial_state")),
        Case("one channel, one state", partial(_selective_scan, b=1, d=1, n=1, optional="initial_state")),
        Case("packed", partial(_selective_scan, optional="cu_seqlens D z dt_bias initial_state")),
        Case("packed, groups", partial(_selective_scan, B="b l g n", C="d n", optional="cu_seqlens")),
        Case("packed, complex", partial(_selective_scan, complex="A B C", optional="cu_seqlens initial_state")),
    ],
    "ssd": [
        Case("plain", _ssd),
        Case("everything", partial(_ssd, g=2, per_channel=True, optional="D z dt_bias initial_state")),
        Case("groups", partial(_ssd, g=4, optional="D")),
        Case("as Mamba-2 calls it", partial(_ssd, optional="D dt_bias initial_state")),
        Case("step limits", partial(_ssd, dt_limit=(0.01, 0.05), optional="dt_bias initial_state")),
        Case("odd sizes", partial(_ssd, b=3, h=3, p=7, n=1, optional="D z initial_state")),
        Case("one of each", partial(_ssd, b=1, h=1, p=1, n=1)),
        Case("packed", partial(_ssd, g=2, optional="cu_seqlens D z dt_bias initial_state")),
        Case("packed, from zeros", partial(_ssd, per_channel=True, optional="cu_seqlens D")),
    ],
    "causal_conv": [
        Case("plain", _causal_conv),
        Case("everything", partial(_causal_conv, activation="silu", optional="bias initial_state")),
        Case("width 2", partial(_causal_conv, w=2, activation="silu", optional="bias")),
        Case("width 3", partial(_causal_conv, w=3, optional="initial_state")),
        Case("width 7", partial(_causal_conv, w=7, activation="silu", optional="bias initial_state")),
        Case("packed", partial(_causal_conv, activation="silu", optional="cu_seqlens bias initial_state")),
        Case("packed, width 7", partial(_causal_conv, w=7, optional="cu_seqlens")),
    ],
    "rms_norm": [
        Case("plain", _rms_norm),
        Case("residual", partial(_rms_norm, residual="narrow")),
        Case("wide residual", partial(_rms_norm, residual="wide", eps=1e-3)),
        Case("odd width", partial(_rms_norm, d=37, residual="narrow")),
    ],
    "gated_rms_norm": [
        Case("plain", _gated_rms_norm),
        Case("groups", partial(_gated_rms_norm, groups=4)),
        Case("norm before gate", partial(_gated_rms_norm, norm_before_gate=True)),
        Case("groups, norm before gate", partial(_gated_rms_norm, groups=3, norm_before_gate=True, eps=1e-3)),
    ],
    "s4d": [
        Case("plain", _s4d),
        Case("everything", partial(_s4d, optional="D initial_state")),
        Case("bilinear", partial(_s4d, discretization="bilinear", optional="D initial_state")),
        Case("real", partial(_s4d, complex="", optional="D initial_state")),
        Case("complex A", partial(_s4d, complex="A", optional="initial_state")),
        Case("packed", partial(_s4d, optional="cu_seqlens D initial_state")),
    ],
    "s4d_kernel": [
        Case("plain", _s4d_kernel),
        Case("bilinear", partial(_s4d_kernel, discretization="bilinear")),
        Case("real", partial(_s4d_kernel, complex="")),
    ],
    "long_conv": [
        Case("plain", _long_conv),
        Case("skip", partial(_long_conv, optional="D")),
        Case("short kernel", partial(_long_conv, k=5, optional="D")),
        Case("kernel past the end", partial(_long_conv, k=1030)),
    ],
}

# The ops that take one position and change their state in place: not differentiable, so `check` is not for them.
STEPS: dict[str, list[Case]] = {
    "selective_scan_step": [
        Case("plain", partial(_step, of=_selective_scan)),
        Case("everything", partial(_step, of=_selective_scan, optional="D z dt_bias")),
        Case("groups", partial(_step, of=_selective_scan, B="b l g n", C="b l g n", optional="D dt_bias")),
        Case("complex", partial(_step, of=_selective_scan, complex="A B C", optional="D z dt_bias")),
    ],
    "ssd_step": [
        Case("plain", partial(_step, of=_ssd)),
        Case("everything", partial(_step, of=_ssd, g=2, per_channel=True, optional="D z dt_bias")),
        Case("step limits", partial(_step, of=_ssd, h=6, g=3, p=7, dt_limit=(0.01, 0.05), optional="dt_bias D")),
        Case("one of each", partial(_step, of=_ssd, b=1, h=1, p=1, n=1)),
    ],
    "causal_conv_step": [
        Case("plain", partial(_step, of=_causal_conv)),
        Case("everything", partial(_step, of=_causal_conv, activation="silu", optional="bias")),
        Case("width 2", partial(_step, of=_causal_conv, w=2, activation="silu", optional="bias")),
        Case("width 7", partial(_step, of=_causal_conv, w=7)),
    ],
}
