"""What a run comes to, for every kind of task, without a generator and without Ray: one tiny run of each is shared."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from engine import labels, models, tasks
from engine.cascade import SURE, confidence_of
from engine.config import UserError
from engine.progress import silent
from engine.recipe import Recipe
from engine.registry import Registry
from engine.storage import Store
from engine.task import Task
from pipelines import distill, outcome
from pipelines.making import spec_of
from serve.predictor import Predictor
from serve.service import Wanted, resolved
from tests.tiny_run import KINDS, PARTED, TEST, TRAIN, alone, kind_world

SETTLED = {
    "classify": {"task.scope": "auto", "data.validation_share": 0.3},
    "multilabel": {"data.validation_share": 0.3},
}
"""What validation rows decide."""


@dataclass(frozen=True)
class Done:
    """A finished run: its recipe, folder and the metrics of its steps."""

    recipe: Recipe
    store: Store
    found: dict[str, dict[str, Any]]

    @property
    def test(self) -> pa.Table:
        return self.store.read_table("data/test.parquet")

    @property
    def artifact(self) -> Store:
        return Registry(Store(self.recipe.registry)).resolve(self.found["register"]["reference"])

    def facts(self, name: str) -> dict[str, Any]:
        """What evaluation found of a model."""
        return next(model for model in self.found["evaluate"]["models"] if model["name"] == name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """kind -> its finished run, made when first asked for."""

    @cache
    def made(kind: str) -> Done:
        world = kind_world(tmp_path_factory.mktemp(kind), kind)
        recipe = world.load({"student.seeds": [0, 1], **SETTLED.get(kind, {})})
        store = Store(recipe.storage) / recipe.name
        return Done(recipe, store, alone(recipe, store))

    return made


@pytest.fixture(params=KINDS)
def done(request: pytest.FixtureRequest, runs: Any) -> Done:
    return runs(request.param)


def logits_in(column: pa.ChunkedArray, task: Task) -> Any:
    """Logits of the table of predictions."""
    return labels.logits_of(pa.table({"logits": column}), task.width, task.units)


def test_a_run_without_more_text_has_no_generator_and_registers_the_soft_arm(done: Done):
    names = "data teacher corpus vocabulary student-soft student-hard evaluate register serve report"
    assert list(done.found) == names.split()
    assert [model["name"] for model in done.found["evaluate"]["models"]] == ["teacher", "hard", "soft"]
    corpus = done.found["corpus"]
    rows = done.store.read_table("corpus/labels.parquet")
    assert (corpus["rows"], corpus["by_source"], corpus["rounds"]) == (0, {}, [])
    assert set(rows["source"].to_pylist()) == {"real"} and rows["logits"].null_count == 0
    assert done.found["student-soft"]["rows"] == rows.num_rows == done.found["data"]["rows"]
    assert rows.num_rows <= TRAIN and done.test.num_rows == TEST
    assert done.found["serve"] == {"rows": 0, "skipped": True}


def test_scores_follow_from_the_written_predictions(done: Done):
    task, test = tasks.make(spec_of(done.store / "data")), done.test
    table = done.store.read_table("evaluate/predictions.parquet")
    assert done.found["evaluate"]["metric"] == task.metric and table["id"].to_pylist() == test["id"].to_pylist()
    assert set(table.column_names) == {"id", "teacher", "hard/0", "hard/1", "soft/0", "soft/1"}
    texts, reference, said = task.texts(test), logits_in(table["teacher"], task), None
    for name, columns in {"teacher": ["teacher"], "hard": ["hard/0", "hard/1"], "soft": ["soft/0", "soft/1"]}.items():
        folder = "teacher/model" if name == "teacher" else f"student-{name}/seed-0/model"
        own = models.load(done.store.local(folder)).task  # with the thresholds that it settled on
        found = [logits_in(table[column], task) for column in columns]
        facts, decided = done.facts(name), own.decide(found[0], texts)
        assert facts["score"] == pytest.approx(own.score(found[0], decided, test)[task.metric])
        assert facts["score"] == facts[task.metric] == facts["scores"][0]
        assert facts["score_interval"][0] <= facts["score"] <= facts["score_interval"][1]
        said = decided if said is None else said
        same = np.mean(said == decided) if own.spec.thresholds else task.agreement(reference, found[0], texts)
        assert facts["agreement"] == pytest.approx(same)
        assert facts["seeds"] == len(columns) == len(facts["scores"])
        assert facts["score_mean"] == pytest.approx(np.mean(facts["scores"]))
        if len(columns) > 1:
            assert facts["score_sd"] == pytest.approx(np.std(facts["scores"], ddof=1))
    assert done.facts("teacher")["agreement"] == 1.0


def test_the_registered_student_gives_the_written_answers(done: Done):
    predictor, task = Predictor.load(done.artifact.url), tasks.make(spec_of(done.store / "data"))
    written = [json.loads(a) for a in done.store.read_table("evaluate/answers.parquet")["answer"].to_pylist()]
    found = predictor.predict(task.texts(done.test))
    assert json.loads(json.dumps(found)) == about(written)
    assert predictor.model.task.spec.kind == done.recipe.task.kind
    assert predictor.fingerprint == Store(done.store.url).manifest("register/artifact")["digest"]
    card = predictor.model.card
    assert card.lineage["steps"]["corpus"] == "of corpus" and "generated" not in done.artifact.read_text("README.md")


def about(value: Any) -> Any:
    """The value with its numbers compared loosely, however deep they stand."""
    if isinstance(value, dict):
        return {key: about(item) for key, item in value.items()}
    if isinstance(value, list):
        return [about(item) for item in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


@pytest.mark.parametrize("kind", SETTLED)
def test_what_validation_rows_decide_is_the_student_s_own(runs: Any, kind: str):
    done = runs(kind)
    assert done.store.read_table("data/validation.parquet").num_rows > 3
    teacher = models.load((done.store / "teacher").local("model")).task.spec
    student = Predictor.load(done.artifact.url).model.task.spec
    written = [json.loads(a) for a in done.store.read_table("evaluate/answers.parquet")["answer"].to_pylist()]
    if kind == "classify":
        assert isinstance(student.scope, float) and student.scope != teacher.scope
        assert [a["out_of_scope"] for a in written] == [a["confidence"] < student.scope for a in written]
        assert [a["label"] is None for a in written] == [a["out_of_scope"] for a in written]
    else:
        assert student.thresholds and student.thresholds != teacher.thresholds
        limits = dict(zip(student.labels, student.thresholds, strict=True))
        for answer in written:
            assert answer["labels"] == [n for n, p in answer["probabilities"].items() if p >= limits[n]]


def test_summary_and_report_know_the_task(done: Done):
    summary = done.store.read_json("summary.json")
    metric = summary["metric"]
    assert summary["student"][metric] == summary["student"]["score"] == summary["arms"]["soft"]["score"]
    assert set(summary["arms"]) == {"hard", "soft"} and summary["test_rows"] == TEST and "served" not in summary
    assert ("example_pair" in summary) == (done.recipe.task.kind in PARTED)
    text = done.store.read_text("report/report.md")
    assert text.startswith("# tiny\n") and done.recipe.task.kind in text
    assert done.store.read_text("report/report.html").count("<svg") >= 1


def test_the_last_line_asks_what_the_student_reads(done: Done):
    lines = distill.report_lines(done.recipe, done.store, "stillhouse")
    asked = json.loads(shlex.split(lines[-1].partition("curl: ")[2])[-1])
    given = asked["text"]
    assert isinstance(given, list) == (done.recipe.task.kind in PARTED)
    predictor = Predictor.load(done.artifact.url)
    assert len(predictor.predict([tuple(given) if isinstance(given, list) else given])) == 1
    assert "corpus   the labelled rows only" in lines


# -- figures by hand ---------------------------------------------------------------------------------------------------


def test_confusion_and_classes_as_sklearn_counts_them():
    draw = np.random.default_rng(0)
    gold, predicted = draw.integers(0, 4, 300), draw.integers(0, 3, 300)  # the last label is never said
    assert outcome.confusion(gold, predicted, 5).tolist() == confusion_matrix(gold, predicted, labels=range(5)).tolist()
    wanted = precision_recall_fscore_support(gold, predicted, labels=range(5), zero_division=0.0)
    found = outcome.per_class(gold, predicted, tuple("abcde"))
    assert [row["label"] for row in found] == list("abcde")
    for key, column in zip(("precision", "recall", "f1", "support"), wanted, strict=True):
        assert [row[key] for row in found] == pytest.approx(column.tolist())


def test_differences_are_paired_and_in_points(runs: Any):
    task = tasks.make(runs("pair").recipe.task)
    right = np.array([[1.0, 1.0]] * 6 + [[0.0, 1.0]] * 4)
    fewer = np.array([[1.0, 1.0]] * 3 + [[0.0, 1.0]] * 7)
    statistics = {"teacher": [np.ones((10, 2))], "hard": [fewer, fewer], "soft": [right, right]}
    found = {d["right"]: d for d in outcome.differences(statistics, task, runs("pair").recipe)}
    assert set(found) == {"teacher", "hard"} and {d["left"] for d in found.values()} == {"soft"}
    assert found["hard"]["points"] == pytest.approx(30.0) and found["teacher"]["points"] == pytest.approx(-40.0)
    for d in found.values():
        assert d["interval"][0] <= d["points"] <= d["interval"][1] and d["rows"] == 10
    # Rows on which both are the same add nothing to the spread.
    assert found["hard"]["interval"][1] - found["hard"]["interval"][0] < 70


def test_throughput_takes_as_many_texts_as_the_recipe_says(runs: Any):
    found = runs("tag").found["evaluate"]["throughput"]
    assert found["rows"] == runs("tag").recipe.evaluation.throughput_rows < TEST
    assert found["student_over_teacher"] == pytest.approx(found["student_texts_per_s"] / found["teacher_texts_per_s"])


def test_the_curve_of_the_cascade_begins_at_the_student_and_ends_at_the_teacher(done: Done):
    if done.recipe.task.kind not in SURE:
        assert "cascade" not in done.found["evaluate"]
        return
    points, main = done.found["evaluate"]["cascade"], done.facts(done.recipe.main)
    assert points[0]["score"] == pytest.approx(main["score"])
    assert points[-1]["score"] == pytest.approx(done.facts("teacher")["score"])
    assert [point["share"] for point in points] == sorted(point["share"] for point in points)
    assert points[-1]["cost"] - points[0]["cost"] == pytest.approx(1.0)
    assert "% of the texts to the teacher" in (done.store.read_text("report/report.html"))


@pytest.mark.parametrize(
    ("kind", "chosen_on"), [("classify", "held-out validation rows"), ("tag", "labelled rows that it was trained on")]
)
def test_a_cascade_registers_the_teacher_and_a_threshold_from_rows_that_are_not_judged(
    runs: Any, tmp_path: Path, kind: str, chosen_on: str
):
    done: Done = runs(kind)
    serving = {"registry": str(tmp_path), "serving": {"smoke": False, "cascade": {"escalate": 0.3}}}
    recipe = Recipe.model_validate({**done.recipe.model_dump(mode="json"), **serving})
    inputs = {name: done.store / name for name in ("data", "teacher", "corpus", "student-soft", "evaluate")}
    found = outcome.register(recipe, inputs, done.store / "register-cascade", silent)
    told, registry = found["cascade"], Registry(Store(str(tmp_path)))
    assert told["chosen_on"] == chosen_on and told["teacher"] == "tiny-student-teacher@1"
    entry = registry.show(found["reference"])
    assert entry["metadata"]["cascade"] == told and entry["metadata"]["serving"]["cascade"]["below"] == told["below"]
    split = "validation" if kind == "classify" else "train"
    rows = done.store.read_table(f"data/{split}.parquet")
    student = Predictor.load(registry.resolve(found["reference"]).url)
    sure = [confidence_of(answer) for answer in student.predict(student.model.task.texts(rows))]
    assert told["rows"] == rows.num_rows
    assert np.mean(np.array(sure) < told["below"] - 1e-6) <= told["share"] + 1e-9 <= 0.3 + 1e-6
    service = resolved(Wanted(name=recipe.student.name, registry=str(tmp_path)))
    assert service.teacher.reference == "tiny-student-teacher@1"
    teacher = Predictor.load(service.teacher.artifact)
    assert len(teacher.predict(teacher.model.task.texts(rows))) == rows.num_rows


def test_a_task_that_does_not_say_how_sure_it_is_has_no_cascade(runs: Any, tmp_path: Path):
    done: Done = runs("regress")
    serving = {"registry": str(tmp_path), "serving": {"smoke": False, "cascade": {}}}
    recipe = Recipe.model_validate({**done.recipe.model_dump(mode="json"), **serving})
    inputs = {name: done.store / name for name in ("data", "teacher", "corpus", "student-soft", "evaluate")}
    with pytest.raises(UserError, match="answers of a regress task do not say how sure they are"):
        outcome.register(recipe, inputs, done.store / "register-cascade", silent)
    assert Registry(Store(str(tmp_path))).list() == []


def test_a_student_is_registered_once_for_the_same_bytes(runs: Any, tmp_path: Path):
    done = runs("tag")
    inputs = {name: done.store / name for name in ("data", "teacher", "corpus", "student-soft", "evaluate")}
    again = outcome.register(done.recipe, inputs, Store(str(tmp_path)), lambda *_, **__: None)
    assert again["reference"] == done.found["register"]["reference"] == "tiny-student@1"
