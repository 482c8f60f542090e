"""The states of a mixer as the original caches them: two tensors a layer, changed in place.

b batch  d channels of the convolution  w its width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ophis.compat.mamba_ssm.utils.generation import InferenceParams


class CachedMixer(nn.Module):
    """What Mamba and Mamba2 share: a layer of `ophis.layers` that keeps its state in `InferenceParams`.

    The cached window (b, d, w) holds one input more than the convolution reads, the oldest.
    """

    ssm_parameters: tuple[str, ...]
    layer_idx: int | None
    in_proj: nn.Module
    conv_inputs: slice  # which outputs of in_proj the convolution takes
    # (u, (window, ssm) or None, cu_seqlens=) -> (y, (window, ssm) after it): the layer's own forward
    run: Callable[..., tuple[Tensor, Any]]

    def mark_parameters(self) -> None:
        """Sets what training code asks of parameters: to leave them their initial values, and without weight decay."""
        for name in self.ssm_parameters:
            if (parameter := getattr(self, name)) is not None:
                parameter._no_weight_decay = True

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, 1, d_model), and the states, which change in place -> (b, 1, d_model), the states."""
        return self.advance(hidden_states, conv_state, ssm_state), conv_state, ssm_state

    def advance(
        self,
        u: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        *,
        begin: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Any number of positions from the cached states, or from nothing, whose states are then written there."""
        before = None
        if not begin:
            wide = torch.promote_types(ssm_state.dtype, torch.float32)
            before = (conv_state[..., 1:].transpose(1, 2).to(wide), ssm_state.to(wide))
        y, (window, ssm) = self.run(u, before, cu_seqlens=cu_seqlens)
        with torch.no_grad():
            oldest = self._oldest(u, conv_state, begin, cu_seqlens)
            conv_state.copy_(torch.cat([oldest[..., None], window.transpose(1, 2)], -1))
            ssm_state.copy_(ssm)
        return y

    def _oldest(self, u: Tensor, conv_state: Tensor, begin: bool, cu_seqlens: Tensor | None) -> Tensor:
        """(b, d): the last input but w-1, which the window after a call has lost; zeros where there is none."""
        l, w = u.shape[1], conv_state.shape[-1]
        if cu_seqlens is not None:
            places = cu_seqlens[1:].long() - w
            inside = places >= cu_seqlens[:-1]
            found = self.in_proj(u[0, torch.where(inside, places, 0)])[..., self.conv_inputs]
            return found.masked_fill(~inside[:, None], 0)
        if l >= w:
            return self.in_proj(u[:, -w])[..., self.conv_inputs]
        return torch.zeros_like(conv_state[..., 0]) if begin else conv_state[..., l].clone()

    def _get_states_from_cache(
        self, inference_params: InferenceParams, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError(
                f"{type(self).__name__}: to decode it needs a layer_idx, its key in the cache; it has none"
            )
        memory = inference_params.key_value_memory_dict
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        states = memory[self.layer_idx]
        name = type(self).__name__
        for state in states:
            if state.shape[0] != batch_size:
                raise ValueError(
                    f"{name}: the cached state is of {state.shape[0]} sequences, the input of {batch_size}"
                )
            if initialize_states:
                state.zero_()
        return states
