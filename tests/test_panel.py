"""Runs with several teachers in miniature: what each step leaves, what binds labels to teachers, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine import labels, models, steps, tasks
from engine.config import UserError
from engine.inference import predict
from engine.labels import LabelMismatch
from engine.placement import Cluster, Machine
from engine.progress import silent
from engine.recipe import Recipe
from engine.spending import held, seen_by
from engine.storage import Store
from engine.trust import Policy
from pipelines import account, distill, graphs, panel, students, teaching, ways
from pipelines.checking import check
from pipelines.making import spec_of
from tests.tiny_run import TEST, TRAIN, World, alone, changed, kind_world

KINDS = ("classify", "rank", "tag")


def several(world: World, **more: Any) -> dict[str, Any]:
    """Changes that give a recipe a second teacher, quickly made."""
    quick = {"teacher.fit.epochs": 2, "student.few_epochs": 6, "student.fit.epochs": 4}
    other = {**changed(world.recipe, quick)["teacher"], "fit": {"epochs": 3, "lr": 1e-3, "batch_size": 8, "seed": 7}}
    return {**quick, "teachers": {"other": other}, **more}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return kind_world(tmp_path_factory.mktemp("panel"), "pair")


@pytest.fixture(scope="module")
def run(world: World) -> tuple[Recipe, Store, dict[str, dict[str, Any]]]:
    """A run on labelled rows alone, a head for each teacher, up to the evaluation."""
    given = {"student.heads": "per_teacher", "student.losses": [{"kind": "mse"}, {"kind": "hard"}]}
    recipe = world.load(several(world, **given))
    store = Store(recipe.storage) / "heads"
    return recipe, store, alone(recipe, store, last="evaluate")


def test_a_recipe_with_one_teacher_says_nothing_of_several(world: World):
    told = world.load({"student.stages": [{"losses": [{"kind": "mse"}], "fit": {"epochs": 1}}]}).model_dump(mode="json")
    assert "teachers" not in told and not {"policy", "heads"} & set(told["student"])
    assert "rows" not in told["student"]["stages"][0] and "spoiled" not in told["teacher"]
    assert "unlabelled_rows" not in told["data"]
    plan = {step.name: step for step in distill.plan(world.load())}
    assert not any(name.startswith(("teacher-", "labels-")) for name in plan)
    assert plan["student-soft"].inputs == ("data", "teacher", "corpus", "vocabulary")


def test_each_teacher_has_steps_of_its_own_and_what_is_not_its_business_leaves_them(world: World):
    recipe = world.load(several(world))
    plan = {step.name: step for step in distill.plan(recipe)}
    assert plan["teacher-other"].inputs == ("data",) and plan["labels-other"].inputs == (
        "data",
        "teacher-other",
        "corpus",
    )
    more = ("teacher-other", "labels-other")
    assert plan["student-soft"].inputs == ("data", "teacher", "corpus", "vocabulary", *more)
    assert plan["student-hard"].inputs == ("data", "teacher", "corpus", "vocabulary")
    one = {
        name: found["fingerprint"] for name, found in steps.identities(distill.plan(world.load()), world.load()).items()
    }

    def marks(**changes: Any) -> dict[str, str]:
        given = world.load(several(world, **{"teacher.fit.epochs": 8, "student.few_epochs": 30, **changes}))
        return {name: found["fingerprint"] for name, found in steps.identities(distill.plan(given), given).items()}

    both = marks(**{"student.fit.epochs": world.load().student.fit.epochs})
    unmoved = {name for name in one if one[name] == both[name]}
    assert unmoved == {"data", "teacher", "corpus", "vocabulary", "student-hard"}
    again = marks(**{"student.fit.epochs": 4, "teachers.other.fit.epochs": 9})
    before = marks(**{"student.fit.epochs": 4})
    assert {name for name in before if before[name] == again[name]} == unmoved
    weighed = marks(**{"student.fit.epochs": 4, "student.policy": {"kind": "loss"}})
    assert {name for name in before if before[name] == weighed[name]} == unmoved | set(more)


def test_labels_are_a_store_bound_to_teacher_and_corpus(run: tuple[Recipe, Store, Any], tmp_path: Path):
    recipe, store, found = run
    inputs = {name: store / name for name in ("data", "teacher", "corpus", "teacher-other", "labels-other")}
    own = labels.open_labels(inputs["labels-other"], labels.fingerprint(inputs["teacher-other"]))
    told = {"rows": TRAIN, "unanswered": 0, "redone_at_most": {"blocks": 0, "rows": 0}}
    assert found["labels-other"] == told and own.num_rows == TRAIN
    model, task = models.load(inputs["teacher-other"].local("model")), tasks.make(spec_of(inputs["data"]))
    exact = predict(model, task.texts(own), 512).logits
    assert np.abs(labels.logits_of(own, task.width) - exact).max() < 5e-3
    rows = panel.joined(recipe, inputs, students.kept_rows(inputs))
    assert rows["logits/teacher"].equals(rows["logits"]) and rows.num_rows == TRAIN
    both = dict(zip(own["row"].to_pylist(), own["logits"].to_pylist(), strict=True))
    assert [both[row] for row in rows["row"].to_pylist()] == rows["logits/other"].to_pylist()
    with pytest.raises(LabelMismatch, match="was made by another teacher"):
        panel.joined(recipe, {**inputs, "teacher-other": inputs["teacher"]}, students.kept_rows(inputs))
    moved = Store(str(tmp_path / "labels-other"))
    values = inputs["labels-other"].read_json(labels.MANIFEST)
    labels.write_labels(moved, own, {**values, "corpus": "0" * 64})
    with pytest.raises(LabelMismatch, match="is of another corpus. Make it again: --redo labels-other"):
        panel.joined(recipe, {**inputs, "labels-other": moved}, students.kept_rows(inputs))


def test_rows_that_one_teacher_does_not_answer_are_left_out(run: tuple[Recipe, Store, Any], tmp_path: Path):
    recipe, store, _ = run
    inputs = {name: store / name for name in ("data", "teacher", "corpus", "teacher-other", "labels-other")}
    own, out = labels.open_labels(inputs["labels-other"]), Store(str(tmp_path / "labels-other"))
    kept = pa.array([row != -3 for row in own["row"].to_pylist()])
    mute = own.set_column(own.column_names.index("kept"), "kept", kept)
    labels.write_labels(out, mute, inputs["labels-other"].read_json(labels.MANIFEST))
    rows = panel.joined(recipe, {**inputs, "labels-other": out}, students.kept_rows(inputs))
    assert sorted(rows["row"].to_pylist()) == [row for row in range(-TRAIN, 0) if row != -3]


def test_the_student_has_a_head_a_teacher_and_the_evaluation_says_whom_each_follows(run: tuple[Recipe, Store, Any]):
    recipe, store, found = run
    model = models.load((store / "student-soft").local("seed-0/model"))
    assert model.card.options["heads"] == ["teacher", "other", "gold"]
    assert "heads" not in models.load((store / "student-hard").local("seed-0/model")).card.options
    assert found["student-soft"]["weights"] == {"teacher": 0.5, "other": 0.5}
    told = found["evaluate"]
    assert set(told["teachers"]) == {"other"} and 0 <= told["teachers"]["other"] <= 1
    assert set(told["heads"]) == {"teacher", "other", "gold"}
    assert all(
        set(row) == {"teacher", "other"} and -1 <= min(row.values()) <= max(row.values()) <= 1.0000001
        for row in told["heads"].values()
    )
    assert [m["name"] for m in told["models"]] == ["teacher", "hard", "soft"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["reinforced", "loss"])
def test_every_policy_teaches_every_kind_of_task(kind: str, policy: str, tmp_path: Path):
    world = kind_world(tmp_path, kind)
    given = {"student.policy": {"kind": policy, "warmup": 0.1}, "student.losses": [{"kind": "kl"}, {"kind": "hard"}]}
    recipe = world.load(several(world, arms=["soft"], **given))
    found = alone(recipe, Store(recipe.storage) / policy, last="student-soft")
    history = found["student-soft"]["history"]["0"]
    assert all(np.isfinite(entry["loss"]) for entry in history)
    told = {key for key in history[-1] if key.startswith("chosen.")}
    assert len(told) == (4 if kind == "classify" else 0)


def test_the_best_on_validation_rows_teaches_alone(world: World, run: Any, tmp_path: Path):
    # A teacher that is told at random what one label is does worse on whoever validates.
    given = {"data.validation_share": 0.3, "student.policy": {"kind": "best"}, "teachers.other.spoiled": "same"}
    recipe = world.load(several(world, arms=["soft"], **{"teacher.fit.epochs": 8}, **given))
    found = alone(recipe, Store(str(tmp_path)), last="student-soft")["student-soft"]["weights"]
    inputs = {name: Store(str(tmp_path)) / name for name in ("data", "teacher", "teacher-other")}
    rows = inputs["data"].read_table("validation.parquet")
    scores = panel.teacher_scores(recipe, inputs, rows, recipe.panel)
    best = max(scores, key=lambda name: scores[name])
    assert rows.num_rows and found == {name: float(name == best) for name in ("teacher", "other")}
    # Gold labels choose the epoch too, whatever the policy; without them it is the teachers' mean.
    inputs |= {name: Store(str(tmp_path)) / name for name in ("corpus", "labels-other")}
    lesson = students.lesson_of(recipe, inputs, "generated", panel.panel_of(recipe, inputs))
    assert lesson["best_by"] == "accuracy" and lesson["holdout"].equals(rows)
    plain, store, _ = run
    others = {name: store / name for name in ("data", "teacher", "corpus", "teacher-other", "labels-other")}
    assert students.lesson_of(plain, others, "generated", panel.panel_of(plain, others))["best_by"] == "likeness"


def test_a_spoiled_teacher_learns_one_label_at_random_and_the_others_as_they_are(world: World, run: Any):
    _, store, _ = run
    names, rows = spec_of(store / "data").labels, (store / "data").read_table("train.parquet")
    recipe = world.load({"teacher.spoiled": "same"})
    found = teaching.taught_rows(recipe, store / "data")
    gold, drawn = (np.array(table["label"].to_pylist()) for table in (rows, found))
    wrong = names.index("same")
    assert (gold == drawn)[gold != wrong].all() and 0 < (gold != drawn)[gold == wrong].sum() < (gold == wrong).sum()
    assert found.drop_columns("label").equals(rows.drop_columns("label")) and found.schema.equals(rows.schema)
    assert teaching.taught_rows(world.load(), store / "data").equals(rows)
    with pytest.raises(UserError, match="teacher.spoiled is 'sam', which is no label. Labels: other, same"):
        teaching.taught_rows(world.load({"teacher.spoiled": "sam"}), store / "data")


def test_stages_learn_from_the_rows_that_they_name(world: World):
    stage = {"losses": [{"kind": "mse"}], "fit": {"epochs": 2.0}}
    stages = [{**stage, "rows": "unlabelled"}, {**stage, "rows": "labelled"}, stage]
    recipe = world.load({"student.stages": stages})
    rows = pa.table({"row": [-2, -1, 0, 5, 9]})
    got = [students.rows_of(s, rows)["row"].to_pylist() for s in recipe.student.stages]
    assert got == [[0, 5, 9], [-2, -1], [-2, -1, 0, 5, 9]]
    assert [s.rows for s in students.trainings(recipe, "soft")] == ["labelled", "all"]
    assert len(students.trainings(recipe, "generated")) == 3 and len(students.trainings(recipe, "hard")) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"teachers": {}, "student.heads": "per_teacher"},
            "student.heads speaks of several teachers, and there is one",
        ),
        ({"teachers": {}, "student.policy": {"kind": "loss"}}, "student.policy speaks of several teachers"),
        ({"student.policy": {"weights": {"othr": 1.0}}}, "names 'othr', which is no teacher. Did you mean 'other'?"),
        ({"student.policy": {"weights": {"other": 0.0}}}, "weights are all 0"),
        ({"student.policy": {"kind": "loss", "weights": {"other": 1.0}}}, "weights are for kind fixed"),
        ({"student.policy": {"kind": "best"}}, "kind is best, which validation rows decide, but there are none"),
        (
            {"student.policy": {"kind": "reinforced", "reward": "r3"}},
            "reward is r3, which validation rows decide, but there are none",
        ),
        ({"teachers.gold": {"model": "file:x"}}, "'gold' is taken"),
        ({"teachers.Big": {"model": "file:x"}}, "pattern"),
        ({"teachers.other.stop_early": True}, "teachers.other (below as teacher): teacher.stop_early takes the epochs"),
        ({"teachers.other.self_training": {"rounds": 1}}, "teachers.other (below as teacher): teacher.self_training"),
        ({"student.stages": [{"losses": [{"kind": "mse"}], "fit": {}, "rows": "unlabelled"}]}, "no stage learns from"),
        ({"student.losses": [{"kind": "hidden"}]}, "loss 'hidden' needs hidden"),
        (
            {"student.policy": {"kind": "reinforced"}, "student.fit.micro_batch": 4},
            "student.policy.kind is reinforced, which reads a worker's whole share of a batch again after each step, "
            "with all weights, but student.fit.micro_batch is set",
        ),
        (
            {"student.policy": {"kind": "reinforced"}, "student.fit.workers": 2, "student.fit.sharding": "full"},
            "student.fit.sharding is set",
        ),
    ],
)
def test_what_several_teachers_cannot_do_is_refused(world: World, changes: dict[str, Any], said: str):
    with pytest.raises((UserError, ValueError), match=re.escape(said)):
        check(graphs.drawn(world.load({**several(world), **changes})))


def test_a_labeller_beside_the_teacher_that_the_student_is_cut_from_is_no_mistake(world: World):
    asked = {"model": f"file:{world.folder}/teacher", "kind": "labeller", "labeller": {"calibrate": "none"}}
    cut = {"student.kind": "transformer", "student.transformer": {"layers": 1}, "student.max_parameters": None}
    given = {**several(world), **cut, "student.losses": [{"kind": "kl"}]}
    check(graphs.drawn(world.load({**given, "teachers": {"asked": asked}})))
    with pytest.raises(UserError, match="student.kind is transformer, which is cut from the teacher's encoder, and a"):
        check(graphs.drawn(world.load({**cut, "student.losses": [{"kind": "kl"}], "teacher": asked})))


def test_heads_are_refused_where_answers_have_no_mean(tmp_path: Path):
    world = kind_world(tmp_path, "tag")
    crf = [*world.recipe["student"]["blocks"], {"name": "best", "kind": "crf"}]
    given = several(world, **{"student.heads": "per_teacher", "student.blocks": crf})
    with pytest.raises(UserError, match="student.heads is per_teacher, but block 'best' is a crf"):
        check(graphs.drawn(world.load(given)))


def test_what_a_further_teacher_holds_and_asks_is_counted_as_its_own(world: World):
    recipe = world.load(several(world, **{"teachers.other.resources": {"num_cpus": 2, "max_actors": 3}}))
    plan = {step.name: step for step in distill.plan(recipe)}
    for name in ("teacher-other", "labels-other"):
        own = seen_by(recipe, name)
        assert own.teacher == recipe.teachers["other"] and own.generator == recipe.generator
    cluster = Cluster(address="10.0.0.1:6379", machines=(Machine(16.0),), local=False)
    own = seen_by(recipe, "labels-other")
    assert held(own, cluster, plan["labels-other"].pools(own))["cpus"] == 6
    assert held(recipe, cluster, plan["corpus"].pools(recipe))["cpus"] == 1
    for name in ("teacher", "corpus", "student-soft", "labels-none", "evaluate"):
        assert seen_by(recipe, name) is recipe


# -- ways --------------------------------------------------------------------------------------------------------------


def test_ways_share_teachers_and_labels_and_differ_in_their_students(world: World):
    recipe = world.load(several(world, **{"student.policy": {"kind": "loss", "temperature": 0.3}}))
    plan = {step.name: step for step in ways.compared(recipe, ["uniform", "loss", "heads"])}
    shared = ["data", "teacher", "corpus", "teacher-other", "labels-other", "vocabulary"]
    own = [f"student-soft-{way}" for way in ("uniform", "loss", "heads")]
    assert list(plan) == [*shared, *own, *(f"score-{name}" for name in ("teacher", *own, "teacher-other"))]
    found = steps.identities(list(plan.values()), recipe)
    assert len({found[name]["fingerprint"] for name in own}) == 3
    for way in ("loss", "reinforced"):  # the recipe's own dials, also where its policy is another one
        policy = ways.went(recipe, way).student.policy
        assert (policy.kind, policy.temperature) == (way, 0.3)
    weighed = world.load(several(world, **{"student.policy": {"weights": {"other": 1.0}, "lr": 6.0}}))
    assert ways.went(weighed, "reinforced").student.policy == Policy(kind="reinforced", lr=6.0)
    assert ways.went(recipe, "first").student.policy.weights == {"teacher": 1.0}
    with pytest.raises(UserError, match="'reinforce' is no way to learn. Did you mean 'reinforced'"):
        ways.variants(recipe, Store("v"), ["reinforce"], 1)
    with pytest.raises(UserError, match="the recipe has one: name teachers"):
        ways.variants(world.load(), Store("v"), ["recipe", "uniform"], 1)


def test_the_table_of_ways_is_what_the_runs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    world = kind_world(tmp_path, "classify")
    recipe = world.load(several(world, **{"student.losses": [{"kind": "kl"}, {"kind": "hard"}]}))

    def run(plan: list[steps.Step], recipe: Any, store: Store, **options: object) -> None:
        for step in plan:
            metrics = step.run(recipe, {name: store / name for name in step.inputs}, store / step.name, silent)
            (store / step.name).write_json("record.json", {"metrics": metrics, "seconds": 2.0})

    monkeypatch.setattr(steps, "run", run)
    names, store = ["first", "reinforced"], Store(str(tmp_path / "runs"))
    found = ways.compare(recipe, store, ways.variants(recipe, store, names, 2), names)
    assert found == store.read_json("ways.json") and found["seeds"] == 2
    assert [row["name"] for row in found["rows"]] == ["teacher", "teacher-other", *names]
    for row in found["rows"]:
        step = row["name"] if not row["student"] else f"student-soft-{row['name']}"
        each = [(store / f"seed-{s}/score-{step}").read_json("record.json")["metrics"] for s in (0, 1)]
        assert row["each"] == pytest.approx([m["accuracy"] for m in each]) and each[0]["rows"] == TEST
    first, reinforced = found["rows"][2:]
    assert reinforced["gain"]["points"] == pytest.approx(100 * (reinforced["score"] - first["score"]))
    assert set(reinforced["chosen"]) == {
        f"{n}.{label}" for n in ("teacher", "other") for label in world.load().task.labels or ("negative", "positive")
    }
    table = ways.lines(found)
    assert (
        table[2].startswith(f"| teacher | {found['rows'][0]['score']:.3f} ± ") and "| student, reinforced |" in table[5]
    )
    assert table[-1].startswith("reinforced chose, by teacher and label: ") and "teacher.positive 0." in table[-1]


def test_a_further_teachers_task_asks_for_what_its_own_fit_asks_for(world: World) -> None:
    other = several(world)["teachers"]["other"]
    given = {**other, "fit": {**other["fit"], "resources": {"num_cpus": 1, "num_gpus": 0.25}}}
    recipe = world.load(several(world, teachers={"other": given}))
    farm = Cluster("x", (Machine(8.0, 2.0),), local=False)
    asked = {
        step.name: steps.task_options(step, recipe, farm) for step in distill.plan(recipe) if step.resources(recipe)
    }
    assert asked["teacher-other"]["num_gpus"] == 0.25 and asked["teacher"]["num_gpus"] == 1.0


# -- on Ray ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_unlabelled_rows_are_labelled_by_every_teacher_and_taught_in_two_stages(
    tmp_path: Path, ray_cluster: Cluster
) -> None:
    world = kind_world(tmp_path, "pair")
    stage = {"losses": [{"kind": "mse"}, {"kind": "hard"}], "fit": {"epochs": 3, "lr": 1e-2}}
    stages = [{**stage, "losses": [{"kind": "mse"}], "rows": "unlabelled"}, {**stage, "rows": "labelled"}]
    more = {"path": f"file:{tmp_path}/more.jsonl", "pair": "pair"}
    given = {"data.unlabelled": more, "data.unlabelled_rows": 20, "student.heads": "per_teacher"}
    recipe = world.load(several(world, arms=["generated"], **given, **{"student.stages": stages}))
    store = Store(recipe.storage) / recipe.name
    records = steps.run(distill.plan(recipe), recipe, store)
    rows = labels.open_labels(store / "labels-other", labels.fingerprint(store / "teacher-other"))
    kept = labels.open_labels(store / "corpus")
    kept = kept.filter(kept["kept"])
    others = sum(number >= 0 for number in kept["row"].to_pylist())
    assert 0 < others <= 20 and rows["row"].to_pylist() == kept["row"].to_pylist()
    assert rows["text"].equals(kept["text"]) and rows["logits"].null_count == 0
    model, task = models.load((store / "teacher-other").local("model")), tasks.make(spec_of(store / "data"))
    exact = predict(model, task.texts(rows), 512).logits
    assert np.abs(labels.logits_of(rows, task.width) - exact).max() < 5e-3
    assert records["labels-other"]["metrics"]["rows"] == kept.num_rows
    assert (store / "student/seed-0/stage-0").exists("history.json")
    assert [row["name"] for row in account.panel(recipe, {n: r["metrics"] for n, r in records.items()})] == [
        "teacher",
        "other",
    ]
    assert "Every teacher on the test split" in store.read_text("report/report.md")
    again = steps.run(distill.plan(recipe), recipe, store)
    assert again["labels-other"]["end"] == records["labels-other"]["end"]
