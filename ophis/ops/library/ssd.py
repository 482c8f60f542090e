"""SSD as a custom op around a pair of kernels, and one step of it as an op that writes its state.

b batch  l length  h heads  p head width  g groups of heads  n state width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ophis.ops.in_place import check_in_place
from ophis.ops.library import as_tensors, differentiable_gradients, function_of, in_float32, of_those, recorded, traced
from ophis.ops.split import places_of, taken
from ophis.ops.ssd import ssd


class Kernels(NamedTuple):
    """What a folder provides. Tensors have any strides and mixed dtypes; A, D, dt_bias and initial_state are float32,
    and forward without gaps.

    forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit) -> y, final_state.
    backward(dy, d_final, and the same, d_x=None, d_B=None, d_C=None) -> gradients of x, dt, A, B, C, D, z, dt_bias,
        initial_state, in their dtypes; None for what is None. Those of x, B and C may be written to `d_x`, `d_B` and
        `d_C`, slices of something wider.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Sequence[Any]]


INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state,"
    " Tensor? cu_seqlens, bool dt_softplus, float[] dt_limit"
)
DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 256


def why_not(call: dict[str, Any]) -> str | None:
    """What no kernel takes. For a step too, whose state is not called the initial one."""
    for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "state"):
        t = call.get(name)
        if t is not None and t.dtype not in DTYPES:
            return f"{name} is {str(t.dtype).removeprefix('torch.')}, and its kernels are for float32 and narrower"
    if call["B"].shape[-1] > WIDEST:
        return f"its kernels hold states of up to n={WIDEST}, and here n={call['B'].shape[-1]}"
    if call["x"].numel() == 0 or call["B"].numel() == 0:
        return "an input is empty"
    return None


def custom_op(name: str, kernels: Kernels) -> Callable[..., tuple[Tensor, Tensor]]:
    """Makes `ophis::ssd_{name}` and its backward; returns a function with the signature of the public op."""

    def traced_forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit):
        A, D, dt_bias, initial_state = in_float32(A, D, dt_bias, initial_state)  # a compiler lays tensors out anew
        return kernels.forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit)

    ssd_op = torch.library.custom_op(
        f"ophis::ssd_{name}", traced_forward, mutates_args=(), schema=f"({INPUTS}) -> (Tensor, Tensor)"
    )

    @ssd_op.register_fake
    def _(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit):
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return x.new_empty(x.shape), A.new_empty(rows, *x.shape[2:], B.shape[-1])

    def traced_backward(dy, d_final, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit):
        inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
        return as_tensors(kernels.backward(dy, d_final, *inputs, cu_seqlens, dt_softplus, dt_limit), A)

    schema = f"(Tensor dy, Tensor? d_final, {INPUTS}) -> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})"
    backward_op = torch.library.custom_op(
        f"ophis::ssd_{name}_backward", traced_backward, mutates_args=(), schema=schema
    )

    @backward_op.register_fake
    def _(dy, d_final, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit):
        inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
        return as_tensors([None if t is None else t.new_empty(t.shape) for t in inputs], A)

    def setup_context(ctx, inputs, output):
        *tensors, ctx.dt_softplus, ctx.dt_limit = inputs
        ctx.save_for_backward(*tensors)
        ctx.places = places_of(*(tensors[DIFFERENTIABLE.index(name)] for name in ("x", "B", "C")))
        ctx.set_materialize_grads(False)  # no zeros for a final state that nobody differentiates

    def backward_of(ctx, dy, d_final):
        *inputs, cu_seqlens = ctx.saved_tensors
        dy = inputs[0].new_zeros(1).expand(inputs[0].shape) if dy is None else dy
        if torch.is_grad_enabled():  # create_graph=True: the gradient of the gradient goes through the reference

            def reference(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
                call = dict(zip(DIFFERENTIABLE, tensors, strict=True))
                limit = tuple(ctx.dt_limit)
                return ssd.run_reference(**call, cu_seqlens=cu_seqlens, dt_softplus=ctx.dt_softplus, dt_limit=limit)

            found = differentiable_gradients(reference, inputs, (dy, d_final))
        elif traced(dy):
            found = of_those(inputs, backward_op(dy, d_final, *inputs, cu_seqlens, ctx.dt_softplus, ctx.dt_limit))
        else:
            more = taken(ctx.places)
            found = kernels.backward(dy, d_final, *inputs, cu_seqlens, ctx.dt_softplus, ctx.dt_limit, *more)
        return (*found, None, None, None)

    ssd_op.register_autograd(backward_of, setup_context=setup_context)
    function = function_of(kernels.forward, setup_context, backward_of)

    def run_ssd(x, dt, A, B, C, *, D, z, dt_bias, dt_softplus, dt_limit, initial_state, cu_seqlens):
        if cu_seqlens is not None:  # a kernel reads them where it runs
            cu_seqlens = cu_seqlens.to(x.device).contiguous()
        A, D, dt_bias, initial_state = in_float32(A, D, dt_bias, initial_state)
        tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
        run = ssd_op if traced(x) else function if recorded(*tensors) else kernels.forward
        return run(*tensors, cu_seqlens, dt_softplus, list(dt_limit))

    return run_ssd


def step_op(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes `ophis::ssd_step_{name}`, which writes its state; returns a function like the public op.

    kernel(x, dt, A, B, C, D, z, dt_bias, state, dt_softplus, dt_limit) -> y. Tensors have any strides, mixed dtypes.
    """

    def forward(x, dt, A, B, C, D, z, dt_bias, state, dt_softplus, dt_limit):
        return kernel(x, dt, A, B, C, D, z, dt_bias, state, dt_softplus, dt_limit)

    schema = (
        "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor(a!) state,"
        " bool dt_softplus, float[] dt_limit) -> Tensor"
    )
    made = torch.library.custom_op(f"ophis::ssd_step_{name}", forward, mutates_args=("state",), schema=schema)

    @made.register_fake
    def _(x, dt, A, B, C, D, z, dt_bias, state, dt_softplus, dt_limit):
        return x.new_empty(x.shape)

    def step(x, dt, A, B, C, state, *, D, z, dt_bias, dt_softplus, dt_limit):
        check_in_place("ssd_step", state, x, dt, A, B, C, D, z, dt_bias)
        return (made if traced(x) else forward)(
            x, dt, A, B, C, D, z, dt_bias, state, dt_softplus, list(dt_limit)
        )  # fmt: skip

    return step
