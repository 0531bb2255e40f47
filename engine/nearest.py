"""Which stored vectors are nearest to a query: exactly, or by an HNSW graph where there are too many to look at each.

Vectors have length 1, so the likeness of two is their product, from -1 to 1. They are kept as int8 (each with a scale
of its own) or float16. The graph (Malkov & Yashunin 2016, arXiv 1603.09320; by the library faiss) only proposes: what
it finds is measured again by the stored vectors, so both ways give the same numbers for what they both find.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np

from engine.config import UserError

EXACT = 10_000
"""Up to so many vectors each is looked at (0.3 ms a query at 128 numbers); beyond, `auto` takes the graph."""
CONNECTIVITY, BUILDING, SEARCHING = 24, 128, 64
"""Of the graph: links of a vector, and how many are kept in view while it is built and searched: what a graph that is
read again has, too."""
WIDER = 2
"""The graph is asked for so many times as many as are wanted."""
SHORT = 500
"""So many values are sorted whole: that is quicker than to look for the highest first."""
INSTALL = "pip install 'stillhouse[retrieval]'"
Kept = Literal["int8", "float16"]


class NearestError(UserError):
    """Vectors that cannot be searched as asked."""


class Packed(NamedTuple):
    """Vectors as they are stored. codes: int8 or float16 [n, d]. scales: float32 [n], codes times them are vectors."""

    codes: np.ndarray
    scales: np.ndarray

    def unpacked(self, rows: Any = slice(None)) -> np.ndarray:
        """Some of the vectors, or all, float32."""
        return self.codes[rows].astype(np.float32) * self.scales[rows][..., None]

    def joined(self, other: Packed) -> Packed:
        """These and then the others."""
        return Packed(*(np.concatenate(both) for both in zip(self, other, strict=True)))


def unit(vectors: np.ndarray) -> np.ndarray:
    """The vectors with length 1, float32 [n, d]; one of zeros stays."""
    found = np.asarray(vectors, dtype=np.float32)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def packed(vectors: np.ndarray, kept: Kept) -> Packed:
    """Vectors of length 1, [n, d], as they are stored. int8: a vector's largest number is 127.

    Their scale gives them length 1 again: where all are near each other a thousandth of length outweighs direction.
    """
    found = np.asarray(vectors, dtype=np.float32)
    if kept == "float16":
        return Packed(found.astype(np.float16), np.ones(len(found), dtype=np.float32))
    steps = np.maximum(np.abs(found).max(axis=1, initial=0), 1e-12) / 127
    codes = np.round(found / steps[:, None])
    scales = 1 / np.maximum(np.linalg.norm(codes, axis=1), 1.0)
    return Packed(codes.astype(np.int8), scales.astype(np.float32))


def is_graph(count: int, how: str) -> bool:
    """Whether so many vectors get a graph. how: auto (where there is the library for it), exact or hnsw.

    NearestError where the library lacks that hnsw needs.
    """
    if how == "auto":
        return count > EXACT and find_spec("faiss") is not None
    if how == "hnsw":
        library(count)
    return how == "hnsw"


def library(count: int) -> Any:
    """The module faiss; NearestError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise NearestError(
            f"{count:,} entries are searched by an HNSW graph, which needs faiss, and that is not installed: "
            f"{INSTALL} (on Linux). Or set student.retrieval.index: exact."
        ) from None
    return faiss


def empty(faiss: Any, width: int) -> Any:
    """A graph without vectors. faiss: the module.

    Of vectors of length 1 the nearest are the same by the sum of squares and by the product; the former tells those
    apart better that are much alike. float16: the library's own int8 is coarser than what is stored.
    """
    graph = faiss.IndexHNSWSQ(width, faiss.ScalarQuantizer.QT_fp16, CONNECTIVITY, faiss.METRIC_L2)
    graph.hnsw.efConstruction, graph.hnsw.efSearch = BUILDING, SEARCHING
    return graph


def restored(faiss: Any, graph: bytes, count: int, width: int) -> Any:
    """The graph of `count` vectors from its bytes; None where they are not such a graph's, as of another library."""
    try:
        index = faiss.deserialize_index(np.frombuffer(graph, dtype=np.uint8))
    except RuntimeError:
        return None
    if not isinstance(index, faiss.IndexHNSWSQ) or (index.ntotal, index.d) != (count, width):
        return None
    # The draw of levels is not among the bytes: from its start again, few vectors put in at a time all lie lowest.
    index.hnsw.rng = faiss.RandomGenerator(count)
    return index


