"""The mixers of transformers' Mamba-family models on the ops: what stands in for their `forward`.

They compute the same, and take for what it means the input that transformers gets wrong:

- a prompt that goes on from a cache begins with the cached state; transformers' Mamba scans from zeros;
- padding, on either side, is left out; transformers takes right padding into the states that it caches;
- packed sequences (`seq_idx`) begin from zeros each; transformers' Mamba takes them for one;
- step sizes are held to `time_step_limit` in decoding as in the prompt;
- `dt_proj` is called as a module, so that an adapter on it counts.

b batch  l length  d inner width  n state size  h heads  p head width  g groups  w width of the convolution
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.utils.import_utils import is_tracing

from ophis import ops
from ophis.integrations.transformers.functions import convolve, convolve_step
from ophis.integrations.transformers.sequences import Sequences

Block = Callable[[Any, Tensor, "States"], Tensor]  # (mixer, inputs (b, l, width), states) -> (b, l, width)


def standing_in(block: Block, *used_raw: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Makes a block the `forward` of a mixer, given the one that it stands in for.

    `used_raw` are the modules whose weights the block takes without calling them: accelerate loads them before it.
    """

    def instead_of(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @force_accelerate_hooks(list(used_raw))
        @functools.wraps(original)
        def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
            cache = kwargs.pop("cache", cache_params)  # as 5.24 calls it
            if attention_mask is not None and is_tracing(hidden_states):
                # How much of it is real cannot be known here. The original, on our functions, needs not know.
                return original(self, hidden_states, cache, attention_mask, **kwargs)
            sequences = Sequences.of(hidden_states, attention_mask, kwargs.get("seq_idx"))
            if sequences is None:
                return block(self, hidden_states, States(self, cache, hidden_states, None))
            inputs = sequences.pack(hidden_states)
            if inputs.shape[1] == 0:  # nothing but padding
                return torch.zeros_like(hidden_states)
            return sequences.unpack(block(self, inputs, States(self, cache, inputs, sequences)))

        return forward

    return instead_of


class States:
    """A layer's window (b, d, w) and recurrent state in a cache of transformers; None while there are none."""

    def __init__(self, mixer: Any, cache: Any, x: Tensor, sequences: Sequences | None):
        self.cache, self.layer, self.sequences = cache, mixer.layer_idx, sequences
        self.window: Any = None
        self.recurrent: Any = None
        self.records = self.in_place = False
        if cache is not None and cache.has_previous_state(self.layer):
            held = cache.layers[self.layer]
            self.window, self.recurrent = held.conv_states[0], held.recurrent_states[0]
            self.records = getattr(held, "record_past", False)  # keeps every input until it is cropped
            # Without gradients a single position is computed where the states are. With them, what the backward pass
            # reads must not change meanwhile.
            if torch.is_grad_enabled():
                self.window, self.recurrent = self.window.clone(), self.recurrent.clone()
            else:
                self.in_place = x.shape[1] == 1 and sequences is None and not self.records

    def convolve(self, mixer: Any, x: Tensor) -> Tensor:
        weight, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
        if self.in_place:
            return convolve_step(x[:, 0], self.window, weight, bias, mixer.activation)[:, None]
        y, last = convolve(x, weight, bias, mixer.activation, self.window, self.sequences)
        if self.cache is not None:
            width = weight.shape[-1]
            if self.sequences is not None:
                x = F.pad(last.to(x.dtype), (0, 0, 1, 0))  # as wide as a window; its first input is read by no one
            elif not self.records:
                x = x[:, -width:]
            self.cache.update_conv_state(x.transpose(1, 2), self.layer, conv_kernel_size=width)
        return y

    def begin(self, *shape: int) -> Tensor | None:
        """What the recurrence begins with, (b, *shape), or a row for each packed sequence."""
        if self.recurrent is None:
            return None
        state = self.recurrent.reshape(-1, *shape)
        return state if self.sequences is None else self.sequences.begin(state)

    def end(self, state: Tensor, *shape: int) -> None:
        """Keeps what the recurrence ended with as (b, *shape)."""
        if self.cache is not None:
            state = state if self.sequences is None else self.sequences.end(state)
            self.cache.update_recurrent_state(state.reshape(-1, *shape), self.layer)

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.sequences is None else self.sequences.cu_seqlens


def mamba(self: Any, u: Tensor, states: States) -> Tensor:
    """Mamba; with norms of dt, B and C, as in Falcon-Mamba and Jamba."""
    x, z = self.in_proj(u).chunk(2, -1)
    x = states.convolve(self, x)
    dt, B, C = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], -1)
    if hasattr(self, "dt_layernorm"):
        dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
    # The scan adds the bias in float32. Whatever stands in dt_proj's place, an adapter or a quantised layer, is called.
    plain = type(self.dt_proj) is nn.Linear
    dt = F.linear(dt, self.dt_proj.weight) if plain else self.dt_proj(dt)
    y = scan(states, x, dt, B, C, z, self.A_log, self.D, self.dt_proj.bias if plain else None)
    return self.out_proj(y.to(u.dtype))


