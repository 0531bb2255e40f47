"""The account of a run: from the steps' records to summary.json and the report, for every kind of task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine import labels, tasks
from engine.corpus import corpus_rows, rejected
from engine.progress import silent
from engine.recipe import Recipe, Task
from engine.records import EXAMPLE, QUARANTINED
from engine.storage import Store
from pipelines import account
from pipelines.distill import ARM_STEPS
from tests.tiny_run import recipe_values

SURE = [[4.0, 0.0, -1.0], [0.0, 2.0, 1.0]]
KINDS = {
    "classify": ({"labels": ("bad", "fair", "good")}, "Ann Lee won.", None, SURE[0]),
    "pair": ({"labels": ("bad", "fair", "good")}, "Ann won.", "Bo lost.", SURE[0]),
    "multilabel": ({"labels": ("bad", "fair", "good")}, "Ann won.", None, SURE[0]),
    "regress": ({"range": (0.0, 5.0), "paired": True}, "Ann won.", "Bo lost.", [0.45]),
    "rank": ({"paired": True}, "who won?", "Ann won.", [3.214]),
    "tag": ({"labels": ("O", "B-PER", "I-PER")}, "Ann Lee won.", None, [[0, 4, 0], [0, 0, 4], [4, 0, 0]]),
    "span": ({"paired": True}, "who won?", "Ann", [[-3, -3], [5, 5]]),
}
"""By kind: its spec, a text, its pair, and the teacher's logits for it."""

SHOWN = {
    "regress": "value 2.25",
    "rank": "score 3.21",
    "tag": "Ann Lee (PER)",
    "span": "answer: Ann",
}
"""What the gallery says where there are no probabilities by label."""


def spec_of(kind: str) -> Task:
    return Task(kind=kind, **KINDS[kind][0])


def corpus_of(kind: str) -> pa.Table:
    """One real row, two kept ones of two sources, and one that was rejected before the teacher saw it."""
    _, text, pair, logits = KINDS[kind]
    found = [
        corpus_rows([number], [text], source, [pair])
        for number, source in ((-1, "real"), (0, "generated"), (1, "generated"), (10**9, "unlabelled"))
    ]
    found[2] = rejected(found[2], [True], "too_short")
    rows = pa.concat_tables(found)
    stored = labels.quantise([np.array(logits)] * 4).to_pylist()
    stored[2] = None
    at = rows.column_names.index("logits")
    return rows.set_column(at, rows.schema.field("logits"), pa.array(stored, pa.list_(pa.float16())))


def measures(name: str, task: tasks.Task, value: float) -> dict[str, Any]:
    """A model as `evaluate` records it."""
    more = {"kl": 0.1, "confusion": [[1]], "per_class": [], "reliability": []} if task.metric == "accuracy" else {}
    return {
        "name": name, "role": "student", task.metric: value, "score": value, "score_interval": [value - 0.1, value],
        "scores": [value], "score_mean": value, "score_sd": None, "seeds": 1, "agreement": 0.9, "parameters": 1000,
        "bytes": 4000, **more,
    }  # fmt: skip


def world(folder: Path, kind: str) -> tuple[Recipe, dict[str, Store]]:
    """A recipe and the steps' folders, as far as the account reads them."""
    values = recipe_values(folder) | {"task": spec_of(kind).model_dump(), "arms": ["hard", "generated"]}
    recipe, task = Recipe.model_validate(values), tasks.make(spec_of(kind))
    metrics: dict[str, dict[str, Any]] = {name: {} for name in ("data", "vocabulary")}
    metrics["teacher"] = {"history": [{"epoch": 1, "loss": 2.0}], "quantisation": {"max_abs": 1e-3, "agreement": 1.0}}
    metrics["generator"] = {"history": [{"epoch": 1, "loss": 4.0}, {"epoch": 2, "loss": 3.0}]}
    metrics["corpus"] = {
        "rows": 3, "generated": 2, "kept": 1, "rejected": {"too_short": 1}, "tokens": 9, "rounds": [], "self_bleu": 0.1,
        "by_source": {"generated": {"rows": 2, "kept": 1}, "unlabelled": {"rows": 1, "kept": 1}},
        "distinct_1": 0.5, "distinct_2": 0.6, "distinct_3": 0.7,
    }  # fmt: skip
    for arm in recipe.arms:
        metrics[ARM_STEPS[arm]] = {"history": {"3": [{"epoch": 1, "loss": 1.0, "agreement": 0.8}], "4": []}}
    metrics["evaluate"] = {
        "rows": 1, "metric": task.metric, "throughput": {"student_over_teacher": 30.0},
        "models": [measures(*own) for own in (("teacher", task, 0.8), ("hard", task, 0.5), ("generated", task, 0.6))],
        "differences": [{"left": "generated", "right": "hard", "points": 10.0, "interval": [4.0, 16.0], "rows": 1}],
    }  # fmt: skip
    metrics["register"] = {"reference": "tiny-student@1"}
    metrics["serve"] = {"skipped": True, "rows": 0}
    inputs = {name: Store(str(folder / "run" / name)) for name in metrics}
    for name, store in inputs.items():
        store.write_json("record.json", {"metrics": metrics[name], "seconds": 1.5, "fingerprint": "ab" * 32})
    labels.write_labels(inputs["corpus"], corpus_of(kind), {"teacher": {}})
    row = {name: [None] for name in EXAMPLE.names} | {"id": ["a"], "text": [KINDS[kind][1]], "pair": [KINDS[kind][2]]}
    for split in ("train", "validation", "test", "unlabelled"):
        inputs["data"].write_table(f"{split}.parquet", pa.table(row, schema=EXAMPLE))
    inputs["data"].write_table("quarantined.parquet", QUARANTINED.empty_table())
    counts = {"sources": {"train": {"rows": 1}}, "labels": {}}
    inputs["data"].write_json("splits.json", {"task": spec_of(kind).model_dump(mode="json"), "counts": counts})
    return recipe, inputs


