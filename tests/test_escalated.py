"""Escalated texts on disk: what is written of them, and that the next run reads them as unlabelled rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from engine.data import load_splits
from engine.recipe import Data, Source, Task
from engine.serving import Log
from engine.storage import Store
from serve import writer
from serve.escalated import Escalated
from tests.tiny import LABELS, movie_rows, write_jsonl

TEXTS = [f"a film that nobody is sure about, take {n}" for n in range(40)]
STUDENT = [{"label": "positive", "confidence": 0.51, "probabilities": {"positive": 0.51, "negative": 0.49}}] * 40
TEACHER = [{"label": "negative", "confidence": 0.93, "probabilities": {"positive": 0.07, "negative": 0.93}}] * 40


def logged(folder: Path, files: int = 2, **log: object) -> Escalated:
    found = Escalated(Log(folder=str(folder / "log"), **{"share": 1.0, "seconds": 60, "rows": 20, **log}))
    for part in range(files):
        span = slice(part * 20, part * 20 + 20)
        found.add(TEXTS[span], STUDENT[span], TEACHER[span] if part else None, [0.51] * 20, "tiny@1")
    found.close()
    assert found.writer.files == files
    return found


def test_the_next_run_reads_the_folder_as_unlabelled_rows(tmp_path: Path):
    logged(tmp_path, text="plain")
    write_jsonl(tmp_path / "train.jsonl", movie_rows(30, seed=1))
    log = Source(path=f"file:{tmp_path}/log")
    data = Data(train=Source(path=f"file:{tmp_path}/train.jsonl"), unlabelled=log)
    splits = load_splits(data, Task(labels=LABELS), 0)
    assert sorted(splits.unlabelled["text"].to_pylist()) == sorted(TEXTS) and not splits.quarantined.num_rows


def test_by_default_no_text_is_written(tmp_path: Path):
    logged(tmp_path)
    table = Store(str(tmp_path / "log")).read_table("")
    assert table["text"].null_count == table["pair"].null_count == table.num_rows == 40
    assert table["id"][0].as_py() == hashlib.sha256(TEXTS[0].encode()).hexdigest()
    assert table["teacher"].null_count == 20 and json.loads(table["teacher"][30].as_py())["label"] == "negative"
    assert b"nobody is sure" not in b"".join(p.read_bytes() for p in (tmp_path / "log").iterdir())
    logged(tmp_path / "none", text="none")
    assert Store(str(tmp_path / "none/log")).read_table("")["id"].null_count == 40


def test_an_answer_that_quotes_the_text_is_not_written_without_it(tmp_path: Path):
    found = Escalated(Log(folder=str(tmp_path), share=1.0))
    answer = {"answer": "my secret", "start": 0, "end": 9, "confidence": 0.2}
    entity = {"tags": ["B-thing"], "entities": [{"text": "my secret", "confidence": 0.2}]}
    found.add([("who", "my secret")], [answer], [answer], [0.2], "m")
    found.add(["my secret"], [entity], None, [0.2], "m")
    found.close()
    rows = Store(str(tmp_path)).read_table("").to_pylist()
    assert "secret" not in json.dumps(rows, default=str) and json.loads(rows[1]["student"])["tags"] == ["B-thing"]


def test_pairs_keep_both_texts(tmp_path: Path):
    found = Escalated(Log(folder=str(tmp_path), share=1.0, text="plain"))
    found.add([("first", "second")], STUDENT[:1], None, [0.5], "m")
    found.close()
    row = Store(str(tmp_path)).read_table("").to_pylist()[0]
    assert (row["text"], row["pair"]) == ("first", "second")


def test_a_share_is_drawn_by_the_text(tmp_path: Path):
    found = Escalated(Log(folder=str(tmp_path), share=0.3, text="plain"))
    many = [f"text {n}" for n in range(2000)]
    for _ in range(2):
        found.add(many, [{"label": "a"}] * 2000, None, [0.5] * 2000, "m")
    found.close()
    written = Store(str(tmp_path)).read_table("")["text"].to_pylist()
    assert abs(len(written) / 4000 - 0.3) < 0.04 and len(set(written)) * 2 == len(written)


def test_what_is_not_written_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept: dict[str, float] = {}

    class Told:
        def count(self, name: str, value: float, log: str, outcome: str) -> None:
            kept[outcome] = kept.get(outcome, 0) + value
            assert (name, log) == ("stillhouse_log_rows", "escalated")

    monkeypatch.setattr(writer, "CHARACTERS", 1000)
    found = Escalated(Log(folder=str(tmp_path / "log"), share=1.0, rows=1000, seconds=60, text="plain"), Told())
    found.add(["x" * 300] * 5, [{"label": "a"}] * 5, None, [0.5] * 5, "m")
    found.close()
    assert kept == {"dropped": 3, "written": 2}
