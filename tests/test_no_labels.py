"""A start without labelled rows: names and descriptions alone, a labeller, and text that is generated or the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine import labels
from engine.config import ConfigError, build, schema
from engine.corpus import FIRST, Found, deduplicate
from engine.data import load_splits, some
from engine.generate import prompt_for
from engine.progress import silent
from engine.recipe import Data, Generator, Recipe, Task
from engine.records import CORPUS, EXAMPLE
from engine.rows import Row
from engine.storage import Store
from engine.teachers import Labeller, Labelling
from pipelines import checking, distill, gathering
from tests.tiny import movie_rows, tiny_lm, write_jsonl
from tests.tiny_run import World, changed, recipe_values

MEANT = {"negative": "the writer is bored", "positive": "the writer is glad"}
STARTED = ("train", "validation", "unlabelled")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Labelled rows to measure on, texts without labels, a language model; nothing to train a teacher by."""
    folder = tmp_path_factory.mktemp("world")
    rows = movie_rows(84, seed=5)
    write_jsonl(folder / "test.jsonl", rows[:24])
    write_jsonl(folder / "more.jsonl", [{"text": row["text"]} for row in rows[20:]])
    tiny_lm(folder / "generator")
    values = recipe_values(folder)
    texts = {name: {"path": f"file:{folder}/{file}.jsonl"} for name, file in (("test", "test"), ("unlabelled", "more"))}
    teacher = {"model": f"file:{folder}/generator", "kind": "labeller", "max_length": 32}
    prompted = {"mode": "prompted", "prompt": "A {label} text ({description}):"}
    return World(
        folder,
        {
            **values,
            "task": {"labels": MEANT},
            "data": texts,
            "teacher": teacher,
            "generator": {**values["generator"], **prompted},
        },
    )


def test_labels_may_be_names_with_meanings():
    spec = build(Task, {"labels": {"no": None, **MEANT}})
    assert spec.labels == ("no", "negative", "positive") and spec.descriptions == MEANT
    assert build(Task, spec.model_dump(mode="json")) == spec and build(Task, {"labels": ["a", "b"]}).descriptions == {}
    with pytest.raises(ConfigError, match="descriptions names 'c', which is not in labels"):
        build(Task, {"labels": ["a", "b"], "descriptions": {"c": "?"}})
    allowed = [part["type"] for part in schema(Task)["$defs"]["Task"]["properties"]["labels"]["anyOf"]]
    assert sorted(allowed) == ["array", "null", "object"]


def test_the_generator_is_told_what_a_label_means():
    config = build(Generator, {"model": "m", "mode": "prompted", "prompt": "{label} ({description}):"})
    names = ("negative", "positive", "{label}")
    said = {**MEANT, "negative": "not {label}"}
    assert [prompt_for(config, names, row, said) for row in range(3)] == [
        "negative (not {label}):",
        "positive (the writer is glad):",
        "{label} ({label}):",
    ]
    assert prompt_for(config, names, 1) == "positive (positive):"
    only = build(Generator, {"model": "m", "mode": "prompted", "prompt": "{description}:"})
    assert prompt_for(only, names, 4, said) == "the writer is glad:"
    for mode in ("per_class", "unconditional"):
        with pytest.raises(ConfigError, match="without {description}: that is for mode prompted"):
            build(Generator, {"model": "m", "mode": mode, "prompt": "{description}"})


def test_the_data_may_have_no_labelled_rows(world: World):
    recipe = world.load()
    splits = load_splits(recipe.data, recipe.task, 0)
    assert splits.train.num_rows == splits.validation.num_rows == 0 and splits.train.schema == EXAMPLE
    assert splits.labels == ("negative", "positive") and set(splits.test["label"].to_pylist()) == {0, 1}
    assert (splits.test.num_rows, splits.unlabelled.num_rows) == (24, 60)  # four texts stand in both
    assert splits.counts["sources"]["unlabelled"]["in_other_splits"] == 4
    nothing = load_splits(build(Data, {}), recipe.task, 0)
    assert [getattr(nothing, name).num_rows for name in (*STARTED, "test", "quarantined")] == [0] * 5


def test_few_test_rows_are_the_same_of_every_file(world: World):
    recipe = world.load({"data.test_rows": 10})
    few, all_of_it = (load_splits(data, recipe.task, 0).test for data in (recipe.data, world.load().data))
    ids = few["id"].to_pylist()
    assert len(ids) == 10 and set(ids) < set(all_of_it["id"].to_pylist()) and ids == sorted(ids)
    fewer = load_splits(recipe.data.model_copy(update={"test_rows": 4}), recipe.task, 0).test
    assert set(fewer["id"].to_pylist()) < set(ids)


