"""What PyTorch must know of an op made of two kernels: its schema, shapes without data, and derivative.

One file an op, shared by every folder of kernels: a folder gives a forward and a backward function, and gets a custom
op for which torch.compile, torch.export, checkpointing and autograd work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def traced(x: Tensor) -> bool:
    """Whether something follows this call that only knows custom ops: a compiler, an export, tensors without data.

    Where nothing does, kernels are launched without a custom op around them. That takes PyTorch longer than the launch:
    on one core 50 to 110 us with nothing inside, where an empty tensor takes 5.
    """
    return torch.compiler.is_compiling() or type(x) is not Tensor


def in_float32(*tensors: Tensor | None) -> list[Any]:
    """Parameters and states as kernels want them: in float32, without gaps."""
    return [
        t if t is None or (t.dtype is torch.float32 and t.is_contiguous()) else t.float().contiguous() for t in tensors
    ]


def dense(*tensors: Tensor | None) -> list[Any]:
    """Parameters and states are small: copies where they are not contiguous cost little."""
    return [None if t is None else t.contiguous() for t in tensors]


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd will want the gradient of a call on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def function_of(
    forward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    returned: int | None = None,
) -> Callable[..., Any]:
    """The kernels as PyTorch's own kind of differentiable function, from what a custom op is given.

    The context is set up within `forward`: set up by itself, PyTorch would look at the signature at every call, 100 us.
    `returned` is how many of the outputs are the function's; the others are for the context alone.
    """

    def forward_and_context(ctx: Any, *inputs: Any) -> Any:
        outputs = forward(*inputs)
        setup_context(ctx, inputs, outputs)
        return outputs if returned is None else outputs[:returned]

    methods = dict(forward=staticmethod(forward_and_context), backward=staticmethod(backward))
    return type("Function", (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]


def as_tensors(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """What a custom op gives are tensors: empty ones for inputs that are not there."""
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def of_those(inputs: Sequence[Tensor | None], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """And back: autograd wants none for an input that is not there."""
    return [None if t is None else g for t, g in zip(inputs, gradients, strict=True)]


def apart(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Views whose derivatives are partial ones, however the tensors depend on each other: autograd stops at them.

    Differentiated by x and B directly, a function of both would count what x does through B to x, and a second time in
    the backward pass of B.
    """
    return [None if t is None else t.view_as(t) for t in tensors]


def differentiable_gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], weights: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of function(*inputs), times `weights`, by those inputs that want one, with a graph of their own."""
    inputs = apart(inputs)
    pairs = [(y, w) for y, w in zip(function(*inputs), weights, strict=True) if w is not None]
    outputs, grads_of = zip(*pairs, strict=True)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads_of, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
