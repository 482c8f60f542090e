"""The selective scan in chunks of time, states recomputed in the backward pass from one a chunk.

b batch  l length  q positions in a chunk  d channels  n state size  g groups of channels

The (b, l, n, d) tensors that the recurrence needs exist for one chunk at a time, in buffers that stay in the CPU's
cache; channels are last in them, so that each step is a few long vector operations. Training one 512 x 1536 x 16 layer
takes a third of the time that autograd needs for the same loop, and a hundredth of its memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ophis.ops.in_place import check_in_place
from ophis.ops.library import differentiable_gradients, function_of, recorded, traced
from ophis.ops.selective_scan import finish, readout, selective_scan, selective_scan_step, state_dtype
from ophis.ops.step_size import step_size

CHUNK = 32  # positions; one state is kept for each chunk
ROW = 1 << 16  # numbers in one position's state, b n d, above which the batch is taken in parts


@selective_scan.register("torch")
def scan(x, dt, A, B, C, *, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens):
    wide = torch.promote_types(x.dtype, torch.float32)
    u, dt = x.to(wide), step_size(dt.to(wide), dt_bias, dt_softplus)
    dtype = state_dtype(u, A, B, *([] if initial_state is None else [initial_state]))
    if C.is_complex() and not dtype.is_complex:
        C = C.real  # only the real part of C h is read
    if dtype.is_complex and not A.is_complex():
        C = C / 2  # `readout` takes complex modes for halves of pairs, which they are only where A is complex
    b, l = x.shape[:2]
    A, B, C = A.to(dtype), grouped(B, x).to(dtype), grouped(C, x).to(dtype)
    if initial_state is None:
        rows = b if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = A.new_zeros(rows, *A.shape)
    if l == 1 and cu_seqlens is None:
        y, state = step(u, dt, A, B, C, initial_state.to(dtype))
    else:
        initial_state = initial_state.to(dtype)
        wanted = recorded(u, dt, A, B, C, initial_state)
        run = scan_op if traced(u) else scan_function if wanted else scan_forward
        y, state, _ = run(u, dt, A, B, C, initial_state, cu_seqlens)
    return finish(y, u, D, z).to(x.dtype), state


def why_not_in_place(call):
    return "A, B, C or the state is complex" if any(call[k].is_complex() for k in ("A", "B", "C", "state")) else None


@selective_scan_step.register("torch", why_not_in_place)
def step_in_place(x, dt, A, B, C, state, *, D, z, dt_bias, dt_softplus):
    check_in_place("selective_scan_step", state, x, dt, A, B, C, D, z, dt_bias)
    after = state.to(state_dtype(x, A, B, state))  # the state itself where it is as wide
    u, dt = x.to(after.dtype), step_size(dt.to(after.dtype), dt_bias, dt_softplus)
    B, C = B.to(after.dtype)[..., None, :], C.to(after.dtype)[..., None]
    after.mul_((dt[..., None] * A).exp_())
    by_group(after, B).addcmul_(by_group((dt * u)[..., None], B), B)
    y = (by_group(after, C) @ C).view(x.shape)
    if after is not state:
        state.copy_(after)
    return finish(y, u, D, z).to(x.dtype)


def by_group(t: Tensor, B: Tensor) -> Tensor:
    """t (b, d, ...) beside a B of one position: as it is, or (b, g, d/g, ...) where B has groups, (b, g, ..., ...)."""
    return t if B.ndim == 3 else t.unflatten(1, (B.shape[1], -1))


def grouped(B: Tensor, x: Tensor) -> Tensor:
    """B or C in any of its three shapes, as (b, l, g, n)."""
    if B.ndim == 2:
        return B.expand(*x.shape[:2], *B.shape)
    return B[:, :, None] if B.ndim == 3 else B


def step(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One position: the recurrence itself, on (b, g, d/g, n); B and C may have different g."""
    b, _, g, n = B.shape
    decay = torch.exp(dt[:, 0, :, None] * A)
    inflow = (dt * u).view(b, g, -1, 1) * B[:, 0, :, None]
    state = inflow.view(b, -1, n).addcmul_(decay, state)  # in the inflow's memory: new pages cost more than the sum
    y = readout(state.view(b, C.shape[2], -1, n) @ C[:, 0, :, :, None], A)
    return y.view(b, 1, -1), state


