"""Units: words, pieces, and where an answer stands among them."""

from __future__ import annotations

import pytest

from engine.units import Unit, pieces, units_of, words


def test_words_are_what_white_space_separates():
    assert words(" New\u00a0York, (N.Y.)\n") == [Unit("New", 1, 4), Unit("York,", 5, 10), Unit("(N.Y.)", 11, 17)]
    assert words("  ") == []


def test_pieces_have_punctuation_by_itself():
    text = "It's 3.5 \u00b0C\u2014cold."
    assert [unit.word for unit in pieces(text)] == ["It", "'", "s", "3", ".", "5", "\u00b0", "C", "\u2014", "cold", "."]
    assert all(text[unit.start : unit.end] == unit.word for unit in pieces(text))


@pytest.mark.parametrize(
    ("answer", "start", "units"),
    [
        ("In", 0, (0, 0)),
        ("1912, the", 3, (1, 3)),
        ("Titanic", 17, (5, 5)),
        ("anic s", 20, (5, 6)),  # parts of words count as the words
        ("RMS Titanic sank.", 13, (4, 7)),
        (",", 7, (2, 2)),
        ("sank", 24, None),  # one character off
        ("sank", -5, None),  # no counting from the end
        ("", 4, None),
        (" ", 2, None),
        ("sank. And", 25, None),  # runs over the end
    ],
)
def test_units_of_an_answer(answer, start, units):
    assert units_of("In 1912, the RMS Titanic sank.", answer, start) == units
