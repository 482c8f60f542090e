"""The Mamba-2 layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ophis import layers
from ophis.compat.inference_cache import CachedMixer
from ophis.compat.mamba_ssm.utils.generation import InferenceParams
from ophis.compat.packing import Runs


class Mamba2(CachedMixer, layers.Mamba2):
    """`ophis.layers.Mamba2` with the original's constructor, call and cache; the parameters have the same names.

    The arguments are the layer's; `chunk_size`, `use_mem_eff_path` and `sequence_parallel` are taken and not used, and
    a `process_group` is refused. `layer_idx` is the key of its states in `InferenceParams.key_value_memory_dict`:
    (b, h p + 2 g n, w) the last inputs of the convolution and (b, h, p, n).
    """

    run = layers.Mamba2.forward

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        if process_group is not None:
            raise NotImplementedError("Mamba2: Ophis does not split a layer over processes; leave out process_group")
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            headdim=headdim,
            ngroups=ngroups,
            d_ssm=d_ssm,
            A_init_range=A_init_range,
            D_has_hdim=D_has_hdim,
            rmsnorm=rmsnorm,
            norm_before_gate=norm_before_gate,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            conv_init=conv_init,
            conv_bias=conv_bias,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.d_conv, self.conv_init, self.expand, self.layer_idx = d_conv, conv_init, expand, layer_idx
        self.d_inner, self.nheads = self.d_ssm + self.d_mlp, self.heads
        self.rmsnorm, self.norm_before_gate = rmsnorm, norm_before_gate
        self.chunk_size, self.use_mem_eff_path = chunk_size, use_mem_eff_path
        self.process_group, self.sequence_parallel, self.world_size, self.local_rank = None, sequence_parallel, 1, 0
        self.activation, self.act = "silu", nn.SiLU()
        start = 2 * self.d_mlp + self.d_ssm
        self.conv_inputs = slice(start, start + self.conv_dim)
        self.mark_parameters()

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:  # type: ignore[override]
        """Like u, from the cached states where inference_params.seqlen_offset is above 0.

        Args:
            u: (b, l, d_model), or with `seqlen` (b l, d_model).
            seqlen: l.
            seq_idx: (b, l) integers: each run of equal ones is a sequence of its own.
            cu_seqlens: (sequences + 1,) offsets of sequences packed in a batch of 1. They keep them apart, with seq_idx
                or without it; positions after the last are padding.
            inference_params: an `InferenceParams`; it then holds one row for each of cu_seqlens, or of the batch.
        """
        x = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        if inference_params is not None and inference_params.seqlen_offset > 0:
            states = self._get_states_from_cache(inference_params, x.shape[0])
            y = self.advance(x, *states)
        elif inference_params is None:
            y = self._packed(x, seq_idx, cu_seqlens)
        elif cu_seqlens is not None:
            states = self._get_states_from_cache(inference_params, len(cu_seqlens) - 1)
            y = self._begin_packed(x, cu_seqlens, *states)
        elif seq_idx is None:
            y = self.advance(x, *self._get_states_from_cache(inference_params, x.shape[0]), begin=True)
        else:
            raise ValueError("Mamba2: to cache the states of packed sequences (seq_idx), give their cu_seqlens as well")
        return y if seqlen is None else y.flatten(0, 1)

    def _packed(self, x, seq_idx, cu_seqlens):
        if seq_idx is None and cu_seqlens is None:
            return self.run(x)[0]
        if seq_idx is None:
            seq_idx = torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
        runs = Runs.of(seq_idx, cu_seqlens)
        return runs.unpack(self.run(runs.pack(x), cu_seqlens=runs.cu_seqlens)[0])

    def _begin_packed(self, x, cu_seqlens, conv_state, ssm_state):
        # What comes after the last sequence is one more, whose states go nowhere.
        end = cu_seqlens.new_full((1,), x.shape[1])
        rows = [torch.cat([state, torch.zeros_like(state[:1])]) for state in (conv_state, ssm_state)]
        y = self.advance(x, *rows, begin=True, cu_seqlens=torch.cat([cu_seqlens, end]).to(torch.int32))
        conv_state.copy_(rows[0][:-1])
        ssm_state.copy_(rows[1][:-1])
        return y

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """(batch_size, h p + 2 g n, w) and (batch_size, h, p, n), zeros, in the parameters' dtype or the one given."""
        zeros = partial(torch.zeros, device=self.D.device, dtype=dtype or self.conv1d.weight.dtype)
        return (
            zeros(batch_size, self.d_conv, self.conv_dim).transpose(1, 2),
            zeros(batch_size, self.heads, self.headdim, self.d_state),
        )
