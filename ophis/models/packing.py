"""Where the sequences of a batch begin and end: padded, packed, or both.   b batch  l length  s sequences

Padding is packing: a padded batch runs as the sequences without their padding, one behind the other in a batch of one.
No layer knows of masks, and padding is neither computed nor seen.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label without a loss, as transformers has it


class PackingArguments(TypedDict, total=False):
    """Packed sequences, under each name that callers have for them; the first that is given holds.

    cu_seqlens, or cu_seq_lens_q and cu_seq_lens_k, which must be the same: (s + 1,) offsets 0..l in a batch of 1.
    seq_idx: (b, l), changes where a sequence of the row begins.
    position_ids: (b, l), does not count on where a sequence of the row begins. Nothing else is read from it.
    max_length_q, max_length_k: accepted from collators; nothing needs them.
    """

    cu_seqlens: Tensor | None
    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    seq_idx: Tensor | None
    position_ids: Tensor | None
    max_length_q: int | None
    max_length_k: int | None


class Packing(NamedTuple):
    """The sequences of a batch that is not simply one whole sequence a row."""

    rows: int  # b
    length: int  # l
    cu_seqlens: Tensor  # (s + 1,) int32, offsets of the sequences among the real positions
    places: Tensor | None  # (real positions,) int64, into the flattened batch; None: all of a batch of 1
    documents: bool  # a row may hold several sequences; otherwise sequence i is row i, padding or none

    @classmethod
    def of(
        cls,
        rows: int,
        length: int,
        attention_mask: Tensor | None,
        arguments: Mapping[str, Any],
        *,
        continued: bool = False,
    ) -> Packing | None:
        """From what a call says of it; None for one whole sequence a row.

        Args:
            rows, length: b and l.
            attention_mask: (b, l), zero at padding; with `continued` also (b, past + l).
            arguments: `PackingArguments`, and whatever else was given by name.
            continued: whether the call goes on from a state.

        Raises:
            TypeError: an argument of another name, but for those that ask for nothing (None or False).
            ValueError: a mask or offsets of another form.
        """
        _refuse_unknown(arguments)
        real = None if attention_mask is None else _real(attention_mask, rows, length, continued)
        offsets = _offsets(arguments, rows)
        if offsets is not None and real is None:
            return cls(rows, length, offsets, None, documents=True)
        numbers = _numbers(arguments, offsets, rows, length)
        packing = None if numbers is None else cls._of_documents(real, *numbers)
        if packing is not None or real is None:
            return packing
        cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return cls(rows, length, cu_seqlens, _places(real), documents=False)

    @classmethod
    def _of_documents(cls, real: Tensor | None, numbers: Tensor, step: int) -> Packing | None:
        """From numbers (b, l) that grow by `step` within a sequence; None where no row holds two sequences."""
        rows, length = numbers.shape
        whole = torch.ones_like(numbers, dtype=torch.bool) if real is None else real
        places = _places(whole)
        new_row = (places // length).diff() != 0
        new_sequence = ~new_row & (numbers.flatten()[places].diff() != step)
        if not bool(new_sequence.any()):
            return None
        starts = F.pad(new_row | new_sequence, (1, 0), value=True).nonzero().squeeze(1)
        cu_seqlens = F.pad(starts, (0, 1), value=len(places)).to(torch.int32)
        return cls(rows, length, cu_seqlens, None if real is None and rows == 1 else places, documents=True)

    @property
    def sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    def pack(self, x: Tensor) -> Tensor:
        """(b, l, ...) -> (1, real positions, ...)."""
        if self.places is None:
            return x
        return x.flatten(0, 1).index_select(0, self.places.to(x.device)).unsqueeze(0)

    def unpack(self, x: Tensor, filling: float = 0) -> Tensor:
        """(1, real positions, ...) -> (b, l, ...), with `filling` at padding."""
        if self.places is None:
            return x
        batch = x.new_full((self.rows * self.length, *x.shape[2:]), filling)
        batch = batch.index_copy(0, self.places.to(x.device), x[0])  # on several GPUs, x may have travelled
        return batch.unflatten(0, (self.rows, self.length))

    def mask_labels(self, labels: Tensor) -> Tensor:
        """Labels (b, l) of what follows a token of its own sequence: not of padding, nor of what comes behind it."""
        starts = self.cu_seqlens[:-1].long().to(labels.device)
        packed = self.pack(labels)
        follows_nothing = torch.zeros(packed.shape[1] + 1, dtype=torch.bool, device=labels.device)
        follows_nothing = follows_nothing.index_fill(0, starts, True)[:-1]  # an empty sequence may start at the end
        if self.places is not None:
            follows_nothing = follows_nothing | F.pad(self.places.diff() != 1, (1, 0), value=True).to(labels.device)
        return self.unpack(packed.masked_fill(follows_nothing, IGNORED), IGNORED)


def _refuse_unknown(arguments: Mapping[str, Any]) -> None:
    known = PackingArguments.__annotations__
    for name, value in arguments.items():
        asks_for_nothing = value is None or value is (name == "is_causal")  # other flags do so by being false
        if name not in known and not asks_for_nothing:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"LanguageModel: {name}={_short(value)} is not something that this model can do{hint}")


def _short(value: Any) -> str:
    return f"<tensor of shape {tuple(value.shape)}>" if isinstance(value, Tensor) else repr(value)


def _real(mask: Tensor, rows: int, length: int, continued: bool) -> Tensor | None:
    """Which positions (b, l) are not padding; None where all are."""
    fits = mask.ndim == 2 and mask.shape[0] == rows
    if not fits or not (mask.shape[1] >= length if continued else mask.shape[1] == length):
        or_past = " or (b, past + l)" if continued else ""
        raise ValueError(
            f"LanguageModel: attention_mask has shape {tuple(mask.shape)}, expected (b={rows}, l={length}){or_past}; "
            "packed sequences are given as seq_idx, position_ids or cu_seq_lens_q"
        )
    mask = mask[:, -length:]
    if bool((mask == 1).all()):
        return None
    real = mask != 0
    if bool((real & (mask != 1)).any()):
        raise ValueError(
            "LanguageModel: attention_mask has values other than 0 and 1; sequences packed in a row are given as "
            "seq_idx, position_ids or cu_seq_lens_q"
        )
    return real


def _offsets(arguments: Mapping[str, Any], rows: int) -> Tensor | None:
    offsets, keys = arguments.get("cu_seqlens"), None
    if offsets is None:
        offsets, keys = arguments.get("cu_seq_lens_q"), arguments.get("cu_seq_lens_k")
        offsets = keys if offsets is None else offsets
    if offsets is None:
        return None
    if rows != 1:
        raise ValueError(
            f"LanguageModel: cu_seqlens and cu_seq_lens_q pack sequences in a batch of 1, got {rows} rows; several "
            f"rows take seq_idx or position_ids of shape (b={rows}, l)"
        )
    # Comparing tensors on a GPU would wait for it.
    if keys is not None and keys is not offsets and keys.device.type == "cpu" and not torch.equal(keys, offsets):
        raise ValueError("LanguageModel: cu_seq_lens_q and cu_seq_lens_k differ; the sequences are the same for both")
    return offsets.to(torch.int32)


def _numbers(arguments: Mapping[str, Any], offsets: Tensor | None, rows: int, length: int) -> tuple[Tensor, int] | None:
    """Numbers (b, l) of the positions, and by how much they grow from one to the next within a sequence."""
    if offsets is not None:
        starts = torch.zeros(length + 1, dtype=torch.int64, device=offsets.device).index_fill(0, offsets.long(), 1)
        return starts[None, :length].cumsum(1), 0
    if length == 1:
        return None
    for name, step in (("seq_idx", 0), ("position_ids", 1)):
        numbers = arguments.get(name)
        if numbers is None:
            continue
        shape = tuple(numbers.shape)
        numbers = numbers[None] if numbers.ndim == 1 else numbers
        if numbers.ndim != 2 or numbers.shape[0] not in (1, rows) or numbers.shape[1] != length:
            raise ValueError(f"LanguageModel: {name} has shape {shape}, expected (b={rows}, l={length})")
        return numbers.expand(rows, -1), step
    return None


def _places(real: Tensor) -> Tensor:
    return real.flatten().nonzero().squeeze(1)
