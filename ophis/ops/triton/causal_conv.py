"""The short convolution in one pass over the positions, its window in registers.

b batch  l length  d channels  w width

A program takes BD channels through a run of positions, one after the other: an input is read from memory once and stays
in registers for the w outputs, or gradients, that it enters. Runs end where sequences end, so that none of a program's
positions has to ask which sequence it is in. Loads are issued UNROLL positions at a time: that many rows are on their
way while none can be computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ophis.ops.causal_conv import causal_conv, causal_conv_step
from ophis.ops.library import causal_conv as library
from ophis.ops.triton import on_device_of, why_not_here
from ophis.ops.triton.packing import place
from ophis.ops.triton.partial_sums import add_up

# Channels of a program at width 4, with one warp 8 a thread, so that a load has 16 bytes in bfloat16. A thread keeps a
# few numbers a channel and tap: wider convolutions take fewer channels, or registers would spill, and fewer positions
# at a time, or compiling would take a minute.
FORWARD_BD, FORWARD_WARPS, FORWARD_UNROLL = 256, 2, 4
BACKWARD_BD, BACKWARD_WARPS, BACKWARD_UNROLL = 128, 1, 4
STEP_BD, STEP_WARPS = 256, 2
# A run reads w-1 positions beyond its own, twice that in the backward pass, which writes w+1 rows of partial sums, too:
# longer runs do less of it, shorter ones give the machine more programs. So many fill it.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 16384, 4096
SHORTEST_RUN, LONGEST_RUN = 16, 256


@triton.jit
def where(condition, channel, d):
    """The mask of a row of channels of which there are d, and none unless the condition holds."""
    return channel < tl.where(condition, d, 0)


@triton.jit
def row_of(tensor, row, row_stride, channel, channel_stride):
    """Pointers to the channels of a row, with offsets of 64 bits."""
    return tensor + row * tl.cast(row_stride, tl.int64) + channel.to(tl.int64) * tl.cast(channel_stride, tl.int64)


@triton.jit
def read(pointers, position, stride, mask):
    """In the tensor's own dtype: what waits to be used takes half the registers in a narrow one."""
    return tl.load(pointers + position * tl.cast(stride, tl.int64), mask=mask, other=0.0)


@triton.jit
def input_at(position, x, x_sl, initial, initial_sl, start, end, channel, d, W: tl.constexpr):
    """The input at a position, which may lie in the window before its sequence."""
    value = read(x, position, x_sl, where((position >= start) & (position < end), channel, d)).to(tl.float32)
    if initial is not None:
        value += read(initial, position - start + W - 1, initial_sl, where(position < start, channel, d)).to(tl.float32)
    return value


@triton.jit
def parameters(weight, bias, weight_sd, weight_sw, bias_sd, channel, inside, W: tl.constexpr):
    weights = ()
    for k in tl.static_range(W):
        weights = weights + (
            read(row_of(weight, 0, weight_sd, channel, weight_sd), k, weight_sw, inside).to(tl.float32),
        )
    if bias is None:
        return weights, tl.zeros(channel.shape, tl.float32)
    else:
        return weights, read(row_of(bias, 0, bias_sd, channel, bias_sd), 0, bias_sd, inside).to(tl.float32)


