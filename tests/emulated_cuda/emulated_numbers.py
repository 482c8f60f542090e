"""Functions of single numbers that kernels share, on a CPU (see emulation.py), against NumPy in float64."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from emulation import compiled

SOURCE = """
#include "numbers.cuh"
extern "C" void softplus_of(const float* x, float* y, int count, bool of_16_bits) {
  for (int i = 0; i < count; ++i) y[i] = of_16_bits ? softplus<true>(x[i]) : softplus<false>(x[i]);
}
"""


@pytest.mark.parametrize(("of_16_bits", "precision"), [(True, 6e-5), (False, 1e-6)])
def test_softplus(of_16_bits: bool, precision: float):
    """Relatively, so that small steps are as good as large ones."""
    x = np.linspace(-5, 20, 100_001, dtype=np.float32)
    y = np.empty_like(x)
    pointers = (array.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for array in (x, y))
    compiled(SOURCE).softplus_of(*pointers, len(x), of_16_bits)
    assert np.abs(y / np.logaddexp(0, x.astype(np.float64)) - 1).max() < precision
