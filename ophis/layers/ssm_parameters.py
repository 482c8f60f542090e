"""What the parameters of the recurrence have in common: precision, optimiser group, initial values."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SSMParameters(nn.Module):
    """A module some of whose own parameters govern the recurrence.

    Those named in `ssm_parameters` stay float32 when the module is cast to half precision (a bfloat16 A_log is up to
    0.7 % off, and errors of a decay compound over the length), and take no weight decay.
    """

    ssm_parameters: tuple[str, ...] = ()

    def reset_ssm_parameters(self) -> None:
        """Their published initial values."""
        raise NotImplementedError

    def _apply(self, fn, recurse: bool = True):
        before = {
            name: (p.data, None if p.grad is None else p.grad.data)
            for name in self.ssm_parameters
            if (p := getattr(self, name)) is not None
        }
        super()._apply(fn, recurse)
        for name, (data, gradient) in before.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.float16, torch.bfloat16) and data.dtype != parameter.dtype:
                parameter.data = data.to(parameter.device)
                parameter.grad = None if gradient is None else gradient.to(parameter.device)
        return self


def log_uniform_steps(count: int, dt_min: float, dt_max: float, floor: float) -> Tensor:
    """(count,) raw steps: softplus of them is log-uniform in [dt_min, dt_max], and at least `floor`.

    The paper says uniform (Gu and Dao 2023, section 3.6); the published code, and so every checkpoint, is log-uniform.
    """
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(torch.rand(count) * (high - low) + low).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


def check_input(module: nn.Module, x: Tensor, width: int) -> None:
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"{type(module).__name__}: x has shape {tuple(x.shape)}, expected (batch, length, {width})")
