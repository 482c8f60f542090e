"""Packed sequences as collators describe them, in the one form that mixers take: `seq_idx`.   b batch  l length"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from ophis.integrations.transformers.sequences import checked


def understanding_packing(original: Callable[..., Any]) -> Callable[..., Any]:
    """The `forward` of a stack of layers that takes any of `seq_idx`, `cu_seq_lens_q` and `position_ids` for packing.

    The original hands `seq_idx` to its mixers. Its attention layers, if there are any, are kept to one sequence by a
    mask, and positions begin anew with each; without packing they go on from the cache, which Bamba forgets.
    """
    names = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names) or given.keys() & kwargs.keys():
            return original(self, *args, **kwargs)  # raises the TypeError that Python has for it
        return original(self, **packed(self, {**given, **kwargs}, attends="position_ids" in names))

    return forward


def packed(model: Any, call: dict[str, Any], attends: bool) -> dict[str, Any]:
    """The arguments of a call, with `seq_idx` among them if it is packed."""
    inputs = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    if inputs is None:
        return call
    seq_idx, cache = sequence_indices(call, *inputs.shape[:2]), cache_of(call)
    if seq_idx is None:
        if attends and cache is not None and call.get("position_ids") is None:
            positions = torch.arange(inputs.shape[1], device=inputs.device) + cache.get_seq_length()
            call = {**call, "position_ids": positions[None]}
        return call
    call = {**call, "seq_idx": seq_idx}
    if not attends:
        return call
    mask = call.get("attention_mask")
    if cache is not None:
        raise ValueError(
            f"{type(model).__name__}: packed sequences beside a cache: its attention layers cannot tell which "
            "of them the cached ones belong to; pass either"
        )
    if isinstance(mask, Tensor) and not bool((mask != 0).all()):
        raise ValueError(
            f"{type(model).__name__}: attention_mask has zeros beside packed sequences; expected either. Padding after "
            "the last sequence can be a sequence of its own"
        )
    if call.get("position_ids") is None:
        call["position_ids"] = positions_of(seq_idx)
    if "flash" in str(model.config._attn_implementation) and call.get("cu_seq_lens_q") is None and len(seq_idx) == 1:
        call.update(offsets_of(call["position_ids"][0]))  # which needs no mask, and not every model tells it positions
    like = model.get_input_embeddings().weight
    shape = like.new_empty(*inputs.shape[:2], 0)  # the mask takes nothing else of it but dtype and device
    causal = create_causal_mask(model.config, shape, None, None, position_ids=call["position_ids"])
    call["attention_mask"] = {"full_attention": causal, "linear_attention": None}
    return call


def sequence_indices(call: dict[str, Any], b: int, l: int) -> Tensor | None:
    """(b, l) int32, the number of each position's sequence; None where nothing is packed."""
    if call.get("seq_idx") is not None:
        return checked(call["seq_idx"], b, l)
    offsets, positions, mask = (call.get(name) for name in ("cu_seq_lens_q", "position_ids", "attention_mask"))
    if offsets is not None:
        if b != 1:
            raise ValueError(f"cu_seq_lens_q describes one packed row, but the batch has {b}; expected a batch of 1")
        places = torch.arange(l, device=offsets.device)
        return torch.searchsorted(offsets[1:].contiguous(), places, right=True).int()[None]
    # Positions also restart where a batch is padded, and go on where there is a cache.
    if positions is None or positions.ndim != 2 or cache_of(call) is not None or isinstance(mask, dict):
        return None
    if mask is not None and not bool((mask != 0).all()):
        return None
    begins = F.pad(positions.diff(dim=1) != 1, (1, 0))
    return begins.cumsum(1).int().expand(b, l) if bool(begins.any()) else None


def cache_of(call: dict[str, Any]) -> Any:
    """By the name that some version of transformers has for it."""
    caches = (call.get(name) for name in ("cache", "past_key_values", "cache_params"))
    return next((cache for cache in caches if cache is not None), None)


def offsets_of(positions: Tensor) -> dict[str, Any]:
    """Of the sequences in a row of positions (l,), as the kernels of flash attention take them."""
    starts = F.pad(positions.diff() != 1, (1, 0), value=True).nonzero().squeeze(1)
    offsets = F.pad(starts, (0, 1), value=len(positions)).int()
    longest = int(offsets.diff().max())
    return dict(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=longest, max_length_k=longest)


def positions_of(seq_idx: Tensor) -> Tensor:
    """(b, l) int64, from 0 in each sequence."""
    places = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    begins = F.pad(seq_idx.diff(dim=1) != 0, (1, 0), value=True)
    return places - (places * begins).cummax(1).values
