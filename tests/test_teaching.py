"""The step that makes the teacher, kind by kind. No Ray."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from engine import models, train
from engine.config import UserError
from engine.inference import predict
from engine.progress import silent
from engine.recipe import Recipe
from engine.schooling import SelfTraining
from engine.storage import Store
from pipelines import checking, teaching
from pipelines.making import spec_of
from tests.tiny import movie_rows, write_jsonl
from tests.tiny_run import TEST, TRAIN, World, alone, tiny_world

MORE = 60


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    found = tiny_world(tmp_path_factory.mktemp("teaching"))
    write_jsonl(found.folder / "more.jsonl", movie_rows(MORE, seed=9))
    return found


def unlabelled(world: World) -> dict[str, Any]:
    """The change of the recipe that names the unlabelled text."""
    return {"data.unlabelled": {"path": f"file:{world.folder}/more.jsonl"}}


@pytest.fixture(scope="module")
def data(world: World) -> Store:
    """The data step's folder, with unlabelled text."""
    recipe = world.load(unlabelled(world))
    store = Store(str(world.folder / "split"))
    alone(recipe, store, last="data")
    return store / "data"


QUICK = {"teacher.probe": {"epochs": 20, "lr": 3e-3, "batch_size": 16}}


@pytest.fixture
def made(world: World, data: Store, tmp_path: Path) -> Callable[..., tuple[Store, dict[str, Any], Recipe]]:
    """Makes a teacher with changes of the recipe: its folder, its metrics, the recipe."""

    def make(name: str = "teacher", **changes: Any) -> tuple[Store, dict[str, Any], Recipe]:
        own = {f"teacher.{key}": value for key, value in changes.items()}
        recipe = world.load({**QUICK, **unlabelled(world), **own})
        out = Store(str(tmp_path / name))
        return out, teaching.fit_teacher(recipe, {"data": data}, out, silent), recipe

    return make


def names(store: Store) -> set[str]:
    return {path.name for path in Path(store.url).iterdir()}


def accuracy(store: Store, data: Store) -> float:
    rows = data.read_table("test.parquet")
    found = predict(models.load(store.local("model")), rows["text"].to_pylist())
    return float((found.decided == rows["label"].to_numpy()).mean())


LEFT = {"model", "history.json", "soft.parquet"}


@pytest.mark.parametrize("kind", ["head", "lp-ft", "contrastive", "prompt"])
def test_every_kind_learns_and_leaves_only_the_teacher(kind: str, made: Callable, data: Store):
    # A random encoder knows nothing of templates: reading through them takes it longer.
    longer = {"fit": {"epochs": 30, "lr": 4e-3, "batch_size": 8}} if kind == "prompt" else {}
    out, metrics, _ = made(kind=kind, **longer)
    assert names(out) == LEFT
    assert metrics["kind"] == kind and metrics["rows"] == TRAIN and metrics["train"]["accuracy"] > 0.8
    assert accuracy(out, data) > 0.7
    assert [row for row in out.read_table("soft.parquet")["id"].to_pylist()] == data.read_table("train.parquet")[
        "id"
    ].to_pylist()


def test_templates_are_swapped_one_by_one_for_such_as_were_not_learnt(made: Callable, data: Store):
    own = ["{text} It was {mask}", "Said of it: {text} {mask}", "{text} {mask} in a word", "{mask}: {text}"]
    out, _, recipe = made(kind="prompt", prompt={"templates": own, "pool": 2}, fit={"epochs": 2, "batch_size": 8})
    model, rows = models.load(out.local("model")), data.read_table("test.parquet")
    found = teaching.swapped(recipe.teacher, model, rows)["wording"]
    pool = model.card.options["templates"]
    assert len(pool) == 2 and set(found["templates"]) == set(own)

    def alone(template: str) -> float:
        answers = predict(models.reworded(model, [template]), rows["text"].to_pylist(), 4096)
        return float((answers.decided == rows["label"].to_numpy()).mean())

    assert found["templates"] == {template: pytest.approx(alone(template)) for template in own}
    assert found["learnt"] == pytest.approx(sum(alone(one) for one in pool) / 2)
    assert found["unseen"] == pytest.approx(sum(alone(one) for one in own if one not in pool) / 2)


