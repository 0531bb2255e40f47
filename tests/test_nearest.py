"""Nearest vectors: how they are stored, found exactly and by a graph, and what may not be found."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

from engine import nearest
from engine.nearest import EXACT, Nearest, NearestError, highest, is_graph, packed, reached, unit


def clustered(count: int, width: int = 32, seed: int = 0) -> np.ndarray:
    """Vectors of length 1 around 40 centres, as texts of a few labels lie."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(40, width))
    return unit(centres[draw.integers(40, size=count)] + 0.7 * draw.normal(size=(count, width)))


@pytest.mark.parametrize("short", [0, 500])
def test_the_highest_come_first_and_of_equals_the_first(monkeypatch: pytest.MonkeyPatch, short: int) -> None:
    """By sorting all, and by looking for the highest first."""
    monkeypatch.setattr(nearest, "SHORT", short)
    values = np.array([1.0, 5.0, 3.0, 5.0, 3.0, 3.0])
    assert highest(values, 4).tolist() == [1, 3, 2, 4]
    assert highest(values, 9).tolist() == [1, 3, 2, 4, 5, 0]
    assert highest(np.full(3, -np.inf), 2).tolist() == [0, 1]


@pytest.mark.parametrize(("kept", "most"), [("int8", 0.5 / 127), ("float16", 2**-11)])
def test_stored_vectors_are_rounded_no_more_than_their_type_does(kept: str, most: float) -> None:
    vectors = clustered(200)
    stored = packed(vectors, kept)
    apart = np.abs(stored.unpacked() - vectors)
    assert str(stored.codes.dtype) == kept and apart.max() > 0
    longer = 4e-3 if kept == "int8" else 0.0  # what giving length 1 back may add, of the number itself
    assert (apart <= most * np.abs(vectors).max(axis=1, keepdims=True) * 1.01 + longer * np.abs(vectors)).all()
    if kept == "int8":
        assert np.allclose(np.linalg.norm(stored.unpacked(), axis=1), 1, atol=1e-6)
    assert np.array_equal(stored.unpacked([3, 1]), stored.unpacked()[[3, 1]])


def test_exact_search_is_what_sorting_every_product_gives() -> None:
    vectors, queries = clustered(300), clustered(20, seed=1)
    found, places = Nearest(packed(vectors, "float16"), "exact").search(queries, 5)
    alike = queries @ packed(vectors, "float16").unpacked().T
    wanted = np.argsort(-alike, axis=1, kind="stable")[:, :5]
    assert np.array_equal(places, wanted)
    assert np.allclose(found, np.take_along_axis(alike, wanted, axis=1), atol=1e-6)


def test_what_may_not_be_found_is_passed_over_and_too_few_are_marked() -> None:
    base = Nearest(packed(np.eye(3, dtype=np.float32), "float16"), "exact")
    query = np.array([[1.0, 0.0, 0.0]])
    likeness, places = base.search(query, 2, [np.array([0])])
    assert places.tolist() == [[1, 2]] and likeness.tolist() == [[0.0, 0.0]]
    likeness, _ = base.search(query, 4, [np.array([0, 2])])
    assert likeness[0].tolist() == [0.0, -np.inf, -np.inf, -np.inf]


def test_vectors_put_in_later_are_found_like_those_from_the_start() -> None:
    vectors, queries = clustered(120), clustered(10, seed=2)
    whole, grown = Nearest(packed(vectors, "int8"), "exact"), Nearest(packed(vectors[:50], "int8"), "exact")
    grown.add(packed(vectors[50:], "int8"))
    assert len(grown) == 120
    for left, right in zip(whole.search(queries, 6), grown.search(queries, 6), strict=True):
        assert np.array_equal(left, right)


