"""The long convolution by fast Fourier transforms."""

from __future__ import annotations

import torch

from ophis.ops.long_conv import long_conv


@long_conv.register("torch")
def fft(x, kernel, *, D):
    wide = torch.promote_types(x.dtype, torch.float32)
    l = x.shape[1]
    size = 2 * l  # room for the linear convolution: nothing wraps around
    u, kernel = x.to(wide), kernel[:, :l].to(wide)
    spectrum = torch.fft.rfft(u, n=size, dim=1) * torch.fft.rfft(kernel, n=size).t()
    y = torch.fft.irfft(spectrum, n=size, dim=1)[:, :l]
    return (y if D is None else y + D.to(wide) * u).to(x.dtype)
