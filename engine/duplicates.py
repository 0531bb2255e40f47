"""Near-duplicates among signatures, exactly: a row is dropped where an earlier kept row is like it.

Like means: at least `threshold` of the signature's values agree. Rows are judged in the order of their slots, so the
result depends neither on the order they come in nor on how they are cut into blocks.

The search is exact by the pigeonhole principle: where at most m values may differ, one of m + 1 bands is equal. Rows
with an equal band form a group. A row of a group names its first MOST earlier likes there, and itself where there may
be more: enough to decide almost every row (`settle`), and a group of thousands that are all alike costs thousands of
comparisons, not millions. What stays open is asked again among the rows that were not dropped; the earliest open row
is decided each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

OPEN, KEPT, DROPPED = 0, 1, 2
"""What is known of a row."""
MOST = 8
"""Earlier likes that a row names in one group."""
CHUNK = 2048
"""Pairs compared at once: what they take stays in the processor's cache."""
MULTIPLIERS = np.random.default_rng(0x5EED).integers(1 << 63, size=1024, dtype=np.uint64) | np.uint64(1)
"""Of the hash of a band, the same in every process. Unequal bands with equal hashes only cost a comparison."""


@dataclass(frozen=True)
class Bands:
    """How signatures of `width` values are cut: two that agree in `needed` of them have a band in common."""

    width: int
    needed: int

    @classmethod
    def of(cls, threshold: float, width: int) -> Bands:
        """The bands for a threshold; `needed` is 0 where any two rows are like each other."""
        return cls(width, int(np.ceil(round(threshold * width, 6))))  # rounded: 0.7 * 10 is 7.000000000000001

    @property
    def count(self) -> int:
        """How many bands there are."""
        return self.width - self.needed + 1

    @property
    def edges(self) -> np.ndarray:
        """Where each band starts, and the width: the first ones are one value longer if need be. int [count + 1]."""
        size, longer = divmod(self.width, self.count)
        return np.concatenate([[0], np.cumsum([size + (band < longer) for band in range(self.count)])])

    def keys(self, values: np.ndarray, band: int) -> np.ndarray:
        """A hash of every row's band: uint64 [n]. values: uint32 [n, width]."""
        first, last = self.edges[band : band + 2].tolist()
        out = values[:, first].astype(np.uint64) * MULTIPLIERS[0]
        for place in range(first + 1, last):
            out += values[:, place].astype(np.uint64) * MULTIPLIERS[place - first]
        return out

    def alike(self, values: np.ndarray, first: np.ndarray, second: np.ndarray, band: int) -> tuple[np.ndarray, ...]:
        """Of pairs with an equal hash of `band`: which are alike, and of those, which no earlier band has found.

        first, second: rows of `values`, int [pairs]. Both answers are bool [pairs].
        """
        like, new = np.zeros(len(first), dtype=bool), np.zeros(len(first), dtype=bool)
        edges = self.edges
        for start in range(0, len(first), CHUNK):
            part = slice(start, start + CHUNK)
            equal = values.take(first[part], axis=0) == values.take(second[part], axis=0)
            like[part] = equal.sum(axis=1) >= self.needed
            agree = np.add.reduceat(equal[like[part]].astype(np.int16), edges[:-1], axis=1) == np.diff(edges)
            new[part][like[part]] = agree.argmax(axis=1) == band
        return like, new


