"""Decoding: greedy or sampling, a token at a time from cached states.   b batch  l length  v vocabulary"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass
class InferenceParams:
    """What the layers remember between two calls of a model, by their layer_idx, and how far they are.

    Args:
        max_seqlen, max_batch_size: what the cache is made for.
        seqlen_offset: positions read so far. At 0 a call begins anew; above, it goes on from the cache. The caller
            counts it up.
        batch_size_offset, lengths_per_sample: kept for the code that names them; no layer here reads them.
        key_value_memory_dict: the states of each layer, changed in place; filled at the first call where it is empty.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """(b, v) -> (b,), the next tokens.

    Args:
        top_k: among the likeliest so many; 1 takes the likeliest, 0 sets no limit.
        top_p: among the likeliest that together have this probability; 0 or 1 sets no limit.
        min_p: among those at least this times as likely as the likeliest; 0 sets no limit.
        temperature: divides the logits first.
    """
    if top_k == 1:
        return logits.argmax(-1)
    from transformers.generation import logits_process as limits

    if temperature != 1:
        logits = limits.TemperatureLogitsWarper(float(temperature))(None, logits)  # type: ignore[arg-type]
    if top_k > 0:
        logits = limits.TopKLogitsWarper(top_k)(None, logits)  # type: ignore[arg-type]
    if 0 < top_p != 1:
        logits = limits.TopPLogitsWarper(top_p)(None, logits)  # type: ignore[arg-type]
    if min_p > 0:
        logits = limits.MinPLogitsWarper(min_p)(None, logits)  # type: ignore[arg-type]
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: BaseStreamer | None = None,
) -> GenerateDecoderOnlyOutput:
    """Prompts (b, l), all of one length, and what follows them.

    Args:
        max_length: of prompt and continuation together. One token at least is decoded.
        top_k, top_p, min_p, temperature: as in `sample`.
        repetition_penalty: above 1 makes tokens that were there before less likely (Keskar et al. 2019).
        eos_token_id: decoding ends early once every sequence has just got this one.
        teacher_outputs: (b, m), taken instead of what is drawn, for their m positions.
        vocab_size: tokens beyond it, the padding of the vocabulary, are not drawn.
        cg: taken and not used; the original replays a CUDA graph.
        enable_timing: print how long it took.
        output_scores: keep the logits of every step.
        streamer: as transformers' `generate` has them.

    Returns:
        transformers' `GenerateDecoderOnlyOutput`, with `sequences` (b, up to max_length) and `scores`, a (b, v) each.
    """
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    began = time.perf_counter()
    parameters = InferenceParams(max_seqlen=max_length, max_batch_size=input_ids.shape[0])
    penalty = None if repetition_penalty == 1 else RepetitionPenaltyLogitsProcessor(float(repetition_penalty))
    if streamer is not None:
        streamer.put(input_ids.cpu())
    sequences, scores, last = input_ids, [], input_ids
    while True:
        at = parameters.seqlen_offset
        positions = None if at == 0 else torch.full_like(last, at)
        logits = model(last, position_ids=positions, inference_params=parameters, num_last_tokens=1).logits[:, -1]
        logits = logits[:, :vocab_size]
        if output_scores:
            scores.append(logits)
        parameters.seqlen_offset += last.shape[1]
        if penalty is not None:
            logits = penalty(sequences, logits)  # type: ignore[arg-type]
        if teacher_outputs is not None and parameters.seqlen_offset < teacher_outputs.shape[1]:
            token = teacher_outputs[:, parameters.seqlen_offset]
        else:
            token = sample(logits, top_k, top_p, min_p, temperature)
        last = token[:, None]
        sequences = torch.cat([sequences, last], 1)
        if streamer is not None:
            streamer.put(last.cpu())
        ended = eos_token_id is not None and bool((last == eos_token_id).all())
        if ended or parameters.seqlen_offset >= max_length - 1:
            break
    if streamer is not None:
        streamer.end()
    if enable_timing:
        if sequences.is_cuda:
            torch.cuda.synchronize(sequences.device)
        print(f"Prompt processing + decoding time: {(time.perf_counter() - began) * 1000:.0f}ms")
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=tuple(scores))  # type: ignore[arg-type]


class GenerationMixin:
    """`generate` for a model that is called with `inference_params` and `num_last_tokens`."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> Any:
        raise NotImplementedError

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs,
    ) -> Any:
        """(b, up to max_length) token ids, the prompts included; greedy unless top_k is other than 1.

        The arguments, `kwargs` too, are those of `decode`. With return_dict_in_generate its whole result is returned,
        `scores` being None unless output_scores.
        """
        output = decode(
            input_ids,
            self,
            max_length,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            temperature=temperature,
            output_scores=output_scores,
            **kwargs,
        )
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences
