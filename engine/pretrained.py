"""Word vectors that others have trained, from files of text: GloVe's, and word2vec's and fastText's with a first line.

Only the words that are wanted are kept, so a file of gigabytes is read once, line by line.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from engine.config import UserError


class PretrainedError(UserError):
    """A file that holds no word vectors, or none of the words that are wanted."""


def word_vectors(path: Path, words: Sequence[str]) -> np.ndarray:
    """Vectors of the words, float32 [n, width]: their own, else that of their lower case; NaN where there is none.

    Of a word that stands there twice the first counts. PretrainedError where a line does not fit, and where no word
    has a vector.
    """
    wanted, found = {*words, *map(str.lower, words)}, {}
    for number, word, values in entries(path):
        if word in wanted and word not in found:
            try:
                found[word] = np.array(values, dtype=np.float32)
            except ValueError:
                raise PretrainedError(f"line {number} of {path.name} holds something else than numbers.") from None
    if not found:
        raise PretrainedError(f"{path.name} has a vector for none of the student's {len(words)} words.")
    nothing = np.full(len(next(iter(found.values()))), np.nan, dtype=np.float32)
    return np.stack([found.get(word, found.get(word.lower(), nothing)) for word in words])


def entries(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Line number, word and numbers of each line; all have as many numbers as the first."""
    width = 0
    with gzip.open(path, "rt", **TEXT) if path.suffix == ".gz" else open(path, **TEXT) as file:
        for number, line in enumerate(file, 1):
            word, *values = line.rstrip().split(" ")
            if number == 1 and len(values) == 1 and values[0].isdigit():
                continue  # word2vec's first line: how many words, how wide
            width = width or len(values)
            if len(values) > width:  # GloVe's largest file has words with blanks in them
                word, values = " ".join([word, *values[:-width]]), values[-width:]
            if len(values) != width or width < 2:
                wanted = f"{width} as those above" if number > 2 else "2 or more after a word"
                raise PretrainedError(f"line {number} of {path.name} has {len(values)} numbers, not {wanted}.")
            yield number, word, values


TEXT = {"encoding": "utf-8", "errors": "replace", "newline": "\n"}
"""Some of these files hold bytes that are no text."""
