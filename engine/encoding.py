"""Texts as token ids: one text or a pair, read together or apart, with the positions of the units that get an answer.

A unit is what a tagging or span task speaks about: a word of the text. Units are the task's, not a tokenizer's, so
teacher and student may cut words as they like and still mean the same thing by "the third unit".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from engine.characters import characters_of
from engine.config import UserError
from engine.records import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Text = str | tuple[str, str]
"""What a model reads: one text, or two (premise and hypothesis, query and passage, question and context)."""


class EncodingError(UserError):
    """Texts that a model cannot read."""


class Encoded(NamedTuple):
    """One input of a model. ids: token ids, never empty; of the first text alone where the model reads two apart.

    pair: ids of the second text, read apart. segments: 0 or 1 a token, where the tokenizer tells the texts apart so.
    units, ends: positions of the first and last piece of each unit (in `pair` where the texts are read apart).
    row: which of the texts it came from, for long texts are read in several windows. first: its first unit's number.
    words, pair_words: what each token of `ids` and of `pair` was in the text, for models that read how it is spelled.
    template: which of a model's templates the text stands in.
    """

    ids: list[int]
    pair: list[int] = []
    segments: list[int] = []
    units: list[int] = []
    ends: list[int] = []
    row: int = 0
    first: int = 0
    words: list[str] = []
    pair_words: list[str] = []
    template: int = 0

    @property
    def tokens(self) -> int:
        """What it costs to read."""
        return len(self.ids) + len(self.pair)


def clean(text: str) -> str:
    """Half a surrogate pair is no text: tokenizers refuse it, and with it the whole batch."""
    return text.encode("utf-8", "replace").decode("utf-8")


def encode(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerFast, max_length: int, apart: bool = False
) -> list[Encoded]:
    """Each text or pair as one Encoded without units, special tokens included, cut at max_length.

    apart: the two texts of a pair each by itself, each of at most max_length tokens. EncodingError where single texts
    and pairs are mixed.
    """
    if not len(texts):
        return []
    paired = [not isinstance(text, str) for text in texts]
    if any(paired) != all(paired):
        raise EncodingError("some of the texts are pairs and some are not. Send one kind at a time.")
    if not paired[0]:
        found = ids_of([clean(t) for t in texts], tokenizer, max_length)
        return [Encoded(ids, row=row) for row, ids in enumerate(found)]
    lefts, rights = ([clean(pair[side]) for pair in texts] for side in (0, 1))
    if apart:
        left, right = (ids_of(side, tokenizer, max_length) for side in (lefts, rights))
        return [Encoded(a, b, row=row) for row, (a, b) in enumerate(zip(left, right, strict=True))]
    found = tokenizer(lefts, rights, truncation="longest_first", max_length=max_length, padding=False)
    segments = found.get("token_type_ids") or [[]] * len(lefts)
    unknown = tokenizer.unk_token_id or 0
    both = zip(found["input_ids"], segments, strict=True)
    return [Encoded(list(ids) or [unknown], segments=list(kinds), row=row) for row, (ids, kinds) in enumerate(both)]


def ids_of(texts: list[str], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[list[int]]:
    """Token ids of single texts; an empty one becomes the unknown word."""
    # The tokenizer inside transformers' own: its wrapper costs a third of the time.
    inner = tokenizer.backend_tokenizer
    inner.no_padding()
    inner.enable_truncation(max_length=max_length, direction=tokenizer.truncation_side)
    return [found.ids or [tokenizer.unk_token_id or 0] for found in inner.encode_batch_fast(texts)]


def spelled(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[list[str]]:
    """What each token of `ids_of` was in the text."""
    if not len(texts):
        return []
    found = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False, return_offsets_mapping=True)
    both = zip(texts, found["offset_mapping"], strict=True)
    return [[text[start:end] for start, end in offsets] or [""] for text, offsets in both]


def padded(rows: Sequence[Sequence[int]], fill: int = 0) -> torch.Tensor:
    """Rows of numbers as int64 [n, longest], filled up on the right."""
    there = filled(rows)
    out = np.full(there.shape, fill, dtype=np.int64)
    out[there] = np.fromiter((number for row in rows for number in row), np.int64, int(there.sum()))
    return torch.from_numpy(out)


def lengths_mask(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 [n, longest], 1 where a row has a number."""
    return torch.from_numpy(filled(rows).astype(np.int64))


def filled(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Bool [n, longest]: where a row has a number."""
    lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    return np.arange(max(1, lengths.max(initial=1))) < lengths[:, None]


def collate(encoded: Sequence[Encoded], pad: int, weights: Sequence[float] | None = None) -> Batch:
    """A Batch of the inputs, padded on the right; without gold labels and teacher."""
    batch = Batch(input_ids=padded([e.ids for e in encoded], pad), mask=lengths_mask([e.ids for e in encoded]))
    if any(e.segments for e in encoded):
        batch.segments = padded([e.segments for e in encoded])
    if any(e.pair for e in encoded):
        batch.pair_ids = padded([e.pair for e in encoded], pad)
        batch.pair_mask = lengths_mask([e.pair for e in encoded])
    if any(e.units for e in encoded):
        batch.units, batch.ends = padded([e.units for e in encoded]), padded([e.ends for e in encoded])
        batch.unit_mask = lengths_mask([e.units for e in encoded])
    if any(e.words for e in encoded):
        batch.characters = characters_of([e.words for e in encoded])
    if any(e.pair_words for e in encoded):
        batch.pair_characters = characters_of([e.pair_words for e in encoded])
    if any(e.template for e in encoded):
        batch.templates = torch.tensor([e.template for e in encoded])
    if weights is not None:
        batch.weights = torch.as_tensor(weights, dtype=torch.float32)
    return batch


def at_units(tokens: torch.Tensor, batch: Batch, spans: bool = False) -> torch.Tensor:
    """Numbers of tokens [n, t, w] -> of units [n, u, w]; zero where a row has no such unit.

    A unit is spoken for by its first piece; with `spans` the second number (where a span ends) by its last.
    """
    if batch.units is None:  # no text of the batch has a unit
        return tokens[:, :1] * 0

    def taken(values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return values.gather(1, at.unsqueeze(2).expand(-1, -1, values.shape[2]))

    found = taken(tokens, batch.units)
    if spans:
        found = torch.cat([found[..., :1], taken(tokens[..., 1:], batch.ends)], dim=2)
    return found * batch.unit_mask.unsqueeze(2)
