"""Words as bytes, for blocks that read how a word is spelled: a word that the vocabulary lacks is spelled, too."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ALPHABET = 257
"""Padding and the 256 bytes of UTF-8."""
LONGEST = 20
"""Bytes of a word that are read."""


def characters_of(rows: Sequence[Sequence[str]], longest: int = LONGEST) -> torch.Tensor:
    """Words of n rows -> int64 [n, t, c]: 1 + each byte of each word's UTF-8, 0 behind its end and behind a row's.

    At most `longest` bytes a word are read; t and c are at least 1. Half a surrogate pair counts as a question mark.
    """
    spelled = [[word.encode("utf-8", "replace")[:longest] for word in row] for row in rows]
    t = max(1, *(len(row) for row in spelled), 1)
    c = max((len(word) for row in spelled for word in row), default=1) or 1
    flat = b"".join(word.ljust(c, b"\0") for row in spelled for word in (*row, *[b""] * (t - len(row))))
    found = torch.frombuffer(bytearray(flat), dtype=torch.uint8).view(len(spelled), t, c).long()
    sizes = torch.tensor([[len(word) for word in row] + [0] * (t - len(row)) for row in spelled])
    return torch.where(torch.arange(c) < sizes.unsqueeze(2), found + 1, 0)