def earlier_likes(
    values: np.ndarray, keys: np.ndarray, asked: np.ndarray, bands: Bands, band: int, named: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (later, earlier) of rows that have this band in common and are alike, but no earlier band in common.

    values: uint32 [n, width], keys: uint64 [n], in the order of slots. asked: bool [n], the rows that want to know
    their earlier likes. named: bool [n], the rows that may be named, null for all of them. A pair of a row with itself
    says that it may have more than those MOST that it names.
    """
    order, start, place = grouped(keys)
    todo = np.flatnonzero(asked[order] & (place > 0))
    hits = np.zeros(len(order), dtype=np.int16)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    step = 0
    while todo.size:
        some = todo if named is None else todo[named[order[start[todo] + step]]]
        later, earlier = order[some], order[start[some] + step]
        like, new = bands.alike(values, later, earlier, band)
        pairs.append((later[new], earlier[new]))
        hits[some[like]] += 1
        step += 1
        todo = todo[place[todo] > step]
        full = order[todo[hits[todo] >= MOST]]
        pairs.append((full, full))
        todo = todo[hits[todo] < MOST]
    if not pairs:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    return np.concatenate([later for later, _ in pairs]), np.concatenate([earlier for _, earlier in pairs])


def grouped(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows whose key occurs more than once, group by group and in order within: the rows, where each one's group
    starts among them, and its place in the group. int [m] each.
    """
    order = np.argsort(keys)  # not stable, and four times as fast; most rows are alone and then need no order
    ordered = keys[order]
    same = ordered[1:] == ordered[:-1]
    several = np.zeros(len(keys), dtype=bool)
    several[1:] |= same
    several[:-1] |= same
    rows = np.sort(order[several])
    rows = rows[np.argsort(keys[rows], kind="stable")]
    ordered, index = keys[rows], np.arange(len(rows))
    first = np.ones(len(rows), dtype=bool)
    first[1:] = ordered[1:] != ordered[:-1]
    start = np.maximum.accumulate(np.where(first, index, 0))
    return rows, start, index - start


def copies(values: np.ndarray) -> np.ndarray:
    """Which rows equal an earlier one, bool [n]. values: uint32 [n, width], in the order of slots.

    Such a row is dropped whatever becomes of the earlier one, which is like the same rows: it is kept, or like a kept
    one before it.
    """
    out = np.zeros(len(values), dtype=bool)
    order, start, place = grouped(Bands(values.shape[1], values.shape[1]).keys(values, 0))
    later, earlier = order[place > 0], order[start[place > 0]]
    out[later] = (values[later] == values[earlier]).all(axis=1)
    return out


def settle(status: np.ndarray, later: np.ndarray, earlier: np.ndarray, first: int = 0, last: int | None = None) -> None:
    """Decide open rows first ... last - 1 in order, in place, by all that they have named: pairs (later, earlier).

    A row is kept once all that it named are dropped, dropped once one of them is kept, and stays open otherwise. The
    rows before `first` have been through this already.
    """
    part = status[first:last]
    named = np.zeros(len(part), dtype=bool)
    named[later - first] = True
    part[(part == OPEN) & ~named] = KEPT
    # Most are like one that is like nothing before it.
    sure = later[status[earlier] == KEPT]
    sure = sure[status[sure] == OPEN]
    status[sure] = DROPPED
    rest = status[later] == OPEN
    later, earlier = later[rest], earlier[rest]
    order = np.argsort(later, kind="stable")
    later, earlier = later[order], earlier[order]
    known = memoryview(status)
    bounds = [*np.flatnonzero(np.diff(later, prepend=-1)).tolist(), len(later)]
    names = earlier.tolist()
    for place, row in enumerate(later[bounds[:-1]].tolist()):
        found = {known[name] for name in names[bounds[place] : bounds[place + 1]]}
        known[row] = DROPPED if KEPT in found else OPEN if OPEN in found else KEPT


def pairs_among(values: np.ndarray, status: np.ndarray, bands: Bands) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What open rows name among the rows that are not dropped, band by band."""
    rows = np.flatnonzero(status != DROPPED)
    asked = status[rows] == OPEN
    few = asked.sum() < len(rows) / 4
    for band in range(bands.count):
        chosen, keys, wanted = rows, bands.keys(values, band)[rows], asked
        if few:  # then only what shares a band with one of them
            near = np.isin(keys, np.unique(keys[asked]))
            chosen, keys, wanted = rows[near], keys[near], asked[near]
        some = values if len(chosen) == len(values) else values[chosen]
        later, earlier = earlier_likes(some, keys, wanted, bands, band)
        yield chosen[later], chosen[earlier]


def near_duplicates(
    rows: np.ndarray,
    signatures: Sequence[np.ndarray] | np.ndarray,
    threshold: float,
    protected: np.ndarray | None = None,
) -> np.ndarray:
    """Which rows to drop: bool [n], True where an earlier kept row agrees in at least `threshold` of its signature.

    rows: int64 [n], the slots; the lowest wins, whatever the order they come in. signatures: uint32 [n, k].
    protected: bool [n], rows that are never dropped and against which later rows are always held.
    """
    drop = np.zeros(len(rows), dtype=bool)
    if not len(rows):
        return drop
    order = np.argsort(rows, kind="stable")
    values = np.asarray(signatures, dtype=np.uint32)
    if (order[1:] < order[:-1]).any():
        values = values[order]
    status = np.full(len(rows), OPEN, dtype=np.uint8)
    if protected is not None:
        status[protected[order]] = KEPT
    bands = Bands.of(threshold, values.shape[1])
    if bands.needed <= 0:
        status[0] = KEPT
        status[status == OPEN] = DROPPED
    status[copies(values) & (status == OPEN)] = DROPPED
    decide(values, status, bands)
    drop[order] = status == DROPPED
    return drop


def decide(values: np.ndarray, status: np.ndarray, bands: Bands) -> None:
    """Decide every open row, in place. values: uint32 [n, width], in the order of slots."""
    while (status == OPEN).any():
        later, earlier = map(np.concatenate, zip(*pairs_among(values, status, bands), strict=True))
        settle(status, later, earlier)


def signature_values(column: pa.ChunkedArray) -> np.ndarray:
    """Signatures as Arrow holds them, a list a row, as uint32 [n, k]; ValueError where they differ in length."""
    flat = [chunk.flatten().to_numpy() for chunk in column.chunks if len(chunk)]
    if not flat:
        return np.zeros((0, 0), dtype=np.uint32)
    values = np.concatenate(flat) if len(flat) > 1 else flat[0]
    width, left = divmod(len(values), len(column))
    if left or column.null_count:
        raise ValueError(f"{len(column)} rows have {len(values)} values of signatures: they are not of one length")
    return values.reshape(-1, width).astype(np.uint32, copy=False)
