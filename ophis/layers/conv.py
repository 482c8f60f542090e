"""The short causal convolution, under the name and shape of its parameters in every published checkpoint."""

from __future__ import annotations

from torch import Tensor, nn

from ophis import ops


class CausalConv(nn.Conv1d):
    """Depthwise causal convolution, (b, l, d) -> (b, l, d). Its state is the window of the last `width - 1` inputs.

    Weights start uniform in ± `init`; by PyTorch's default when None.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        bias: bool = True,
        activation: str | None,
        init: float | None = None,
        device=None,
        dtype=None,
    ):
        self.init, self.activation = init, activation  # first: the base class's constructor ends in reset_parameters
        super().__init__(channels, channels, width, groups=channels, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.init is not None:
            nn.init.uniform_(self.weight, -self.init, self.init)

    def forward(  # type: ignore[override]
        self, x: Tensor, state: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return ops.causal_conv(
            x,
            self.weight.squeeze(1),
            self.bias,
            activation=self.activation,
            initial_state=state,
            cu_seqlens=cu_seqlens,
        )

    def initial_state(self, batch: int) -> Tensor:
        """(batch, width - 1, channels), zeros."""
        return self.weight.new_zeros(batch, self.kernel_size[0] - 1, self.in_channels).float()
