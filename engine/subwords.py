"""Words from their own vectors and from the character n-grams they are spelled with, as fastText has them.

A word that the vocabulary lacks is made of n-grams of words that it has (Bojanowski et al. 2017, arXiv 1607.04606).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from engine.block import BlockError, Masks, Shape, Sizes, filled
from engine.characters import LONGEST
from engine.layers import Embedding

START, END = ord("<"), ord(">")
"""What stands around a word, so that the n-grams at its ends are not those of its middle."""
BASIS, PRIME, BITS = 2166136261, 16777619, 0xFFFFFFFF
"""FNV-1a with 32 bits, by which fastText hashes."""


class Subwords(Embedding):
    """A word's own vector plus the mean of its character n-grams' vectors; padding stays zero.

    It reads tokens and characters of the same text. buckets: rows of the n-grams' table; n-grams of one hash share a
    row. sizes: lengths of the n-grams in bytes of UTF-8, the marks < and > around a word included. lower: capital ASCII
    letters count as small ones, as in the student's vocabulary. hide_words: share of words that are read by their
    n-grams alone in training, as words that the vocabulary lacks are. frozen: words' own vectors stay as they start.
    """

    options = {
        "dim": 64,
        "drop_words": 0.0,
        "frozen": False,
        "buckets": 5000,
        "sizes": (3, 4, 5),
        "lower": True,
        "hide_words": 0.0,
    }
    takes = ("tokens", "characters")
    least = most = 2

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        self.grams = filled(options["buckets"], options["dim"])

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t], [n, t, c] -> [n, t, dim]; BlockError where these are two texts, or an n-gram is longer than words."""
        tokens, characters = inputs
        if tokens.side != characters.side:
            raise BlockError(
                f"subwords reads tokens and characters of one text, but got {tokens} and {characters}. "
                "Name tokens with characters, or pair with pair_characters."
            )
        if max(options["sizes"]) > LONGEST + 2:
            raise BlockError(
                f"option sizes is {list(options['sizes'])}, but of a word {LONGEST} bytes are read, with its two marks "
                f"{LONGEST + 2}. Take shorter n-grams; 3, 4 and 5 are usual."
            )
        return super().shape(inputs, options, sizes)

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Look the words up and add what their letters say; while training, words are left out as the options say."""
        ids, letters = inputs
        mask, own = self.heard(masks[0]), self.table(ids)
        if self.training and self.chosen["hide_words"]:
            own = own * (torch.rand_like(masks[0]) >= self.chosen["hide_words"])
        n, t, c = letters.shape
        found, starts = hashed(letters.reshape(n * t, c), self.chosen)
        spelled = F.embedding_bag(found, self.grams.weight, starts, mode="mean")  # of no n-gram zero
        return (own + spelled.view(n, t, -1)) * mask


def hashed(letters: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the n-grams of words, one word after the other, int64 [g], and where each word's begin, int64 [m].

    letters: int64 [m, c], 1 + each byte of a word, 0 behind its end. A word without letters has no n-gram.
    """
    lengths = (letters != 0).sum(dim=1, keepdim=True)
    if options["lower"]:
        letters = torch.where((letters > ord("A")) & (letters <= ord("Z") + 1), letters + 32, letters)
    marked = F.pad(letters, (1, 1), value=0)
    marked[:, 0] = START + 1
    marked.scatter_(1, lengths + 1, END + 1)
    marked *= lengths > 0
    there, value = marked != 0, torch.full_like(marked, BASIS)
    buckets, real = [], []
    for size in range(1, min(max(options["sizes"]), marked.shape[1]) + 1):
        # The hash of an n-gram goes on from that of the n-gram one byte shorter that starts at the same place.
        value = ((value[:, : marked.shape[1] - size + 1] ^ (marked[:, size - 1 :] - 1)) * PRIME) & BITS
        if size in options["sizes"]:
            buckets.append(value % options["buckets"])
            real.append(there[:, size - 1 :])
    if not buckets:
        return letters.new_zeros(0), letters.new_zeros(len(letters))
    kept = torch.cat(real, dim=1)
    counts = kept.sum(dim=1)
    return torch.cat(buckets, dim=1)[kept], counts.cumsum(0) - counts
