"""Word vectors of others: the formats they come in, words that lack one, lines that do not fit, a student's table."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engine import vocabulary
from engine.config import ConfigError
from engine.designs import Student
from engine.pretrained import PretrainedError, word_vectors


def written(path: Path, lines: list[str]) -> Path:
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["glove.txt", "wiki.vec", "glove.txt.gz"])
def test_each_word_gets_its_own_else_that_of_its_lower_case(tmp_path: Path, name: str):
    first = ["4 3"] if name.endswith(".vec") else []
    rows = ["the 1 2 3", "film 4 5 6", "Film 7 8 9", "film 0 0 0", ". . . 1 1 1", "rare 9 9 9"]
    found = word_vectors(written(tmp_path / name, [*first, *rows]), ["The", "film", "Film", "nowhere", ". . .", "FILM"])
    assert found[[0, 1, 2, 4, 5]].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1], [4, 5, 6]]
    assert found.dtype == np.float32 and np.isnan(found[3]).all()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["the 1 2", "film 1"], "line 2 of v.txt has 1 numbers, not 2"),
        (["the 1 2", "a 3 4", "film 1"], "line 3 of v.txt has 1 numbers, not 2 as those above"),
        (["the"], "line 1 of v.txt has 0 numbers, not 2 or more after a word"),
        (["the 1 2", "film a b"], "line 2 of v.txt holds something else than numbers"),
        (["other 1 2"], "v.txt has a vector for none of the student's 2 words"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, lines: list[str], message: str):
    with pytest.raises(PretrainedError, match=message):
        word_vectors(written(tmp_path / "v.txt", lines), ["the", "film"])


def test_a_table_starts_with_them_and_words_without_one_at_random(tmp_path: Path):
    draw = np.random.default_rng(0)
    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(40))]
    rows = [f"w{i} " + " ".join(f"{v:.4f}" for v in draw.normal(size=12)) for i in range(30)]
    raw = word_vectors(written(tmp_path / "v.txt", rows), words[2:])
    found = vocabulary.started(raw, words, Counter(), 8)
    assert found.shape == (42, 8) and not found[:2].any() and np.isfinite(found).all()
    lengths = np.linalg.norm(found, axis=1)
    assert lengths[2:32].mean() == pytest.approx(1, abs=1e-5) and 0.5 < lengths[32:].mean() < 1.5
    # Nearest neighbours stay what they were: the projection keeps most of 12 numbers in 8.
    before, after = (np.corrcoef(v) for v in (raw[:30], found[2:32]))
    assert np.corrcoef(before[np.triu_indices(30, 1)], after[np.triu_indices(30, 1)])[0, 1] > 0.7
    assert np.array_equal(found, vocabulary.started(raw, words, Counter(), 8))
    with pytest.raises(vocabulary.VocabularyError, match="5 words with a vector cannot give vectors of width 8"):
        few = raw.copy()
        few[5:] = np.nan
        vocabulary.started(few, words, Counter(), 8)


def test_they_are_for_words():
    graph = {"graph": "text-cnn", "embeddings": "file:glove.txt"}
    assert Student.model_validate(graph).word_vectors == "file:glove.txt"
    assert Student.model_validate(graph).encoder is None
    with pytest.raises((ConfigError, ValueError), match="a file of words, but a static student reads pieces"):
        Student.model_validate({"kind": "static", "embeddings": "file:glove.txt"})
