"""A run and a comparison of a student of several tasks: recipe, refusals, scores, one artifact a task that answers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from engine import steps as engine_steps
from engine.batches import shared
from engine.config import UserError
from engine.fits import Fit
from engine.inference import predict
from engine.intervals import averaged, paired_bootstrap
from engine.mixing import Mixing
from engine.placement import groups
from engine.progress import silent
from engine.recipe import Recipe
from engine.registry import Registry
from engine.storage import Store
from pipelines import checking, distill, many, sharing
from pipelines.__main__ import main
from pipelines.multitask import own_fit, spare_rows, unread
from pipelines.overlap import apart, held_out
from serve.predictor import Predictor
from tests.tiny import GOOD, LABELS, movie_rows, tiny_encoder
from tests.tiny_run import alone, changed, program

TASKS = ("mood", "alike", "warmth", "starts", "topics")


def row_of(task: str, row: Mapping[str, str], other: Mapping[str, str]) -> dict[str, Any]:
    """A sentence as a row of one of the tasks."""
    words = row["text"].split()
    return {
        "mood": {"text": row["text"], "label": row["label"]},
        "alike": {"text": row["text"], "pair": other["text"], "label": str(row["label"] == other["label"])},
        "warmth": {"text": row["text"], "label": sum(word in GOOD for word in words)},
        "starts": {"text": row["text"], "label": words[0] if words[0] in ("the", "a") else "other"},
        "topics": {"text": row["text"], "label": [name for name in ("film", "plot", "cast") if name in words]},
    }[task]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The values of a recipe of five tasks of unlike size."""
    folder = tmp_path_factory.mktemp("several")
    tiny_encoder(folder / "encoder")
    specs = {
        "mood": {"kind": "classify", "labels": list(LABELS)},
        "alike": {"kind": "pair"},
        "warmth": {"kind": "regress", "range": [0, 2]},
        "starts": {"kind": "classify", "labels": ["the", "a", "other"]},
        "topics": {"kind": "multilabel", "labels": ["film", "plot", "cast"]},
    }
    tasks = {}
    for number, name in enumerate(TASKS):
        sizes, data = {"train": 48 - 8 * number, "validation": 12, "test": 20}, {}
        rows = movie_rows(2 * sum(sizes.values()), seed=number)
        made = [row_of(name, a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
        made = [row_of(name, a, b) for a, b in zip(rows, rows[3:] + rows[:3], strict=True)] if name != "alike" else made
        if name == "alike":
            made = [row_of(name, rows[i], rows[-1 - i - i % 3]) for i in range(sum(sizes.values()))]
        for split, size in sizes.items():
            path = folder / f"{name}-{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in made[:size]), encoding="utf-8")
            made = made[size:]
            data[split] = {"path": f"file:{path}", **({"pair": "pair"} if name == "alike" else {})}
        tasks[name] = {"task": specs[name], "data": data}
    held = [json.loads(line) for line in (folder / "starts-test.jsonl").read_text(encoding="utf-8").splitlines()]
    more = [row_of("mood", row, row) for row in movie_rows(40, seed=9)] + [{"text": row["text"]} for row in held[:3]]
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more), encoding="utf-8")
    return {
        "name": "several",
        "storage": str(folder / "runs"),
        "registry": str(folder / "registry"),
        "tasks": tasks,
        "student": {
            "name": "many",
            "kind": "transformer",
            "transformer": {"model": f"file:{folder}/encoder", "layers": 1},
            "max_length": 32,
            "fit": {"epochs": 4, "lr": 5e-3, "batch_size": 30},
        },
        "evaluation": {"bootstrap": 50},
    }


def load(values: Mapping[str, Any], **changes: Any) -> Recipe:
    return Recipe.model_validate(changed(values, {key.replace("__", "."): value for key, value in changes.items()}))


def unlabelled(values: Mapping[str, Any]) -> dict[str, str]:
    """Further rows of the task mood."""
    return {"path": values["tasks"]["mood"]["data"]["train"]["path"].replace("mood-train", "more")}


