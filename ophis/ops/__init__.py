"""Operators on tensors: the mathematics of state-space models, without modules or configuration."""

from ophis.ops._op import OPS, use_backend
from ophis.ops.causal_conv import causal_conv, causal_conv_step
from ophis.ops.long_conv import long_conv
from ophis.ops.norm import gated_rms_norm, rms_norm
from ophis.ops.s4d import s4d, s4d_init, s4d_kernel
from ophis.ops.selective_scan import selective_scan, selective_scan_step
from ophis.ops.split import split
from ophis.ops.ssd import ssd, ssd_step

__all__ = [
    "OPS",
    "causal_conv",
    "causal_conv_step",
    "gated_rms_norm",
    "long_conv",
    "rms_norm",
    "s4d",
    "s4d_init",
    "s4d_kernel",
    "selective_scan",
    "selective_scan_step",
    "split",
    "ssd",
    "ssd_step",
    "use_backend",
]