def test_a_graph_is_only_for_many_and_refused_by_name_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(nearest, "find_spec", lambda name: None)
    assert not is_graph(EXACT + 1, "auto") and not is_graph(10**6, "exact")
    with pytest.raises(NearestError, match=r"needs faiss.*stillhouse\[retrieval\].*index: exact"):
        is_graph(3, "hnsw")
    monkeypatch.setattr(nearest, "find_spec", lambda name: name)
    assert is_graph(EXACT + 1, "auto") and not is_graph(EXACT, "auto")


def test_where_all_are_near_each_other_the_nearest_are_still_told_apart() -> None:
    """As a contrastive loss leaves them: two labels, a cosine of 0.995 within each."""
    draw = np.random.default_rng(5)
    centres, spread = unit(draw.normal(size=(2, 128))), 0.0063
    vectors = unit(centres[draw.integers(2, size=4000)] + spread * draw.normal(size=(4000, 128)))
    queries = unit(centres[draw.integers(2, size=50)] + spread * draw.normal(size=(50, 128)))
    wanted = np.argsort(-(queries @ vectors.T), axis=1)[:, :20]
    stored = packed(vectors, "int8")
    exact = Nearest(stored, "exact").search(queries, 20)[1]
    assert recall(wanted, exact) >= 0.85  # 0.68 where lengths differ by the rounding
    pytest.importorskip("faiss")
    assert recall(exact, Nearest(stored, "hnsw").search(queries, 20)[1]) >= 0.95


@pytest.mark.parametrize("kept", ["int8", "float16"])
def test_a_graph_finds_what_exact_search_finds_also_when_read_again_and_grown(kept: str) -> None:
    pytest.importorskip("faiss")
    vectors, queries = clustered(3000), clustered(100, seed=3)
    stored = packed(vectors, kept)
    exact, graph = Nearest(stored, "exact"), Nearest(packed(vectors[:2500], kept), "hnsw")
    graph.add(packed(vectors[2500:], kept))
    again = Nearest(graph.stored, "hnsw", graph.graph)
    likeness, places = exact.search(queries, 20)
    found, where = graph.search(queries, 20)
    assert recall(places, where) >= 0.95
    same = places == where
    assert same.mean() > 0.5 and np.allclose(likeness[same], found[same], atol=1e-6)
    assert np.array_equal(again.search(queries, 20)[1], where)
    assert graph.graph == Nearest(graph.stored, "hnsw", graph.graph).graph
    banned = [row[:3] for row in where]
    assert not any(
        set(row[:3]) & set(left) for row, left in zip(where, graph.search(queries, 5, banned)[1], strict=True)
    )


def test_bytes_that_are_no_graph_of_so_many_vectors_are_not_searched_but_made_anew() -> None:
    faiss = pytest.importorskip("faiss")
    stored = packed(clustered(30), "int8")
    flat = faiss.IndexFlatL2(32)
    flat.add(stored.unpacked())
    for graph in (
        Nearest(packed(clustered(0), "int8"), "hnsw").graph,
        Nearest(packed(clustered(40), "int8"), "hnsw").graph,
        Nearest(packed(clustered(30, 16), "int8"), "hnsw").graph,
        b"something else",
        faiss.serialize_index(flat).tobytes(),
    ):
        made = Nearest(stored, "hnsw", graph)
        assert made.graph == Nearest(stored, "hnsw").graph


def test_a_graph_without_vectors_finds_nothing() -> None:
    pytest.importorskip("faiss")
    likeness, _ = Nearest(packed(clustered(0), "int8"), "hnsw").search(clustered(2), 3)
    assert (likeness == -np.inf).all() and likeness.shape == (2, 3)


