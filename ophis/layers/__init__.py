"""Layers, (batch, length, width) -> (y, state). They need torch and `ophis.ops`, nothing else."""

from ophis.layers.attention import Attention, AttentionState
from ophis.layers.block import Block
from ophis.layers.mamba import Mamba, MambaState
from ophis.layers.mamba2 import Mamba2, Mamba2State
from ophis.layers.mlp import GatedMLP
from ophis.layers.norm import GatedRMSNorm, RMSNorm
from ophis.layers.s4d import S4D, S4DState

__all__ = [
    "S4D",
    "Attention",
    "AttentionState",
    "Block",
    "GatedMLP",
    "GatedRMSNorm",
    "Mamba",
    "Mamba2",
    "Mamba2State",
    "MambaState",
    "RMSNorm",
    "S4DState",
]
