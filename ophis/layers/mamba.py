"""The Mamba block (Gu and Dao 2023, section 3.4).   b batch  l length  d inner width  n state size  w conv width"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ophis import ops
from ophis.layers.conv import CausalConv
from ophis.layers.ssm_parameters import SSMParameters, check_input, log_uniform_steps


class MambaState(NamedTuple):
    conv: Tensor  # (b, w-1, d), the last inputs of the convolution
    ssm: Tensor  # (b, d, n)


class Mamba(SSMParameters):
    """x, z = in_proj(u);  x = silu(conv(x));  dt, B, C = x_proj(x);  y = out_proj(scan(x, dt_proj(dt), A, B, C, z))

    Args:
        d_model: width of input and output.
        d_state: n, the state size of each channel.
        d_conv: w, width of the short convolution.
        expand: inner width d over d_model.
        dt_rank: rank of the projection to step sizes; "auto" is d_model / 16, rounded up.
        dt_min, dt_max, dt_init_floor: initial step sizes are log-uniform between the first two, at least the third.
        dt_init, dt_scale: weights of dt_proj start "random", uniform in ± dt_scale / sqrt(dt_rank), or "constant".
        conv_bias, bias: of the convolution; of in_proj and out_proj.
        norm_bcdt: dt, B and C are divided by their root mean square (+ norm_eps) first, as Falcon-Mamba does.

    The parameters' names, shapes, initial values and defaults are those of the published code.
    """

    ssm_parameters = ("A_log", "D")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        norm_bcdt: bool = False,
        norm_eps: float = 1e-6,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f"Mamba: dt_init is {dt_init!r}, expected 'random' or 'constant'")
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f"Mamba: dt_rank is {dt_rank!r}, expected an integer or 'auto'")
        self.d_model, self.d_state = d_model, d_state
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.norm_bcdt, self.norm_eps = norm_bcdt, norm_eps
        factory = {"device": device, "dtype": dtype}
        fp32 = {"device": device, "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = CausalConv(self.d_inner, d_conv, bias=conv_bias, activation="silu", **factory)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = StepProjection(
            self.dt_rank,
            self.d_inner,
            (dt_min, dt_max, dt_init_floor),
            scale=dt_scale * self.dt_rank**-0.5,
            constant=dt_init == "constant",
            **factory,
        )
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, **fp32))
        self.D = nn.Parameter(torch.empty(self.d_inner, **fp32))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self.reset_ssm_parameters()

    def reset_parameters(self) -> None:
        """Every parameter anew; the linears and the convolution by PyTorch's defaults, as published."""
        for module in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            module.reset_parameters()
        self.reset_ssm_parameters()

    @torch.no_grad()
    def reset_ssm_parameters(self) -> None:
        self.dt_proj.reset_parameters()
        self.A_log.copy_(torch.arange(1, self.d_state + 1).log().expand(self.d_inner, -1))  # S4D-Real
        nn.init.ones_(self.D)

    def initial_state(self, batch: int) -> MambaState:
        return MambaState(self.conv1d.initial_state(batch), self.A_log.new_zeros(batch, self.d_inner, self.d_state))

    def forward(
        self, x: Tensor, state: MambaState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """(b, l, d_model), from `state` or from zeros -> (b, l, d_model), the state after it."""
        check_input(self, x, self.d_model)
        window, ssm = state if state is not None else (None, None)
        x, z = ops.split(self.in_proj(x), self.d_inner, self.d_inner)
        x, window = self.conv1d(x, window, cu_seqlens=cu_seqlens)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        if self.norm_bcdt:
            dt, B, C = (F.rms_norm(t, t.shape[-1:], eps=self.norm_eps) for t in (dt, B, C))
        # The scan adds the bias as it reads dt: a sum in float32 here would be twice as wide, and a pass over it more.
        # Whatever stands in dt_proj's place, an adapter or a quantised layer, adds its own.
        dt, bias = self.dt_proj(dt, split=True) if type(self.dt_proj) is StepProjection else (self.dt_proj(dt), None)
        y, ssm = ops.selective_scan(
            x,
            dt,
            -torch.exp(self.A_log),
            B,
            C,
            D=self.D,
            z=z,
            dt_bias=bias,
            dt_softplus=True,
            initial_state=ssm,
            cu_seqlens=cu_seqlens,
        )
        return self.out_proj(y), MambaState(window, ssm)


class StepProjection(SSMParameters, nn.Linear):
    """A linear layer to raw step sizes whose bias is added in float32.

    The bias is the recurrence's dt_bias, about -2 to -7: rounding the sum to bfloat16 would put every step up to 1.6 %
    off. To whatever wraps or replaces linear layers this is one: calling it gives x W^T + bias.
    """

    ssm_parameters = ("bias",)

    def __init__(
        self,
        rank: int,
        channels: int,
        steps: tuple[float, float, float],
        *,
        scale: float,
        constant: bool,
        device=None,
        dtype=None,
    ):
        # First: the base class's constructor ends in reset_parameters.
        self.steps = steps  # dt_min, dt_max, floor
        self.scale, self.constant = scale, constant
        super().__init__(rank, channels, device=device, dtype=dtype)
        self.bias = nn.Parameter(self.bias.detach().to(torch.promote_types(self.bias.dtype, torch.float32)))

    def reset_parameters(self) -> None:
        """Its own initial values, not a linear layer's: some frameworks reset module after module."""
        if self.constant:
            nn.init.constant_(self.weight, self.scale)
        else:
            nn.init.uniform_(self.weight, -self.scale, self.scale)
        self.reset_ssm_parameters()

    @torch.no_grad()
    def reset_ssm_parameters(self) -> None:
        self.bias.copy_(log_uniform_steps(self.out_features, *self.steps))

    def forward(self, input: Tensor, *, split: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x W^T + bias; with `split` the two apart, for a scan that adds them as it reads."""
        dt = F.linear(input, self.weight)
        return (dt, self.bias) if split else dt + self.bias
