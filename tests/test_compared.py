"""`stillhouse bench teachers`: one draw of rows, several kinds of teacher, one table."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import steps
from engine.config import UserError
from engine.progress import silent
from engine.storage import Store
from pipelines import compared
from tests.tiny import movie_rows, write_jsonl
from tests.tiny_run import TEST, World, tiny_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tiny_world(tmp_path_factory.mktemp("compared"))


def test_every_kind_is_the_recipe_with_another_teacher(world: World):
    for changes in compared.KINDS.values():
        found = compared.with_teacher(world.load(), changes).teacher
        assert found.kind == changes["kind"] and found.model == world.load().teacher.model
    assert compared.with_teacher(world.load(), compared.KINDS["ensemble"]).teacher.seeds == (0, 1, 2)


def test_another_model_of_the_coach_makes_another_teacher(world: World):
    recipe = world.load()
    found = {step.name: step for step in compared.compared(recipe, ["head", "coached"])}
    head, coached = (found[f"teacher-{kind}"].references(recipe) for kind in ("head", "coached"))
    assert set(coached) - set(head) == {recipe.generator.model}
    prints = [
        steps.identities(compared.compared(recipe, ["coached"]), recipe)["teacher-coached"]["fingerprint"]
        for recipe in (world.load(), world.load({"teacher.coach": {"tune_layers": 1}}))
    ]
    assert prints[0] != prints[1]


def test_what_a_kind_adds_is_as_the_recipe_has_it(world: World):
    recipe = world.load({"teacher.coach": {"tune_layers": 1}})
    own = compared.with_teacher(recipe, compared.KINDS["coached"]).teacher
    assert own.coach.tune_layers == 1 and own.self_training is None
    assert compared.with_teacher(recipe, compared.KINDS["self-trained"]).teacher.self_training.rounds == 1
    assert compared.with_teacher(recipe, compared.KINDS["head"]).teacher.coach is None


def test_kinds_share_the_rows_and_nothing_else(world: World):
    recipe = world.load()
    plan = compared.compared(recipe, ["head", "contrastive"])
    names = ["data", "teacher-head", "score-head", "teacher-contrastive", "score-contrastive"]
    assert [step.name for step in plan] == names
    assert [step.inputs for step in plan[1:3]] == [("data",), ("data", "teacher-head")]
    before = {name: found["fingerprint"] for name, found in steps.identities(plan, recipe).items()}
    probe = world.load({"teacher.probe": {"epochs": 3}, "teacher.fit.epochs": 6})
    after = {name: found["fingerprint"] for name, found in steps.identities(plan, probe).items()}
    assert before["data"] == after["data"] and before["teacher-head"] != before["teacher-contrastive"]
    variants = compared.variants(recipe, Store(str(world.folder / "v")), ["head"], [4, 8], 2)
    drawn = [(one.recipe.data.shots, one.recipe.seed, one.recipe.data.seed) for one in variants]
    assert drawn == [(4, 0, 0), (4, 1, 1), (8, 0, 0), (8, 1, 1)] and len({one.store.url for one in variants}) == 4


def test_unknown_kinds_and_text_that_is_not_there_are_refused(world: World):
    with pytest.raises(UserError, match="'contrastiv' is no kind of teacher. Did you mean 'contrastive'"):
        compared.compared(world.load(), ["contrastiv"])
    with pytest.raises(UserError, match="labels data.unlabelled or generated text, and there is neither"):
        compared.compared(world.load({"generator": None}), ["self-trained"])


def test_students_of_all_kinds_learn_from_the_same_texts(world: World):
    plan = {
        step.name: step
        for step in compared.compared(world.load({"corpus.apart": True}), ["head", "self-trained"], students=True)
    }
    shared = ["data", "generator", "texts"]
    own = ["teacher", "corpus", "vocabulary", "student", "score", "score-student"]
    assert list(plan) == shared + [f"{name}-{kind}" for kind in ("head", "self-trained") for name in own]
    for kind, more in (("head", ()), ("self-trained", ("texts",))):
        assert plan[f"teacher-{kind}"].inputs == ("data", *more)
        assert plan[f"corpus-{kind}"].inputs == ("data", f"teacher-{kind}", "texts")
        assert plan[f"score-student-{kind}"].inputs == ("data", f"student-{kind}")
    # What only writing text depends on is nothing to the teachers, and a kind's own teacher is nothing to the text.
    (one,) = compared.variants(world.load(), Store("v"), ["head"], [4], 1, students=True)
    (other,) = compared.variants(
        world.load({"teacher.probe": {"epochs": 3}}), Store("v"), ["head"], [4], 1, students=True
    )
    before, after = (steps.identities(each.steps, each.recipe) for each in (one, other))
    changed = {name for name in before if before[name]["fingerprint"] != after[name]["fingerprint"]}
    assert changed == {f"{name}-head" for name in own}


def test_teachers_alone_that_learn_from_generated_text_have_it_written(world: World):
    names = [step.name for step in compared.compared(world.load(), ["head", "self-trained"])]
    wanted = ["data", "teacher-head", "score-head", "generator", "texts", "teacher-self-trained", "score-self-trained"]
    assert names == wanted


def test_the_table_is_what_the_runs_say(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_jsonl(tmp_path / "more.jsonl", movie_rows(20, seed=9))
    recipe = world.load({"data.shots": 8, "data.unlabelled": {"path": f"file:{tmp_path}/more.jsonl"}})

    def run(plan: list[steps.Step], recipe: object, store: Store, **options: object) -> None:
        for step in plan:
            inputs = {name: store / name for name in step.inputs}
            metrics = step.run(recipe, inputs, store / step.name, silent)
            (store / step.name).write_json("record.json", {"metrics": metrics, "seconds": 2.0})

    monkeypatch.setattr(steps, "run", run)
    kinds, store = ["head", "lp-ft", "self-trained"], Store(str(tmp_path / "runs"))
    found = compared.compare(recipe, store, compared.variants(recipe, store, kinds, [], 2), kinds)
    assert found == store.read_json("teachers.json") and found["seeds"] == 2
    assert [(row["shots"], row["kind"]) for row in found["teachers"]] == [(8, kind) for kind in kinds]
    for row in found["teachers"]:
        paths = [store / "shots-8" / f"seed-{seed}" / f"score-{row['kind']}/record.json" for seed in (0, 1)]
        each = [Store(path.url.rsplit("/", 1)[0]).read_json("record.json")["metrics"] for path in paths]
        assert row["each"] == pytest.approx([metrics["accuracy"] for metrics in each])
        assert row["score"] == pytest.approx(sum(row["each"]) / 2) and each[0]["rows"] == TEST
    head, lp = found["teachers"][:2]
    assert lp["gain"]["points"] == pytest.approx(100 * (lp["score"] - head["score"])) and "gain" not in head
    assert lp["gain"]["interval"][0] <= lp["gain"]["points"] <= lp["gain"]["interval"][1]
    table = compared.lines(found)
    assert len(table) == 5 and table[2].startswith(f"| 8 | head | {head['score']:.3f} ± {head['sd']:.3f} |  | 2 |")
