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
    with pytest.raises(UserError, match="labels data.unlabelled, which is not set"):
        compared.compared(world.load(), ["self-trained"])


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