@triton.jit(do_not_specialize=["l", "run", "of_a_row", "sequences"])
def causal_conv_forward_kernel(
    x, weight, bias, initial, cu_seqlens, y, final,
    l, d, run, of_a_row, sequences,
    x_sb, x_sl, x_sd, weight_sd, weight_sw, bias_sd, initial_sb, initial_sl, initial_sd,
    W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(d, BD)
    program = tl.program_id(0)
    row, sequence, start, end, first = place(program // blocks, cu_seqlens, l, run, of_a_row, sequences)
    channel = program % blocks * BD + tl.arange(0, BD)
    inside = channel < d
    weights, added = parameters(weight, bias, weight_sd, weight_sw, bias_sd, channel, inside, W)
    x = row_of(x, row, x_sb, channel, x_sd)
    if initial is not None:
        initial = row_of(initial, sequence, initial_sb, channel, initial_sd)
    y = y + tl.cast(row, tl.int64) * l * d + channel

    window = ()
    for j in tl.static_range(W - 1):
        window = window + (input_at(first - (W - 1) + j, x, x_sl, initial, initial_sl, start, end, channel, d, W),)
    last = tl.minimum(first + run, end)
    for t in range(first, last, UNROLL):
        entering = ()
        for u in tl.static_range(UNROLL):
            entering = entering + (read(x, t + u, x_sl, where(t + u < last, channel, d)),)
        for u in tl.static_range(UNROLL):
            window = window + (entering[u].to(tl.float32),)
            value = added
            for k in tl.static_range(W):
                value += weights[k] * window[k]
            if SILU:
                value *= tl.sigmoid(value)
            tl.store(y + tl.cast(t + u, tl.int64) * d, value, mask=where(t + u < last, channel, d))
            window = window[1:]

    # The sequence's last chunk, or the only one of an empty sequence, leaves the window.
    if (first + run >= end) & ((first < end) | (first == start)):
        at = tl.cast(sequence, tl.int64) * (W - 1) * d + channel
        for j in tl.static_range(W - 1):
            value = input_at(end - (W - 1) + j, x, x_sl, initial, initial_sl, start, end, channel, d, W)
            tl.store(final + at + j * d, value, mask=inside)


@triton.jit
def enter(x_t, dy_t, inputs, slopes, weights, added, W: tl.constexpr, SILU: tl.constexpr):
    """Position t enters both windows: its input, and the gradient of what its activation is applied to."""
    inputs = inputs + (x_t.to(tl.float32),)
    slope = dy_t.to(tl.float32)
    if SILU:
        value = added
        for k in tl.static_range(W):
            value += weights[k] * inputs[k]
        sigmoid = tl.sigmoid(value)
        slope *= sigmoid * (1 + value * (1 - sigmoid))
    return inputs, slopes + (slope,)


@triton.jit
def leave(slopes, weights, W: tl.constexpr):
    """The gradient of the input that has now met all its w outputs: sum_k weight[:, k] slope_{t-k}."""
    value = weights[0] * slopes[W - 1]
    for k in tl.static_range(1, W):
        value += weights[k] * slopes[W - 1 - k]
    return value


@triton.jit
def gather(sums, x_t, slopes, W: tl.constexpr):
    """The same input's share of the weight's gradient."""
    added = ()
    for k in tl.static_range(W):
        added = added + (sums[k] + x_t * slopes[W - 1 - k],)
    return added


@triton.jit(do_not_specialize=["l", "run", "of_a_row", "sequences"])
def causal_conv_backward_kernel(
    dy, d_final, x, weight, bias, initial, cu_seqlens, dx, d_initial, partial,
    l, d, run, of_a_row, sequences,
    dy_sb, dy_sl, dy_sd, d_final_sb, d_final_sl, d_final_sd,
    x_sb, x_sl, x_sd, weight_sd, weight_sw, bias_sd, initial_sb, initial_sl, initial_sd,
    W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(d, BD)
    program = tl.program_id(0)
    chunk = program // blocks
    row, sequence, start, end, first = place(chunk, cu_seqlens, l, run, of_a_row, sequences)
    channel = program % blocks * BD + tl.arange(0, BD)
    inside = channel < d
    weights, added = parameters(weight, bias, weight_sd, weight_sw, bias_sd, channel, inside, W)
    dy = row_of(dy, row, dy_sb, channel, dy_sd)
    if d_final is not None:
        d_final = row_of(d_final, sequence, d_final_sb, channel, d_final_sd)
    x = row_of(x, row, x_sb, channel, x_sd)
    if initial is not None:
        initial = row_of(initial, sequence, initial_sb, channel, initial_sd)
    dx = dx + tl.cast(row, tl.int64) * l * d + channel

    # The windows before the chunk, then the chunk's first w-1 positions, at each of which an earlier input leaves: it
    # belongs to the chunk before, or to the initial window.
    inputs = ()
    ahead = ()
    slopes = ()
    sums = ()
    total = tl.zeros([BD], tl.float32)
    for j in tl.static_range(W - 1):
        inputs = inputs + (input_at(first - (W - 1) + j, x, x_sl, initial, initial_sl, start, end, channel, d, W),)
        mask = where(first + j < end, channel, d)
        ahead = ahead + (read(x, first + j, x_sl, mask), read(dy, first + j, dy_sl, mask))
        slopes = slopes + (total,)
    for _ in tl.static_range(W):
        sums = sums + (total,)
    for j in tl.static_range(W - 1):
        inputs, slopes = enter(ahead[2 * j], ahead[2 * j + 1], inputs, slopes, weights, added, W, SILU)
        if d_initial is not None:
            value = leave(slopes, weights, W)
            if d_final is not None:  # what a short sequence keeps of its initial window
                kept = j - (end - start)
                value += read(d_final, kept, d_final_sl, where((first == start) & (kept >= 0), channel, d))
            at = (tl.cast(sequence, tl.int64) * (W - 1) + j) * d + channel
            tl.store(d_initial + at, value, mask=where(first == start, channel, d))
            sums = gather(sums, tl.where(first == start, inputs[0], 0.0), slopes, W)
        inputs = inputs[1:]
        slopes = slopes[1:]

    last = tl.minimum(first + run, end)
    for t in range(first, last, UNROLL):  # t leaves when t + w-1 enters; past the end, slopes are zero
        entering = ()
        for u in tl.static_range(UNROLL):
            mask = where(t + u + W - 1 < end, channel, d)
            entering = entering + (read(x, t + u + W - 1, x_sl, mask), read(dy, t + u + W - 1, dy_sl, mask))
        for u in tl.static_range(UNROLL):
            inputs, slopes = enter(entering[2 * u], entering[2 * u + 1], inputs, slopes, weights, added, W, SILU)
            value = leave(slopes, weights, W)
            sums = gather(sums, inputs[0], slopes, W)
            total += slopes[0]
            if d_final is not None:
                kept = t + u - (end - (W - 1))
                value += read(d_final, kept, d_final_sl, where((kept >= 0) & (kept < W - 1), channel, d))
            tl.store(dx + tl.cast(t + u, tl.int64) * d, value, mask=where(t + u < last, channel, d))
            inputs = inputs[1:]
            slopes = slopes[1:]

    partial = partial + tl.cast(chunk, tl.int64) * (W + 1) * d + channel
    for k in tl.static_range(W):
        tl.store(partial + k * d, sums[k], mask=inside)
    tl.store(partial + W * d, total, mask=inside)


@triton.jit
def causal_conv_step_kernel(
    x, state, weight, bias, y,
    d, x_sb, x_sd, state_sb, state_sw, state_sd, weight_sd, weight_sw, bias_sd,
    W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(d, BD)
    program = tl.program_id(0)
    row = program // blocks
    channel = program % blocks * BD + tl.arange(0, BD)
    inside = channel < d
    weights, value = parameters(weight, bias, weight_sd, weight_sw, bias_sd, channel, inside, W)
    state = row_of(state, row, state_sb, channel, state_sd)
    window = ()
    for k in tl.static_range(W - 1):
        window = window + (read(state, k, state_sw, inside).to(tl.float32),)
    window = window + (read(row_of(x, row, x_sb, channel, x_sd), 0, x_sb, inside).to(tl.float32),)
    for k in tl.static_range(W):
        value += weights[k] * window[k]
    if SILU:
        value *= tl.sigmoid(value)
    tl.store(y + tl.cast(row, tl.int64) * d + channel, value, mask=inside)
    for k in tl.static_range(W - 1):
        tl.store(state + k * tl.cast(state_sw, tl.int64), window[k + 1], mask=inside)


class Tiles(NamedTuple):
    channels: int
    unroll: int
    blocks: int  # of channels
    run: int
    of_a_row: int  # chunks of a batch row, 0 where sequences are packed
    chunks: int


def tiles(x: Tensor, w: int, cu_seqlens: Tensor | None, channels: int, unroll: int, programs: int) -> Tiles:
    b, l, d = x.shape
    wider = triton.next_power_of_2(max(w, 4)) // 4
    channels, unroll = channels // wider, max(1, unroll // wider)
    blocks = triton.cdiv(d, channels)
    run = min(LONGEST_RUN, triton.cdiv(b * l * blocks, programs * SHORTEST_RUN) * SHORTEST_RUN)
    if cu_seqlens is not None:
        return Tiles(channels, unroll, blocks, run, 0, l // run + len(cu_seqlens) - 1)
    of_a_row = triton.cdiv(l, run)
    return Tiles(channels, unroll, blocks, run, of_a_row, b * of_a_row)


def strides(t: Tensor | None, axes: int) -> tuple[int, ...]:
    return (0,) * axes if t is None else t.stride()


def forward(x, weight, bias, initial_state, cu_seqlens, silu):
    b, l, d = x.shape
    w = weight.shape[1]
    sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
    tile = tiles(x, w, cu_seqlens, FORWARD_BD, FORWARD_UNROLL, FORWARD_PROGRAMS)
    y = torch.empty((b, l, d), dtype=x.dtype, device=x.device)
    final_state = torch.empty((sequences, w - 1, d), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        causal_conv_forward_kernel[(tile.chunks * tile.blocks,)](
            x, weight, bias, initial_state, cu_seqlens, y, final_state,
            l, d, tile.run, tile.of_a_row, sequences,
            *x.stride(), *weight.stride(), *strides(bias, 1), *strides(initial_state, 3),
            W=w, SILU=silu, BD=tile.channels, UNROLL=tile.unroll, num_warps=FORWARD_WARPS,
        )  # fmt: skip
    return y, final_state


def backward(dy, d_final, x, weight, bias, initial_state, cu_seqlens, silu, *_):
    b, l, d = x.shape
    w = weight.shape[1]
    sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
    tile = tiles(x, w, cu_seqlens, BACKWARD_BD, BACKWARD_UNROLL, BACKWARD_PROGRAMS)
    dx = torch.empty((b, l, d), dtype=x.dtype, device=x.device)
    d_weight = torch.empty((d, w), dtype=weight.dtype, device=x.device)
    d_bias = None if bias is None else torch.empty((d,), dtype=bias.dtype, device=x.device)
    d_initial = None
    if initial_state is not None:
        d_initial = torch.empty((sequences, w - 1, d), dtype=initial_state.dtype, device=x.device)
    partial = torch.empty((tile.chunks, w + 1, d), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        causal_conv_backward_kernel[(tile.chunks * tile.blocks,)](
            dy, d_final, x, weight, bias, initial_state, cu_seqlens, dx, d_initial, partial,
            l, d, tile.run, tile.of_a_row, sequences,
            *dy.stride(), *strides(d_final, 3),
            *x.stride(), *weight.stride(), *strides(bias, 1), *strides(initial_state, 3),
            W=w, SILU=silu, BD=tile.channels, UNROLL=tile.unroll, num_warps=BACKWARD_WARPS,
        )  # fmt: skip
        add_up(partial, d_weight, d_bias)
    return dx, d_weight, d_bias, d_initial


def step(x, state, weight, bias, silu):
    b, d = x.shape
    y = torch.empty((b, d), dtype=x.dtype, device=x.device)
    with on_device_of(x):
        causal_conv_step_kernel[(b * triton.cdiv(d, STEP_BD),)](
            x, state, weight, bias, y,
            d, *x.stride(), *state.stride(), *weight.stride(), *strides(bias, 1),
            W=weight.shape[1], SILU=silu, BD=STEP_BD, num_warps=STEP_WARPS,
        )  # fmt: skip
    return y


def why_not(call):
    return why_not_here(call["x"]) or library.why_not(call)


causal_conv.register("triton", why_not)(library.custom_op("triton", library.Kernels(forward, backward)))
causal_conv_step.register("triton", why_not)(library.step_op("triton", step))