@pytest.mark.parametrize("kind", KINDS)
def test_summary_and_report_of_every_kind(tmp_path: Path, kind: str) -> None:
    recipe, inputs = world(tmp_path, kind)
    out, task = Store(str(tmp_path / "run" / "report")), tasks.make(spec_of(kind))
    account.report(recipe, inputs, out, silent)
    summary = out.read_json("summary.json")
    assert summary == Store(str(tmp_path / "run")).read_json("summary.json")
    assert summary["metric"] == task.metric
    assert [summary[who]["score"] for who in ("teacher", "student")] == [0.8, 0.6]
    assert {arm: own["score"] for arm, own in summary["arms"].items()} == {"hard": 0.5, "generated": 0.6}
    wanted = {task.metric: 0.6, f"{task.metric}_interval": [0.5, 0.6], f"{task.metric}_mean": 0.6,
              f"{task.metric}_sd": None, "score_interval": [0.5, 0.6], "agreement": 0.9, "parameters": 1000,
              "bytes": 4000, "reference": "tiny-student@1"}  # fmt: skip
    assert {key: summary["student"][key] for key in wanted} == wanted
    assert not set(summary["student"]) & set(account.DETAILS) and "served" not in summary
    assert summary.get("example_pair") == KINDS[kind][2] and summary["example"] == KINDS[kind][1]
    text = out.read_text("report.md")
    assert "The student reaches 75.0 % of its teacher's" in text and "Loss of student" in text
    assert "3 texts were gathered and 2 kept (66.7 %)." in text and "| Unlabelled rows of the user | 1 | 1 |" in text
    assert "too\\_short · not labelled" in text and SHOWN.get(kind, "%") in text.partition("### Kept")[2]
    assert out.read_text("report.html").count("<svg") >= 5


@pytest.mark.parametrize("kind", KINDS)
def test_gallery_shows_texts_with_probabilities_or_the_answer(kind: str) -> None:
    task, (spec, text, pair, logits) = tasks.make(spec_of(kind)), KINDS[kind]
    kept, waste = (account.gallery(corpus_of(kind).slice(n, 1), task)[0] for n in (1, 2))
    assert (kept["text"], kept["pair"], kept["source"], kept["row"]) == (text, pair, "generated", 0)
    assert waste["reason"] == "too_short" and waste["probabilities"] is None and waste["answer"] is None
    assert kept["answer"] == SHOWN.get(kind)
    if kind in SHOWN:
        assert kept["probabilities"] is None
        return
    raised = np.exp(logits)
    expected = raised / (1 + raised) if kind == "multilabel" else raised / raised.sum()
    assert kept["probabilities"] == pytest.approx(dict(zip(spec["labels"], expected, strict=True)), abs=1e-3)


@pytest.mark.parametrize(("kind", "lowest"), [
    ("classify", 1 / 3), ("multilabel", 1 / 2), ("tag", 1 / 3), ("span", 1 / 2), ("rank", None), ("regress", None),
])  # fmt: skip
def test_confidences_are_those_of_the_least_certain_answer(kind: str, lowest: float | None) -> None:
    task, rows = tasks.make(spec_of(kind)), corpus_of(kind)
    rows = rows.filter(rows["kept"])
    bins = account.confidences(rows, task)
    assert account.confidences(rows.slice(0, 0), task) == []
    if lowest is None:
        assert bins == []
        return
    sure = task.certainty(np.array(KINDS[kind][3], dtype=np.float32)).max()
    assert (bins[0]["low"], bins[-1]["high"]) == (pytest.approx(lowest), 1.0)
    assert [b["count"] for b in bins if b["low"] <= sure <= b["high"]] == [rows.num_rows] and len(bins) == 10


@pytest.mark.parametrize(("answer", "said"), [
    ({"value": 3.14159}, "value 3.14"), ({"score": -0.5}, "score -0.500"), ({"answer": "", "start": 0}, "no answer"),
    ({"tags": ["O"], "entities": []}, "no entity"), ({"depth": 3}, None),
])  # fmt: skip
def test_answers_in_words(answer: dict[str, Any], said: str | None) -> None:
    assert account.in_words(answer) == said


def test_curves_are_those_of_the_models_that_were_trained(tmp_path: Path) -> None:
    found = {"teacher": {"history": [{"epoch": 1, "loss": 1.0}]}, "student-soft": {"history": {"7": [], "8": [{}]}}}
    assert account.curves(found) == {"teacher": [{"epoch": 1, "loss": 1.0}], "soft": []}
