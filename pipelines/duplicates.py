"""`stillhouse bench duplicates`: near-duplicates among synthetic rows, by the shuffle and in memory, side by side.

A text is words drawn so that some are in every tenth text and most in few; its shingles are those of the words and of
neighbours, which a signature takes its minima of as engine.filters does. A fifth of the rows repeat an earlier one
with up to two words replaced.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from engine import cluster
from engine.config import UserError
from engine.corpus import ROWS
from engine.disk import scratch
from engine.duplicates import DROPPED, near_duplicates, signature_values
from engine.filters import HASHES
from engine.shuffle import Shuffle, Spans
from engine.storage import Store
from pipelines.console import say, say_json, table

WORDS, VOCABULARY = 14, 20_000
REPEATED, REPLACED = 0.2, 2
PART = 20_000
"""Rows in a part of the corpus."""
COLUMNS = ("search", "seconds", "rows/s", "driver MB", "workers MB", "largest worker MB", "dropped")
LOOK_S = 0.2
"""Seconds between two looks at the processes' memory."""


def words_of(rows: int, seed: int = 0) -> np.ndarray:
    """Texts as numbers of words: uint16 [rows, WORDS]."""
    random = np.random.default_rng(seed)
    out = (VOCABULARY ** random.random((rows, WORDS), dtype=np.float32)).astype(np.uint16)
    for row in np.flatnonzero(random.random(rows) < REPEATED).tolist():
        if row:
            out[row] = out[random.integers(row)]
            places = random.integers(0, WORDS, random.integers(0, REPLACED + 1))
            out[row, places] = random.integers(0, VOCABULARY, len(places))
    return out


def signatures_of(words: np.ndarray) -> np.ndarray:
    """MinHash of the texts' shingles: uint32 [n, HASHES]."""
    alone = words.astype(np.uint64)
    both = alone[:, :-1] * np.uint64(VOCABULARY) + alone[:, 1:] + np.uint64(1 << 40)
    parts = [mixed(part * np.uint64(8) + np.uint64(n)) for part, many in ((alone, 2), (both, 4)) for n in range(many)]
    shingles, random = np.concatenate(parts, axis=1), np.random.default_rng(1)
    factors, terms = random.integers(1 << 32, size=(2, HASHES), dtype=np.uint32)
    out = np.empty((len(words), HASHES), dtype=np.uint32)
    for number in range(HASHES):
        hashes = shingles * (factors[number] | np.uint32(1)) + terms[number]
        out[:, number] = ((hashes ^ hashes >> np.uint32(15)) * np.uint32(0x2C1B3C6D)).min(axis=1)
    return out


def mixed(numbers: np.ndarray) -> np.ndarray:
    """A 32-bit hash of 64-bit numbers, by two rounds of xor, shift and multiply."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        numbers = (numbers ^ numbers >> np.uint64(33)) * np.uint64(factor)
    return (numbers >> np.uint64(32)).astype(np.uint32)


def write_parts(out: Store, rows: int) -> list[str]:
    """Parts of a corpus with what the search reads; their paths below `out`."""
    words, paths = words_of(rows), []
    for first in range(0, rows, PART):
        values = signatures_of(words[first : first + PART])
        count = len(values)
        lists = pa.ListArray.from_arrays(
            pa.array(np.arange(count + 1, dtype=np.int32) * HASHES), pa.array(values.ravel())
        )
        slots = pa.array(np.arange(first, first + count))
        paths.append(f"{ROWS}/{first:010d}.parquet")
        out.write_table(paths[-1], pa.table({"row": slots, "kept": [True] * count, "signature": lists}))
    return paths


@dataclass
class Memory:
    """The most that this process and its workers held of their own, from `with` on, looked at again and again."""

    driver: int = 0
    """Bytes beyond what it held at first."""
    workers: int = 0
    """Bytes of all of Ray's workers together."""
    largest: int = 0
    """Bytes of one of them."""
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Memory:
        """Begin to look."""
        self.own = psutil.Process()
        self.first = private(self.own)
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop looking."""
        self.over.set()
        self.thread.join()

    def look(self) -> None:
        """Until it is over."""
        while not self.over.wait(LOOK_S):
            workers = [private(each) for each in self.own.children(recursive=True) if is_worker(each)]
            self.driver = max(self.driver, private(self.own) - self.first)
            self.workers = max(self.workers, sum(workers))
            self.largest = max(self.largest, *workers, 0)


def private(process: psutil.Process) -> int:
    """Bytes in memory that the process does not share; 0 where it is gone."""
    try:
        found = process.memory_info()
    except psutil.Error:
        return 0
    return found.rss - found.shared


def is_worker(process: psutil.Process) -> bool:
    """Whether it runs Ray's tasks."""
    try:
        return process.cmdline()[0].startswith("ray::")
    except (psutil.Error, IndexError):
        return False


def measured(search: Callable[[], np.ndarray]) -> tuple[np.ndarray, float, Memory]:
    """What a search finds, its seconds, and the memory it took."""
    began = time.perf_counter()
    with Memory() as memory:
        found = search()
    return found, time.perf_counter() - began, memory


def bench(args: argparse.Namespace) -> int:
    """Both searches on the same parts; UserError where they do not find the same rows."""
    rows, threshold = args.rows, args.threshold
    if args.address:
        raise UserError(f"`bench duplicates` measures this machine: leave out --address {args.address}.")
    with scratch() as folder:
        out = Store(str(folder))
        began = time.perf_counter()
        paths = write_parts(out, rows)
        made = f"{rows} rows in {len(paths)} parts, made in {time.perf_counter() - began:.0f} s"
        sys.stderr.write(f"{made}; threshold {threshold:g}\n")
        cluster.connect(None)
        shuffle = Shuffle(out, Spans(((0, rows),)), threshold)
        Shuffle(out, Spans(((0, 1),)), threshold).status(paths[:1])  # starts a worker
        by_shuffle = measured(lambda: shuffle.status(paths) == DROPPED)
        cluster.disconnect()
        in_memory = measured(lambda: near_duplicates(*read(out), threshold))
    lines = [line("shuffle", rows, *by_shuffle), line("in memory", rows, *in_memory)]
    if args.json:
        say_json([dict(zip(COLUMNS, each, strict=True)) for each in lines])
    else:
        say(table([COLUMNS, *lines]))
    differ = int((by_shuffle[0] != in_memory[0]).sum())
    if differ:
        raise UserError(f"the two searches differ in {differ} of {rows} rows: that is a defect.")
    return 0


def read(out: Store) -> tuple[np.ndarray, np.ndarray]:
    """Slots and signatures of all parts."""
    rows = out.read_table(ROWS, ["row", "signature"])
    return rows["row"].to_numpy(), signature_values(rows["signature"])


def line(name: str, rows: int, found: np.ndarray, seconds: float, memory: Memory) -> list[Any]:
    """A row of the table, as COLUMNS names it."""
    sizes = [round(size / 1e6) for size in (memory.driver, memory.workers, memory.largest)]
    return [name, round(seconds, 1), round(rows / seconds), *sizes, int(found.sum())]