def zamba(self: Any, u: Tensor, states: States) -> Tensor:
    """Mamba whose heads have selections of their own, weights (h, ..., ...); the channels of x and z alternate."""
    x, z = self.in_proj(u).unflatten(-1, (-1, 2)).unbind(-1)
    x = states.convolve(self, x)
    heads = x.unflatten(-1, (self.n_mamba_heads, self.mamba_head_dim))
    selection = torch.einsum("b l h p, h k p -> b l h k", heads, self.x_proj_weight)
    dt, B, C = selection.split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], -1)
    dt = torch.einsum("b l h r, h p r -> b l h p", dt, self.dt_proj_weight).flatten(2)
    y = scan(states, x, dt, B, C, z, self.A_log, self.D, self.dt_proj_bias)
    return self.out_proj(y.to(u.dtype))


def scan(
    states: States,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor,
    A_log: Tensor,
    D: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The parameters are (d, ...), or (h, p, ...) as the state is then: (b, h, p, n)."""
    shape = A_log.shape
    A, n = rates(A_log).flatten(0, -2), shape[-1]
    bias = None if bias is None else bias.float().flatten()
    options: Any = dict(D=D.float().flatten(), dt_bias=bias, dt_softplus=True)
    if states.in_place:
        state = states.recurrent.view(-1, len(A), n)
        return ops.selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, z=z[:, 0], **options)[:, None]
    y, state = ops.selective_scan(
        x, dt, A, B, C, z=z, initial_state=states.begin(len(A), n), cu_seqlens=states.cu_seqlens, **options
    )
    states.end(state, *shape)
    return y


def rates(A_log: Tensor) -> Tensor:
    """A, in float32. Decoding makes it anew for each token: in new memory twice, that would be a tenth of a mixer."""
    A = torch.exp(A_log.float())
    return -A if torch.is_grad_enabled() else A.neg_()


def mamba2(self: Any, u: Tensor, states: States) -> Tensor:
    return self.out_proj(ssd(self, self.in_proj(u), states).to(u.dtype))


def falcon_h1(self: Any, u: Tensor, states: States) -> Tensor:
    """Mamba-2 with multipliers around its first projection."""
    projected = self.in_proj(u * self.ssm_in_multiplier) * self.mup_vector
    return self.out_proj(ssd(self, projected, states).to(u.dtype))


def ssd(self: Any, projected: Tensor, states: States) -> Tensor:
    """From one projection to the next: (b, l, 2 d + 2 g n + h) -> (b, l, d)."""
    z, xBC, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], -1)
    xBC = states.convolve(self, xBC)
    width = self.n_groups * self.ssm_state_size
    x, B, C = xBC.split([self.intermediate_size, width, width], -1)
    x, gate = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (x, z))
    B, C = (t.unflatten(-1, (self.n_groups, self.ssm_state_size)) for t in (B, C))
    normed = getattr(self, "mamba_rms_norm", True)  # a choice in Falcon-H1
    A = rates(self.A_log)
    options: Any = dict(D=self.D, dt_bias=self.dt_bias, dt_softplus=True, dt_limit=tuple(self.time_step_limit))
    if states.in_place:
        gate = None if normed else gate[:, 0]
        y = ops.ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], states.recurrent, z=gate, **options)[:, None]
    else:
        shape = (self.num_heads, self.head_dim, self.ssm_state_size)
        y, state = ops.ssd(
            x, dt, A, B, C, z=None if normed else gate, initial_state=states.begin(*shape),
            cu_seqlens=states.cu_seqlens, **options,
        )  # fmt: skip
        states.end(state, *shape)
    y = y.flatten(2)
    return self.norm(y, z) if normed else y
