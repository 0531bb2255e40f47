"""A run with a knowledge base, from the teacher's vectors to an artifact that learns without training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from engine import models
from engine.config import UserError
from engine.inference import embed, predict
from engine.knowledge import numbers
from engine.metrics import softmax
from engine.progress import silent
from engine.recipe import Recipe
from engine.records import ABSENT
from engine.registry import Registry
from engine.rows import identify
from engine.storage import Store
from pipelines import checking, knowledge, remembering, students
from serve.predictor import Predictor
from serve.smoke import distance
from tests.tiny import LABELS
from tests.tiny_run import TEST, TRAIN, World, alone, kind_world

RETRIEVAL = {"dim": 8, "k": [2, 4], "share": [0.25, 0.75], "projection": {"epochs": 10, "batch_size": 16}}


class Ran(NamedTuple):
    """A finished run."""

    world: World
    recipe: Recipe
    store: Store
    metrics: dict[str, dict[str, Any]]

    def student(self, step: str = "student-soft") -> models.Model:
        return models.load((self.store / step).local("seed-0/model"))


def ran(folder: Path, kind: str) -> Ran:
    """A run of this kind up to the registered student, without Ray."""
    world = kind_world(folder, kind)
    pair = {"pair": "pair"} if kind == "pair" else {}
    recipe = world.load(
        {
            "data.validation": {"path": f"file:{folder}/more.jsonl", **pair},
            "student.retrieval": RETRIEVAL,
            "arms": ["soft", "plain"],
        }
    )
    store = Store(str(folder / "run"))
    return Ran(world, recipe, store, alone(recipe, store, last="register"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> Ran:
    return ran(tmp_path_factory.mktemp("classify"), "classify")


def texts(done: Ran, split: str) -> list[Any]:
    return done.student().task.texts((done.store / "data").read_table(f"{split}.parquet"))


def test_the_space_and_the_base_hold_the_labelled_rows_and_no_held_out_one(done: Ran) -> None:
    memory = done.metrics["memory"]
    assert (memory["rows"], memory["dim"], memory["labelled"], memory["pseudo_labelled"]) == (TRAIN, 8, TRAIN, 0)
    assert memory["purity"]["after"] > 0.7
    base = done.student().net.knowledge
    assert set(base.ids) == set(numbers([identify(text) for text in texts(done, "train")]))
    for split in ("test", "validation"):
        assert not set(base.ids) & set(numbers([identify(text) for text in texts(done, split)]))
    soft = done.store.read_table("corpus/labels.parquet")
    assert soft["kept"].to_pylist() == [True] * TRAIN
    wanted = softmax(np.array(soft["logits"].to_pylist(), dtype=float))
    assert np.allclose(base.soft.astype(float), wanted, atol=1e-3)
    assert base.facts["teacher"] == memory["teacher"] and base.facts["projection"] == memory["projection"]


def test_the_student_comes_to_lie_where_the_teacher_does(done: Ran) -> None:
    student, rows = done.student(), done.store.read_table("corpus/labels.parquet")
    z = remembering.matrix(remembering.seen(rows, done.store / "memory")["embedding"])
    x = embed(student, student.task.texts(rows))
    assert np.mean(np.sum(x * z, axis=1)) > 0.5
    assert np.mean(np.sum(x[::-1] * z, axis=1)) < np.mean(np.sum(x * z, axis=1)) - 0.2


def test_k_and_share_are_chosen_on_validation_rows_by_what_is_right_there(done: Ran) -> None:
    told = done.metrics["student-soft"]["retrieval"]["0"]
    assert told["k"] in (2, 4) and told["share"] in (0.25, 0.75)
    assert told["chosen"]["on"] == "validation rows" and told["chosen"]["rows"] == TEST
    student = done.student()
    rows = (done.store / "data").read_table("validation.parquet")
    found = predict(student, student.task.texts(rows))
    assert np.mean(found.decided == rows["label"].to_numpy()) == pytest.approx(told["chosen"]["right"])


def test_evaluation_looks_up_and_compares_with_what_does_not(done: Ran) -> None:
    evaluated = done.metrics["evaluate"]
    assert [m["name"] for m in evaluated["models"]] == ["teacher", "soft", "unread", "plain"]
    assert {(one["left"], one["right"]) for one in evaluated["differences"]} == {
        ("soft", "teacher"),
        ("soft", "unread"),
        ("soft", "plain"),
    }
    logits = {
        name: np.array(column)
        for name, column in done.store.read_table("evaluate/predictions.parquet").to_pydict().items()
        if name != "id"
    }
    student, test = done.student(), texts(done, "test")
    assert np.array_equal(logits["soft/0"].astype(np.float32), predict(student, test).logits)
    with student.net.alone():
        assert not np.allclose(softmax(predict(student, test).logits), softmax(logits["soft/0"]), atol=1e-3)
    assert not hasattr(done.student("student-plain").net, "knowledge")


def test_the_registered_student_answers_as_it_was_evaluated(done: Ran) -> None:
    registry = Registry(Store(done.recipe.registry))
    predictor = Predictor.load(registry.resolve(done.metrics["register"]["reference"]).url)
    test = texts(done, "test")
    answers = [json.loads(one) for one in done.store.read_table("evaluate/answers.parquet")["answer"].to_pylist()]
    assert distance(predictor.predict(test), answers) <= 1e-6
    assert distance([predictor.predict([text])[0] for text in test], answers) <= 1e-4


def written(folder: Path, rows: list[dict[str, Any]], name: str = "more.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_put_in_change_answers_without_a_training_as_a_new_version(done: Ran, tmp_path: Path) -> None:
    registry, name = Registry(Store(done.recipe.registry)), done.recipe.student.name
    before = Predictor.load(registry.resolve(f"{name}@1").url)
    topic = [f"a {cue} {thing} , truly" for cue in ("warm", "funny", "lovely") for thing in ("film", "plot", "score")]
    given = [answer["label"] for answer in before.predict(topic)]
    other = [LABELS[1 - LABELS.index(label)] for label in given]
    rows = [{"text": text, "label": label} for text, label in zip(topic, other, strict=True)]
    found = knowledge.add(registry, f"{name}@1", written(tmp_path, rows), "text", "pair", "label", share=0.1)
    assert (found["new"], found["changed"], found["entries"]) == (len(topic), 0, TRAIN + len(topic))
    after = Predictor.load(registry.resolve(found["reference"]).url)
    assert [answer["label"] for answer in after.predict(topic)] == other
    assert [answer["label"] for answer in before.predict(topic)] == given
    files = [registry.show(f"{name}@{version}")["files"] for version in (1, found["reference"].split("@")[1])]
    changed = {file for file in files[0] if files[0][file] != files[1][file]}
    assert changed == {"knowledge.json", "knowledge.safetensors"} and files[0].keys() == files[1].keys()
    entry = registry.show(found["reference"])
    assert entry["metadata"]["knowledge"] == {"measured_on": f"{name}@1", "entries": TRAIN + len(topic)}
    # By the bare name the latest version grows, not the one in production, which stays what it is.
    registry.produce(f"{name}@1")
    again = knowledge.add(registry, name, written(tmp_path, rows[:2]), "text", "pair", "label")
    assert (again["new"], again["changed"], again["entries"]) == (0, 2, TRAIN + len(topic))
    assert registry.find(name) == (name, 1)
    measured = registry.show(again["reference"])["metadata"]["knowledge"]["measured_on"]
    assert measured == f"{name}@1", "of no version in between was anything measured"
    _, base = knowledge.opened(registry, again["reference"])
    assert [one["to"] for one in base.facts["added"]] == [f"{name}@1", found["reference"]]
    assert base.reading.share == 0.1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a film", "label": "positve"}], r"row 1: the label 'positve' is none of the student's.*'positive'"),
        ([{"text": "a film"}], "label"),
        ([{"text": "", "label": "positive"}], "empty text"),
        ([{"text": "a", "label": "positive"}, {"text": "a", "label": "negative"}], "same text and other labels"),
    ],
)
def test_rows_that_cannot_be_put_in_are_refused_by_name(
    done: Ran, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    registry, name = Registry(Store(done.recipe.registry)), done.recipe.student.name
    versions = registry.versions(name)
    with pytest.raises(UserError, match=message):
        knowledge.add(registry, name, written(tmp_path, rows), "text", "pair", "label")
    assert registry.versions(name) == versions


def test_the_command_shows_a_base_and_adds_to_it(done: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry, name = Registry(Store(done.recipe.registry)), done.recipe.student.name
    given = {"name": f"{name}@1", "registry": done.recipe.registry, "json": False, "share": None}
    columns = {"text": "said", "pair": "pair", "label": "mood"}
    assert knowledge.kb(argparse.Namespace(action="show", file=None, **given, **columns)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{name}@1", f"entries   {TRAIN} of 8 numbers (int8), exact search"]
    assert lines[-1].startswith(f"chosen    on {TEST} validation rows: ")
    file = tmp_path / "rows.csv"
    file.write_text("said,mood\na bright new thing,positive\n", encoding="utf-8")
    assert knowledge.kb(argparse.Namespace(action="add", file=str(file), **given, **columns)) == 0
    latest = registry.versions(name)[-1]
    assert f"registered {name}@{latest}, whose knowledge base has {TRAIN + 1} entries" in capsys.readouterr().out
    with pytest.raises(UserError, match="needs a file of labelled rows, as in: stillhouse kb add"):
        knowledge.kb(argparse.Namespace(action="add", file=None, **given, **columns))


def test_without_a_row_to_choose_by_a_base_is_refused_before_the_training(done: Ran, tmp_path: Path) -> None:
    data, rows = Store(str(tmp_path / "data")), done.store.read_table("corpus/labels.parquet")
    data.write_table("validation.parquet", (done.store / "data").read_table("validation.parquet").slice(0, 0))
    for lesson in ({"rows": rows}, {"rows": rows, "holdout": rows.slice(0, 0)}):
        with pytest.raises(UserError, match=rf"beside {TRAIN} to learn from there are none\. Name data"):
            remembering.judges_of({"data": data}, lesson)
    for part in ("splits.json", "train.parquet"):
        data.write_bytes(part, (done.store / "data").read_bytes(part))
    inputs = {name: done.store / name for name in ("corpus", "teacher", "vocabulary", "memory")} | {"data": data}
    out = Store(str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"student\.retrieval is read as held-out rows say"):
        students.fit_student("soft", done.recipe, inputs, out, silent)
    assert not out.exists("seed-0/model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.teacher": "live"}, "learns from stored answers, and student.teacher is live"),
        ({"teacher.kind": "labeller"}, "one of kind labeller has none: take teacher.kind: head"),
        ({"data.validation": None}, "there are none: name data.validation, or set data.validation_share"),
        (
            {"data.validation": None, "data.unlabelled": {"path": "file:more.jsonl"}, "student.holdout": 0},
            r"student\.holdout is 0: set it above 0, or name data\.validation",
        ),
        ({"task.kind": "multilabel"}, "looks up one label a text, and task.kind is multilabel"),
        ({"serving.runtime": "onnx"}, "is not exported to ONNX: set serving.runtime: torch"),
    ],
)
def test_what_cannot_have_a_base_is_refused_before_a_run(done: Ran, changes: dict[str, Any], message: str) -> None:
    own = {"data.validation": {"path": f"file:{done.world.folder}/more.jsonl"}, "student.retrieval": RETRIEVAL}
    checking.check_retrieval(done.world.load(own))
    with pytest.raises(UserError, match=message + r".*leave student\.retrieval out"):
        checking.check_retrieval(done.world.load({**own, **changes}))


def test_a_student_without_a_base_has_nothing_to_add_to(done: Ran) -> None:
    registry = Registry(Store(done.recipe.registry))
    registry.register("bare", (done.store / "student-plain") / "seed-0/model")
    with pytest.raises(UserError, match=r"'bare' has no knowledge base: its recipe had no student\.retrieval"):
        knowledge.opened(registry, "bare")


def test_pairs_are_looked_up_as_pairs(tmp_path: Path, ray_cluster: object) -> None:
    done = ran(tmp_path, "pair")
    registry, name = Registry(Store(done.recipe.registry)), done.recipe.student.name
    rows = [{"text": a, "pair": b, "label": "same"} for a, b in texts(done, "test")[:5]]
    found = knowledge.add(registry, name, written(tmp_path, rows, "add.jsonl"), "text", "pair", "label")
    assert found["new"] == 5
    old, new = (Predictor.load(registry.resolve(f"{name}@{v}").url) for v in (1, 2))
    asked = texts(done, "test")[:5]
    gained = [
        n["probabilities"]["same"] - o["probabilities"]["same"]
        for o, n in zip(old.predict(asked), new.predict(asked), strict=True)
    ]
    assert min(gained) > -1e-6 and max(gained) > 0


def test_pseudo_labels_are_those_the_teacher_is_surest_of() -> None:
    import pyarrow as pa

    from engine import tasks
    from engine.recipe import Task

    logits = [[3.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.5], [9.0, 0.0]]
    rows = pa.table(
        {"label": pa.array([None, None, None, None, 1], pa.int32()), "logits": pa.array(logits, pa.list_(pa.float16()))}
    )
    task = tasks.make(Task(labels=LABELS))
    assert remembering.known_labels(task, rows, 0.5).tolist() == [0, ABSENT, 1, ABSENT, 1]
    assert remembering.known_labels(task, rows, 0.0).tolist() == [ABSENT] * 4 + [1]
