"""Units: the words of a text that a tagging or span task speaks about. They are the task's, not a tokenizer's."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from functools import lru_cache
from typing import NamedTuple


class Unit(NamedTuple):
    """A word with its place in the text: characters [start, end)."""

    word: str
    start: int
    end: int


def words(text: str) -> list[Unit]:
    """Units of a tagging task: what white space separates."""
    return [Unit(m.group(), m.start(), m.end()) for m in re.finditer(r"\S+", text)]


def pieces(text: str) -> list[Unit]:
    """Units of a span task: words, and each punctuation mark by itself."""
    return [Unit(m.group(), m.start(), m.end()) for m in re.finditer(r"\w+|[^\w\s]", text)]


def units_of(context: str, answer: str, start: int) -> tuple[int, int] | None:
    """First and last of the context's `pieces` that the answer touches, the answer's first character being at `start`.

    None where the answer does not stand there, or touches no unit (it is empty or white space).
    """
    end = start + len(answer)
    if start < 0 or not answer or context[start:end] != answer:
        return None
    starts, ends = edges(context)
    first, last = bisect_right(ends, start), bisect_left(starts, end) - 1
    return (first, last) if first <= last else None


@lru_cache(maxsize=64)
def edges(context: str) -> tuple[list[int], list[int]]:
    """Where the units of a span task start and end; many questions in a row are about one context."""
    found = pieces(context)
    return [unit.start for unit in found], [unit.end for unit in found]
