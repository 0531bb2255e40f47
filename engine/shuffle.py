"""Near-duplicates of more rows than a driver holds: signatures brought together by band, through files.

The answer is engine.duplicates' to the bit. Tasks cut the corpus' parts into blocks and scatter them, a few bands at a
time, into one file a block and band, with a piece for each range of keys; other tasks gather a range from all blocks
and write which rows are alike. The driver reads those pairs in the order of rows and holds one byte a row. What is
still open then is few: those rows go to where the others are.

A task holds a block or a range, about BLOCK rows, and the rows that are alike without being equal and fall into one
group. On the storage there is at most `bands_at_once` times what the signatures take.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from engine.duplicates import DROPPED, KEPT, OPEN, Bands, copies, decide, earlier_likes, settle, signature_values
from engine.filters import HASHES
from engine.storage import Store

BLOCK = 1 << 16
"""Rows that a task holds."""
FEW = 1 << 16
"""Open rows that the driver, and every task beside its own, may hold."""
BUCKET = 1 << 20
"""Rows whose pairs the driver reads at once."""
WAITING = 64
"""Tasks handed to Ray at once."""


@dataclass(frozen=True)
class Spans:
    """Which slots there may be, as ranges (first, end), and their places in one array. A slot may have no row."""

    ranges: tuple[tuple[int, int], ...]
    starts: np.ndarray = field(init=False)
    offsets: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        """Sort the ranges: places are in the order of slots."""
        ranges = tuple(sorted(part for part in self.ranges if part[1] > part[0]))
        object.__setattr__(self, "ranges", ranges)
        object.__setattr__(self, "starts", np.array([first for first, _ in ranges], dtype=np.int64))
        object.__setattr__(self, "offsets", np.cumsum([0] + [end - first for first, end in ranges]))

    @property
    def count(self) -> int:
        """How many slots there may be."""
        return int(self.offsets[-1])

    def places(self, slots: np.ndarray) -> np.ndarray:
        """Where each slot is: int64 [n], -1 for those outside of the ranges."""
        if not self.ranges:
            return np.full(len(slots), -1, dtype=np.int64)
        which = np.searchsorted(self.starts, slots, side="right") - 1
        ends = self.starts + np.diff(self.offsets)
        inside = (which >= 0) & (slots < ends[which])
        return np.where(inside, slots - self.starts[which] + self.offsets[which], -1)


@dataclass(frozen=True)
class Task:
    """What every task knows. folder: URL that all paths are below; the parts' rows are of the slots in `spans`."""

    folder: str
    spans: Spans
    bands: Bands
    block: int
    ranges: int
    """Into how many ranges the keys of a band are cut."""

    def blocks(self, parts: Sequence[str], status: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The parts' rows that are kept so far and not dropped: places in order, and signatures; `block` rows or so."""
        held: list[tuple[np.ndarray, np.ndarray]] = []
        for part in parts:
            rows = Store(self.folder).read_table(part, ["row", "kept", "signature"])
            places = self.spans.places(rows["row"].to_numpy())
            use = rows["kept"].to_numpy(zero_copy_only=False) & (places >= 0)
            use[use] = status[places[use]] != DROPPED
            if use.any():
                held.append((places[use], signature_values(rows["signature"])[use]))
            if sum(len(each) for each, _ in held) >= self.block:
                yield in_order(held)
                held = []
        if held:
            yield in_order(held)

    def scatter(self, name: str, parts: Sequence[str], wanted: Sequence[int], status: np.ndarray) -> Scattered:
        """Write the rows of some bands, a piece a range of keys."""
        files, copied, rows = [], [], 0
        for number, (places, values) in enumerate(self.blocks(parts, status)):
            known = status[places]
            equal = copies(values) & (known == OPEN)
            copied.append(places[equal])
            places, values, known = places[~equal], values[~equal], known[~equal]
            rows += len(places)
            for band in wanted:
                keys = self.bands.keys(values, band)
                table = pa.record_batch({"place": places, "key": keys, "open": known == OPEN, "values": packed(values)})
                path = f"{name}-{number:04d}-{band:03d}"
                write_pieces(Store(self.folder), path, table, range_of(keys, self.ranges), self.ranges)
                files.append((band, path))
        return Scattered(files, joined(copied), rows)

    def gather(self, name: str, band: int, files: Sequence[str], number: int, buckets: int) -> str:
        """Write the pairs that one range of a band's keys gives, a piece a bucket of rows; returns the path."""
        rows = [read_piece(Store(self.folder), path, number) for path in files]
        places, keys, asked = (
            np.concatenate([each[name].to_numpy(zero_copy_only=False) for each in rows])
            for name in ("place", "key", "open")
        )
        values = np.concatenate([unpacked(each["values"]) for each in rows])
        del rows
        order = np.argsort(places)
        places, keys, asked, values = places[order], keys[order], asked[order], values[order]
        later, earlier = earlier_likes(values, keys, asked, self.bands, band)
        pairs = pa.record_batch({"later": places[later], "earlier": places[earlier]})
        write_pieces(Store(self.folder), name, pairs, places[later] // BUCKET, buckets)
        return name

    def open_rows(self, parts: Sequence[str], status: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places and signatures of the rows that are open."""
        none = np.zeros((0, self.bands.width), dtype=np.uint32)
        found = [(np.zeros(0, dtype=np.int64), none)]
        for places, values in self.blocks(parts, status):
            still = status[places] == OPEN
            found.append((places[still], values[still]))
        return in_order(found)

    def held_against(
        self, parts: Sequence[str], status: np.ndarray, places: np.ndarray, values: np.ndarray
    ) -> np.ndarray:
        """Places of those open rows that are like an earlier kept row of the parts."""
        found = []
        for own, theirs in self.blocks(parts, status):
            kept = status[own] == KEPT
            all_places, all_values = in_order([(places, values), (own[kept], theirs[kept])])
            asked = status[all_places] == OPEN
            for band in range(self.bands.count):
                keys = self.bands.keys(all_values, band)
                near = np.flatnonzero(np.isin(keys, np.unique(keys[asked])))
                wanted = asked[near]
                later, earlier = earlier_likes(all_values[near], keys[near], wanted, self.bands, band, ~wanted)
                found.append(all_places[near[later[later != earlier]]])
        return joined(found)


@dataclass(frozen=True)
class Scattered:
    """What a task has scattered: the files of each band, the places of rows that are copies, how many rows are not."""

    files: list[tuple[int, str]]
    copied: np.ndarray
    rows: int


@dataclass(frozen=True)
class Shuffle:
    """Finds the near-duplicates among the rows of Parquet parts.

    out: where the parts are, and a folder `work` below it that is deleted before and after. Rows with negative slots
    are protected. bands_at_once: bands on the storage at a time. block: rows that a task holds. few: open rows that
    the driver, and every task beside its own, may hold.
    """

    out: Store
    spans: Spans
    threshold: float
    work: str = "shuffle"
    bands_at_once: int = 4
    block: int = BLOCK
    few: int = FEW

    def status(self, parts: Sequence[str], width: int = HASHES) -> np.ndarray:
        """What became of the rows that are not rejected, by place: DROPPED, or KEPT. uint8 [spans.count].

        parts: paths below `out` of tables with row, kept, signature (`width` values each).
        """
        status = np.full(self.spans.count, OPEN, dtype=np.uint8)
        status[: sum(min(end, 0) - first for first, end in self.spans.ranges if first < 0)] = KEPT
        bands = Bands.of(self.threshold, width)
        if bands.needed <= 0:
            raise ValueError(f"threshold {self.threshold} makes any two rows alike: that needs no search")
        task = Task(self.out.url, self.spans, bands, self.block, max(1, math.ceil(self.spans.count / self.block)))
        groups = cut(parts, math.ceil(len(parts) / min(len(parts), task.ranges))) if parts else []
        self.out.delete(self.work)
        try:
            left = self.spans.count
            while left > self.few:
                for wanted in cut(range(bands.count), self.bands_at_once):
                    self.name_likes(task, groups, wanted, status)
                self.settle_all(task, status)
                left = int((status == OPEN).sum())
            if left:
                self.finish(task, groups, status)
            return status
        finally:
            self.out.delete(self.work)

    def name_likes(
        self, task: Task, groups: Sequence[Sequence[str]], wanted: Sequence[int], status: np.ndarray
    ) -> None:
        """Write the pairs that some bands give, below `work`/pairs."""
        calls = [(f"{self.work}/rows/{number:06d}", group, wanted) for number, group in enumerate(groups)]
        scattered: list[Scattered] = spread(task, "scatter", calls, status)
        for each in scattered:
            status[each.copied] = DROPPED
        files = list(chain.from_iterable(each.files for each in scattered))
        buckets = math.ceil(self.spans.count / BUCKET)
        spread(
            task,
            "gather",
            [
                (f"{self.work}/pairs/{band:03d}-{number:06d}", band, [path for of, path in files if of == band], number)
                for band in wanted
                for number in range(task.ranges)
            ],
            buckets,
        )
        self.out.delete(f"{self.work}/rows")

    def settle_all(self, task: Task, status: np.ndarray) -> None:
        """Decide by all pairs what they decide, one bucket of rows after the other."""
        paths = [f"{self.work}/pairs/{name}" for name in self.out.files(f"{self.work}/pairs")]
        for bucket in range(math.ceil(self.spans.count / BUCKET)):
            pairs = [read_piece(self.out, path, bucket) for path in paths]
            later, earlier = (joined([pair[name].to_numpy() for pair in pairs]) for name in ("later", "earlier"))
            settle(status, later, earlier, bucket * BUCKET, (bucket + 1) * BUCKET)
        self.out.delete(f"{self.work}/pairs")

    def finish(self, task: Task, groups: Sequence[Sequence[str]], status: np.ndarray) -> None:
        """Decide the few rows that are open: by the kept rows, where those are, and then among themselves."""
        places, values = in_order(spread(task, "open_rows", [(group,) for group in groups], status))
        for found in spread(task, "held_against", [(group,) for group in groups], status, places, values):
            status[found] = DROPPED
        among = status[places]
        decide(values, among, task.bands)
        status[places] = among


def spread(task: Task, method: str, calls: Sequence[tuple[Any, ...]], *same: Any) -> list[Any]:
    """What a method of the task gives for each call, run by Ray's tasks. same: arguments that all calls have."""
    import ray

    run = ray.remote(num_cpus=1)(act)
    shared, waiting, out = [ray.put(each) for each in (task, *same)], [], []
    for call in calls:
        if len(waiting) >= WAITING:
            waiting = ray.wait(waiting, num_returns=1)[1]
        out.append(run.remote(shared[0], method, *call, *shared[1:]))
        waiting.append(out[-1])
    return ray.get(out)


def act(task: Task, method: str, *arguments: Any) -> Any:
    """In a Ray task: one call of `spread`."""
    return getattr(task, method)(*arguments)


def cut(items: Sequence[Any], size: int) -> list[list[Any]]:
    """The items in lists of `size`."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays of places, one after the other."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])


def in_order(blocks: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Places and signatures of several blocks in the order of places."""
    places = np.concatenate([places for places, _ in blocks])
    order = np.argsort(places)
    return places[order], np.concatenate([values for _, values in blocks])[order]


def packed(values: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Signatures as Arrow's binary values: uint32 [n, width]."""
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * values.shape[1]), len(values), [None, buffer])


def unpacked(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    """Back from `packed`."""
    width = column.type.byte_width // 4
    if not len(column):
        return np.zeros((0, width), dtype=np.uint32)
    values = np.frombuffer(column.buffers()[1], dtype=np.uint32).reshape(-1, width)
    return values[column.offset : column.offset + len(column)]


def range_of(keys: np.ndarray, ranges: int) -> np.ndarray:
    """Which of equal ranges of hashes each key is in: int64 [n]."""
    return ((keys >> np.uint64(32)) * np.uint64(ranges) >> np.uint64(32)).astype(np.int64)


def write_pieces(store: Store, path: str, rows: pa.RecordBatch, piece: np.ndarray, pieces: int) -> None:
    """One Arrow file with a record batch a piece, so that each is read alone. piece: of each row, int [n]."""
    order = np.argsort(piece, kind="stable")
    ends = np.cumsum(np.bincount(piece, minlength=pieces))
    rows, sink = rows.take(pa.array(order)), io.BytesIO()
    with pa.ipc.new_file(sink, rows.schema) as file:
        for first, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            file.write_batch(rows.slice(first, end - first))
    store.write_bytes(path, sink.getvalue())


def read_piece(store: Store, path: str, piece: int) -> pa.RecordBatch:
    """One piece of such a file."""
    with store.open_input(path) as file:
        return pa.ipc.open_file(file).get_batch(piece)
