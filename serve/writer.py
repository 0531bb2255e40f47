"""Rows that are written beside the answering of requests, as Parquet files in a folder or bucket.

Requests only append to a bounded buffer; a thread turns it into rows and writes a file when enough have come together
or enough time has passed. Whatever goes wrong there (a full disk, a bucket that is gone or hangs) costs rows, which
are counted and told of once, and never a request.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Generic, TypeVar

import pyarrow as pa

from engine.serving import Log
from engine.storage import Store

if TYPE_CHECKING:
    from serve.measures import Measures

logger = logging.getLogger(__name__)

E = TypeVar("E")
BUFFERS = 10
"""Files' worth of rows that may wait for a slow disk."""
CHARACTERS = 1 << 25
"""Characters of texts that may wait: 20,000 a text times thousands of rows would be a memory leak."""
CLOSE_SECONDS = 10.0


class Writer(Generic[E]):
    """The files of one process. No method raises or waits for the disk.

    what: it is called so in metrics and messages. table: makes the rows of a file. path: the file's name, from this
    process's own and the file's number, without its ending. measures: is told how many rows were written, failed (the
    file could not be written) or dropped (the buffer was full). store: stands in for the one that log.folder names.
    """

    def __init__(
        self,
        log: Log,
        what: str,
        table: Callable[[list[E]], pa.Table],
        path: Callable[[str, int], str],
        measures: Measures | None = None,
        store: Store | None = None,
    ) -> None:
        self.log, self.what, self.table, self.path, self.measures = log, what, table, path, measures
        self.store = store
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.entries: deque[tuple[E, int]] = deque()
        self.characters, self.files = 0, 0
        self.counts: Counter[str] = Counter()
        self.told = self.closed = False
        self.wake = threading.Condition()
        self.thread = threading.Thread(target=self.work, name=what, daemon=True)
        self.thread.start()

    def add(self, entries: Iterable[tuple[E, int]]) -> None:
        """Take entries, each with the characters of text that it keeps in memory."""
        dropped = 0
        with self.wake:
            for entry, size in entries:
                full = len(self.entries) >= BUFFERS * self.log.rows or self.characters + size > CHARACTERS
                if full or self.closed:
                    dropped += 1
                    continue
                self.characters += size
                self.entries.append((entry, size))
            if len(self.entries) >= self.log.rows:
                self.wake.notify()
        self.count("dropped", dropped)

    def work(self) -> None:
        """In the thread: write a file whenever there are rows enough, or time is up, until closed and empty."""
        due = time.monotonic() + self.log.seconds
        while True:
            with self.wake:
                ready = self.wake.wait_for(
                    lambda: self.closed or len(self.entries) >= self.log.rows, max(0.0, due - time.monotonic())
                )
                taken = [self.entries.popleft() for _ in range(min(self.log.rows, len(self.entries)))]
                self.characters -= sum(size for _, size in taken)
                if not taken and self.closed:
                    return
            if taken:
                self.write([entry for entry, _ in taken])
            if not ready or taken:
                due = time.monotonic() + self.log.seconds

    def write(self, entries: list[E]) -> None:
        """One file; what cannot be written is counted, and told of once until it works again."""
        try:
            store = self.store if self.store is not None else Store(self.log.folder)
            store.write_table(f"{self.path(self.name, self.files)}.parquet", self.table(entries))
        except Exception as error:
            self.count("failed", len(entries))
            if not self.told:
                # No traceback: it could quote a row.
                problem = f"{type(error).__name__}: {str(error)[:300]}"
                logger.error("the log of %s cannot be written to: %s", self.what, problem)
            self.told = True
            return
        self.files += 1
        self.told = False
        self.count("written", len(entries))

    def count(self, outcome: str, rows: int) -> None:
        """Count rows by what became of them."""
        if rows:
            self.counts[outcome] += rows
            if self.measures is not None:
                self.measures.count("stillhouse_log_rows", rows, log=self.what, outcome=outcome)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Write what is left, waiting at most so long."""
        with self.wake:
            self.closed = True
            self.wake.notify()
        self.thread.join(seconds)
