"""The norms in one pass: a program holds its rows in registers, from the one time they are read to what is written.

The two ops are one kernel, with or without a residual before the norm and a gate beside it. A group of channels with a
mean square of its own is a narrower row.   d width
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ophis.ops.library import norm as library
from ophis.ops.norm import gated_rms_norm, rms_norm
from ophis.ops.triton import multiprocessors, on_device_of, shared_memory, why_not_here
from ophis.ops.triton.partial_sums import add_up

# Entries of a program's tile at least, several rows where they are narrow, and how many a thread holds of them.
FORWARD_TILE, BACKWARD_TILE = 2048, 2048
FORWARD_EACH, BACKWARD_EACH = 16, 16
# The backward pass's programs each go through many rows and leave one row of sums. There are so many that each
# multiprocessor gets this number of their warps. With 168 registers a thread it can hold no more.
BACKWARD_WARPS = 12
# Of the loop over rows there: two tiles are on their way through shared memory while one is computed with. On an H200,
# 32,768 rows of 2048 with a gate take 0.18 ms by it and 0.24 without; by their bytes, 0.16.
STAGES = 3


@triton.jit
def silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def sum_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def read(tensor, row, row_stride, channel, channel_stride, mask):
    """A tile of rows in float32, with offsets of 64 bits."""
    at = row[:, None] * tl.cast(row_stride, tl.int64) + channel[None, :] * tl.cast(channel_stride, tl.int64)
    return tl.load(tensor + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def norm_forward_kernel(
    x, residual, z, weight, y, s,
    rows, width, groups, eps,
    x_sr, x_sd, residual_sr, residual_sd, z_sr, z_sd, weight_sd,
    GATE_LAST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    group = program % groups
    row = (program // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    channel = (group * width + column).to(tl.int64)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    out = row[:, None] * (groups * width) + channel[None, :]

    value = read(x, row, x_sr, channel, x_sd, mask)
    if residual is not None:  # rounded as the stream that is returned is
        value = value.to(s.dtype.element_ty).to(tl.float32)
        value += read(residual, row, residual_sr, channel, residual_sd, mask)
        value = value.to(s.dtype.element_ty)
        tl.store(s + out, value, mask=mask)
        value = value.to(tl.float32)
    if z is not None:
        gate = silu(read(z, row, z_sr, channel, z_sd, mask))
        if not GATE_LAST:
            value *= gate
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    weights = tl.load(weight + channel * tl.cast(weight_sd, tl.int64), mask=column < width, other=0.0).to(tl.float32)
    value = value * scale[:, None] * weights[None, :]
    if z is not None:
        if GATE_LAST:
            value *= gate
    tl.store(y + out, value, mask=mask)


@triton.jit(do_not_specialize=["rows", "programs"])
def norm_backward_kernel(
    dy, ds, s, z, weight, d_s, dx, dz, partial,
    rows, width, groups, programs, eps,
    dy_sr, dy_sd, ds_sr, ds_sd, s_sr, s_sd, z_sr, z_sd, weight_sd, dz_sr,
    GATE_LAST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    group = program % groups
    column = tl.arange(0, WIDTH)
    channel = (group * width + column).to(tl.int64)
    weights = tl.load(weight + channel * tl.cast(weight_sd, tl.int64), mask=column < width, other=0.0).to(tl.float32)
    weights = weights[None, :]
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for block in tl.range(program // groups, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        out = row[:, None] * (groups * width) + channel[None, :]

        slope = read(dy, row, dy_sr, channel, dy_sd, mask)
        value = read(s, row, s_sr, channel, s_sd, mask)
        normed = value
        if z is not None:
            gate = read(z, row, z_sr, channel, z_sd, mask)
            sigmoid = tl.sigmoid(gate)
            d_gate = sigmoid * (1 + gate * (1 - sigmoid))
            gate *= sigmoid
            if GATE_LAST:
                d_gate *= slope
                slope *= gate
            else:
                normed *= gate
        # y = n w / rms(n):  dn = (w dy - n mean(w dy n) / rms^2) / rms
        weighted = slope * weights
        # Both at once: warps wait for each other once a tile, not twice.
        square, common = tl.reduce((normed * normed, weighted * normed), 1, sum_both)
        scale = tl.rsqrt(square / width + eps)[:, None]
        common = scale * common[:, None] / width
        normed *= scale
        total += slope * normed
        change = scale * (weighted - normed * common)
        if z is not None:
            if GATE_LAST:
                d_gate *= normed * weights
            else:
                d_gate *= change * value
                change *= gate
            at = row[:, None] * tl.cast(dz_sr, tl.int64) + channel[None, :]
            tl.store(dz + at, d_gate, mask=mask)
        if ds is not None:
            change += read(ds, row, ds_sr, channel, ds_sd, mask)
        tl.store(d_s + out, change, mask=mask)
        if dx is not None:
            tl.store(dx + out, change, mask=mask)
    at = tl.cast(program // groups, tl.int64) * (groups * width) + channel
    tl.store(partial + at, tl.sum(total, 0), mask=column < width)


def rows_of(t: Tensor) -> Tensor:
    """(..., d) -> (rows, d), in place wherever one stride leads from row to row: for slices of something wider, and for
    what is expanded. Leading axes in another order in memory are copied; nothing in a model has them."""
    return t.reshape(-1, t.shape[-1])


def tile(width: int, entries: int, each: int) -> dict[str, int]:
    wide = triton.next_power_of_2(width)
    rows = max(1, entries // wide)
    return {"ROWS": rows, "WIDTH": wide, "num_warps": min(32, max(1, rows * wide // (32 * each)))}


def stages(device: torch.device, sizes: dict[str, int], *read: Tensor | None) -> int:
    """As many of `STAGES` as there is shared memory for, beside a tile in float32 that changes hands."""
    entries = sizes["ROWS"] * sizes["WIDTH"]
    tiles = entries * sum(t.element_size() for t in read if t is not None)
    return max(1, min(STAGES, 1 + (shared_memory(device) - 4 * entries) // tiles))


def strides(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if t is None else t.stride()


def forward(x, residual, z, weight, eps, groups, gate_last):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = None if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    x, residual, z = (None if t is None else rows_of(t) for t in (x, residual, z))
    rows, d = x.shape
    sizes = tile(d // groups, FORWARD_TILE, FORWARD_EACH)
    with on_device_of(x):
        norm_forward_kernel[(triton.cdiv(rows, sizes["ROWS"]) * groups,)](
            x, residual, z, weight, y, s,
            rows, d // groups, groups, eps,
            *x.stride(), *strides(residual), *strides(z), *weight.stride(),
            GATE_LAST=gate_last, **sizes,
        )  # fmt: skip
    return y, s


def backward(dy, ds, s, z, weight, x_dtype, eps, groups, gate_last, d_z=None):
    d_s = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dx = None if x_dtype == s.dtype else torch.empty(s.shape, dtype=x_dtype, device=s.device)
    dz = torch.empty(z.shape, dtype=z.dtype, device=s.device) if d_z is None and z is not None else d_z
    dz_row = 0 if dz is None else rows_of(dz).stride(0)
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=s.device)
    dy, ds, s, z = (None if t is None else rows_of(t) for t in (dy, ds, s, z))
    rows, d = s.shape
    sizes = tile(d // groups, BACKWARD_TILE, BACKWARD_EACH)
    blocks = triton.cdiv(rows, sizes["ROWS"])
    programs = min(blocks, max(1, BACKWARD_WARPS // sizes["num_warps"]) * multiprocessors(s.device) // groups)
    programs = max(1, programs)
    partial = torch.empty((programs, 1, d), dtype=torch.float32, device=s.device)
    with on_device_of(s):
        norm_backward_kernel[(programs * groups,)](
            dy, ds, s, z, weight, d_s, dx, dz, partial,
            rows, d // groups, groups, programs, eps,
            *dy.stride(), *strides(ds), *s.stride(), *strides(z), *weight.stride(), dz_row,
            GATE_LAST=gate_last, **sizes, STAGES=stages(s.device, sizes, dy, ds, s, z),
        )  # fmt: skip
        add_up(partial, d_weight)
    return d_s, dx, dz, d_weight


def rms(x, residual, weight, eps):
    y, s = forward(x, residual, None, weight, eps, 1, False)
    return y, x.new_empty(0) if s is None else s


def rms_backward(dy, ds, s, weight, x_dtype, eps):
    d_s, dx, _, d_weight = backward(dy, ds, s, None, weight, x_dtype, eps, 1, False)
    return d_s, s.new_empty(0) if dx is None else dx, d_weight


def gated(x, z, weight, eps, groups, norm_before_gate):
    return forward(x, None, z, weight, eps, groups, norm_before_gate)[0]


def gated_backward(dy, x, z, weight, eps, groups, norm_before_gate, d_z=None):
    dx, _, dz, d_weight = backward(dy, None, x, z, weight, x.dtype, eps, groups, norm_before_gate, d_z)
    return dx, dz, d_weight


def why_not(call):
    return why_not_here(call["x"]) or library.why_not(call)


KERNELS = library.Kernels(rms, rms_backward, gated, gated_backward)
rms_norm.register("triton", why_not)(library.rms_op("triton", KERNELS))
gated_rms_norm.register("triton", why_not)(library.gated_op("triton", KERNELS))
