"""The short convolution as a custom op around a pair of kernels, and one step of it as an op that writes its state.

b batch  l length  d channels  w width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ophis.ops.causal_conv import causal_conv, check_activation
from ophis.ops.in_place import check_in_place
from ophis.ops.library import as_tensors, differentiable_gradients, function_of, of_those, recorded, traced
from ophis.ops.split import places_of, taken


class Kernels(NamedTuple):
    """What a folder provides; tensors of any strides, but cu_seqlens dense, and mixed dtypes.

    forward(x, weight, bias, initial_state, cu_seqlens, silu) -> y, final_state in float32.
    backward(dy, d_final, x, weight, bias, initial_state, cu_seqlens, silu, d_x=None)
        -> gradients of x, weight, bias, initial_state, in their dtypes; None for what is None. That of x may be written
        to `d_x`, a slice of something wider.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Sequence[Any]]


INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu"
WIDEST = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(call: dict[str, Any]) -> str | None:
    """What no kernel takes. For a step too, whose state is not called the initial one."""
    for name in ("x", "weight", "bias", "initial_state", "state"):
        t = call.get(name)
        if t is not None and t.dtype not in DTYPES:
            return f"{name} is {str(t.dtype).removeprefix('torch.')}, and its kernels are for float32 and narrower"
    if call["weight"].shape[1] > WIDEST:
        return f"its kernels are for widths up to w={WIDEST}, and here w={call['weight'].shape[1]}"
    if call["x"].numel() == 0:
        return "x is empty"
    return None


def custom_op(name: str, kernels: Kernels) -> Callable[..., tuple[Tensor, Tensor]]:
    """Makes `ophis::causal_conv_{name}` and its backward; returns a function with the signature of the public op."""

    def traced_forward(x, weight, bias, initial_state, cu_seqlens, silu):
        return kernels.forward(x, weight, bias, initial_state, cu_seqlens, silu)

    schema = f"({INPUTS}) -> (Tensor, Tensor)"
    conv_op = torch.library.custom_op(f"ophis::causal_conv_{name}", traced_forward, mutates_args=(), schema=schema)

    @conv_op.register_fake
    def _(x, weight, bias, initial_state, cu_seqlens, silu):
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        final_state = x.new_empty((rows, weight.shape[1] - 1, x.shape[2]), dtype=torch.float32)
        return x.new_empty(x.shape), final_state

    def traced_backward(dy, d_final, x, weight, bias, initial_state, cu_seqlens, silu):
        return as_tensors(kernels.backward(dy, d_final, x, weight, bias, initial_state, cu_seqlens, silu), x)

    schema = f"(Tensor dy, Tensor? d_final, {INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)"
    backward_op = torch.library.custom_op(
        f"ophis::causal_conv_{name}_backward", traced_backward, mutates_args=(), schema=schema
    )

    @backward_op.register_fake
    def _(dy, d_final, x, weight, bias, initial_state, cu_seqlens, silu):
        return as_tensors([None if t is None else t.new_empty(t.shape) for t in (x, weight, bias, initial_state)], x)

    def setup_context(ctx, inputs, output):
        *tensors, ctx.silu = inputs
        ctx.save_for_backward(*tensors)
        ctx.places = places_of(tensors[0])
        ctx.set_materialize_grads(False)  # no zeros for a final state that nobody differentiates

    def backward_of(ctx, dy, d_final):
        *inputs, cu_seqlens = ctx.saved_tensors
        x = inputs[0]
        dy = x.new_zeros(1).expand(x.shape) if dy is None else dy
        if torch.is_grad_enabled():  # create_graph=True: the gradient of the gradient goes through the reference

            def reference(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
                call = dict(zip(("x", "weight", "bias", "initial_state"), tensors, strict=True))
                activation = "silu" if ctx.silu else None
                return causal_conv.run_reference(**call, cu_seqlens=cu_seqlens, activation=activation)

            found = differentiable_gradients(reference, inputs, (dy, d_final))
        elif traced(dy):
            found = of_those(inputs, backward_op(dy, d_final, *inputs, cu_seqlens, ctx.silu))
        else:
            found = kernels.backward(dy, d_final, *inputs, cu_seqlens, ctx.silu, *taken(ctx.places))
        return (*found, None, None)

    conv_op.register_autograd(backward_of, setup_context=setup_context)
    function = function_of(kernels.forward, setup_context, backward_of)

    def conv(x, weight, bias, *, activation, initial_state, cu_seqlens):
        check_activation(activation)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(x.device).contiguous()
        run = conv_op if traced(x) else function if recorded(x, weight, bias, initial_state) else kernels.forward
        return run(x, weight, bias, initial_state, cu_seqlens, activation is not None)

    return conv


def step_op(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes `ophis::causal_conv_step_{name}` of kernel(x, state, weight, bias, silu) -> y, which writes `state`."""

    def forward(x, state, weight, bias, silu):
        return kernel(x, state, weight, bias, silu)

    schema = "(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu) -> Tensor"
    made = torch.library.custom_op(f"ophis::causal_conv_step_{name}", forward, mutates_args=("state",), schema=schema)

    @made.register_fake
    def _(x, state, weight, bias, silu):
        return x.new_empty(x.shape)

    def step(x, state, weight, bias, *, activation):
        check_activation(activation)
        check_in_place("causal_conv_step", state, x, weight, bias)
        return (made if traced(x) else kernel)(x, state, weight, bias, activation is not None)

    return step