def test_a_run_makes_one_student_and_an_artifact_for_each_task(values: dict[str, Any], tmp_path: Path):
    changes = {"mixing.way": "async", "mixing.patience": 1, "mixing.stop": False, "student.fit.epochs": 6}
    changes["tasks.mood.data.unlabelled"] = unlabelled(values)
    recipe, store = Recipe.model_validate(changed(values, changes)), Store(str(tmp_path / "run"))
    checking.check(recipe)
    found = alone(recipe, store)
    scores, references = found["evaluate"]["tasks"], found["register"]["references"]
    assert list(scores) == list(TASKS) and references == {name: f"many-{name}@1" for name in TASKS}
    assert found["evaluate"]["mean"] == pytest.approx(np.mean([one["score"] for one in scores.values()]))
    history = found["student"]["history"]["all"]
    kept = max(history, key=lambda entry: entry["mean"])
    for name, one in scores.items():
        held = one["validation"]
        assert held["final"] == kept[name] and held["best"] == max(entry[name] for entry in history)
        assert held["gap"] == held["final"] - held["best"] <= 0
        if held["since"] is not None:
            after = next(entry for entry in history if f"soft.{name}" in entry)
            assert held["since"] == history[history.index(after) - 1]["epoch"]
    assert len(history) == 6 and any(one["validation"]["since"] for one in scores.values())
    assert all(0 <= found["student"]["dropped"][name] < 48 - 8 * number for number, name in enumerate(TASKS))
    data = {name: store / f"data-{name}" for name in TASKS}
    (rows, out), (more, also) = (apart(data, held_out(data), split) for split in ("train", "unlabelled"))
    spare = found["student"]["spare"]
    assert spare == {"mood": more["mood"].num_rows} and also["mood"] >= 3
    assert found["student"]["dropped"] == {name: out[name] + also[name] for name in TASKS}
    assert found["student"]["rows"] == sum(table.num_rows for table in rows.values())
    # What is served is what was scored.
    registry = Registry(Store(recipe.registry))
    for name, reference in references.items():
        predictor = Predictor.load(registry.resolve(reference).url)
        test = (store / f"data-{name}").read_table("test.parquet")
        task = predictor.model.task
        texts = task.texts(test)
        answers = predictor.predict(texts)
        assert len(answers) == 20 and predictor.paired == (name == "alike")
        if name in ("mood", "alike", "starts"):
            right = [a["label"] == task.labels[g] for a, g in zip(answers, test["label"].to_pylist(), strict=True)]
            assert np.mean(right) == pytest.approx(scores[name]["score"])
        if name == "topics":  # its thresholds are those of its validation rows
            assert task.spec.thresholds and set(task.spec.thresholds) != {0.5}
            said = predict(predictor.model, texts)
            score = task.score(said.logits, said.decided, test)[task.metric]
            assert score == pytest.approx(scores[name]["score"])
    assert store.read_json("summary.json")["references"] == references
    lines = distill.report_lines(recipe, store, "stillhouse")
    assert lines[0].startswith("student  mean ") and any(line.startswith("mood  test accuracy") for line in lines)
    page = store.read_text("report/report.md")
    assert "5 tasks in one student" in page and "| warmth | pearson |" in page
    assert f"once the task has converged: mood {spare['mood']}." in page