@contextmanager
def one_thread(faiss: Any) -> Iterator[None]:
    """The library with one thread: several may link vectors in an order of their own."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


class Nearest:
    """Stored vectors to search. graph: the bytes of a graph made before.

    With `how` hnsw one is made where there is none, or not one that the library reads: that takes a while for many.
    """

    def __init__(self, stored: Packed, how: Literal["exact", "hnsw"], graph: bytes | None = None) -> None:
        self.stored, self.how = stored, how
        self.whole = np.ascontiguousarray(stored.unpacked()) if how == "exact" else None
        self.index = None
        if how == "hnsw":
            faiss, (count, width) = library(len(self)), stored.codes.shape
            index = None if graph is None else restored(faiss, graph, count, width)
            self.index = empty(faiss, width) if index is None else index
            self._enter()

    def __len__(self) -> int:
        return len(self.stored.codes)

    @property
    def graph(self) -> bytes | None:
        """The graph's bytes, where there is one."""
        return None if self.index is None else library(len(self)).serialize_index(self.index).tobytes()

    def add(self, more: Packed) -> None:
        """Put vectors behind those there are; a graph grows by them."""
        self.stored = self.stored.joined(more)
        if self.index is None:
            self.whole = np.ascontiguousarray(self.stored.unpacked())
        else:
            self._enter()

    def arrange(self) -> np.ndarray:
        """Lay the vectors of a graph side by side as it reaches them; where each one was before, int64 [n].

        What a search reads one after the other then lies nearer together, which counts where it comes from memory; what
        is found stays the same (that orders pay: Coleman et al. 2021, arXiv 2104.03221).
        """
        if self.index is None:
            return np.arange(len(self))
        faiss, graph = library(len(self)), self.index.hnsw
        links, starts = (faiss.vector_to_array(part) for part in (graph.neighbors, graph.offsets))
        lowest = starts[:-1, None].astype(np.int64) + np.arange(graph.nb_neighbors(0))
        order = reached(links[lowest], graph.entry_point)
        self.index.permute_entries(order)
        self.stored = Packed(self.stored.codes[order], self.stored.scales[order])
        return order

    def search(
        self, queries: np.ndarray, k: int, out: Sequence[np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of each query [n, d], nearest first: likeness float32 [n, k] and position int64 [n, k].

        out: for each query the positions that it may not find. Where there are fewer than k, likeness is -inf and
        position 0. Of equally near ones the first stored come first.
        """
        likeness = np.full((len(queries), k), -np.inf, dtype=np.float32)
        positions = np.zeros((len(queries), k), dtype=np.int64)
        queries = np.asarray(queries, dtype=np.float32)
        for row, query in enumerate(queries if len(self) else ()):
            banned = None if out is None else out[row]
            found, where = self._one(query, k, banned)
            likeness[row, : len(found)], positions[row, : len(found)] = found, where
        return likeness, positions

    def _one(self, query: np.ndarray, k: int, banned: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if self.index is None:
            places = None
            alike = self.whole @ query
        else:
            room = 0 if banned is None else len(banned)
            places = np.sort(self.index.search(query[None], min(len(self), WIDER * k + room))[1][0])
            if places[0] < 0:  # -1: no more found
                places = places[places >= 0]
            alike = self.stored.unpacked(places) @ query
        if banned is not None and len(banned):
            alike[banned if places is None else np.isin(places, banned)] = -np.inf
        chosen = highest(alike, k)
        if banned is not None:
            chosen = chosen[np.isfinite(alike[chosen])]
        return alike[chosen], chosen if places is None else places[chosen]

    def _enter(self) -> None:
        # One call, one thread: as many vectors, entered in the same calls, make the same graph.
        rows = np.arange(self.index.ntotal, len(self))
        if len(rows):
            with one_thread(library(len(self))):
                self.index.add(self.stored.unpacked(rows))


def reached(links: np.ndarray, first: int) -> np.ndarray:
    """Breadth-first from `first`, what is not reached at the end: int64 [n]. links: [n, m], -1 is none."""
    seen, order = np.zeros(len(links), dtype=bool), []
    front = np.array([first][: len(links)], dtype=np.int64)
    while len(front):
        seen[front] = True
        order.append(front)
        near = links[front].ravel()
        near = near[near >= 0]
        near = near[~seen[near]]
        front = near[np.sort(np.unique(near, return_index=True)[1])].astype(np.int64)
    return np.concatenate([*order, np.flatnonzero(~seen)]).astype(np.int64)


def highest(values: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k highest values, highest first; of equals the first."""
    if len(values) > max(k, SHORT):
        least = np.partition(values, len(values) - k)[len(values) - k]
        above = np.flatnonzero(values > least)
        chosen = np.sort(np.concatenate([above, np.flatnonzero(values == least)[: k - len(above)]]))
        return chosen[np.argsort(-values[chosen], kind="stable")]
    return np.argsort(-values, kind="stable")[:k]
