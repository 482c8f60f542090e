"""The two norms as custom ops around a pair of kernels.   d width"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ophis.ops.library import apart, differentiable_gradients, function_of, recorded, traced
from ophis.ops.norm import check_groups, gated_rms_norm, rms_norm
from ophis.ops.split import places_of, taken


class Kernels(NamedTuple):
    """What a folder provides; tensors (..., d) of any strides and mixed dtypes.

    rms(x, residual, weight, eps) -> y, and s of its own memory; s is empty without a residual.
    rms_backward(dy, ds, s, weight, x_dtype, eps) -> gradients of residual, x and weight. That of x is empty where its
        dtype is the residual's, for then it is the same. Without a residual, s is x.
    gated(x, z, weight, eps, groups, norm_before_gate) -> y.
    gated_backward(dy, x, z, weight, eps, groups, norm_before_gate, d_z=None) -> gradients of x, z, weight, in their
        dtypes. That of z may be written to `d_z`, a slice of something wider.
    """

    rms: Callable[..., tuple[Tensor, Tensor]]
    rms_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gated: Callable[..., Tensor]
    gated_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


WIDEST = 65536
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(call: dict[str, Any]) -> str | None:
    """What no kernel takes."""
    for name in ("x", "z", "residual", "weight"):
        t = call.get(name)
        if t is not None and t.dtype not in DTYPES:
            return f"{name} is {str(t.dtype).removeprefix('torch.')}, and its kernels are for float32 and narrower"
    width = call["x"].shape[-1] // max(call.get("groups", 1), 1)
    if width > WIDEST:
        return f"its kernels hold a row, or a group of one, of up to {WIDEST}, and here it has {width}"
    if call["x"].numel() == 0:
        return "x is empty"
    return None


def rms_op(name: str, kernels: Kernels) -> Callable[..., tuple[Tensor, Tensor]]:
    """Makes `ophis::rms_norm_{name}` and its backward; returns a function with the signature of the public op."""

    def forward(x, residual, weight, eps):
        return kernels.rms(x, residual, weight, eps)

    schema = "(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor)"
    norm_op = torch.library.custom_op(f"ophis::rms_norm_{name}", forward, mutates_args=(), schema=schema)

    @norm_op.register_fake
    def _(x, residual, weight, eps):
        return x.new_empty(x.shape), x.new_empty(0) if residual is None else residual.new_empty(x.shape)

    def backward(dy, ds, s, weight, x_dtype, eps):
        return kernels.rms_backward(dy, ds, s, weight, x_dtype, eps)

    schema = (
        "(Tensor dy, Tensor? ds, Tensor s, Tensor weight, ScalarType x_dtype, float eps) -> (Tensor, Tensor, Tensor)"
    )
    backward_op = torch.library.custom_op(f"ophis::rms_norm_{name}_backward", backward, mutates_args=(), schema=schema)

    @backward_op.register_fake
    def _(dy, ds, s, weight, x_dtype, eps):
        dx = s.new_empty(0) if x_dtype == s.dtype else s.new_empty(s.shape, dtype=x_dtype)
        return s.new_empty(s.shape), dx, weight.new_empty(weight.shape)

    def setup_context(ctx, inputs, output):
        x, residual, weight, ctx.eps = inputs
        ctx.x_dtype, ctx.added = x.dtype, residual is not None
        ctx.save_for_backward(output[1] if ctx.added else x, weight)
        ctx.set_materialize_grads(False)

    def backward_of(ctx, dy, ds):
        s, weight = ctx.saved_tensors
        dy = s.new_zeros(1, dtype=ctx.x_dtype).expand(s.shape) if dy is None else dy
        ds = ds if ctx.added else None
        if torch.is_grad_enabled():  # create_graph=True: the gradient of the gradient goes through the reference
            s, weight = apart((s, weight))
            y = rms_norm.run_reference(x=s, weight=weight, residual=None, eps=ctx.eps)[0]
            d_s, d_weight = torch.autograd.grad(y, (s, weight), dy.to(y.dtype), create_graph=True)
            d_s = d_s if ds is None else d_s + ds
            dx = d_s.to(ctx.x_dtype)
        else:
            run: Callable[..., Any] = backward_op if traced(dy) else backward
            d_s, dx, d_weight = run(dy, ds, s, weight, ctx.x_dtype, ctx.eps)
            dx = d_s if ctx.x_dtype == s.dtype else dx
        return dx, d_s if ctx.added else None, d_weight, None

    norm_op.register_autograd(backward_of, setup_context=setup_context)
    function = function_of(forward, setup_context, backward_of)

    def norm(x, weight, *, residual, eps):
        run = norm_op if traced(x) else function if recorded(x, residual, weight) else forward
        y, s = run(x, residual, weight, eps)
        return y, x if residual is None else s

    return norm


def gated_op(name: str, kernels: Kernels) -> Callable[..., Tensor]:
    """Makes `ophis::gated_rms_norm_{name}` and its backward; returns a function with the public op's signature."""

    def forward(x, z, weight, eps, groups, norm_before_gate):
        return kernels.gated(x, z, weight, eps, groups, norm_before_gate)

    options = "float eps, int groups, bool norm_before_gate"
    schema = f"(Tensor x, Tensor z, Tensor weight, {options}) -> Tensor"
    norm_op = torch.library.custom_op(f"ophis::gated_rms_norm_{name}", forward, mutates_args=(), schema=schema)

    @norm_op.register_fake
    def _(x, z, weight, eps, groups, norm_before_gate):
        return x.new_empty(x.shape)

    def backward(dy, x, z, weight, eps, groups, norm_before_gate):
        return kernels.gated_backward(dy, x, z, weight, eps, groups, norm_before_gate)

    schema = f"(Tensor dy, Tensor x, Tensor z, Tensor weight, {options}) -> (Tensor, Tensor, Tensor)"
    backward_op = torch.library.custom_op(
        f"ophis::gated_rms_norm_{name}_backward", backward, mutates_args=(), schema=schema
    )

    @backward_op.register_fake
    def _(dy, x, z, weight, eps, groups, norm_before_gate):
        return tuple(t.new_empty(t.shape) for t in (x, z, weight))

    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps, ctx.groups, ctx.norm_before_gate = inputs
        ctx.save_for_backward(*tensors)
        ctx.places = places_of(tensors[1])

    def backward_of(ctx, dy):
        inputs = ctx.saved_tensors
        options = dict(eps=ctx.eps, groups=ctx.groups, norm_before_gate=ctx.norm_before_gate)
        if torch.is_grad_enabled():  # create_graph=True

            def reference(x: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor]:
                return (gated_rms_norm.run_reference(x=x, z=z, weight=weight, **options),)

            grads = differentiable_gradients(reference, inputs, (dy,))
        elif traced(dy):
            grads = backward_op(dy, *inputs, *options.values())
        else:
            grads = kernels.gated_backward(dy, *inputs, *options.values(), *taken(ctx.places))
        return (*grads, None, None, None)

    norm_op.register_autograd(backward_of, setup_context=setup_context)
    function = function_of(forward, setup_context, backward_of)

    def norm(x, z, weight, *, eps, groups, norm_before_gate):
        check_groups(x, groups)
        run = norm_op if traced(x) else function if recorded(x, z, weight) else forward
        return run(x, z, weight, eps, groups, norm_before_gate)

    return norm