class Part(NamedTuple):
    """The rows and the sequence that one run of the recurrence covers."""

    rows: slice  # of the batch
    state: slice  # rows of the initial and final states
    start: int
    end: int
    checkpoint: int  # index of its first checkpoint


def parts(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> list[Part]:
    b, l, _ = x.shape
    if cu_seqlens is None:
        rows = max(1, ROW // A.numel()) if x.device.type == "cpu" else b
        return [Part(slice(i, i + rows), slice(i, i + rows), 0, l, 0) for i in range(0, b, rows)]
    found, checkpoint = [], 0
    for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        found.append(Part(slice(0, 1), slice(i, i + 1), start, end, checkpoint))
        checkpoint += -(-(end - start) // CHUNK)
    return found


def checkpoints(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many states are kept a row; an upper bound that needs no lengths."""
    return -(-x.shape[1] // CHUNK) if cu_seqlens is None else x.shape[1] // CHUNK + len(cu_seqlens) - 1


def scan_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final_state, states at the chunks' starts as (b, chunks, n, d)); B and C are (b, l, g, n)."""
    b, _, d = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    kept = A.new_zeros(b, checkpoints(x, cu_seqlens), A.shape[1], d)
    rates = A.t().contiguous()
    for part in parts(x, A, cu_seqlens):
        state = initial_state[part.state].transpose(1, 2)
        room = Room.of(x[part.rows], rates)
        for i, chunk in enumerate(chunks(part)):
            kept[part.rows, part.checkpoint + i] = state
            _, states = recur(x[chunk], dt[chunk], rates, B[chunk], state, room)
            y[chunk] = readout(contract_states(C[chunk], states[:, 1:]), A)
            state = states[:, -1]
        final[part.state] = state.transpose(1, 2)
    return y, final, kept


scan_op = torch.library.custom_op(
    "ophis::selective_scan_torch",
    scan_forward,
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor initial_state, Tensor? cu_seqlens)"
    " -> (Tensor, Tensor, Tensor)",
)


@scan_op.register_fake
def _(x, dt, A, B, C, initial_state, cu_seqlens):
    kept = A.new_empty(x.shape[0], checkpoints(x, cu_seqlens), A.shape[1], x.shape[2])
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(initial_state, memory_format=contiguous),
        kept,
    )


def scan_backward(
    dy: Tensor, d_final: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, kept: Tensor,
    initial_state: Tensor, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C and initial_state; complex ones are PyTorch's, d/dRe + i d/dIm.

    Conjugates are `conj_physical`: in an inference graph of aot_autograd the lazy ones of `conj` are never conjugated.
    """
    rates = A.t().contiguous()
    scale = 2 if A.is_complex() else 1
    dx, ddt = torch.empty_like(x), torch.empty_like(dt)
    dB, dC = torch.empty_like(B).contiguous(), torch.empty_like(C).contiguous()
    d_rates, d_initial = torch.zeros_like(rates), torch.empty_like(initial_state)
    for part in parts(x, A, cu_seqlens):
        flow = d_final[part.state].transpose(1, 2).contiguous()  # gradient of the state after the present chunk
        room = Room.of(x[part.rows], rates)
        for i, chunk in reversed(list(enumerate(chunks(part)))):
            u, step_sizes = x[chunk], dt[chunk]
            decay, states = recur(u, step_sizes, rates, B[chunk], kept[part.rows, part.checkpoint + i], room)
            dC[chunk] = contract_channels(dy[chunk] * scale, states[:, 1:].conj_physical(), C[chunk])
            grads = outer(C[chunk].conj_physical(), dy[chunk] * scale, out=room.grads[:, : u.shape[1]])
            decay = decay.conj_physical()
            for a, g in zip(reversed(decay.unbind(1)), reversed(grads.unbind(1)), strict=True):
                g += flow
                flow = a * g
            dB[chunk] = contract_channels(step_sizes * u, grads, B[chunk])
            inflow = real(contract_states(B[chunk].conj_physical(), grads))  # gradient of dt x
            dx[chunk] = inflow * step_sizes
            # d(dt A) = grad conj(decay h_{t-1}); `grads` is not needed any more and takes it.
            grads.mul_(decay).mul_(states[:, :-1].conj_physical())
            d_rates += (grads * step_sizes[:, :, None]).sum((0, 1))
            ddt[chunk] = torch.addcmul(real(grads.mul_(rates.conj_physical()).sum(2)), inflow, u)
        d_initial[part.state] = flow.transpose(1, 2)
    return dx, ddt, d_rates.t().contiguous(), dB, dC, d_initial


scan_backward_op = torch.library.custom_op(
    "ophis::selective_scan_torch_backward",
    scan_backward,
    mutates_args=(),
    schema="(Tensor dy, Tensor d_final, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor kept,"
    " Tensor initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@scan_backward_op.register_fake
def _(dy, d_final, x, dt, A, B, C, kept, initial_state, cu_seqlens):
    B, C = torch.empty_like(B).contiguous(), torch.empty_like(C).contiguous()
    return (torch.empty_like(x), torch.empty_like(dt), torch.empty_like(A).contiguous(), B, C,
            torch.empty_like(initial_state))  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, dt, A, B, C, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(x, dt, A, B, C, initial_state, cu_seqlens, output[2])
    ctx.set_materialize_grads(True)


def _backward(ctx, dy, d_final, _):
    x, dt, A, B, C, initial_state, cu_seqlens, kept = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradient of the gradient goes through the reference
        names = ("x", "dt", "A", "B", "C", "initial_state")

        def reference(*tensors):  # past the checks: here B and C may differ in g
            return selective_scan.run_reference(**dict(zip(names, tensors, strict=True)), cu_seqlens=cu_seqlens)

        return (*differentiable_gradients(reference, (x, dt, A, B, C, initial_state), (dy, d_final)), None)
    run = scan_backward_op if traced(dy) else scan_backward
    return (*run(dy, d_final, x, dt, A, B, C, kept, initial_state, cu_seqlens), None)


scan_op.register_autograd(_backward, setup_context=_setup_context)
scan_function = function_of(scan_forward, _setup_context, _backward)


def chunks(part: Part) -> Iterator[tuple[slice, slice]]:
    for start in range(part.start, part.end, CHUNK):
        yield part.rows, slice(start, min(start + CHUNK, part.end))


class Room(NamedTuple):
    """The memory of a chunk, allocated once: fresh pages for every chunk would double the forward pass's time."""

    decay: Tensor  # (b, q, n, d)
    states: Tensor  # (b, q + 1, n, d)
    grads: Tensor  # (b, q, n, d), touched in the backward pass only

    @classmethod
    def of(cls, x: Tensor, rates: Tensor) -> Room:
        b, q = x.shape[0], min(CHUNK, x.shape[1])
        return cls(*(rates.new_empty(b, positions, *rates.shape) for positions in (q, q + 1, q)))


def recur(x: Tensor, dt: Tensor, rates: Tensor, B: Tensor, state: Tensor, room: Room) -> tuple[Tensor, Tensor]:
    """One chunk from `state`: the decays (b, q, n, d) and the states (b, q + 1, n, d), the first of them `state`."""
    q = x.shape[1]
    decay, states = room.decay[:, :q], room.states[:, : q + 1]
    torch.mul(dt[:, :, None], rates, out=decay).exp_()
    states[:, 0] = state
    outer(B, dt * x, out=states[:, 1:])
    before, *after = states.unbind(1)  # indexing one by one would cost as much as the arithmetic
    for a, h in zip(decay.unbind(1), after, strict=True):
        before = torch.addcmul(h, a, before, out=h)
    return decay, states


def outer(B: Tensor, u: Tensor, out: Tensor) -> Tensor:
    """B (b, q, g, n) times u (b, q, d) -> (b, q, n, d)."""
    b, q, g, n = B.shape
    torch.mul(B.transpose(2, 3)[..., None], u.view(b, q, 1, g, -1), out=out.view(b, q, n, g, -1))
    return out


def contract_states(C: Tensor, h: Tensor) -> Tensor:
    """Sum over n: C (b, q, g, n), h (b, q, n, d) -> (b, q, d)."""
    g = C.shape[2]
    if g == 1:
        return (C @ h).squeeze(2)
    return (C.transpose(2, 3)[..., None] * h.unflatten(3, (g, -1))).sum(2).flatten(2)


def contract_channels(u: Tensor, h: Tensor, like: Tensor) -> Tensor:
    """Sum over a group's channels: u (b, q, d), h (b, q, n, d) -> (b, q, g, n)."""
    g = like.shape[2]
    if g == 1:
        return (h @ u.to(h.dtype)[..., None]).transpose(2, 3)
    return (h * u[:, :, None]).unflatten(3, (g, -1)).sum(4).transpose(2, 3)


def real(t: Tensor) -> Tensor:
    return t.real if t.is_complex() else t
