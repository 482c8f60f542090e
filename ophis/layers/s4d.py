"""The S4D layer (Gu et al. 2022).   b batch  l length  d channels  n modes"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ophis import ops
from ophis.layers.ssm_parameters import SSMParameters, check_input


class S4DState(NamedTuple):
    ssm: Tensor  # (b, d, n), complex but for init "real"


class S4D(SSMParameters):
    """y = GLU(output_linear(dropout(gelu(s4d(x) + D x)))): a convolution over a prompt, a recurrence token by token.

    Args:
        d_model: d, the width; every channel has a state space of its own.
        d_state: its size; complex inits hold d_state / 2 modes, one of each conjugate pair.
        init: "lin", "inv", "legs" or "real" (`ophis.ops.s4d_init`).
        discretization: "zoh" or "bilinear".
        dt_min, dt_max: initial step sizes are log-uniform between them.
        dropout: after the activation.
    """

    ssm_parameters = ("log_dt", "A_log", "A_imag", "B", "C", "D")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: str = "lin",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        A, _ = ops.s4d_init(init, d_state)  # refuses what it does not know
        self.d_model, self.d_state, self.init, self.discretization = d_model, d_state, init, discretization
        self.dt_min, self.dt_max = dt_min, dt_max
        fp32 = {"device": device, "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)}
        modes = (d_model, len(A))
        complex_modes = (*modes, 2) if A.is_complex() else modes  # real and imaginary parts
        self.log_dt = nn.Parameter(torch.empty(d_model, **fp32))
        self.A_log = nn.Parameter(torch.empty(modes, **fp32))  # log of minus the real part
        self.A_imag = nn.Parameter(torch.empty(modes, **fp32)) if A.is_complex() else None
        self.B = nn.Parameter(torch.empty(complex_modes, **fp32))
        self.C = nn.Parameter(torch.empty(complex_modes, **fp32))
        self.D = nn.Parameter(torch.empty(d_model, **fp32))
        self.dropout = nn.Dropout(dropout)
        self.output_linear = nn.Linear(d_model, 2 * d_model, device=device, dtype=dtype)
        self.reset_ssm_parameters()

    def reset_parameters(self) -> None:
        self.output_linear.reset_parameters()
        self.reset_ssm_parameters()

    @torch.no_grad()
    def reset_ssm_parameters(self) -> None:
        A, B = ops.s4d_init(self.init, self.d_state)
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        self.A_log.copy_((-A.real).log().expand_as(self.A_log))
        if self.A_imag is not None:
            self.A_imag.copy_(A.imag.expand_as(self.A_imag))
            B = torch.view_as_real(B)
        self.B.copy_(B.expand_as(self.B))
        # A complex normal number has half the variance in each part.
        nn.init.normal_(self.C, std=1.0 if self.A_imag is None else 0.5**0.5)
        nn.init.normal_(self.D)

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt (d,), A, B, C (d, n): the continuous system."""
        A, B, C = -torch.exp(self.A_log), self.B, self.C
        if self.A_imag is not None:
            A, B, C = torch.complex(A, self.A_imag), torch.view_as_complex(B), torch.view_as_complex(C)
        return torch.exp(self.log_dt), A, B, C

    def initial_state(self, batch: int) -> S4DState:
        _, A, _, _ = self.system()
        return S4DState(torch.zeros_like(A).expand(batch, -1, -1))

    def forward(
        self, x: Tensor, state: S4DState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, S4DState]:
        """(b, l, d_model), from `state` or from zeros -> (b, l, d_model), the state after it."""
        check_input(self, x, self.d_model)
        y, ssm = ops.s4d(
            x,
            *self.system(),
            D=self.D,
            discretization=self.discretization,
            initial_state=None if state is None else state.ssm,
            cu_seqlens=cu_seqlens,
        )
        return F.glu(self.output_linear(self.dropout(F.gelu(y))), dim=-1), S4DState(ssm)
