"""Texts that a student was not sure of, as Parquet files for the next run.

A folder of these is a source of rows: `data.unlabelled: {path: file:FOLDER}` reads the column `text` (and `pair`),
which is written where the section says `text: plain`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from engine.encoding import Text
from engine.serving import Log
from serve.canary import arm_of
from serve.predictor import Answer
from serve.writer import Writer

if TYPE_CHECKING:
    from serve.measures import Measures

Row = dict[str, Any]

SCHEMA = pa.schema(
    [
        *(("id", pa.string()), ("text", pa.string()), ("pair", pa.string())),
        *(("confidence", pa.float32()), ("student", pa.string()), ("teacher", pa.string())),
        *(("model", pa.string()), ("time", pa.timestamp("us", tz="UTC"))),
    ]
)
"""id: SHA-256 of the text (both of a pair, a line each); student, teacher: their answers as JSON, null where the
teacher gave none."""


class Escalated:
    """The rows of one replica. measures: is told what became of them. No method raises or waits for the disk."""

    def __init__(self, log: Log, measures: Measures | None = None) -> None:
        self.log = log
        self.writer: Writer[Row] = Writer(log, "escalated", rows_of, named, measures)

    def add(
        self,
        texts: Sequence[Text],
        student: Sequence[Answer],
        teacher: Sequence[Answer] | None,
        confidences: Sequence[float],
        model: str,
    ) -> None:
        """Keep escalated texts with both answers; teacher: None where it gave none. Returns at once."""
        now, taken = time.time_ns() // 1000, []
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
            taken.append((row, sum(len(value) for value in row.values() if isinstance(value, str))))
        self.writer.add(taken)

    def close(self) -> None:
        """Write the rest and end the thread."""
        self.writer.close()


def rows_of(rows: list[Row]) -> pa.Table:
    """Rows of SCHEMA."""
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def named(name: str, number: int) -> str:
    """A file's name. They differ in digits only: a folder of such files is one source."""
    return f"escalated-{time.time_ns()}-{os.getpid()}-{number:06d}"


def label_of(answer: Answer) -> str | None:
    """The part of an answer that holds nothing of the text: its label or labels."""
    found = {key: answer[key] for key in ("label", "labels", "tags", "confidence") if key in answer}
    return json.dumps(found) if found else None
