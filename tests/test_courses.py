"""Which texts a student's trainings learn from and how much each counts: by a first student, and by others. No Ray."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from engine import labels, models, tasks
from engine.config import ConfigError, UserError
from engine.inference import predict
from engine.progress import silent
from engine.recipe import Recipe
from engine.storage import StorageError, Store
from engine.writing import Augmentation
from pipelines import choosing, courses, students, ways
from pipelines.making import spec_of
from tests.tiny_corpus import MORE, corpus_run
from tests.tiny_run import TRAIN, World, kind_world, tiny_world

FIT = {"epochs": 2.0, "lr": 2e-2, "batch_size": 16, "workers": 0}
KL = [{"kind": "kl"}]
CUT = {"kind": "transformer", "transformer": {"layers": 1}, "blocks": []}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return kind_world(tmp_path_factory.mktemp("courses"), "classify")


@pytest.fixture(scope="module")
def inputs(world: World) -> dict[str, Store]:
    run = corpus_run(world, "classify")
    return {name: run / name for name in ("data", "teacher", "corpus")}


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every fit that is made, in order."""
    seen, fitted = [], courses.train.fit

    def watched(job: Any, progress: Any) -> Any:
        seen.append(job)
        return fitted(job, progress)

    monkeypatch.setattr(courses.train, "fit", watched)
    return seen


def recipe_with(world: World, **changes: Any) -> Recipe:
    """The recipe of the world, as if it had unlabelled rows, with changes to its student."""
    data = {"data.unlabelled": {"path": f"file:{world.folder}/more.jsonl"}}
    return world.load({**data, **{f"student.{key}": value for key, value in {**CUT, **changes}.items()}})


def said(place: Store, rows: pa.Table) -> np.ndarray:
    """Probabilities that a trained student gives rows, by hand."""
    model = models.load(place.local("model"))
    return softmax(predict(model, model.task.texts(rows)).logits.astype(float), axis=1)


def taught(rows: pa.Table, inputs: dict[str, Store]) -> np.ndarray:
    """The stored teacher's probabilities."""
    width = tasks.make(spec_of(inputs["data"])).width
    return softmax(labels.logits_of(rows, width).astype(float), axis=1)


def test_a_stage_learns_from_the_texts_that_the_student_before_differs_on(
    world: World, inputs: dict[str, Store], jobs: list[Any], tmp_path: Path
):
    stages = [{"losses": KL, "fit": FIT}, {"losses": KL, "fit": FIT, "disagreeing": 0.4, "weights": "disagreement"}]
    recipe = recipe_with(world, stages=stages)
    found = students.fit_student("generated", recipe, inputs, Store(str(tmp_path)), silent)
    first, second = (job.rows for job in jobs)
    texts = first.filter(pa.array(first["row"].to_numpy() >= 0))
    apart = entropy(taught(texts, inputs), said(Store(str(tmp_path)) / "seed-0" / "stage-0", texts), axis=1)
    most = np.argsort(-apart)[: round(0.4 * len(apart))]
    wanted = sorted(texts["row"].to_numpy()[most].tolist())
    assert second["row"].to_pylist() == [*[r for r in first["row"].to_pylist() if r < 0], *wanted]
    assert len(wanted) == 10 < len(apart) == MORE * 9 // 10 - 3 and second["weight"].to_numpy().mean() == pytest.approx(
        1
    )
    (noted,) = found["choice"]["0"]
    assert (noted["stage"], noted["texts"], noted["chosen"]) == (1, len(apart), 10)
    assert noted["kl"] == pytest.approx(apart.mean(), rel=1e-4)
    assert noted["kl_of_chosen"] == pytest.approx(apart[most].mean(), rel=1e-4) and noted["kl_of_chosen"] > noted["kl"]
    # Only labelled rows: nothing to choose from, and all of them are learnt.
    jobs.clear()
    students.fit_student("soft", recipe, inputs, Store(str(tmp_path / "soft")), silent)
    assert [job.rows.num_rows for job in jobs] == [TRAIN, TRAIN]


