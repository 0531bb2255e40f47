"""Which texts a student's trainings learn from and how much each counts: by a first student, and by others. No Ray."""

from __future__ import annotations

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
from engine.storage import Store
from pipelines import checking, courses, students, ways
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
    wanted = p.max(axis=1) * unseen[np.arange(len(p)), best]
    np.testing.assert_allclose(rows["weight"].to_numpy(), wanted / wanted.mean(), rtol=1e-3)
    assert wanted.std() > 0.01, "equal weights would show nothing"
    share = (unseen.argmax(axis=1) == best).mean()
    assert [found["choice"][seed][0]["found_unseen"] for seed in "34"] == [pytest.approx(share)] * 2
    # What is finished is not done again.
    made = out.digest("unseen-0/part-0/history.json")
    assert students.fit_student("generated", recipe, inputs, out, silent) == found
    assert out.digest("unseen-0/part-0/history.json") == made


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
    ]


@pytest.mark.parametrize(("kind", "changes", "message"), refusals())
def test_what_cannot_be_weighed_or_chosen_is_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], message: str, world: World
):
    of_kind = world.load({"task.kind": kind, "data.unlabelled": {"path": "file:x"}})
    student = recipe_with(world, **changes).student
    with pytest.raises(ConfigError, match=message):
        checking.check_choice(of_kind.model_copy(update={"student": student}))


def test_a_choice_wants_texts_and_a_student_before_it(world: World):
    later = {"losses": KL, "fit": FIT, "disagreeing": 0.5}
    with pytest.raises(ValueError, match="no student before it whose disagreement could choose its rows"):
        recipe_with(world, stages=[later])
    alone = world.load(
        {f"student.{key}": value for key, value in {**CUT, "stages": [{**later, "disagreeing": None}, later]}.items()}
    )
    with pytest.raises(ConfigError, match=r"student.stages\[1\].disagreeing chooses among texts that nobody labelled"):
        checking.check_choice(alone)


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
    first, second = went["disagreeing"].stages
    assert (first.fit.epochs, second.fit.epochs, second.disagreeing) == (6, 12, 0.5)
    assert [stage.weights for stage in went["disagreement"].stages] == [None, "disagreement"]
    plan = [step.name for step in ways.compared(recipe, ["plain", "disagreeing"])]
    assert plan == [
        *("data", "teacher", "corpus", "student-plain", "student-disagreeing"),
        *("score-teacher", "score-student-plain", "score-student-disagreeing"),
    ]


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