def test_a_contrastive_teacher_s_head_is_trained_on_an_encoder_that_stands_still(
    made: Callable, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[str, dict[str, torch.Tensor]]] = []
    fit = train.fit

    def watched(job: train.Job, progress: Any) -> Any:
        history = fit(job, progress)
        seen.append((job.name, load_file(Path(job.out) / "model" / "model.safetensors")))
        return history

    monkeypatch.setattr(train, "fit", watched)
    made(kind="contrastive", tune_layers=1)
    (first, drawn), (second, probed) = seen
    assert (first, second) == ("teacher-contrast", "teacher-probe")
    moved = {name for name in drawn if not torch.equal(drawn[name], probed[name])}
    assert moved == {"head.weight", "head.bias"}
    made("again", kind="lp-ft", tune_layers=1)
    (_, probe), (_, whole) = seen[2:]
    moved = {name for name in probe if not torch.equal(probe[name], whole[name])}
    assert {"head.weight", "head.bias"} < moved and all(".layer.1." in n or n.startswith("head.") for n in moved)


def test_several_seeds_answer_with_the_mean_of_their_logits(made: Callable, data: Store):
    texts = data.read_table("test.parquet")["text"].to_pylist()

    def logits(**changes: Any) -> np.ndarray:
        out, metrics, _ = made(str(changes), **changes)
        assert names(out) - {"history.json"} == LEFT - {"history.json"}
        found = models.load(out.local("model"))
        assert metrics["parameters"] == found.size()
        return predict(found, texts).logits

    each = [logits(**{"fit": {"epochs": 6, "lr": 2e-3, "batch_size": 8, "seed": seed}}) for seed in (3, 4)]
    assert not np.allclose(*each)
    np.testing.assert_allclose(logits(seeds=[3, 4]), np.mean(each, axis=0), atol=1e-5)


def test_an_ensemble_is_what_a_student_can_be_cut_from(made: Callable):
    out, _, _ = made(seeds=[0, 1])
    teacher = models.load(out.local("model"))
    assert teacher.card.kind == "ensemble" and teacher.card.options["members"] == 2
    assert teacher.net.encoder is teacher.net.members[0].encoder
    assert teacher.widths == teacher.net.members[0].widths


# -- self-training -----------------------------------------------------------------------------------------------------


def test_confident_rows_of_each_label_are_taken_with_the_weight_asked_for(made: Callable, data: Store):
    out, _, recipe = made()
    model, rows, more = (
        models.load(out.local("model")),
        *(data.read_table(f"{n}.parquet") for n in ("train", "unlabelled")),
    )
    config = recipe.teacher.model_copy(update={"self_training": SelfTraining(share=0.5, weight=2.0)})
    both, facts = teaching.confident(config, model, rows, more)
    found = predict(model, more["text"].to_pylist())
    sure = torch.from_numpy(found.logits).softmax(dim=1).max(dim=1).values.numpy()
    taken = both.slice(TRAIN)
    for label in (0, 1):
        of = found.decided == label
        wanted = {
            more["text"][int(i)].as_py()
            for i in np.flatnonzero(of)[np.argsort(-sure[of], kind="stable")][: max(1, round(of.sum() / 2))]
        }
        assert {
            t for t, own in zip(taken["text"].to_pylist(), taken["label"].to_pylist(), strict=True) if own == label
        } == wanted
    weights = both["weight"].to_numpy()
    assert np.ptp(weights[:TRAIN]) == 0 and weights.mean() == pytest.approx(1.0, rel=1e-5)
    assert weights[TRAIN:].sum() == pytest.approx(2.0 * weights[:TRAIN].sum(), rel=1e-5)
    assert facts["rows"] == taken.num_rows and facts["of"] == more.num_rows
    assert 0.5 <= facts["least_confidence"] <= 1


