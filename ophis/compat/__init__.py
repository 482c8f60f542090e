"""The names of mamba_ssm and causal_conv1d over Ophis, for the code that is written against them.

    import ophis.compat
    ophis.compat.install()                         # from here on `import mamba_ssm` finds these

    python -m ophis.compat train.py --epochs 3     # the same for a script as it is

Nothing happens on import. `install()` leaves a package alone that is really installed, unless told `force=True`;
`uninstall()` and `with installed():` undo it. The functions and modules can also be imported from here, or from
`ophis.compat.mamba_ssm` and `ophis.compat.causal_conv1d`, whose modules have the names of the originals.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ophis.compat.installation import install, installed, uninstall

# Public names and where they live; imported at first use.
_NAMES = {
    "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
    "selective_scan_ref": "mamba_ssm.ops.selective_scan_interface",
    "mamba_inner_fn": "mamba_ssm.ops.selective_scan_interface",
    "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
    "mamba_split_conv1d_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
    "selective_state_update": "mamba_ssm.ops.triton.selective_state_update",
    "layer_norm_fn": "mamba_ssm.ops.triton.layer_norm",
    "rms_norm_fn": "mamba_ssm.ops.triton.layer_norm",
    "RMSNorm": "mamba_ssm.ops.triton.layer_norm",
    "RMSNormGated": "mamba_ssm.ops.triton.layernorm_gated",
    "Mamba": "mamba_ssm.modules.mamba_simple",
    "Mamba2": "mamba_ssm.modules.mamba2",
    "Block": "mamba_ssm.modules.block",
    "MambaConfig": "mamba_ssm.models.config_mamba",
    "MambaLMHeadModel": "mamba_ssm.models.mixer_seq_simple",
    "InferenceParams": "mamba_ssm.utils.generation",
    "causal_conv1d_fn": "causal_conv1d.causal_conv1d_interface",
    "causal_conv1d_update": "causal_conv1d.causal_conv1d_interface",
}

if TYPE_CHECKING:
    from ophis.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update
    from ophis.compat.mamba_ssm.models.config_mamba import MambaConfig
    from ophis.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from ophis.compat.mamba_ssm.modules.block import Block
    from ophis.compat.mamba_ssm.modules.mamba2 import Mamba2
    from ophis.compat.mamba_ssm.modules.mamba_simple import Mamba
    from ophis.compat.mamba_ssm.ops.selective_scan_interface import (
        mamba_inner_fn,
        selective_scan_fn,
        selective_scan_ref,
    )
    from ophis.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
    from ophis.compat.mamba_ssm.ops.triton.layernorm_gated import RMSNormGated
    from ophis.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from ophis.compat.mamba_ssm.ops.triton.ssd_combined import (
        mamba_chunk_scan_combined,
        mamba_split_conv1d_scan_combined,
    )
    from ophis.compat.mamba_ssm.utils.generation import InferenceParams

__all__ = [
    "Block",
    "InferenceParams",
    "Mamba",
    "Mamba2",
    "MambaConfig",
    "MambaLMHeadModel",
    "RMSNorm",
    "RMSNormGated",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "install",
    "installed",
    "layer_norm_fn",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "rms_norm_fn",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "uninstall",
]


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module 'ophis.compat' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_NAMES]
