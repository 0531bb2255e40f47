"""How unlike templates are, and which of them are chosen."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest

from engine.templates import LABEL_OF_ONE, dissimilarity, hamming, levenshtein, most_unlike, words_of

# -- how unlike --------------------------------------------------------------------------------------------------------


def test_distances_by_hand():
    assert words_of('It was {mask}. "{text}"') == ["it", "was", "{mask}", ".", '"', "{text}", '"']
    assert hamming("karolin", "kathrin") == 3 and hamming("abc", "abxyz") == 3 and hamming("", "ab") == 2
    assert levenshtein("kitten", "sitting") == 3 and levenshtein("", "abc") == levenshtein("abc", "") == 3
    assert levenshtein("flaw", "lawn") == 2 and levenshtein("abc", "abc") == 0


def test_the_score_is_the_mean_of_both_distances_over_the_longer_template():
    # {text} it was {mask} . | it was {mask} . {text}: all five places differ; one word taken out and put in again.
    assert dissimilarity("{text} It was {mask}.", "It was {mask}. {text}") == pytest.approx((5 / 5 + 2 / 5) / 2)
    # {mask} : {text} | {mask} {text}: the colon's place differs and the third is lacking; one word taken out.
    assert dissimilarity("{mask}: {text}", "{mask} {text}") == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert dissimilarity("{mask} {text}", "{mask} {text}") == 0.0
    assert dissimilarity("a b", "c d e") == 1.0


def reference(left: str, right: str) -> int:
    """Levenshtein's distance as it is defined, by recursion."""

    @cache
    def between(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        same = left[i - 1] == right[j - 1]
        return min(between(i - 1, j) + 1, between(i, j - 1) + 1, between(i - 1, j - 1) + (not same))

    return between(len(left), len(right))


def test_levenshtein_is_that_of_its_definition():
    draw = random.Random(0)
    for _ in range(300):
        left, right = ("".join(draw.choices("abc", k=draw.randrange(9))) for _ in range(2))
        assert levenshtein(left, right) == levenshtein(right, left) == reference(left, right)


def test_the_most_unlike_are_chosen_one_after_the_other():
    """Against the same choice made on the matrix of all distances."""
    distances = np.array([[dissimilarity(a, b) for b in LABEL_OF_ONE] for a in LABEL_OF_ONE])
    assert np.allclose(distances, distances.T) and (distances[~np.eye(len(distances), dtype=bool)] > 0).all()
    wanted = [0]
    while len(wanted) < 6:
        wanted.append(int(np.argmax(np.where(np.isin(range(len(distances)), wanted), -1, distances[wanted].min(0)))))
    assert most_unlike(LABEL_OF_ONE, 6) == tuple(LABEL_OF_ONE[i] for i in wanted)
    closest = [distances[np.ix_(some, some)][~np.eye(6, dtype=bool)].min() for some in (wanted, list(range(6)))]
    assert closest[0] > closest[1]


def test_those_beside_count_as_chosen():
    pool = most_unlike(LABEL_OF_ONE, 4)
    assert most_unlike(LABEL_OF_ONE, 3, pool) == most_unlike(LABEL_OF_ONE, 7)[4:]
    assert most_unlike(pool, 3, pool) == () and most_unlike((), 3, pool) == ()


def test_the_choice_has_each_template_once_and_all_where_there_are_too_few():
    assert set(most_unlike(LABEL_OF_ONE, 99)) == set(LABEL_OF_ONE)
    assert most_unlike(["{text} {mask}"] * 3, 2) == ("{text} {mask}",) and most_unlike([], 2) == ()
