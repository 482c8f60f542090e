"""Triton's interpreter with the bfloat16 of a GPU.

It cuts bits off where a GPU rounds to nearest, which doubles errors and gives all of them one sign; and it hands the
bits of bfloat16 matrices to NumPy's product as if they were integers (both in Triton 3.9).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

cast, fp_to_fp, dot = (
    getattr(InterpreterBuilder, f"{name}") for name in ("cast_impl", "create_fp_to_fp", "create_dot")
)


def narrowed(source: TensorHandle) -> TensorHandle:
    """float32 to bfloat16, which the interpreter keeps as its bits, to nearest, ties to even."""
    bits = np.ascontiguousarray(source.data).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return TensorHandle(np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def widened(operand: TensorHandle) -> TensorHandle:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def is_narrowing(source: TensorHandle, dtype: Any) -> bool:
    return source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16


def cast_impl(self: Any, source: TensorHandle, dtype: Any) -> TensorHandle:
    return narrowed(source) if is_narrowing(source, dtype) else cast(self, source, dtype)


def create_fp_to_fp(self: Any, source: TensorHandle, dtype: Any, mode: Any) -> TensorHandle:
    return narrowed(source) if is_narrowing(source, dtype) else fp_to_fp(self, source, dtype, mode)


def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
    return dot(self, widened(a), widened(b), d, *options)


def install() -> None:
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
