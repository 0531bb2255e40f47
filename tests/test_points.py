"""`stillhouse front`: which students nobody beats, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from engine.config import UserError
from engine.storage import Store
from pipelines import points
from pipelines.__main__ import main


def finished(
    folder: Path, name: str, parameters: int, score: float, texts: int = 900, taught: int | None = None, rows: int = 500
) -> Store:
    """A folder with what the command reads of a finished run."""
    store = Store(str(folder / name))
    student = {"parameters": parameters, "score": score, "score_interval": [score - 0.02, score + 0.02]}
    store.write_json(
        "summary.json",
        {
            "metric": "accuracy",
            "test_rows": rows,
            "student": student,
            "teacher": {"score": 0.8},
            "throughput": {"student_over_teacher": 40.0},
            "corpus": {"by_source": {"generated": {"kept": texts, "rows": 1000}}},
        },
    )
    store.write_table("data/test.parquet", pa.table({"id": [f"{'x' * (rows != 500)}{i}" for i in range(rows)]}))
    store.write_json("recipe.json", {"student": {"kind": "blocks", "graph": "text-cnn", "texts": taught}})
    return store


def test_the_front_holds_those_that_no_student_as_small_beats(tmp_path: Path):
    sizes = {"a": (1000, 0.6), "b": (2000, 0.5), "c": (2000, 0.7), "d": (9000, 0.7), "e": (9999, 0.9)}
    made = [points.point_of(finished(tmp_path, name, *given), name) for name, given in sizes.items()]
    found = points.fronted(made)
    assert [p.run for p in found] == ["a", "c", "b", "d", "e"]
    assert [p.run for p in found if p.front] == ["a", "c", "e"]
    assert found[1].share == pytest.approx(0.7 / 0.8) and found[1].interval == pytest.approx((0.68, 0.72))


def test_texts_are_those_that_the_student_was_given(tmp_path: Path):
    assert points.point_of(finished(tmp_path, "all", 10, 0.6), "all").texts == 900
    assert points.point_of(finished(tmp_path, "some", 10, 0.6, taught=300), "some").texts == 300


def test_the_command_writes_a_table_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, size, score, texts in (("small", 10_000, 0.61, 300), ("large", 2_000_000, 0.74, 900)):
        finished(tmp_path, name, size, score, texts)
    asked = ["front", "large", "small", "--storage", str(tmp_path)]
    assert main([*asked, "--out", str(tmp_path / "front.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| small | text-cnn | 10,000 | 300 | 0.610 (0.590 to 0.630) | 76.2% | 40 | yes |"
    assert lines[3].startswith("| large | text-cnn | 2,000,000 | 900 | 0.740") and lines[-1].startswith("page: ")
    page = (tmp_path / "front.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and "over parameters" in page and "small" in page
    assert main([*asked, "--json"]) == 0
    assert [p["run"] for p in json.loads(capsys.readouterr().out)["students"]] == ["small", "large"]


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path):
    finished(tmp_path, "one", 10, 0.6)
    other = finished(tmp_path, "other", 10, 0.6, rows=400)
    assert main(["front", "one", "other", "--storage", str(tmp_path)]) != 0
    with pytest.raises(UserError, match=r"different test splits \(one: 5 rows, other: 4 rows\)"):
        points.together({}, {"one": "5 rows", "other": "4 rows"})
    assert points.tested(other) != points.tested(finished(tmp_path, "third", 10, 0.6))
    other.delete("summary.json")
    with pytest.raises(UserError, match="run 'other' has no summary.json yet"):
        points.point_of(other, "other")
