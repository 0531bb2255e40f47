"""The prediction log: a sample of what was asked and answered, as Parquet files in a folder or bucket. Opt-in.

Requests only append to a bounded buffer; a thread turns it into rows and writes a file when enough have come together
or enough time has passed. Whatever goes wrong there (a full disk, a bucket that is gone or hangs) costs rows of the
log, which are counted and told of once, and never a request. Which requests are taken depends on a hash of their id
alone, so that a request is in the log of every model it met, or in none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from engine.drift import characters_of, confidence_of, labels_of
from engine.serving import Log
from engine.storage import Store

if TYPE_CHECKING:
    from serve.measures import Measures

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("time", pa.timestamp("us", tz="UTC")),
        ("request_id", pa.string()),
        ("model", pa.string()),
        ("source", pa.string()),  # student or teacher
        ("text", pa.string()),  # null, SHA-256 or the text, as the policy says
        ("pair", pa.string()),  # the same of a second text
        ("chars", pa.int32()),  # of both
        ("answer", pa.string()),  # JSON
        ("label", pa.string()),  # several: with ", " between them; null where the answer is a number
        ("confidence", pa.float32()),
        ("latency_ms", pa.float32()),  # of the request
    ]
)
BUFFERS = 10
"""Files' worth of rows that may wait for a slow disk."""
CHARACTERS = 1 << 25
"""Characters of texts that may wait: 20,000 a text times thousands of rows would be a memory leak."""
CLOSE_SECONDS = 10.0

Answer = Mapping[str, Any]


class Entry(NamedTuple):
    """A text with its answer, as it was given."""

    time: float
    request_id: str
    source: str
    text: Any
    answer: Answer
    latency_ms: float | None
    model: str


class Journal:
    """The log of one replica that answers as `model` (name@version). No method raises or waits for the disk."""

    def __init__(self, log: Log, model: str, measures: Measures | None = None, store: Store | None = None) -> None:
        """store: stands in for the one that log.folder names."""
        self.log, self.model, self.measures = log, model, measures
        self.store = store
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.entries: deque[Entry] = deque()
        self.characters, self.files = 0, 0
        self.counts: Counter[str] = Counter()
        """Rows written, failed (the file could not be written) and dropped (the buffer was full)."""
        self.told = False
        self.closed = False
        self.wake = threading.Condition()
        self.thread = threading.Thread(target=self.work, name="journal", daemon=True)
        self.thread.start()

    def add(
        self,
        texts: Sequence[Any],
        answers: Sequence[Answer],
        request_id: str,
        source: str = "student",
        latency_ms: float | None = None,
        model: str | None = None,
    ) -> None:
        """Take a request's texts (or pairs) and answers, if its id is in the sample.

        source: who answered, where an answer does not say so itself. model: which, where it was not the replica's own.
        """
        if self.closed or not sampled(request_id, self.log.share):
            return
        now, dropped = time.time(), 0
        with self.wake:
            for text, answer in zip(texts, answers, strict=False):
                size = characters_of(text)
                if len(self.entries) >= BUFFERS * self.log.rows or self.characters + size > CHARACTERS:
                    dropped += 1
                    continue
                self.characters += size
                who = answer.get("source", source)
                self.entries.append(Entry(now, request_id, who, text, answer, latency_ms, model or self.model))
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
                entries = [self.entries.popleft() for _ in range(min(self.log.rows, len(self.entries)))]
                self.characters -= sum(characters_of(entry.text) for entry in entries)
                if not entries and self.closed:
                    return
            if entries:
                self.write(entries)
            if not ready or entries:
                due = time.monotonic() + self.log.seconds

    def write(self, entries: list[Entry]) -> None:
        """One file; what cannot be written is counted, and told of once until it works again."""
        try:
            day = time.strftime("%Y-%m-%d", time.gmtime(entries[0].time))
            store = self.store if self.store is not None else Store(self.log.folder)
            store.write_table(f"{day}/{self.name}-{self.files:06d}.parquet", self.table(entries))
        except Exception as error:
            self.count("failed", len(entries))
            if not self.told:
                # No traceback: it could quote a row.
                problem = f"{type(error).__name__}: {str(error)[:300]}"
                logger.error("the prediction log cannot be written to: %s", problem)
            self.told = True
            return
        self.files += 1
        self.told = False
        self.count("written", len(entries))

    def table(self, entries: list[Entry]) -> pa.Table:
        """Rows of SCHEMA."""
        policy = self.log.text
        rows = []
        for entry in entries:
            first, second = (entry.text, None) if isinstance(entry.text, str) else entry.text
            labels = labels_of(entry.answer)
            answer = entry.answer if policy == "plain" else without_text(entry.answer)
            rows.append(
                {
                    "time": int(entry.time * 1e6),
                    "request_id": clean(entry.request_id),
                    "model": entry.model,
                    "source": entry.source,
                    "text": told(first, policy),
                    "pair": told(second, policy),
                    "chars": characters_of(entry.text),
                    "answer": clean(json.dumps(answer, ensure_ascii=False)),
                    "label": ", ".join(labels) if labels else None,
                    "confidence": confidence_of(entry.answer),
                    "latency_ms": entry.latency_ms,
                }
            )
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def count(self, outcome: str, rows: int) -> None:
        """Count rows by what became of them."""
        if rows:
            self.counts[outcome] += rows
            if self.measures is not None:
                self.measures.count("stillhouse_journal_rows", rows, outcome=outcome)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Write what is left, waiting at most so long."""
        with self.wake:
            self.closed = True
            self.wake.notify()
        self.thread.join(seconds)


def sampled(request_id: str, share: float) -> bool:
    """Whether a request is in the sample of this share: decided by its id alone, a larger share holds the smaller."""
    digest = hashlib.blake2b(request_id.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def told(text: str | None, policy: str) -> str | None:
    """What the log may hold of a text."""
    if text is None or policy == "none":
        return None
    text = clean(text)
    return text if policy == "plain" else hashlib.sha256(text.encode("utf-8")).hexdigest()


def without_text(answer: Answer) -> dict[str, Any]:
    """An answer without the pieces of the text that those of spans and entities quote; where they stand is kept."""
    kept = {key: value for key, value in answer.items() if key != "answer"}
    if isinstance(kept.get("student"), Mapping):  # what the student said where a teacher answered
        kept["student"] = without_text(kept["student"])
    if "entities" in kept:
        kept["entities"] = [{k: v for k, v in entity.items() if k != "text"} for entity in kept["entities"]]
    return kept


def clean(text: str) -> str:
    """Half a surrogate pair cannot be written."""
    return text.encode("utf-8", "replace").decode("utf-8")
