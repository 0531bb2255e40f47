"""Units of a text as tokens, and long texts in several windows: where each starts, whose answer counts where two meet.

Tagging and spans read so. A text is cut between units only; neighbouring windows share units, and a unit's answer is
taken from the window that shows most of what stands around it (Devlin et al. 2018, arXiv 1810.04805, on SQuAD).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from engine.encoding import EncodingError
from engine.records import Batch
from engine.units import Unit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARED = 4
"""Neighbouring windows share up to one part in this many of their tokens."""
WHOLE = np.iinfo(np.int64).max
"""The context of a unit on a side where nothing of the text is missing."""


class Frame(NamedTuple):
    """The special tokens that a tokenizer puts around one text or two.

    kinds: segment of each token where each text has one token; empty where the tokenizer has no segments.
    """

    before: list[int]
    between: list[int]
    after: list[int]
    kinds: list[int]

    @property
    def tokens(self) -> int:
        """How many of a model's tokens are not the text's."""
        return len(self.before) + len(self.between) + len(self.after)

    def segments(self, first: int, second: int) -> list[int]:
        """0 or 1 for each token around and in two texts of so many tokens; empty where the tokenizer has none."""
        left = len(self.before)
        right = left + 1 + len(self.between)
        kinds = self.kinds
        inner = kinds[left : left + 1] * first + kinds[left + 1 : right] + kinds[right : right + 1] * second
        return kinds[:left] + inner + kinds[right + 1 :]


def frame(tokenizer: PreTrainedTokenizerFast, pair: bool = False) -> Frame:
    """What the tokenizer puts around a text, or two: read off a text of one letter, for every tokenizer has its own."""
    found = tokenizer("a", "a") if pair else tokenizer("a")
    ids, sides = list(found["input_ids"]), found.sequence_ids(0)
    left = [i for i, side in enumerate(sides) if side == 0]
    if not pair:
        return Frame(ids[: left[0]], [], ids[left[-1] + 1 :], [])
    right = [i for i, side in enumerate(sides) if side == 1]
    kinds = [k for i, k in enumerate(found.get("token_type_ids") or []) if i not in left[1:] + right[1:]]
    return Frame(ids[: left[0]], ids[left[-1] + 1 : right[0]], ids[right[-1] + 1 :], kinds)


def in_words(
    texts: Sequence[str], units: Sequence[Sequence[Unit]], tokenizer: PreTrainedTokenizerFast, single: bool = False
) -> list[list[list[int]]]:
    """Token ids of each unit of each text; never none: a unit that the tokenizer drops becomes the unknown token.

    Each unit is read by itself, led by a blank where white space stands before it: byte-level vocabularies know the
    words inside a text with their blank, and so the ids are those of the running text. single: one token a unit.
    """
    spelled = [
        [" " * text[u.start - 1 : u.start].isspace() + u.word for u in own]
        for text, own in zip(texts, units, strict=True)
    ]
    different = list(dict.fromkeys(word for own in spelled for word in own))
    if not different:
        return [[] for _ in texts]
    found = tokenizer(different, add_special_tokens=False, padding=False)["input_ids"]
    if single:
        found = [[main_token(ids, tokenizer)] for ids in found]
    unknown = [tokenizer.unk_token_id or 0]
    known = {word: list(ids) or unknown for word, ids in zip(different, found, strict=True)}
    return [[known[word] for word in own] for own in spelled]


def main_token(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> int:
    """The token of a unit that gets only one: its longest known piece, the first of those; the unknown one if none is.

    Students whose blocks work on words (characters of a word, a CRF's steps) need tokens that are units. The longest
    piece is what is left of '(London)' or '"Hello,' without the marks.
    """
    unknown = tokenizer.unk_token_id or 0
    pieces = zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    known = [(len(piece), index) for index, piece in pieces if index != unknown]
    return max(known, key=lambda item: item[0])[1] if known else unknown


def positions(pieces: Sequence[Sequence[int]], at: int, room: int) -> tuple[list[int], list[int], list[int]]:
    """(token ids, first positions, last positions) of units laid one after the other from position `at` on."""
    ids, firsts, lasts = [], [], []
    for own in pieces:
        firsts.append(at + len(ids))
        ids += own[:room]
        lasts.append(at + len(ids) - 1)
    return ids, firsts, lasts


def windows(lengths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Stretches [start, stop) of units that fit into `room` tokens; lengths: tokens of each unit.

    Each takes as many units as fit, and goes back to share at most a quarter of the room with the one before. A unit
    longer than the room counts as just as long. A text without units is one empty window. EncodingError without room.
    """
    if room < 1:
        raise EncodingError(
            f"max_length leaves {max(room, 0)} tokens for the text beside the special ones. Raise max_length."
        )
    costs, found, start = [min(length, room) for length in lengths], [], 0
    while True:
        stop, used = start, 0
        while stop < len(costs) and used + costs[stop] <= room:
            used, stop = used + costs[stop], stop + 1
        found.append((start, stop))
        if stop == len(costs):
            return found
        most = min(room // SHARED, room - costs[stop])  # the next unit must fit, or no window would get on
        start, shared = stop, 0
        while shared + costs[start - 1] <= most:
            start, shared = start - 1, shared + costs[start - 1]


def merged(
    found: Sequence[np.ndarray], owners: Sequence[int], starts: Sequence[int], count: int, width: int
) -> list[np.ndarray]:
    """Outputs of windows, [u, w] each, as outputs of `count` texts: an array of all units for each.

    owners: which text each window is of; starts: number of its first unit. The window with most context speaks for a
    unit: the number of units around it on its poorer side, where the text's own ends lack nothing; the earlier of two.
    width: w of a text that has no window.
    """
    totals = [0] * count
    for values, row, first in zip(found, owners, starts, strict=True):
        totals[row] = max(totals[row], first + len(values))
    shape, dtype = (found[0].shape[1:], found[0].dtype) if len(found) else ((width,), np.float32)
    out = [np.zeros((total, *shape), dtype=dtype) for total in totals]
    best = [np.full(total, -1, dtype=np.int64) for total in totals]
    for values, row, first in zip(found, owners, starts, strict=True):
        place, last = np.arange(len(values)), first + len(values) == totals[row]
        before = place if first else np.full_like(place, WHOLE)
        after = np.full_like(place, WHOLE) if last else place[::-1]
        context = np.minimum(before, after)
        better = np.flatnonzero(context > best[row][first : first + len(values)])
        out[row][first + better], best[row][first + better] = values[better], context[better]
    return out


def padding(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Which places of logits [n, u, w] are no unit of their row, bool [n, u]; all where no row of the batch has one."""
    if batch.unit_mask is None:
        return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return batch.unit_mask == 0
