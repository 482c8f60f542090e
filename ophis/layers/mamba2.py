"""The Mamba-2 block (Dao and Gu 2024, section 7).

b batch  l length  h heads  p head width  g groups of heads  n state width  w conv width
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ophis import ops
from ophis.layers.conv import CausalConv
from ophis.layers.norm import GatedRMSNorm
from ophis.layers.ssm_parameters import SSMParameters, check_input, log_uniform_steps


class Mamba2State(NamedTuple):
    conv: Tensor  # (b, w-1, h p + 2 g n), the last inputs of the convolution over x, B and C
    ssm: Tensor  # (b, h, p, n)


class Mamba2(SSMParameters):
    """z, xBC, dt = in_proj(u);  x, B, C = silu(conv(xBC));  y = out_proj(norm(ssd(x, dt, A, B, C) silu(z)))

    Args:
        d_model: width of input and output.
        d_state: n, the state width.
        d_conv: w, width of the short convolution over x, B and C.
        expand: inner width over d_model.
        headdim: p; the inner width (or d_ssm) must be a multiple of it.
        ngroups: g, sets of B and C, each shared by h/g neighbouring heads.
        d_ssm: how much of the inner width goes through the recurrence; the rest is a gated MLP beside it. None: all.
        A_init_range: -A starts uniform in it, per head.
        D_has_hdim: the skip D is per channel rather than per head.
        rmsnorm: whether y is normalised before out_proj; without it the gate is applied all the same.
        norm_before_gate: norm(y) silu(z) rather than norm(y silu(z)).
        norm_eps: of that norm.
        dt_min, dt_max, dt_init_floor: initial step sizes are log-uniform between the first two, at least the third.
        dt_limit: step sizes are clamped to it, in training and decoding alike.
        conv_init: the convolution's weights start uniform in ± it; None for PyTorch's default.
        conv_bias, bias: of the convolution; of in_proj and out_proj.
        learnable_init_states: the state before the first position is a parameter, `init_states` (h, p, n).

    The parameters' names, shapes, initial values and defaults are those of the published code.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        d_ssm: int | None = None,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        conv_init: float | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        learnable_init_states: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        d_inner = int(expand * d_model)
        self.d_model, self.d_state, self.headdim, self.ngroups = d_model, d_state, headdim, ngroups
        self.d_ssm = d_inner if d_ssm is None else d_ssm
        self.d_mlp = d_inner - self.d_ssm
        if self.d_ssm % headdim or self.d_mlp < 0:
            raise ValueError(
                f"Mamba2: d_ssm={self.d_ssm} (expand x d_model = {d_inner}) must be a multiple of headdim={headdim} "
                "and at most the inner width"
            )
        self.heads = self.d_ssm // headdim
        if self.heads % ngroups:
            raise ValueError(f"Mamba2: ngroups={ngroups} must divide the number of heads, {self.heads}")
        self.A_init_range = A_init_range
        self.steps = (dt_min, dt_max, dt_init_floor)
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        factory = {"device": device, "dtype": dtype}
        fp32 = {"device": device, "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)}
        self.conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(
            d_model, 2 * self.d_mlp + self.d_ssm + self.conv_dim + self.heads, bias=bias, **factory
        )
        self.conv1d = CausalConv(self.conv_dim, d_conv, bias=conv_bias, activation="silu", init=conv_init, **factory)
        self.dt_bias = nn.Parameter(torch.empty(self.heads, **fp32))
        self.A_log = nn.Parameter(torch.empty(self.heads, **fp32))
        self.D = nn.Parameter(torch.empty(self.d_ssm if D_has_hdim else self.heads, **fp32))
        self.D_has_hdim = D_has_hdim
        shape = (self.heads, headdim, d_state)
        self.init_states = nn.Parameter(torch.empty(shape, **fp32)) if learnable_init_states else None
        self.norm = (
            GatedRMSNorm(self.d_ssm, eps=norm_eps, groups=ngroups, norm_before_gate=norm_before_gate, **factory)
            if rmsnorm
            else None
        )
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **factory)
        self.reset_ssm_parameters()

    ssm_parameters = ("A_log", "D", "dt_bias", "init_states")

    def reset_parameters(self) -> None:
        """Every parameter anew; the linears by PyTorch's defaults, as published."""
        for module in (self.in_proj, self.conv1d, self.norm, self.out_proj):
            if module is not None:
                module.reset_parameters()
        self.reset_ssm_parameters()

    @torch.no_grad()
    def reset_ssm_parameters(self) -> None:
        self.dt_bias.copy_(log_uniform_steps(self.heads, *self.steps))
        self.A_log.copy_(torch.empty(self.heads).uniform_(*self.A_init_range).log())
        nn.init.ones_(self.D)
        if self.init_states is not None:
            nn.init.zeros_(self.init_states)

    def initial_state(self, batch: int) -> Mamba2State:
        if self.init_states is not None:
            ssm = self.init_states.expand(batch, -1, -1, -1)
        else:
            ssm = self.A_log.new_zeros(batch, self.heads, self.headdim, self.d_state)
        return Mamba2State(self.conv1d.initial_state(batch), ssm)

    def forward(
        self, x: Tensor, state: Mamba2State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """(b, l, d_model), from `state` or from the initial one -> (b, l, d_model), the state after it."""
        check_input(self, x, self.d_model)
        window, ssm = state if state is not None else (None, None)
        if state is None and self.init_states is not None:
            ssm = self.init_states.expand(x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, -1, -1, -1)
        gate, skip, z, xBC, dt = ops.split(
            self.in_proj(x), self.d_mlp, self.d_mlp, self.d_ssm, self.conv_dim, self.heads
        )
        xBC, window = self.conv1d(xBC, window, cu_seqlens=cu_seqlens)
        shared = (self.ngroups, self.d_state)
        x, B, C = ops.split(xBC, (self.heads, self.headdim), shared, shared)
        y, ssm = ops.ssd(
            x,
            dt,
            -torch.exp(self.A_log),
            B,
            C,
            D=self.D.view(self.heads, self.headdim) if self.D_has_hdim else self.D,
            z=z.unflatten(-1, (self.heads, self.headdim)) if self.norm is None else None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_state=ssm,
            cu_seqlens=cu_seqlens,
        )
        y = y.flatten(2)
        if self.norm is not None:
            y = self.norm(y, z)
        if self.d_mlp:
            y = torch.cat([F.silu(gate) * skip, y], -1)
        return self.out_proj(y), Mamba2State(window, ssm)