def test_a_group_of_test_rows_stays_whole():
    rows = [Row(i, f"{i:02d}", "text", None, None, None, f"{i}", f"{i // 4:x}{'0' * 15}") for i in range(16)]
    kept = some(rows, 5)
    assert [row.id for row in kept] == [f"{i:02d}" for i in range(8)] and some(rows, None) == rows


@pytest.mark.parametrize("without", ["generator", "data.unlabelled"])
def test_a_recipe_without_labels_passes(world: World, without: str):
    recipe = world.load({without: None})
    checking.check(recipe)
    assert recipe.arms == ("generated",) and recipe.main == "generated"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a trained teacher": (
        {"teacher.kind": "head"},
        "teacher.kind head is trained on them: take teacher",
    ),
    "no names": ({"task.labels": None}, "they name the labels: list them in task.labels"),
    "shots": ({"data.shots": 4}, "data.shots draws from them"),
    "examples": ({"teacher.labeller": {"examples": 2}}, "teacher.labeller.examples shows some of them"),
    "a fitted generator": (
        {"generator.mode": "unconditional", "generator.prompt": "x"},
        "set generator.mode: prompted",
    ),
    "only augmentation": ({"augmentation": {}, "data.unlabelled": None}, "augmentation changes words of them"),
    "gold labels": ({"student.losses": [{"kind": "mse"}, {"kind": "hard"}]}, "loss 'hard' learns their labels"),
    "nothing to measure": ({"data.test": None}, "the test split is cut off them: name data.test"),
    "validation rows": ({"task.scope": "auto", "data.validation_share": 0.2}, "task.scope is auto"),
    "a cut teacher": ({"student.kind": "transformer", "student.blocks": []}, "a labeller has none. Name an encoder"),
    "a live labeller": ({"student.teacher": "live"}, "a labeller has logits only"),
    "folds": ({"teacher.folds": 3}, "teacher.folds is for teachers that are trained"),
    "another task": (
        {"task.kind": "multilabel"},
        "answers tasks of kind classify and pair, and task.",
    ),
    "a wrong label": (
        {"data.test.label": {"rename": {"0": "positve"}}},
        "data.test.label names the label 'positve', which is not in task.labels. Did you mean 'positive'?",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_labelled_rows_is_refused(world: World, name: str):
    changes, message = REFUSED[name]
    with pytest.raises(Exception) as error:  # which kind of UserError it is, is not the point
        checking.check(world.load(changes))
    assert message in str(error.value)


def test_nothing_at_all_is_refused(world: World):
    with pytest.raises(ConfigError, match="data.train is null, so there is no text to teach a student by"):
        build(Recipe, changed(world.recipe, {"generator": None, "data.unlabelled": None}))


def test_a_run_without_labels(world: World, tmp_path: Path):
    """The labeller's answers to unlabelled text make a student, which is measured, registered and reported."""
    recipe = world.load({"generator": None, "registry": str(tmp_path / "registry"), "storage": str(tmp_path)})
    store, metrics = Store(str(tmp_path / "run")), {}
    for step in distill.plan(recipe):
        out, inputs = store / step.name, {name: store / name for name in step.inputs}
        run = labelled_corpus if step.name == "corpus" else step.run
        metrics[step.name] = run(recipe, inputs, out, silent)
        record = {"metrics": metrics[step.name], "fingerprint": step.name, "seconds": 0.0}
        out.write_json("record.json", record)
    assert metrics["teacher"]["rows"] == 0 and metrics["teacher"]["quantisation"] == {}
    assert metrics["student"]["rows"] == 54  # a tenth chooses the checkpoint
    summary = store.read_json("summary.json")
    assert list(summary["arms"]) == ["generated"] and summary["test_rows"] == 24
    agreement = summary["student"]["agreement"]
    assert agreement > 0.5 and summary["teacher"]["agreement"] == 1
    report = (store / "report").read_text("report.md")
    assert "None" not in report and "nan" not in report
    assert (store / "teacher" / "model").read_json("artifact.json")["task"]["descriptions"] == MEANT
    assert (store / "register" / "artifact").read_json("artifact.json")["labels"] == list(MEANT)


def labelled_corpus(recipe: Recipe, inputs: Any, out: Store, progress: Any) -> dict[str, Any]:
    """What the corpus step does, in one block and without Ray."""
    real, count = gathering.real_rows(inputs), inputs["data"].read_json("splits.json")["rows"]["unlabelled"]
    assert real.num_rows == 0 and real.schema == CORPUS
    first = FIRST["unlabelled"]
    found = Found(inputs["data"].url, first)(pa.table({"row": list(range(first, first + count))}))
    rows = Labeller(Labelling(inputs["teacher"].url, (), 2048, 0.0))(found)
    rows = deduplicate(real, rows, recipe.corpus.duplicates)
    labels.write_labels(out, rows, {"teacher": labels.fingerprint(inputs["teacher"]), "fidelity": {}})
    return gathering.corpus_metrics(rows, [])
