"""What `generate` does otherwise than for a model with an attention cache: reading the prompt, and its states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from ophis.models.state import CACHE, ModelState, fingerprint


class StatefulGeneration(GenerationMixin):
    """transformers' `generate` on a `ModelState`: greedy, sampling and beams, streamers, criteria, kept states.

    transformers' own reading of the prompt differs between its versions where a kept state is read on from in chunks,
    drops tokens where only the new ones are given, and takes the logits of padding where it is on the right.
    """

    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override] (all of transformers' arguments)
        """transformers' own. A state to go on from is `past_key_values` or `cache`, whichever its version calls it."""
        names = kwargs.keys() & {"past_key_values", "cache"}
        given = [state for name in names if (state := kwargs.pop(name)) is not None]
        if given:
            kwargs[CACHE] = ModelState.of(*given)
        return super().generate(*args, **kwargs)  # type: ignore[misc] (of a model)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """From an empty `ModelState`, or from the one given."""
        state = model_kwargs.get(CACHE)
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"LanguageModel: cache_implementation={generation_config.cache_implementation!r} is for attention "
                "caches; leave it out, the state of this model has one form"
            )
        if generation_config.is_assistant:
            raise ValueError("LanguageModel: an assistant rejects tokens, and this one's state cannot be cut back")
        if not generation_config.use_cache and state is not None:
            raise ValueError("LanguageModel: use_cache=False, but a state to go on from is given as past_key_values")
        if generation_config.use_cache:
            model_kwargs[CACHE] = ModelState.of(state)

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Reads what the state has not read yet, in pieces of `prefill_chunk_size` where there is one."""
        given = dict(model_kwargs)
        state, mask, embedded = (given.pop(k, None) for k in (CACHE, "attention_mask", "inputs_embeds"))
        text = input_ids if embedded is None else embedded
        if state is not None and state.layers is not None:
            state = _of_rows(state, len(text), generation_config)
            # A mask that is all ones is dropped before, and its length kept.
            total = text.shape[1] if embedded is not None else getattr(generation_config, "_mask_length", text.shape[1])
            unread = _unread(text, state, total if mask is None else mask.shape[1])
            text, mask = text[:, -unread:], None if mask is None else mask[:, -unread:]
        given_text, before = text, None if state is None else state.fingerprint
        if mask is not None and bool((mask[:, -1] == 0).any()):
            text, mask = _to_the_right(text, mask)
        size = generation_config.prefill_chunk_size or text.shape[1]
        if size < text.shape[1] and state is None:
            raise ValueError("LanguageModel: prefill_chunk_size needs use_cache=True")
        outputs: Any = None
        read = 0
        for piece in text.split(size, 1):
            read += piece.shape[1]
            inputs = self.prepare_inputs_for_generation(
                input_ids if embedded is not None else piece,
                attention_mask=None if mask is None else mask[:, :read],
                inputs_embeds=None if embedded is None else piece,
                is_first_iteration=is_first_iteration,
                **{CACHE: state},
                **given,
            )
            outputs = self(**inputs, return_dict=True)  # type: ignore[operator] (the model that this is a part of)
            state = outputs.get(CACHE)
        if text is not given_text and state is not None and state.fingerprint is not None:
            # Of the tokens where they were given, which is how they come again with the state.
            outputs[CACHE] = replace(state, fingerprint=fingerprint(given_text, before))
        return outputs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        kwargs.pop("tokenizer", None)  # for stop strings; `generate` hands it on
        if next_sequence_length == 1 and not is_first_iteration:
            attention_mask = None  # a generated token is never padding, and a GPU need not be asked about it
        return super().prepare_inputs_for_generation(  # type: ignore[misc] (as above)
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _reorder_cache(self, past_key_values: ModelState, beam_idx: Tensor) -> ModelState:
        return past_key_values.select(beam_idx)


def _of_rows(state: ModelState, rows: int, generation_config: GenerationConfig) -> ModelState:
    """The state for that many rows: of one text for all of them, or of each prompt for each of its continuations."""
    each = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    if state.rows == rows:
        return state
    if state.rows == 1:
        return state.repeat(rows)
    if state.rows is not None and state.rows * each == rows:
        return state.repeat(each)
    raise ValueError(f"LanguageModel: past_key_values is of {state.rows} sequences, the prompts are {rows // each}")


def _unread(text: Tensor, state: ModelState, total: int) -> int:
    """How many of the last positions of `text` the state has not read, of `total` with those it has."""
    length = text.shape[1]
    if total > length:  # only what follows is given, and a mask over all
        if total != state.length + length and state.length:
            raise ValueError(
                f"LanguageModel: attention_mask has {total} positions, expected {state.length + length}: "
                f"{state.length} that the state has read and {length} new ones"
            )
        return length
    if length <= state.length:
        raise ValueError(
            f"LanguageModel: the state has read {state.length} tokens, of {length} that are given; give all of them "
            "and at least one more or, to give only what follows, past_key_values=state.as_prefix()"
        )
    known = state.fingerprint if state.length and not text.is_floating_point() else None
    if known is not None and not torch.equal(fingerprint(text[:, : state.length]), known.to(text.device)):
        raise ValueError(
            f"LanguageModel: the state has read {state.length} tokens, and they are not the first {state.length} of "
            "input_ids; give the text from its beginning or, to give only what follows, "
            "past_key_values=state.as_prefix()"
        )
    return length - state.length


def _to_the_right(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Every row's padding before its text, so that it ends in its last token. The mask may reach further back."""
    earlier, real = mask[:, : -text.shape[1]], mask[:, -text.shape[1] :] != 0
    order = real.to(torch.int8).argsort(dim=1, stable=True)
    index = order if text.ndim == 2 else order[..., None].expand_as(text)
    return text.gather(1, index), torch.cat([earlier, real.gather(1, order).to(mask.dtype)], 1)
