"""The selective scan as a custom op around a pair of kernels, and one step of it as an op that writes its state.

b batch  l length  d channels  n state size  g groups of channels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ophis.ops.in_place import check_in_place
from ophis.ops.library import as_tensors, differentiable_gradients, function_of, in_float32, of_those, recorded, traced
from ophis.ops.selective_scan import selective_scan
from ophis.ops.split import places_of, taken


class Kernels(NamedTuple):
    """What a folder provides. Both take A, D, dt_bias and initial_state in float32, and forward without gaps.

    forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, keep) -> y, final_state, kept.
        `kept` is one tensor with whatever the backward pass wants besides the inputs; empty or None unless `keep`.
    backward(dy, d_final, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, kept, d_z=None)
        -> gradients of x, dt, A, B, C, D, z, dt_bias, initial_state, in their dtypes; None for what is None. That of z
        may be written to `d_z`, a slice of something wider.
    kept_shape(x, A, cu_seqlens) -> the shape of `kept`, which is float32.
    in_groups: whether B and C always come as (b, l, g, n); otherwise as the caller gave them. A view costs 4 us.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    backward: Callable[..., Sequence[Any]]
    kept_shape: Callable[[Tensor, Tensor, Tensor | None], tuple[int, ...]]
    in_groups: bool = True


INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state,"
    " Tensor? cu_seqlens, bool dt_softplus"
)
DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(call: dict[str, Any]) -> str | None:
    """What no kernel takes."""
    B, C = call["B"], call["C"]
    if B.ndim == 2 or C.ndim == 2:
        return "B or C is constant, (d, n), and its kernels read one for each position"
    return why_not_step(call)


def why_not_step(call: dict[str, Any]) -> str | None:
    """What no kernel takes at a single position, where B and C have an axis less and the state another name."""
    x, B, C = call["x"], call["B"], call["C"]
    for name in ("x", "dt", "A", "B", "C", "z", "initial_state", "state"):
        t = call.get(name)
        if t is not None and t.dtype not in DTYPES:
            return f"{name} is {str(t.dtype).removeprefix('torch.')}, and its kernels are for real float32 and narrower"
    if B.ndim != C.ndim or (B.ndim == x.ndim + 1 and B.shape[-2] != C.shape[-2]):
        return "B and C have different numbers of groups"
    if call["A"].shape[1] > 256:
        return f"its kernels hold states of up to n=256, and here n={call['A'].shape[1]}"
    if x.shape[0] == 0:
        return "the batch is empty"
    return None