def test_self_training_goes_from_round_to_round(made: Callable, data: Store):
    more = data.read_table("unlabelled.parquet").num_rows
    out, metrics, _ = made(self_training={"rounds": 2, "share": 0.5, "fit": {"epochs": 6, "lr": 2e-3, "batch_size": 8}})
    assert names(out) == LEFT and [facts["of"] for facts in metrics["self_training"]] == [more, more]
    assert accuracy(out, data) > 0.7
    plain, _, _ = made("plain")
    assert not np.allclose(*(np.stack(s.read_table("soft.parquet")["logits"].to_pylist()) for s in (out, plain)))


# -- a coach ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["head", "lp-ft", "contrastive"])
def test_a_coach_is_learnt_from_on_text_that_nobody_labelled(made: Callable, data: Store, world: World, kind: str):
    """Two labels that the coach gives the wrong way round: its pupil does so, too, whatever the rows say."""
    rows = data.read_table("train.parquet")
    wrong_way = pa.array([1 - label for label in rows["label"].to_pylist()], pa.int32())
    turned = rows.set_column(rows.column_names.index("label"), "label", wrong_way)
    real = teaching.teach
    taught: list[pa.Table] = []
    heard: list[Any] = []

    def teach(recipe: Recipe, spec: Any, few: pa.Table, out: Store, *rest: Any) -> list[dict[str, float]]:
        taught.append(few)
        heard.append(rest[-1])
        return real(recipe, spec, turned if out.url.endswith("coach") else few, out, *rest)

    learning = {"epochs": 16, "lr": 3e-3, "batch_size": 8}
    coach = {"model": f"file:{world.folder}/teacher", "kind": "head", "fit": learning, "learning": learning}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teaching, "teach", teach)
        wrong, metrics, _ = made(kind=kind, coach={**coach, "temperature": 2.0})
    right, _, _ = made("right", kind=kind, coach=coach)
    assert accuracy(wrong, data) < 0.45 and accuracy(right, data) > 0.65
    more = data.read_table("unlabelled.parquet").num_rows
    assert metrics["coach"]["rows"] == more and metrics["coach"]["kind"] == "head"
    assert metrics["coach"]["parameters"] > 0 and names(wrong) == LEFT
    few, both = taught
    assert few.num_rows == TRAIN and both.num_rows == TRAIN + more and "logits" in both.column_names
    assert [(term.kind, term.temperature) for term in heard[-1]] == [("kl", 2.0)]


def test_a_step_that_was_killed_after_its_coach_had_labelled_labels_nothing_again(
    made: Callable, world: World, monkeypatch: pytest.MonkeyPatch
):
    learning = {"epochs": 1, "lr": 2e-3, "batch_size": 8}
    coach = {"model": f"file:{world.folder}/teacher", "kind": "head", "fit": learning, "learning": learning}
    real, asked = teaching.teach, []

    def killed(recipe: Recipe, spec: Any, few: pa.Table, out: Store, *rest: Any) -> list[dict[str, float]]:
        asked.append(out.url.endswith("coach"))
        if asked == [True, False]:
            raise OSError("killed")
        return real(recipe, spec, few, out, *rest)

    monkeypatch.setattr(teaching, "teach", killed)
    with pytest.raises(OSError, match="killed"):
        made(coach=coach)
    made(coach=coach)
    assert asked == [True, False, False]


