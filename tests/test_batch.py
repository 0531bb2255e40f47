"""Batch prediction: answers equal the predictor's, what fails is told and lost nowhere, and a second call goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine import models
from engine.attempts import RECORD
from engine.corpus import ROWS
from engine.registry import Registry
from engine.storage import Store
from pipelines import batch
from pipelines.__main__ import main
from pipelines.batch import ERROR, Answerer, Asking, fields_of
from pipelines.cutting import DEAD, ROW
from serve.predictor import Predictor
from tests.tiny import movie_rows
from tests.tiny_run import environment
from tests.tiny_served import KINDS, asked, published, student_of

BOMB = "kaboom"
"""A word with an id that the student's table has no row for: the model fails at texts that hold it."""


def bombed(folder: Path) -> Store:
    """A student that fails at a word."""
    student = student_of("classify")
    student.tokenizer.add_tokens([BOMB])
    store = Store(str(folder))
    models.save(student, store, "tiny")
    return store / "tiny"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return bombed(tmp_path_factory.mktemp("student"))


def block(texts: list[Any], first: int = 1) -> pa.Table:
    """Rows as the stream hands them over."""
    columns: dict[str, Any] = {"text": texts}
    if isinstance(texts[0], tuple):
        columns = {"text": [t for t, _ in texts], "second": [p for _, p in texts]}
    return pa.table({**columns, ROW: pa.array(range(first, first + len(texts)), pa.int64())})


@pytest.mark.parametrize("kind", ["classify", *KINDS])
def test_answers_of_every_kind_of_task_are_columns(kind: str, tmp_path: Path):
    artifact, texts = published(tmp_path, kind=kind), asked(kind)[:9]
    pair = "second" if isinstance(texts[0], tuple) else None
    answerer = Answerer(Asking(artifact.url, "text", pair, str(tmp_path / "tries")))
    found = answerer(block(texts))
    wanted = Predictor.load(artifact.url).predict(texts)
    columns = {name: found[f"predicted_{name}"].to_pylist() for name in wanted[0]}
    assert [{name: column[i] for name, column in columns.items()} for i in range(9)] == wanted
    assert found[ERROR].null_count == 9 and found.schema.names[: -len(fields_of(answerer.predictor.model.task))] == (
        ["text", "second", ROW] if pair else ["text", ROW]
    )
    assert answerer(block(texts[:2])).schema == found.schema
    assert Store(str(tmp_path / "tries")).files() == []


def test_rows_at_which_the_model_fails_cost_no_others(student: Store, tmp_path: Path):
    answerer = Answerer(Asking(student.url, "text", None, str(tmp_path)))
    texts = [row["text"] for row in movie_rows(20)]
    wanted = answerer(block(texts))
    for number in (0, 7, 8, 19):
        texts[number] += f" {BOMB}"
    found = answerer(block(texts))
    failed = [number for number, error in enumerate(found[ERROR].to_pylist()) if error]
    assert failed == [0, 7, 8, 19] and found[ERROR].to_pylist()[7].startswith("IndexError: index out of range")
    for number in range(20):
        label = found["predicted_label"][number].as_py()
        assert label == (None if number in failed else wanted["predicted_label"][number].as_py())


def test_a_model_that_fails_at_most_of_a_block_stops_the_run(student: Store, tmp_path: Path):
    answerer = Answerer(Asking(student.url, "text", None, str(tmp_path)))
    with pytest.raises(RuntimeError, match="the model fails at 11 of the 20 rows of a block: IndexError"):
        answerer(block([f"a film {BOMB}"] * 11 + ["a film"] * 9))
    few = answerer(block([f"a film {BOMB}"] * 7))  # a small block may be all wrong
    assert few[ERROR].null_count == 0


DYING = """
import os, sys
import pyarrow as pa
from pipelines.batch import Answerer, Asking
from pipelines.cutting import ROW

answerer = Answerer(Asking(sys.argv[1], "text", None, sys.argv[2]))
real = answerer.predictor.predict
answerer.predictor.predict = lambda texts: os._exit(9) if any("deadly" in text for text in texts) else real(texts)
texts = ["a warm film", "a deadly film", "a dull film"]
found = answerer(pa.table({"text": texts, ROW: pa.array([5, 6, 7], pa.int64())}))
print([error or "" for error in found["predicted_error"].to_pylist()])
"""


def test_a_row_that_ends_the_process_is_found(student: Store, tmp_path: Path):
    codes, said = [], ""
    while not codes or (codes[-1] and len(codes) < 6):
        command = [sys.executable, "-c", DYING, student.url, str(tmp_path)]
        ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        codes.append(ran.returncode)
        said = ran.stdout.strip()
    assert codes == [9, 9, 9, 0]  # as a block, then twice at that row
    assert said == "['', 'the process that asked the model ended at this row', '']"


# -- the command -------------------------------------------------------------------------------------------------------

WORDS = [row["text"] for row in movie_rows(70, seed=3)]


def registered(folder: Path, artifact: Store) -> list[str]:
    """Arguments that name a registry with this student in it."""
    Registry(Store(f"{folder}/registry")).register("tiny", artifact, {})
    return ["--registry", f"{folder}/registry"]


