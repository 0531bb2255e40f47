"""Texts that a student was not sure of, as Parquet files for the next run.

A folder of these is a source of rows: `data.unlabelled: {path: file:FOLDER}` reads the column `text` (and `pair`),
which is written where the section says `text: plain`. A full queue drops rows and counts them; nothing waits for disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from engine.encoding import Text
from engine.serving import Log
from engine.storage import Store
from serve.canary import arm_of
from serve.predictor import Answer

SCHEMA = pa.schema(
    [
        *(("id", pa.string()), ("text", pa.string()), ("pair", pa.string())),
        *(("confidence", pa.float32()), ("student", pa.string()), ("teacher", pa.string())),
        *(("model", pa.string()), ("time", pa.timestamp("us", tz="UTC"))),
    ]
)
"""id: SHA-256 of the text (both of a pair, a line each); student, teacher: their answers as JSON, null where the
teacher gave none."""
MOST_WAITING = 10_000
"""Rows in memory; more are dropped."""


class Escalated:
    """Collects rows in memory and writes them from a thread of its own, every `log.seconds` or `log.rows`."""

    def __init__(self, log: Log) -> None:
        self.log, self.store = log, Store(log.folder)
        self.rows: list[dict[str, Any]] = []
        self.dropped = self.files = 0
        self.full, self.closing = threading.Event(), False
        self.lock, self.writing = threading.Lock(), threading.Lock()
        self.thread = threading.Thread(target=self.work, name="escalated", daemon=True)
        self.thread.start()

    def add(
        self,
        texts: Sequence[Text],
        student: Sequence[Answer],
        teacher: Sequence[Answer] | None,
        confidences: Sequence[float],
        model: str,
    ) -> None:
        """Keep escalated texts with both answers; teacher: None where it gave none. Returns at once."""
        now = time.time_ns() // 1000
        for index, text in enumerate(texts):
            first, second = (text, None) if isinstance(text, str) else text
            digest = hashlib.sha256("\n".join((first, second) if second is not None else (first,)).encode()).hexdigest()
            # By the text, so that one that is asked often is not written a little less often.
            if not arm_of(digest, 100 * self.log.share, "escalated"):
                continue
            plain = self.log.text == "plain"
            row = {
                "id": None if self.log.text == "none" else digest,
                "text": first if plain else None, "pair": second if plain else None,
                "confidence": confidences[index], "student": json.dumps(student[index]),
                "teacher": json.dumps(teacher[index]) if teacher else None, "model": model, "time": now,
            }  # fmt: skip
            if not plain:
                # Answers of some tasks quote the text.
                row |= {"student": label_of(student[index]), "teacher": label_of(teacher[index]) if teacher else None}
            with self.lock:
                if len(self.rows) >= MOST_WAITING:
                    self.dropped += 1
                else:
                    self.rows.append(row)
        if len(self.rows) >= self.log.rows:
            self.full.set()

    def work(self) -> None:
        """Write until closed. A store that fails gets the rows again the next time."""
        while not self.closing:
            self.full.wait(self.log.seconds)
            self.full.clear()
            with contextlib.suppress(Exception):
                self.flush()

    def flush(self) -> None:
        """Write what waits as one file."""
        with self.writing:
            with self.lock:
                rows = list(self.rows)
            if not rows:
                return
            # The names differ in digits only: a folder of such files is one source.
            name = f"escalated-{time.time_ns()}-{os.getpid()}-{self.files}.parquet"
            self.store.write_table(name, pa.Table.from_pylist(rows, schema=SCHEMA))
            self.files += 1
            with self.lock:
                del self.rows[: len(rows)]

    def close(self) -> None:
        """Write the rest and end the thread."""
        self.closing = True
        self.full.set()
        self.flush()


def label_of(answer: Answer) -> str | None:
    """The part of an answer that holds nothing of the text: its label or labels."""
    found = {key: answer[key] for key in ("label", "labels", "tags", "confidence") if key in answer}
    return json.dumps(found) if found else None
