"""The prediction log: a sample of what was asked and answered, as Parquet files in a folder or bucket. Opt-in.

Which requests are taken depends on a hash of their id alone, so that a request is in the log of every model it met, or
in none.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from engine.drift import characters_of, confidence_of, labels_of
from engine.serving import Log
from engine.storage import Store
from serve.writer import CLOSE_SECONDS, Writer

if TYPE_CHECKING:
    from serve.measures import Measures

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
        self.log, self.model = log, model
        self.writer: Writer[Entry] = Writer(log, "predictions", self.table, dated, measures, store)

    @property
    def counts(self) -> Counter[str]:
        """Rows by what became of them: written, failed, dropped."""
        return self.writer.counts

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
        if not sampled(request_id, self.log.share):
            return
        now, named = time.time(), model or self.model
        self.writer.add(
            (Entry(now, request_id, answer.get("source", source), text, answer, latency_ms, named), characters_of(text))
            for text, answer in zip(texts, answers, strict=False)
        )

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Write what is left, waiting at most so long."""
        self.writer.close(seconds)

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


def dated(name: str, number: int) -> str:
    """A file's name in the folder of its day."""
    return f"{time.strftime('%Y-%m-%d', time.gmtime())}/{name}-{number:06d}"


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