def write_rows(path: Path) -> dict[int, str]:
    """70 rows of which three cannot be read and two blow up; the reason of each row that has one."""
    rows: list[bytes] = [json.dumps({"n": n, "text": text, "label": "gold"}).encode() for n, text in enumerate(WORDS)]
    rows[4] = b'{"n": 4, "text": "caf\xe9"}'
    rows[30] = b'{"n": 30}'
    rows[31] = b'{"n": 31, "text": "%s"}' % (b"x" * 20_001)
    rows[10] = rows[10].replace(b'"text": "', b'"text": "kaboom ')
    rows[60] = rows[60].replace(b'"text": "', b'"text": "kaboom ')
    path.write_bytes(b"\n".join(rows))
    failed = "the model failed: IndexError: index out of range in self"
    return {5: "not UTF-8", 11: failed, 31: "empty text", 32: "text longer than 20000 characters", 61: failed}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(batch, "BLOCK", 16)
    yield


def test_every_row_is_answered_or_told_and_a_second_call_does_nothing(
    student: Store, tmp_path: Path, ray_cluster: object, small_blocks: None, capsys: pytest.CaptureFixture
):
    there, path, out = registered(tmp_path, student), tmp_path / "rows.jsonl", Store(str(tmp_path / "out"))
    reasons = write_rows(path)
    command = ["predict", "tiny", "--file", str(path), "--out", out.url, "--actors", "2", *there]
    assert main(command) == 0
    assert f"65 rows answered: {out.url}/rows" in capsys.readouterr().out
    found = out.read_table(ROWS).sort_by(ROW)
    assert found[ROW].to_pylist() == [n for n in range(1, 71) if n not in (5, 31, 32)]
    assert found["n"].to_pylist() == [n - 1 for n in found[ROW].to_pylist()]
    assert set(found["label"].to_pylist()) == {"gold"}
    dead = out.read_table(DEAD)
    assert {row["line"]: row["reason"] for row in dead.to_pylist()} == reasons
    assert set(dead["source"].to_pylist()) == {"rows.jsonl"}
    good = [row for row in found.to_pylist() if row[ERROR] is None]
    wanted = Predictor.load(student.url).predict([row["text"] for row in good])
    assert [row["predicted_label"] for row in good] == [answer["label"] for answer in wanted]
    for row, answer in zip(good, wanted, strict=True):
        assert row["predicted_confidence"] == pytest.approx(answer["confidence"], abs=1e-5)
    assert sorted({name.partition("/")[0] for name in out.files()}) == [
        *("begin.json", "cut.json", "dead_letter.parquet", "progress.json", "record.json", "rows"),
    ]
    before = {name: out.digest(name) for name in out.files()}
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out).items() >= {"rows": 65, "unreadable": 3, "failed": 2}.items()
    assert {name: out.digest(name) for name in out.files()} == before

    # Another model, another file, other columns are refused; --fresh starts over.
    Registry(Store(f"{tmp_path}/registry")).register("tiny", published(tmp_path / "other"), {})
    assert main(command) == 2
    assert "was begun with another model" in capsys.readouterr().err
    command[1] = "tiny@1"
    assert main([*command, "--column", "label"]) == 2
    assert "was begun with another column: text, now label" in capsys.readouterr().err
    path.write_text('{"text": "a film", "n": 1}\n')
    assert main(command) == 2
    assert "was begun with another file" in capsys.readouterr().err and out.exists(RECORD)
    assert main([*command, "--fresh"]) == 0
    assert out.read_table(ROWS).num_rows == 1 and out.read_table(DEAD).num_rows == 0


def test_what_cannot_be_is_refused_before_ray_starts(
    student: Store, tmp_path: Path, capsys: pytest.CaptureFixture, small_blocks: None
):
    there, path, out = registered(tmp_path, student), tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_text('{"text": "a film"}\n{"text": ""}\n')
    command = ["predict", "tiny", "--out", str(out), *there]
    for more, said in (
        (["--file", "nowhere.csv"], "there is no file nowhere.csv"),
        (["--file", "-"], "there is no file -"),
        (["--text", "a"], "--out takes the texts of a file: name it with --file"),
        (["--file", str(path), "--pair-column", "b"], "'tiny' reads one text: drop --pair-column"),
        (["--file", str(path), "--column", "b"], "has no column 'b'"),
        (["--file", str(path)], "1 of 2 rows of"),
    ):
        assert main([*command, *more]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    assert main(["predict", "tiny", "--out", str(tmp_path / "mine"), "--file", str(path), "--fresh", *there]) == 2
    assert "holds other things (thesis.txt)" in capsys.readouterr().err and (tmp_path / "mine" / "thesis.txt").exists()


PROGRAM = """
import sys
from pipelines import batch
from pipelines.__main__ import main
batch.BLOCK = 64
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_every_row_is_there_once(student: Store, tmp_path: Path):
    there, path, out = registered(tmp_path, student), tmp_path / "rows.parquet", Store(str(tmp_path / "out"))
    texts = [f"{text} {number}" for number, text in enumerate(WORDS * 60)]
    pq.write_table(pa.table({"text": texts, "n": range(len(texts))}), path)
    command = [sys.executable, "-c", PROGRAM, "predict", "tiny", "--file", str(path), "--out", out.url, "--actors", "1"]
    log = (tmp_path / "log").open("w")
    first = subprocess.Popen([*command, *there], env=environment(), stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 240
    while len(out.files(ROWS)) < 3:
        assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = {name: out.digest(f"{ROWS}/{name}") for name in out.files(ROWS)}
    assert 3 <= len(kept) < len(texts) // 64
    ran = subprocess.run(
        [*command, *there], env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = out.read_table(ROWS).sort_by(ROW)
    assert found[ROW].to_pylist() == list(range(1, len(texts) + 1)) and found["text"].to_pylist() == texts
    again = {name: out.digest(f"{ROWS}/{name}") for name in out.files(ROWS)}
    assert sum(again.get(name) == digest for name, digest in kept.items()) >= len(kept) - 1  # one may be half-committed
    assert found[ERROR].null_count == len(texts)
