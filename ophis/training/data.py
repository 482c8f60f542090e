"""Documents as sequences of tokens, all of one length.   l length"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ophis.training.documents import hold_out
from ophis.training.tokenizer import encode


class Stream(NamedTuple):
    """Documents one behind the other, each followed by the end-of-text token."""

    ids: Tensor  # (tokens,) int32
    size: int  # bytes of text

    @classmethod
    def of(cls, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Stream:
        end = torch.tensor([tokenizer.eos_token_id], dtype=torch.int32)
        ids = [part for text in texts for part in (encode(tokenizer, text), end)]
        return cls(torch.cat(ids) if ids else end[:0], sum(len(text.encode()) for text in texts))


class Sequences(Dataset):
    """A stream cut into sequences (l,); what is left over at the end, less than one, is not used.

    The last token of one is the first of the next, so that each token is predicted exactly once: a model predicts a
    sequence's tokens but for the first. Documents run on from one to the next, told apart by the end-of-text token.
    """

    def __init__(self, stream: Stream, length: int):
        self.stream, self.length = stream, length

    def __len__(self) -> int:
        return max(len(self.stream.ids) - 1, 0) // (self.length - 1)

    def __getitem__(self, index: int) -> Tensor:
        start = index * (self.length - 1)
        return self.stream.ids[start : start + self.length]


class Data(NamedTuple):
    """What a model is trained on, and what it is measured on."""

    train: Sequences
    held_out: Sequences

    @classmethod
    def of(cls, texts: list[str], tokenizer: PreTrainedTokenizerFast, *, length: int, held_out: float = 0.05) -> Data:
        """Sequences of `length` tokens; of the held-out text shorter ones where it is shorter than one.

        Raises:
            ValueError: the text is too short for one sequence.
        """
        split = hold_out(texts, held_out)
        train, rest = Stream.of(split.train, tokenizer), Stream.of(split.held_out, tokenizer)
        data = cls(Sequences(train, length), Sequences(rest, max(2, min(length, len(rest.ids)))))
        if not len(data.train) or not len(data.held_out):
            raise ValueError(
                f"the text is too short: {len(train.ids)} tokens to train on and {len(rest.ids)} held out; a sequence "
                f"has {length} (--length)"
            )
        return data

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokens: whether a run that goes on reads the text it began with."""
        digest = hashlib.sha256()
        for sequences in self:
            digest.update(sequences.stream.ids.numpy().tobytes())
            digest.update(b"|")
        return digest.hexdigest()[:16]

    def bits_per_byte(self, loss: float) -> float:
        """What the held-out text costs per byte, ends of documents included, at so many nats per token."""
        stream = self.held_out.stream
        return loss * len(stream.ids) / (stream.size * math.log(2))


def collate(sequences: list[Tensor]) -> dict[str, Tensor]:
    """A batch as the model takes it, (b, l); the model shifts the labels by one itself."""
    ids = torch.stack(sequences).long()
    return {"input_ids": ids, "labels": ids}
