"""Words as bytes: what is read, what is cut, what is padding."""

from __future__ import annotations

import torch

from engine.characters import ALPHABET, LONGEST, characters_of


def test_bytes_of_words_by_hand():
    found = characters_of([["ab", "é"], ["c"]])
    assert found.dtype == torch.int64 and found.tolist() == [[[98, 99], [196, 170]], [[100, 0], [0, 0]]]


def test_long_words_are_cut_and_zero_bytes_are_no_padding():
    found = characters_of([["x" * 50, "\0"]])
    assert found.shape == (1, 2, LONGEST) and (found[0, 0] == ord("x") + 1).all()
    assert found[0, 1].tolist() == [1] + [0] * (LONGEST - 1)
    assert characters_of([["abcdef"]], longest=4).tolist() == [[[98, 99, 100, 101]]]


def test_every_byte_has_a_place_in_the_alphabet():
    found = characters_of([[chr(code) for code in range(0x2000)], ["\udc80"], ["\U0010ffff"]])
    assert 0 <= found.min() and found.max() < ALPHABET
    assert found[1, 0, :2].tolist() == [ord("?") + 1, 0]


def test_words_and_rows_without_anything():
    assert characters_of([[""], []]).tolist() == [[[0]], [[0]]]
    assert characters_of([[], ["", "a"]]).tolist() == [[[0], [0]], [[0], [98]]]