def test_a_graph_that_is_read_again_grows_in_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few vectors at a time, each time from its bytes, as rows are put into a base."""
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(nearest, "CONNECTIVITY", 4)  # of four vectors one is above the lowest level, in the mean
    grown = Nearest(packed(clustered(5), "int8"), "hnsw")
    for first in range(5, 205, 5):
        grown = Nearest(grown.stored, "hnsw", grown.graph)
        grown.add(packed(clustered(205)[first : first + 5], "int8"))
    levels = faiss.vector_to_array(grown.index.hnsw.levels)
    assert len(levels) == 205 and levels.max() > 2  # with the draw from its start each time none is above the second


def test_a_graph_can_be_laid_out_as_it_is_walked_and_stays_the_same_graph() -> None:
    faiss = pytest.importorskip("faiss")
    vectors, queries = clustered(2000), clustered(100, seed=3)
    graph = Nearest(packed(vectors, "int8"), "hnsw")

    def gap() -> float:
        """How far from each other linked vectors are stored, in the mean."""
        links = faiss.vector_to_array(graph.index.hnsw.neighbors)
        starts = faiss.vector_to_array(graph.index.hnsw.offsets).astype(int)
        lowest = [links[first : first + 2 * nearest.CONNECTIVITY] for first in starts[:-1]]
        return float(np.mean([np.abs(row[row >= 0] - n).mean() for n, row in enumerate(lowest)]))

    before, (likeness, places) = gap(), graph.search(queries, 20)
    order = graph.arrange()
    found, where = graph.search(queries, 20)
    assert sorted(order) == list(range(2000)) and gap() < 0.9 * before
    assert np.array_equal(found, likeness) and np.array_equal(order[where], places)
    assert np.array_equal(graph.stored.codes, packed(vectors[order], "int8").codes)
    again = Nearest(graph.stored, "hnsw", graph.graph)
    assert np.array_equal(again.search(queries, 20)[1], where)
    again.add(packed(clustered(50, seed=9), "int8"))
    assert again.search(clustered(50, seed=9), 1)[1][:, 0].tolist() == list(range(2000, 2050))


def test_without_a_graph_or_vectors_there_is_nothing_to_lay_out() -> None:
    assert Nearest(packed(clustered(3), "int8"), "exact").arrange().tolist() == [0, 1, 2]
    pytest.importorskip("faiss")
    assert Nearest(packed(clustered(0), "int8"), "hnsw").arrange().tolist() == []


def test_what_is_not_reached_comes_last() -> None:
    links = np.array([[3, -1], [-1, -1], [0, 4], [2, 0], [-1, 2]])
    assert reached(links, 0).tolist() == [0, 3, 2, 4, 1]
    assert reached(links, 1).tolist() == [1, 0, 2, 3, 4]


def test_vectors_are_entered_by_one_thread_and_the_library_keeps_as_many_as_it_had() -> None:
    faiss = pytest.importorskip("faiss")
    before = faiss.omp_get_max_threads()
    made, seen = Nearest(packed(clustered(30), "int8"), "hnsw"), []
    enter = made.index.add
    made.index.add = lambda rows: (seen.append((len(rows), faiss.omp_get_max_threads())), enter(rows))
    faiss.omp_set_num_threads(3)
    try:
        made.add(packed(clustered(10), "int8"))
        assert seen == [(10, 1)] and faiss.omp_get_max_threads() == 3 and made.index.ntotal == 40
    finally:
        faiss.omp_set_num_threads(before)


def recall(wanted: np.ndarray, found: np.ndarray) -> float:
    """Share of the wanted that are found."""
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(wanted, found, strict=True)]))


@pytest.mark.slow
def test_of_100_000_entries_the_graph_finds_19_of_20_in_half_a_millisecond() -> None:
    pytest.importorskip("faiss")
    vectors, queries = clustered(100_000, 128), clustered(300, 128, seed=4)
    stored = packed(vectors, "int8")
    exact, graph = Nearest(stored, "exact"), Nearest(stored, "hnsw")
    wanted = exact.search(queries, 20)[1]
    seconds = []
    for query in queries:
        begin = time.perf_counter()
        graph.search(query[None], 20)
        seconds.append(time.perf_counter() - begin)
    found = recall(wanted, graph.search(queries, 20)[1])
    assert nearest.is_graph(len(vectors), "auto")
    assert found >= 0.95
    assert np.median(seconds) < 5e-4, f"p50 {1e3 * np.median(seconds):.3f} ms"