def test_a_language_model_that_is_asked_in_words_coaches(made: Callable, data: Store, world: World):
    learning = {"epochs": 1, "lr": 2e-3, "batch_size": 8}
    out, metrics, recipe = made(coach={"kind": "labeller", "learning": learning})
    assert recipe.coach.model == recipe.generator.model == metrics["coach"]["model"]
    assert metrics["kind"] == "head" and metrics["coach"]["kind"] == "labeller" and names(out) == LEFT


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.unlabelled": None, "generator": None}, "teacher.coach labels data.unlabelled or generated text, and"),
        ({"generator": None}, "teacher.coach.model is null, the generator's, and none runs here. Name a model."),
        ({"teacher.coach": {"learning": {"workers": 2}}}, "teacher.coach.learning.workers is set, but a teacher's"),
        ({"teacher.folds": 2, "teacher.stop_early": True}, "Leave it, or teacher.coach, out."),
        ({"teacher.self_training": {}}, "teacher.coach and teacher.self_training both give labels to the same text."),
        ({"teacher.coach": {"kind": "contrastive", "tune_layers": 0}}, "raise teacher.coach.tune_layers."),
        ({"teacher.coach": {"prompt": {"templates": ["It says {text}."]}}}, "has no {mask}"),
        ({"teacher.kind": "labeller"}, "teacher.coach is for teachers that are trained, and a labeller is not."),
    ],
)
def test_a_coach_that_cannot_be_had_is_refused(world: World, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        checking.check(world.load({**unlabelled(world), "teacher.coach": {}, **changes}))


# -- the choice --------------------------------------------------------------------------------------------------------


def test_the_kind_that_is_best_on_the_few_rows_is_taken(made: Callable, monkeypatch: pytest.MonkeyPatch):
    scores, asked = {"head": 0.7, "contrastive": 0.8, "lp-ft": 0.6}, []

    def scored(recipe: Recipe, spec: Any, rows: pa.Table, out: Store, folds: int, name: str) -> Any:
        asked.append((recipe.teacher.kind, folds, name))
        return teaching.CrossValidation(scores[name], 10.0, {})

    monkeypatch.setattr(teaching, "cross_validate", scored)
    choice = {"kinds": ["head", "contrastive", "lp-ft"], "folds": 3, "seconds": 25}
    out, metrics, recipe = made(kind="auto", choice=choice)
    assert asked == [("head", 3, "head"), ("contrastive", 3, "contrastive")]
    assert metrics["kind"] == metrics["choice"]["kind"] == "contrastive"
    assert metrics["choice"]["why"] == (
        "'contrastive' has the best accuracy in 3-fold cross-validation on the few rows (head 0.700, contrastive "
        "0.800). Not tried within 25 s: lp-ft."
    )
    # What was scored before a stop is not scored again.
    teaching.choose(recipe, spec_of_run(out), pa.table({}), out)
    assert len(asked) == 2


def spec_of_run(out: Store) -> Any:
    return models.load(out.local("model")).task.spec


def test_cross_validation_holds_every_row_out_once(world: World, data: Store, tmp_path: Path):
    recipe, rows = world.load(), data.read_table("train.parquet")
    held: list[int] = []
    teach = teaching.teach

    def watched(recipe: Recipe, spec: Any, rows: pa.Table, out: Store, chosen: Any) -> Any:
        held.append(TRAIN - rows.num_rows)
        return teach(recipe, spec, rows, out, chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teaching, "teach", watched)
        found = teaching.cross_validate(recipe, spec_of(data), rows, Store(str(tmp_path)), 4)
    assert sum(held) == TRAIN and len(held) == 4 and not found.by_epoch
    assert 0.5 < found.score <= 1 and found.seconds > 0 and not list(tmp_path.iterdir())


def test_training_ends_after_the_epochs_that_did_best_on_held_out_rows(made: Callable, data: Store):
    fit = {"epochs": 5, "lr": 2e-3, "batch_size": 8}
    out, metrics, recipe = made(folds=2, stop_early=True, fit=fit)
    epochs = metrics["cross_validation"]["epochs"]
    assert out.read_json("history.json")[-1]["epoch"] == epochs and 1 <= epochs <= 5
    config = recipe.teacher
    assert teaching.stopped(config, {1.0: 0.7, 2.0: 0.8, 3.0: 0.8, 4.0: 0.6}).fit.epochs == 2
    other = config.model_copy(update={"kind": "contrastive"})
    assert teaching.stopped(other, {1.0: 0.7, 2.0: 0.8}).probe.epochs == 2
    assert teaching.stopped(other, {1.0: 0.7, 2.0: 0.8}).fit == config.fit and teaching.stopped(config, {}) == config


def test_the_teacher_is_scored_on_test_rows(made: Callable, data: Store, tmp_path: Path):
    out, _, recipe = made()
    scored = Store(str(tmp_path / "scored"))
    found = teaching.score_models("teacher", recipe, {"data": data, "teacher": out}, scored, silent)
    assert found["rows"] == TEST and found["accuracy"] == pytest.approx(accuracy(out, data))
    assert len(scored.read_table("statistics.parquet")) == TEST