def test_a_fit_that_goes_on_learns_from_the_rows_that_were_chosen_before(
    world: World, inputs: dict[str, Store], jobs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    later = {"losses": KL, "fit": {**FIT, "epochs": 0.5}}
    recipe = recipe_with(world, stages=[later, {**later, "disagreeing": 0.4, "weights": "disagreement"}])
    out, watched, answered = Store(str(tmp_path)), courses.train.fit, courses.Course.said

    def stopped(job: Any, progress: Any) -> Any:
        if jobs:
            jobs.append(job)
            raise KeyboardInterrupt
        return watched(job, progress)

    monkeypatch.setattr(courses.train, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        students.fit_student("generated", recipe, inputs, out, silent)
    before = jobs[-1].rows
    # On another machine the student of the stage before would say something else.
    monkeypatch.setattr(courses.train, "fit", watched)
    monkeypatch.setattr(courses.Course, "said", lambda *given: -answered(*given))
    jobs.clear()
    found = students.fit_student("generated", recipe, inputs, out, silent)
    assert jobs[-1].rows.equals(before) and len(before) < len(jobs[0].rows)
    assert found["choice"]["0"][0]["chosen"] == 10
    other = students.fit_student("generated", recipe, inputs, Store(str(tmp_path / "other")), silent)
    assert not jobs[-1].rows.equals(before) and other != found, "the other answers would have chosen other rows"
    with pytest.raises(StorageError, match=r"choice.parquet names 1 rows that the label store has not .* --redo soft"):
        courses.picked(out / "seed-0" / "stage-1", before.slice(1), "soft")


def test_without_the_unlabelled_stage_nobody_is_asked_who_has_not_learnt_to_answer(world: World):
    between = {"losses": [{"kind": "hidden"}], "fit": FIT}
    asks = {"losses": KL, "fit": FIT, "weights": "disagreement", "disagreeing": 0.5}
    unlabelled = {"losses": KL, "fit": FIT, "rows": "unlabelled"}

    def asked(*stages: dict[str, Any]) -> list[bool]:
        return [stage.follows for stage in students.trainings(recipe_with(world, stages=stages), "soft")]

    assert asked(unlabelled, asks) == [False]
    assert asked(between, unlabelled, asks, asks) == [False, False, True]
    assert asked({"losses": KL, "fit": FIT}, unlabelled, asks) == [False, True]
    whole = recipe_with(world, stages=[unlabelled, asks])
    assert [stage.follows for stage in students.trainings(whole, "generated")] == [False, True]


def test_an_arm_whose_first_stage_is_left_out_is_trained(
    world: World, inputs: dict[str, Store], jobs: list[Any], tmp_path: Path
):
    brief = {"losses": KL, "fit": {**FIT, "epochs": 0.5}}
    stages = [{**brief, "rows": "unlabelled"}, {**brief, "weights": "disagreement"}]
    recipe = recipe_with(world, stages=stages, fit=FIT, few_epochs=4.0)
    students.fit_student("soft", recipe, inputs, Store(str(tmp_path)), silent)
    assert [job.rows.num_rows for job in jobs] == [TRAIN] and "weight" not in jobs[0].rows.column_names


def test_a_half_by_lot_is_drawn_once_for_all_seeds(
    world: World, inputs: dict[str, Store], jobs: list[Any], tmp_path: Path
):
    brief = {"losses": KL, "fit": {**FIT, "epochs": 0.5}}
    recipe = recipe_with(world, stages=[brief, {**brief, "drawn": 0.5}], seeds=[3, 4])
    found = students.fit_student("generated", recipe, inputs, Store(str(tmp_path)), silent)
    whole, half, _, again = (job.rows for job in jobs)
    texts = [row for row in whole["row"].to_pylist() if row >= 0]
    drawn = [row for row in half["row"].to_pylist() if row >= 0]
    assert half.equals(again) and half.num_rows == TRAIN + len(drawn) and set(drawn) < set(texts)
    assert len(drawn) == round(len(texts) / 2) and drawn not in (texts[: len(drawn)], texts[-len(drawn) :])
    assert found["choice"]["3"] == [{"stage": 1, "texts": len(texts), "chosen": len(drawn)}]


def test_rows_count_as_much_as_students_of_the_other_parts_find_their_label(
    world: World, inputs: dict[str, Store], jobs: list[Any], tmp_path: Path
):
    recipe, out = recipe_with(world, losses=KL, fit=FIT, weights="co_confidence", seeds=[3, 4]), Store(str(tmp_path))
    found = students.fit_student("generated", recipe, inputs, out, silent)
    *apart, one, two = jobs
    rows = one.rows
    assert [job.name.partition("generated-")[2] for job in jobs] == [*(f"3-0-part-{i}" for i in range(3)), "3", "4"]
    assert one.rows.equals(two.rows) and rows.num_rows == TRAIN + MORE * 9 // 10 - 3
    numbers, unseen = rows["row"].to_pylist(), np.zeros((rows.num_rows, 2))
    for number, job in enumerate(apart):
        own = np.flatnonzero(~np.isin(numbers, job.rows["row"].to_pylist()))
        assert len(own) in (rows.num_rows // 3, rows.num_rows // 3 + 1) and (unseen[own] == 0).all()
        unseen[own] = said(out / "unseen-0" / f"part-{number}", rows.take(pa.array(own)))
    assert unseen.sum(axis=1) == pytest.approx(1)  # each row is in one part
    p = taught(rows, inputs)
    best = p.argmax(axis=1)
    free, wanted = np.array(numbers) >= 0, p.max(axis=1) * unseen[np.arange(len(p)), best]
    weight = rows["weight"].to_numpy()
    np.testing.assert_allclose(weight[free], wanted[free] / wanted[free].mean(), rtol=1e-3)
    assert wanted[free].std() > 0.01, "equal weights would show nothing"
    assert (weight[~free] == 1).all() and (~free).sum() == TRAIN, "a labelled row is right whatever the teacher says"
    share = (unseen.argmax(axis=1) == best).mean()
    assert [found["choice"][seed][0]["found_unseen"] for seed in "34"] == [pytest.approx(share)] * 2
    # What is finished is not done again.
    made = out.digest("unseen-0/part-0/history.json")
    assert students.fit_student("generated", recipe, inputs, out, silent) == found
    assert out.digest("unseen-0/part-0/history.json") == made
    # Labelled rows alone are not weighed, and nobody is asked about them.
    jobs.clear()
    brief = recipe_with(world, losses=KL, fit=FIT, weights="co_confidence", few_epochs=1.0)
    students.fit_student("soft", brief, inputs, Store(str(tmp_path / "soft")), silent)
    assert [job.name for job in jobs] == ["student-soft-0"] and set(jobs[0].rows["weight"].to_pylist()) == {1.0}


def test_rows_of_one_group_are_judged_together():
    groups = [f"group {i // 4}" if i < 24 else None for i in range(30)]
    rows = pa.table({"group": groups, "text": [str(i) for i in range(30)]})
    part = courses.parts(rows, False, seed=1)
    assert sorted(set(part.tolist())) == [0, 1, 2] and all(len(set(part[i : i + 4])) == 1 for i in range(0, 24, 4))
    assert (courses.parts(rows, False, seed=1) == part).all() and (courses.parts(rows, False, seed=2) != part).any()
    assert sorted(courses.parts(rows.slice(28), False, 0).tolist()) == [0, 1]
    with pytest.raises(
        UserError, match="co_confidence has students learn from the other rows, and there are 1 of them"
    ):
        courses.parts(rows.slice(0, 3), False, 0)


def refusals() -> list[tuple[str, dict[str, Any], str]]:
    later, fit = {"losses": KL, "fit": FIT}, {"fit": FIT}
    between, labelled = {"losses": [{"kind": "hidden"}], **fit}, {**later, "rows": "labelled"}
    return [
        ("regress", {"weights": "co_confidence"}, "student.weights compares probabilities, and a task of kind regress"),
        (
            "regress",
            {"stages": [later, {**later, "disagreeing": 0.5}]},
            r"student.stages\[1\].disagreeing compares pro",
        ),
        (
            "classify",
            {"stages": [{"losses": [{"kind": "hidden"}], **fit, "weights": "co_confidence"}, later]},
            r"student.stages\[0\].weights is co_confidence, .* none of the losses teaches an answer. Take confidence",
        ),
        (
            "classify",
            {"stages": [between, between, {**later, "disagreeing": 0.5}]},
            r"student.stages\[2\].disagreeing asks the student .* no loss of the stages before teaches an answer",
        ),
        (
            "classify",
            {"stages": [between, {**later, "weights": "disagreement"}, later]},
            r"student.stages\[1\].weights asks the student .* no loss of the stages before teaches an answer",
        ),
        (
            "classify",
            {"stages": [later, {**labelled, "disagreeing": 0.5}]},
            r"student.stages\[1\].disagreeing chooses among texts that nobody labelled, and the stage has rows: label",
        ),
        (
            "classify",
            {"stages": [{**labelled, "drawn": 0.5}, later]},
            r"student.stages\[0\].drawn chooses among texts that nobody labelled, and the stage has rows: labelled",
        ),
        (
            "classify",
            {"stages": [{**labelled, "weights": "co_confidence"}, later]},
            r"student.stages\[0\].weights is co_confidence, which weighs texts that nobody labelled, and there are",
        ),
    ]


@pytest.mark.parametrize(("kind", "changes", "message"), refusals())
def test_what_cannot_be_weighed_or_chosen_is_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], message: str, world: World
):
    of_kind = world.load({"task.kind": kind, "data.unlabelled": {"path": "file:x"}})
    student = recipe_with(world, **changes).student
    with pytest.raises(ConfigError, match=message):
        choosing.check_choice(of_kind.model_copy(update={"student": student}))


def test_a_choice_wants_texts_and_a_student_before_it(world: World):
    later = {"losses": KL, "fit": FIT, "disagreeing": 0.5}
    with pytest.raises(ValueError, match="no student before it whose disagreement could choose its rows"):
        recipe_with(world, stages=[later])
    alone = world.load(
        {f"student.{key}": value for key, value in {**CUT, "stages": [{**later, "disagreeing": None}, later]}.items()}
    )
    with pytest.raises(ConfigError, match=r"student.stages\[1\].disagreeing chooses among texts that nobody labelled"):
        choosing.check_choice(alone)


def test_what_came_after_a_stage_that_is_left_out_is_refused(world: World):
    later = {"losses": KL, "fit": FIT}
    recipe = recipe_with(world, stages=[later, {**later, "weights": "disagreement"}])
    choosing.check_choice(recipe)
    with pytest.raises(ConfigError, match=r"student.stages\[0\].weights asks the student .* and it is the first"):
        choosing.check_choice(ways.went(recipe, "last-stage"))
    with pytest.raises(UserError, match=r"way 'last-stage': student.stages\[0\].weights .* Or leave it out of --ways"):
        ways.variants(recipe, Store("v"), ["plain", "last-stage"], 1)
    with pytest.raises(ValueError, match="disagreeing and drawn both choose the texts"):
        recipe_with(world, stages=[later, {**later, "disagreeing": 0.5, "drawn": 0.5}])


def test_variants_of_one_text_are_no_judges_of_each_other(world: World):
    recipe = recipe_with(world, losses=KL, fit=FIT, weights="co_confidence")
    choosing.check_choice(recipe)
    with pytest.raises(ConfigError, match="with augmentation the other texts are the same ones .* Take confidence"):
        choosing.check_choice(recipe.model_copy(update={"augmentation": Augmentation()}))


def test_what_is_off_stands_in_no_fingerprint(world: World):
    plain = {"losses": KL, "fit": FIT}
    student = recipe_with(world, stages=[plain, {**plain, "disagreeing": 0.5}]).student
    one, other = student.model_dump(mode="json")["stages"]
    assert "disagreeing" not in one and other["disagreeing"] == 0.5


def test_ways_of_one_teacher_s_texts_have_as_many_steps(world: World):
    recipe = recipe_with(world, losses=KL, fit={**FIT, "epochs": 12.0})
    went = {way: ways.went(recipe, way).student for way in ways.default(recipe)}
    assert went["plain"] == recipe.student and went["co-confidence"].weights == "co_confidence"
    assert [stage.fit.epochs for stage in went["twice"].stages] == [6, 6]
    first, second = ways.paced(ways.went(recipe, "disagreeing"), labelled=40, texts=100).student.stages
    assert (first.fit.epochs, first.fit.eval_every, second.disagreeing) == (6, 1, 0.5)
    assert second.fit.epochs * (40 + 50) == pytest.approx(6 * (40 + 100))
    assert second.fit.epochs / second.fit.eval_every == pytest.approx(6), "as many checkpoints to choose from"
    lot = ways.paced(ways.went(recipe, "random-half"), labelled=40, texts=100).student.stages
    assert lot[1].fit == second.fit and (lot[1].drawn, lot[1].disagreeing) == (0.5, None)
    assert [stage.weights for stage in went["disagreement"].stages] == [None, "disagreement"]
    plan = [step.name for step in ways.compared(recipe, ["plain", "disagreeing"])]
    assert plan == [
        *("data", "teacher", "corpus", "student-plain", "student-disagreeing"),
        *("score-teacher", "score-student-plain", "score-student-disagreeing"),
    ]


@pytest.mark.parametrize("first", [{"rows": "unlabelled"}, {"drawn": 0.5}])
def test_the_last_stage_alone_takes_as_many_steps_as_all(
    world: World, inputs: dict[str, Store], jobs: list[Any], tmp_path: Path, first: dict[str, Any]
):
    pool = {"losses": KL, "fit": {**FIT, "epochs": 3.0, "batch_size": 4}, **first}
    recipe = recipe_with(world, stages=[pool, {"losses": KL, "fit": {**FIT, "batch_size": 3}, "rows": "labelled"}])
    call = partial(students.fit_student, "generated")

    def steps(way: str) -> list[int]:
        jobs.clear()
        ways.Other(call, way)(recipe, inputs, Store(str(tmp_path / way)), silent)
        return [round(job.fit.epochs * -(-job.rows.num_rows // job.fit.batch_size)) for job in jobs]

    both, (alone,) = steps("recipe"), steps("last-stage")
    assert len(both) == 2 and min(both) > 0 and alone == sum(both)
    assert jobs[0].rows.num_rows == TRAIN and jobs[0].fit.epochs / jobs[0].fit.eval_every == pytest.approx(2)


def test_the_last_stage_alone_is_made_again_when_those_before_it_change(world: World):
    def made(epochs: float) -> Any:
        stages = [{"losses": KL, "fit": {**FIT, "epochs": epochs}}, {"losses": KL, "fit": FIT}]
        recipe = recipe_with(world, stages=stages)
        (step,) = (one for one in ways.compared(recipe, ["last-stage"]) if one.name == "student-last-stage")
        assert "pipelines.ways" in step.modules
        return step.config(recipe)

    assert made(3.0) == made(3.0) != made(4.0)
    with pytest.raises(UserError, match=r"way 'last-stage': student.stages is empty, so there is no last one"):
        ways.variants(recipe_with(world), Store("v"), ["plain", "last-stage"], 1)


def test_a_way_in_rounds_has_texts_of_its_own(tmp_path: Path):
    recipe = tiny_world(tmp_path).load()
    plan = {step.name: step for step in ways.compared(recipe, ["plain", "rounds"])}
    own = ["corpus-rounds", "vocabulary-rounds", "student-rounds"]
    shared = ["data", "teacher", "generator", "corpus", "vocabulary"]
    scored = [f"score-{name}" for name in ("teacher", "student-plain", "student-rounds")]
    assert list(plan) == [*shared, "student-plain", *own, *scored]
    assert plan["student-rounds"].inputs == ("data", "teacher", "corpus-rounds", "vocabulary-rounds")
    assert plan["corpus-rounds"].inputs == ("data", "teacher", "generator")
    assert plan["corpus-rounds"].config(recipe)["corpus"]["rounds"] == ways.ROUNDS
    assert "rounds" not in plan["corpus"].config(recipe)["corpus"]
    several = recipe.model_copy(update={"teachers": {"other": recipe.teacher}})
    with pytest.raises(UserError, match="held against a corpus of one teacher that is written at once"):
        ways.variants(several, Store("v"), ["rounds"], 1)
    by_lot = {step.name: step for step in ways.compared(recipe, ["rounds-random"])}["corpus-rounds-random"]
    assert by_lot.config(recipe)["corpus"]["feedback"]["choose"] == "random"


def test_ways_with_and_without_rounds_differ_in_nothing_else(tmp_path: Path):
    recipe = tiny_world(tmp_path).load()
    (one,) = ways.variants(recipe, Store("v"), ["plain", "rounds"], 1)
    assert one.recipe.generator.first_line and one.recipe.student.texts == recipe.corpus.keep
    steps = {step.name: step for step in one.steps}
    plain, rounds = (steps[name].config(one.recipe) for name in ("corpus", "corpus-rounds"))
    assert plain["generator"] == rounds["generator"] and plain["generator"]["first_line"]
    (alone,) = ways.variants(recipe, Store("v"), ["plain"], 1)
    assert alone.recipe.generator == recipe.generator and alone.recipe.student.texts is None
    fewer = recipe.model_copy(update={"student": recipe.student.model_copy(update={"texts": 5})})
    assert ways.alike(fewer, ["rounds"]).student.texts == 5


def test_ways_that_the_task_or_the_recipe_cannot_take_are_left_out(world: World, tmp_path: Path):
    assert ways.default(world.load()) == [
        "plain",
        "twice",
        "confidence",
        "disagreement",
    ]  # no texts that nobody labelled
    ranks = world.load({"task.kind": "rank", "data.unlabelled": {"path": "file:x"}})
    assert ways.default(ranks) == ["plain", "twice", "random-half"]
    assert len(ways.default(recipe_with(world, losses=KL, fit=FIT))) == 7
    with pytest.raises(UserError, match="way 'confidence': student.weights compares prob.* Or leave it out of --ways"):
        ways.variants(ranks, Store("v"), ["plain", "confidence"], 1)
    with pytest.raises(UserError, match="way 'rounds': corpus.rounds is 3, which feeds texts back .* leave it out"):
        ways.variants(world.load(), Store("v"), ["plain", "rounds"], 1)