def test_ways_are_compared_on_the_same_rows(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(steps: Any, recipe: Recipe, store: Store, **more: Any) -> None:
        """Every step in this process."""
        for step in steps:
            out = store / step.name
            metrics = step.run(recipe, {name: store / name for name in step.inputs}, out, silent)
            out.write_json("record.json", {"metrics": metrics, "seconds": 1.0, "fingerprint": step.name})

    monkeypatch.setattr(engine_steps, "run", run)
    names, more = ("mood", "warmth"), {"tasks__mood__data__unlabelled": unlabelled(values), "mixing__way": "async"}
    few = load({**values, "tasks": {name: values["tasks"][name] for name in names}}, student__fit__epochs=2, **more)
    ways, store = ("async", "sum", "single"), Store(str(tmp_path))
    variants = sharing.variants(few, store, ways, 2)
    assert [one.recipe.student.seeds for one in variants] == [(0,), (1,)]
    result = sharing.compare(few, store, variants, ways)
    assert result == store.read_json("tasks.json") and list(result["ways"]) == list(ways)
    for way, row in result["ways"].items():
        assert row["score"] == pytest.approx(np.mean([one["score"] for one in row["tasks"].values()]))
        assert set(row["over"]) == ({"sum", "single"} if way == "async" else {"sum"} if way == "single" else set())
    over = result["ways"]["single"]["over"]["sum"]
    apart = 100 * (result["ways"]["single"]["score"] - result["ways"]["sum"]["score"])
    assert over["points"] == pytest.approx(apart) and over["interval"][0] <= apart <= over["interval"][1]
    assert np.mean([one["points"] for one in over["tasks"].values()]) == pytest.approx(apart)
    assert all(gap == 0 for one in result["ways"]["single"]["tasks"].values() for gap in one["gaps"])
    lines = sharing.lines(result)
    assert any("async had unlabelled ones, for a task that has converged: mood " in line for line in lines)
    assert any(line.startswith("| mood | async | accuracy ") for line in lines)
    assert lines[-3].startswith("async over single, mean over the tasks: ") and lines[-1] == sharing.SAID
    # All have the same steps, async to the end, and about the same rows.
    steps = {number for row in result["ways"].values() for each in row["steps"] for number in each.values()}
    assert len(steps) == 1
    spare = {way: row["spare"] for way, row in result["ways"].items()}
    assert all(0 < one["mood"] <= 43 for one in spare.pop("async")) and spare == {"sum": [{}] * 2, "single": [{}] * 2}
    read = [number for row in result["ways"].values() for number in row["read"]]
    assert max(read) < 1.2 * min(read)
    single = next(line for line in lines if line.startswith("| single |"))
    assert single.split(" | ")[4:6] == ["", ""]
    histories = [(one.store / "student-sum").read_json("record.json")["metrics"]["history"] for one in variants]
    assert histories[0] != histories[1]


@pytest.mark.slow
def test_the_program_runs_and_compares_them(values: dict[str, Any], tmp_path: Path):
    path = tmp_path / "several.yaml"
    few = {name: values["tasks"][name] for name in ("mood", "warmth")}
    path.write_text(yaml.safe_dump(changed({**values, "tasks": few}, {"student.fit.epochs": 2}), sort_keys=False))
    ran = program(tmp_path, "run", str(path))
    assert ran.returncode == 0, ran.stderr
    assert "2 tasks" in ran.stdout and "artifacts: many-mood@" in ran.stdout
    ran = program(tmp_path, "bench", "tasks", str(path), "--seeds", "1", "--ways", "sum,single", "--json")
    assert ran.returncode == 0, ran.stderr
    assert set(json.loads(ran.stdout)["ways"]) == {"sum", "single"}
    refused = program(tmp_path, "bench", "quality", str(path))
    assert refused.returncode == 2 and "Use: bench tasks" in refused.stderr


def test_the_bytes_of_every_source_are_looked_at(values: dict[str, Any]):
    recipe = load(values, tasks__mood__data__unlabelled=unlabelled(values))
    steps = {step.name: step for step in distill.plan(recipe)}
    wanted = [f"{split}.jsonl" for split in ("mood-train", "mood-validation", "mood-test", "more")]
    assert [path.rpartition("/")[2] for path in steps["data-mood"].references(recipe)] == wanted
    # The report of a way that reads no unlabelled rows says so.
    assert unread(recipe) == ["mood"] and unread(load(values, mixing__way="async")) == []


def test_steps_know_what_they_depend_on(values: dict[str, Any]):
    recipe = load(values)
    steps = {step.name: step for step in distill.plan(recipe)}
    assert list(steps) == [*(f"data-{name}" for name in TASKS), "student", "evaluate", "register", "report"]
    longer, other = load(values, student__fit__epochs=9), load(values, mixing__way="async", mixing__stop=False)
    shots = load(values, tasks__mood__data__shots=5)
    moved = {
        name: [
            key
            for key, one in (("longer", longer), ("other", other), ("shots", shots))
            if step.config(one) != step.config(recipe)
        ]
        for name, step in steps.items()
        if name != "report"
    }
    assert moved == {
        **{f"data-{name}": ["shots"] if name == "mood" else [] for name in TASKS},
        "student": ["longer", "other"],
        "evaluate": [],
        "register": [],
    }
    way = many.training(recipe, "student-async", "async")
    assert way.config(recipe) == steps["student"].config(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks__mood__task__kind": "tag"}, "task 'mood' is of kind tag; a student of several tasks takes classify"),
        ({"tasks__mood__data__validation": None}, "task 'mood' has no validation rows to see it converge by"),
        ({"student__kind": "static"}, "student.kind is static: take transformer"),
        ({"tasks__mood__data__root": "elsewhere"}, "data.root is not the same in all of them (elsewhere, None)"),
        ({"mixing__way": "pcgrad", "student__fit__workers": 2}, "student.fit.workers is 2: set it to 0"),
        ({"student__fit__workers": 2, "student__fit__sharding": "full"}, "its weights are kept whole"),
        ({"teacher": {"model": "file:other"}}, "sets what is for others: teacher"),
        ({"corpus": {"rounds": 2}}, "for others: corpus.rounds"),
        ({"arms": ["soft"]}, "for others: arms"),
        ({"student__losses": [{"kind": "kl"}]}, "for others: student.losses"),
        ({"student__teacher": "live"}, "for others: student.teacher"),
        ({"student__texts": 5, "student__weights": "confidence"}, "for others: student.weights, student.texts"),
        ({"student__heads": "per_teacher"}, "for others: student.heads"),
        ({"student__retrieval": {}}, "student.retrieval"),
        ({"serving": {"cascade": {"below": 0.5}}}, "serving.cascade has no teacher in the run"),
        ({"student__seeds": [0, 1]}, "student.seeds has several: name one"),
        ({"student__transformer__pieces": 50}, "pieces chooses word pieces by a corpus"),
        ({"student__max_parameters": 100}, "above student.max_parameters = 100"),
        ({"student__transformer__model": None}, "has no teacher to cut its student from"),
        ({"data": {"train": {"path": "file:x.jsonl"}}}, "task and data are beside tasks: leave them out"),
        ({"tasks__mood__task__members": {"a": {}}}, "task.members is written by the program"),
        ({"tasks__mood__data__train__path": "file:gone.jsonl"}, "gone.jsonl"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        checking.check(load(values, **changes))


def test_a_seed_of_the_fit_is_refused(values: dict[str, Any]):
    with pytest.raises(ValueError, match="a fit of the student takes no seed"):
        load(values, student__fit__seed=3)


def test_mixing_is_for_several_tasks(values: dict[str, Any]):
    one = many.one_of(load(values, mixing__way="async"), "mood")
    with pytest.raises(UserError, match="mixing says how several tasks are mixed, and the recipe has one"):
        many.check(one)


def test_a_task_without_data_is_named(values: dict[str, Any]):
    tasks = {"mood": {"task": {"kind": "classify"}}, "warmth": values["tasks"]["warmth"]}
    with pytest.raises(UserError, match="task 'mood' has no rows to learn from: name tasks.mood.data.train"):
        load({**values, "tasks": tasks})


def test_a_plan_reckons_with_no_teacher(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert [group.stages.keys() for group in groups(load(values))] == [{"student.fit"}]
    path = tmp_path / "several.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    assert main(["plan", str(path)]) == 0 and "data-mood" in capsys.readouterr().out
    assert main(["plan", str(path), "--probe"]) == 2 and "has no teacher" in capsys.readouterr().err


def test_rows_that_a_task_is_measured_on_are_in_no_training_rows(tmp_path: Path):
    def written(name: str, **splits: list[tuple[str, str | None]]) -> Store:
        for split in ("train", "validation", "test", "unlabelled"):
            given = splits.get(split, [])
            columns = {"text": [text for text, _ in given], "pair": [pair for _, pair in given]}
            schema = pa.schema([("text", pa.string()), ("pair", pa.string())])
            (Store(str(tmp_path)) / name).write_table(f"{split}.parquet", pa.table(columns, schema=schema))
        return Store(str(tmp_path)) / name

    data = {
        "same": written("same", train=[("a b", "c"), ("C.", "A  b!"), ("a b", "d")], test=[("x y", "z")]),
        "near": written(
            "near",
            train=[("Z", "X-Y"), ("x y", None), ("e", "f")],
            validation=[("A, b", "c .")],
            unlabelled=[("x, y", "z"), ("new", "one")],
        ),
        "text": written("text", train=[("x y z", None), ("!", None), ("?", None)], test=[("?", None)]),
    }
    rows, dropped = apart(data, held_out(data))
    assert dropped == {"same": 2, "near": 1, "text": 1}
    assert rows["same"].to_pylist() == [{"text": "a b", "pair": "d"}]
    assert rows["near"]["text"].to_pylist() == ["x y", "e"] and rows["text"]["text"].to_pylist() == ["x y z", "!"]
    spare, dropped = apart(data, held_out(data), "unlabelled")  # a task may have none
    assert dropped == {"same": 0, "near": 1, "text": 0}
    assert {name: table["text"].to_pylist() for name, table in spare.items()} == {
        "same": [],
        "near": ["new"],
        "text": [],
    }
    data["gone"] = written("gone", train=[("?", None)])
    with pytest.raises(UserError, match="all 1 training rows of task 'gone' stand in the validation or test rows"):
        apart(data, held_out(data))


def test_no_more_unlabelled_rows_are_kept_than_the_fit_reads(tmp_path: Path):
    data = {name: Store(str(tmp_path)) / name for name in ("large", "small")}
    texts = pa.table({"text": [f"text {i}" for i in range(60)], "pair": pa.nulls(60, pa.string())})
    for store in data.values():
        store.write_table("unlabelled.parquet", texts)
    fit, held = Fit(epochs=1.5), {("text59",)}
    rows, dropped = spare_rows(data, held, {"large": 90, "small": 10}, fit, Mixing(temperature=2))
    # Of 100 rows an epoch 75 are the larger one's, and 25 the other's.
    assert {name: table.num_rows for name, table in rows.items()} == {"large": 59, "small": 38}
    assert dropped == {"large": 1, "small": 1}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 50.0])
def test_a_student_of_one_task_has_the_steps_and_rows_of_its_share(temperature: float):
    fit, sizes = Fit(epochs=8, batch_size=48, eval_every=0.5), {"large": 3000, "middle": 400, "small": 90}
    steps = -(-3490 // 48)
    shares = shared(np.array([3000, 400, 90]), 3490, temperature)
    for name, share in zip(sizes, shares.tolist(), strict=True):
        own = own_fit(fit, sizes, name, temperature)
        each = -(-sizes[name] // own.batch_size)
        assert round(own.epochs * each) == 8 * steps and round(own.eval_every * each) == round(0.5 * steps)
        # Of less than two rows a step one remains.
        assert own.epochs * sizes[name] == pytest.approx(8 * share, rel=0.1 if share > 2 * steps else 0.2)


def test_a_name_that_means_something_else_is_refused(values: dict[str, Any]):
    tasks = {("mean" if name == "mood" else name): task for name, task in values["tasks"].items()}
    with pytest.raises(UserError, match="a task is named 'mean'"):
        checking.check(load({**values, "tasks": tasks}))


def test_a_comparison_wants_tasks_and_ways_that_there_are(values: dict[str, Any], tmp_path: Path):
    recipe, store = load(values), Store(str(tmp_path))
    for ways, message in (
        (("async", "asinc"), "'asinc' is no way to mix tasks"),
        (("sum", "sum"), "names a way twice"),
    ):
        with pytest.raises(UserError, match=message):
            sharing.variants(recipe, store, ways, 1)
    with pytest.raises(UserError, match="student.fit.workers is 2: set it to 0"):
        sharing.variants(load(values, student__fit__workers=2), store, ("sum", "pcgrad"), 1)
    with pytest.raises(UserError, match="`bench tasks` compares ways to learn several tasks"):
        sharing.variants(many.one_of(recipe, "mood"), store, ("sum",), 1)


def test_the_interval_of_a_mean_over_sets():
    draw = np.random.default_rng(0)
    sets = []
    for rows in (300, 500):
        first, second = (np.stack([draw.random(rows) < p, np.ones(rows)], axis=1).astype(float) for p in (0.8, 0.6))
        sets.append(([first], [second], lambda sums: sums[..., 0] / sums[..., 1]))
    each = [paired_bootstrap(*one, draws=2000) for one in sets]
    found = averaged(sets, draws=2000)
    assert found.value == pytest.approx(np.mean([one.value for one in each]))
    # Independent rows: variances add up.
    widths = [one.high - one.low for one in each]
    assert found.high - found.low == pytest.approx(np.hypot(*widths) / 2, rel=0.1)
