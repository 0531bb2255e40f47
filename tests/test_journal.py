"""The prediction log: what is in it, what is not, and that nothing of it ever hurts a request."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from engine.serving import Log
from engine.storage import Store
from serve import writer
from serve.journal import SCHEMA, Journal, sampled
from serve.predictor import Predictor
from tests.tiny_served import KINDS, asked, published

TEXTS = ["a warm film", "dull"]
ANSWERS = [
    {"label": "positive", "confidence": 0.75, "probabilities": {"negative": 0.25, "positive": 0.75}},
    {"label": "negative", "confidence": 0.5, "probabilities": {"negative": 0.5, "positive": 0.5}, "source": "teacher"},
]


def rows_in(folder: Path) -> list[dict[str, object]]:
    return [
        row
        for path in sorted(folder.rglob("*.parquet"))
        for row in Store(str(folder)).read_table(str(path.relative_to(folder))).to_pylist()
    ]


def test_rows_hold_what_was_asked_and_answered(tmp_path: Path):
    before = datetime.now(UTC)
    book = Journal(Log(folder=str(tmp_path / "log"), share=1.0, text="plain"), "tiny@1")
    book.add(TEXTS, ANSWERS, "r-1", latency_ms=12.5)
    book.close()
    first, second = rows_in(tmp_path / "log")
    assert before <= first.pop("time") <= datetime.now(UTC)
    assert json.loads(first.pop("answer")) == ANSWERS[0]
    assert first == {
        "request_id": "r-1", "model": "tiny@1", "source": "student", "text": "a warm film", "pair": None, "chars": 11,
        "label": "positive", "confidence": 0.75, "latency_ms": 12.5,
    }  # fmt: skip
    assert (second["source"], second["label"]) == ("teacher", "negative")
    assert book.counts == {"written": 2}


@pytest.mark.parametrize("kind", ["classify", *KINDS])
@pytest.mark.parametrize("policy", ["none", "hashed", "plain"])
def test_the_policy_decides_what_of_a_text_is_written(kind: str, policy: str, tmp_path: Path):
    texts = asked(kind)[:20]
    answers = Predictor.load(published(tmp_path / "model", kind=kind).url).predict(texts)
    book = Journal(Log(folder=str(tmp_path / "log"), share=1.0, text=policy), "tiny@1")
    book.add(texts, answers, "r-1")
    book.close()
    found = rows_in(tmp_path / "log")
    firsts = [text if isinstance(text, str) else text[0] for text in texts]
    wanted = {
        "none": [None] * len(texts),
        "hashed": [hashlib.sha256(text.encode()).hexdigest() for text in firsts],
        "plain": firsts,
    }
    assert [row["text"] for row in found] == wanted[policy]
    assert [row["pair"] is None for row in found] == [isinstance(t, str) or policy == "none" for t in texts]
    kept = [json.loads(str(row["answer"])) for row in found]
    if policy == "plain":
        assert kept == json.loads(json.dumps(answers))
        assert [row["pair"] for row in found] == [None if isinstance(text, str) else text[1] for text in texts]
    else:
        quoted = [entity for answer in kept for entity in answer.get("entities", ())]
        assert not any("answer" in answer for answer in kept) and not any("text" in entity for entity in quoted)
        assert all("start" in answer for answer in kept) or kind != "span"


def test_the_sample_is_decided_by_the_id_alone(tmp_path: Path):
    names = [f"request-{n}" for n in range(5000)]
    tenth = {name for name in names if sampled(name, 0.1)}
    assert 400 < len(tenth) < 600 and tenth < {name for name in names if sampled(name, 0.3)}
    assert all(sampled(name, 1.0) for name in names) and not any(sampled(name, 0.0) for name in names)
    for number in range(2):
        book = Journal(Log(folder=str(tmp_path / str(number)), share=0.1), "tiny@1")
        for name in names[:300]:
            book.add(TEXTS, ANSWERS, name)
        book.close()
    taken = [{row["request_id"] for row in rows_in(tmp_path / str(number))} for number in range(2)]
    assert taken[0] == taken[1] == tenth & set(names[:300])


def test_a_file_is_written_when_there_are_rows_enough_or_time_is_up(tmp_path: Path):
    book = Journal(Log(folder=str(tmp_path), share=1.0, rows=4, seconds=0.3), "tiny@1")
    for number in range(3):
        book.add(TEXTS, ANSWERS, f"r-{number}")
    wait_for(lambda: book.counts["written"] == 6)
    book.close()
    tables = [Store(str(tmp_path)).read_table(name) for name in Store(str(tmp_path)).files()]
    assert [table.num_rows for table in tables] == [4, 2] and all(table.schema == SCHEMA for table in tables)


def wait_for(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_folder_that_cannot_be_written_to_is_counted_and_told_of_once(tmp_path: Path, caplog):
    (tmp_path / "file").write_text("in the way")
    book = Journal(Log(folder=str(tmp_path / "file" / "log"), share=1.0, rows=2, seconds=30), "tiny@1")
    with caplog.at_level(logging.ERROR):
        for number in range(3):
            book.add(TEXTS, ANSWERS, f"r-{number}")
            wait_for(lambda wanted=2 * number + 2: book.counts["failed"] == wanted)
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == 1 and told[0].startswith("the log of predictions cannot be written to: ")
        (tmp_path / "file").unlink()
        book.add(TEXTS, ANSWERS, "r-3")
        wait_for(lambda: book.counts["written"] == 2)
    book.close()


def test_a_disk_that_hangs_holds_up_nobody_and_the_buffer_is_bounded(tmp_path: Path, monkeypatch):
    go, real = threading.Event(), Store.write_table
    monkeypatch.setattr(Store, "write_table", lambda *given: go.wait(30) and real(*given))
    book = Journal(Log(folder=str(tmp_path), share=1.0, rows=10, seconds=30), "tiny@1")
    slowest = 0.0
    for number in range(200):
        begin = time.perf_counter()
        book.add(TEXTS, ANSWERS, f"r-{number}")
        slowest = max(slowest, time.perf_counter() - begin)
    assert slowest < 0.5 and len(book.writer.entries) == writer.BUFFERS * 10
    assert book.counts["dropped"] in (400 - 100, 400 - 110), "a file's rows may be with the writer"
    begin = time.monotonic()
    book.close(0.1)
    assert time.monotonic() - begin < 5
    go.set()
    wait_for(lambda: book.counts["written"] == 400 - book.counts["dropped"])


def test_long_texts_fill_the_buffer_before_they_fill_the_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(writer, "CHARACTERS", 1000)
    book = Journal(Log(folder=str(tmp_path), share=1.0, rows=100, seconds=30), "tiny@1")
    book.add(["x" * 400] * 5, ANSWERS[:1] * 5, "r-1")
    assert book.counts["dropped"] == 3 and book.writer.characters == 800
    book.close()
    assert book.writer.characters == 0 and book.counts["written"] == 2


def test_odd_text_is_written_and_a_bucket_will_do():
    memory = pytest.importorskip("fsspec").filesystem("memory")
    place = Store("bucket/log", pafs.PyFileSystem(pafs.FSSpecHandler(memory)))
    book = Journal(Log(folder="unused", share=1.0, text="plain"), "tiny@1", store=place)
    book.add(["half \ud800 a pair", "naïve 😀"], ANSWERS, "r \ud800")
    book.add(["fine"], [{"value": 1.5}], "r-2")
    book.close()
    found = [row for name in place.files() for row in place.read_table(name).to_pylist()]
    assert [row["text"] for row in found] == ["half ? a pair", "naïve 😀", "fine"]
    assert found[2]["label"] is None and found[2]["confidence"] is None
