"""causal_conv1d's names over `ophis.ops.causal_conv`."""

from ophis.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]

__version__ = "1.7.0"  # of the interface; some code asks
