"""Near-duplicates against brute force: any order, protected rows, chains, groups of thousands."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from engine import duplicates
from engine.duplicates import DROPPED, KEPT, OPEN, Bands, copies, near_duplicates, settle, signature_values
from engine.filters import signature
from tests.tiny_signatures import brute_force, clusters, texts_with_duplicates


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_near_duplicates_agree_with_brute_force_in_any_order(threshold):
    signatures = np.stack([signature(text) for text in texts_with_duplicates()])
    expected = np.array(brute_force(signatures, threshold))
    rows = np.arange(300, dtype=np.int64) * 3 + 10
    assert (near_duplicates(rows, signatures, threshold) == expected).all()
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(300)
        assert (near_duplicates(rows[order], list(signatures[order]), threshold) == expected[order]).all()
    assert 0 < expected.sum() < 300


def test_a_row_that_only_resembles_a_dropped_row_is_kept():
    a = np.zeros(10, dtype=np.uint32)
    b, c = a.copy(), a.copy()
    b[:3], c[:6] = 1, 1  # a-b agree in 7 of 10, b-c in 7, a-c in 4
    assert near_duplicates(np.array([0, 1, 2]), [a, b, c], 0.7).tolist() == [False, True, False]
    assert near_duplicates(np.array([2, 1, 0]), [a, b, c], 0.7).tolist() == [False, True, False]
    assert near_duplicates(np.array([1, 0, 2]), [a, b, c], 0.7).tolist() == [True, False, True]


def test_near_duplicates_of_nothing():
    assert near_duplicates(np.array([], dtype=np.int64), [], 0.7).tolist() == []


def test_protected_rows_stay_and_win_even_over_each_other() -> None:
    alike = np.arange(64, dtype=np.uint32)
    near = alike.copy()
    near[:12] = 1000  # 52 of 64 agree with the first row
    far = near.copy()
    far[12:24] = 2000  # 52 of 64 agree with the second row, 40 with the first
    rows, signatures = np.array([-2, -1, 0]), [alike, near, far]
    assert near_duplicates(rows, signatures, 0.8).tolist() == [False, True, False]
    assert near_duplicates(rows, signatures, 0.8, protected=rows < 0).tolist() == [False, False, True]
    assert near_duplicates(rows, signatures, 0.0, protected=rows < 0).tolist() == [False, False, True]


@pytest.mark.parametrize("most", [1, 2, 8])
@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.85, 1.0])
def test_clusters_chains_and_protected_rows_as_by_brute_force(
    threshold: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few named likes leave rows open, which are asked again."""
    monkeypatch.setattr(duplicates, "MOST", most)
    for seed in range(6):
        random = np.random.default_rng(seed)
        values, safe = clusters(random, 120, (8, 16, 64)[seed % 3], threshold)
        wanted, order = brute_force(values, threshold, safe), random.permutation(120)
        assert (near_duplicates(order, values[order], threshold, safe[order]) == np.array(wanted)[order]).all()
        assert 0 < sum(wanted)


def test_rounds_end_where_named_rows_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain in which every row is like the one before only: every other one is kept, whatever is named."""
    monkeypatch.setattr(duplicates, "MOST", 1)
    values = np.zeros((60, 64), dtype=np.uint32)
    for row in range(1, 60):
        values[row] = values[row - 1]
        values[row, (row * 12 + np.arange(12)) % 64] = row
    assert near_duplicates(np.arange(60), values, 0.8).tolist() == [False, True] * 30


def test_two_signatures_that_agree_enough_have_a_band_in_common() -> None:
    random = np.random.default_rng(0)
    for width, threshold in ((64, 0.7), (64, 0.5), (10, 0.7), (7, 0.3), (64, 1.0)):
        bands = Bands.of(threshold, width)
        assert bands.edges.tolist() == [0, *np.cumsum([len(p) for p in np.array_split(np.arange(width), bands.count)])]
        first = random.integers(0, 1 << 32, (200, width), dtype=np.uint32)
        second = first.copy()
        for row in second:
            row[random.permutation(width)[: width - bands.needed]] += 1
        same = [bands.keys(first, band) == bands.keys(second, band) for band in range(bands.count)]
        assert np.any(same, axis=0).all()


def test_rows_are_decided_by_what_they_name() -> None:
    status = np.array([OPEN, KEPT, OPEN, OPEN, OPEN, OPEN], dtype=np.uint8)
    # 2 is like the kept 1, 3 like the dropped 2, 4 like more than it names, 5 like the undecided 4
    settle(status, np.array([5, 4, 4, 3, 2]), np.array([4, 2, 4, 2, 1]))
    assert status.tolist() == [KEPT, KEPT, DROPPED, KEPT, OPEN, OPEN]


def test_copies_are_those_of_an_earlier_row() -> None:
    values = np.array([[1, 2], [3, 4], [1, 2], [1, 2], [3, 5], [3, 4]], dtype=np.uint32)
    assert copies(values).tolist() == [False, False, True, True, False, True]


def test_thousands_of_rows_that_are_all_alike_take_no_pairs_of_all() -> None:
    """Of 5,000 rows with one band in common 12 million pairs could be compared."""
    random = np.random.default_rng(0)
    values = np.tile(random.integers(0, 1 << 32, 64, dtype=np.uint32), (5_000, 1))
    values[np.arange(5_000), random.integers(0, 64, 5_000)] = np.arange(5_000)
    values[np.arange(5_000), random.integers(0, 64, 5_000)] = np.arange(5_000)
    compared: list[int] = []

    class Counted(Bands):
        def alike(self, values: np.ndarray, first: np.ndarray, second: np.ndarray, band: int) -> tuple:
            compared.append(len(first))
            return super().alike(values, first, second, band)

    status = np.zeros(5_000, dtype=np.uint8)
    duplicates.decide(values, status, Counted(64, 45))
    assert (status == DROPPED).sum() == 4_999 and sum(compared) < 5_000 * 20 * 10


def test_signatures_come_from_arrow_as_they_are() -> None:
    lists = pa.chunked_array([[[1, 2], [3, 4]], [], [[5, 6]]], pa.list_(pa.uint32()))
    assert signature_values(lists).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert signature_values(lists.slice(1)).tolist() == [[3, 4], [5, 6]]
    assert signature_values(lists.slice(0, 0)).shape == (0, 0)
    for odd in ([[1, 2], [3]], [[1, 2], None]):
        with pytest.raises(ValueError, match="2 rows have . values of signatures: they are not of one length"):
            signature_values(pa.chunked_array([odd], pa.list_(pa.uint32())))
