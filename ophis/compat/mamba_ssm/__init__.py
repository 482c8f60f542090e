"""mamba_ssm's names over `ophis.ops` and `ophis.layers`."""

from ophis.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from ophis.compat.mamba_ssm.modules.mamba2 import Mamba2
from ophis.compat.mamba_ssm.modules.mamba_simple import Mamba
from ophis.compat.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

__all__ = ["Mamba", "Mamba2", "MambaLMHeadModel", "mamba_inner_fn", "selective_scan_fn"]

__version__ = "2.3.2"  # of the interface; some code asks