def custom_op(name: str, kernels: Kernels) -> Callable[..., tuple[Tensor, Tensor]]:
    """Makes `ophis::selective_scan_{name}` and its backward; returns a function with the signature of the public op."""

    def grouped(t: Tensor) -> Tensor:
        return t[:, :, None] if t.ndim == 3 else t

    def forward_in_groups(x, dt, A, B, C, *others):
        return kernels.forward(x, dt, A, grouped(B), grouped(C), *others)

    forward = forward_in_groups if kernels.in_groups else kernels.forward

    def traced_forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, keep):
        A, D, dt_bias, initial_state = in_float32(A, D, dt_bias, initial_state)  # a compiler lays tensors out anew
        y, final_state, kept = forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, keep)
        return y, final_state, A.new_empty(0) if kept is None else kept

    schema = f"({INPUTS}, bool keep) -> (Tensor, Tensor, Tensor)"
    scan_op = torch.library.custom_op(f"ophis::selective_scan_{name}", traced_forward, mutates_args=(), schema=schema)

    @scan_op.register_fake
    def _(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, keep):
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        kept = kernels.kept_shape(x, A, cu_seqlens) if keep else (0,)
        return x.new_empty(x.shape), A.new_empty(rows, *A.shape), A.new_empty(kept)

    def backward_in_groups(dy, d_final, x, dt, A, B, C, *others):
        dx, ddt, dA, dB, dC, *more = kernels.backward(dy, d_final, x, dt, A, grouped(B), grouped(C), *others)
        return dx, ddt, dA, dB.view(B.shape), dC.view(C.shape), *more

    backward = backward_in_groups if kernels.in_groups else kernels.backward

    def traced_backward(dy, d_final, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, kept):
        inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
        return as_tensors(backward(dy, d_final, *inputs, cu_seqlens, dt_softplus, kept), A)

    schema = f"(Tensor dy, Tensor? d_final, {INPUTS}, Tensor kept) -> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})"
    backward_op = torch.library.custom_op(
        f"ophis::selective_scan_{name}_backward", traced_backward, mutates_args=(), schema=schema
    )

    @backward_op.register_fake
    def _(dy, d_final, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, kept):
        inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
        return as_tensors([None if t is None else t.new_empty(t.shape) for t in inputs], A)

    def setup_context(ctx, inputs, output):
        *tensors, ctx.dt_softplus, _ = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.places = places_of(tensors[DIFFERENTIABLE.index("z")])
        ctx.set_materialize_grads(False)  # no zeros for a final state that nobody differentiates

    def backward_of(ctx, dy, d_final, _=None):
        *inputs, cu_seqlens, kept = ctx.saved_tensors
        dy = inputs[0].new_zeros(inputs[0].shape) if dy is None else dy
        if torch.is_grad_enabled():  # create_graph=True: the gradient of the gradient goes through the reference

            def reference(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
                call = dict(zip(DIFFERENTIABLE, tensors, strict=True))
                return selective_scan.run_reference(**call, cu_seqlens=cu_seqlens, dt_softplus=ctx.dt_softplus)

            found = differentiable_gradients(reference, inputs, (dy, d_final))
        elif traced(dy):
            found = of_those(inputs, backward_op(dy, d_final, *inputs, cu_seqlens, ctx.dt_softplus, kept))
        else:
            found = backward(dy, d_final, *inputs, cu_seqlens, ctx.dt_softplus, kept, *taken(ctx.places))
        return (*found, None, None, None)

    scan_op.register_autograd(backward_of, setup_context=setup_context)
    function = function_of(forward, setup_context, backward_of, returned=2)

    def scan(x, dt, A, B, C, *, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens):
        if cu_seqlens is not None:  # a kernel reads them where it runs
            cu_seqlens = cu_seqlens.to(x.device).contiguous()
        A, D, dt_bias, initial_state = in_float32(A, D, dt_bias, initial_state)
        tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
        keep = recorded(*tensors)
        run = scan_op if traced(x) else function if keep else forward
        y, final_state, *_ = run(*tensors, cu_seqlens, dt_softplus, keep)
        return y, final_state

    return scan


def step_op(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes `ophis::selective_scan_step_{name}`, which writes its state; returns a function like the public op.

    kernel(x, dt, A, B, C, D, z, dt_bias, old, new, dt_softplus) -> y reads the state from `old`, which may be None for
    zeros, and writes it to `new`, which may be `old`. B and C are (b, g, n); tensors have any strides, mixed dtypes.
    """

    def forward(x, dt, A, B, C, D, z, dt_bias, state, dt_softplus):
        return kernel(x, dt, A, B, C, D, z, dt_bias, state, state, dt_softplus)

    schema = (
        "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor(a!) state,"
        " bool dt_softplus) -> Tensor"
    )
    made = torch.library.custom_op(
        f"ophis::selective_scan_step_{name}", forward, mutates_args=("state",), schema=schema
    )

    @made.register_fake
    def _(x, dt, A, B, C, D, z, dt_bias, state, dt_softplus):
        return x.new_empty(x.shape)

    def step(x, dt, A, B, C, state, *, D, z, dt_bias, dt_softplus):
        check_in_place("selective_scan_step", state, x, dt, A, B, C, D, z, dt_bias)
        B, C = (t[:, None] if t.ndim == 2 else t for t in (B, C))
        run = made if traced(x) else forward
        return run(x, dt, A, B, C, D, z, dt_bias, state, dt_softplus)

    return step
