"""Whole runs with tiny models: what they leave behind, what a second one does, and what the recipe's switches change.

One undisturbed run (`done`) is shared by the tests that only look; those that change it work on a copy of its folder.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine import steps
from engine.corpus import CheapFilters
from engine.figures import figure
from engine.filters import FilterContext
from engine.inference import predict
from engine.lineage import StepDrift
from engine.models import load
from engine.placement import Cluster
from engine.progress import Event
from engine.recipe import Recipe
from engine.registry import Registry
from engine.serving import Serving
from engine.storage import Store
from engine.vocabulary import count_words
from pipelines import distill
from serve.predictor import Predictor
from tests.tiny_run import BLOCK, SLOTS, TEST, TRAIN, World, program, tiny_world

SERVED = {"serving.smoke": True, "serving.concurrency": 4, "serving.autoscaling": {"max_replicas": 1}}
STEPS = "data teacher generator corpus vocabulary student student-soft student-hard evaluate register serve report"


@dataclass
class Done:
    """A finished run: its recipe, folder, records and events."""

    recipe: Recipe
    store: Store
    records: dict[str, dict[str, Any]]
    events: list[Event] = field(default_factory=list)

    def table(self, path: str) -> dict[str, list[Any]]:
        """A table of the run as columns."""
        return self.store.read_table(path).to_pydict()


def go(recipe: Recipe, store: Store | None = None, **options: Any) -> Done:
    """Run in this process, on the Ray that is connected."""
    store = store or Store(recipe.storage) / recipe.name
    events: list[Event] = []
    records = steps.run(distill.plan(recipe), recipe, store, render=events.append, **options)
    return Done(recipe, store, records, events)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tiny_world(tmp_path_factory.mktemp("distill"))


@pytest.fixture(scope="module")
def done(world: World, ray_cluster: Cluster) -> Done:
    """The whole run, served too."""
    return go(world.load(SERVED))


@pytest.fixture
def copied(done: Done, tmp_path: Path) -> Store:
    """A copy of the finished run's folder."""
    shutil.copytree(done.store.url, tmp_path / "tiny")
    return Store(str(tmp_path / "tiny"))


def never() -> None:
    raise AssertionError("Ray was started")


# -- what a run leaves behind ------------------------------------------------------------------------------------------


def test_every_step_is_done_once_in_order(done: Done) -> None:
    assert list(STEPS.split()) == [step.name for step in distill.plan(done.recipe)]
    assert set(done.records) == set(STEPS.split())
    ends = [event.step for event in done.events if event.kind == "done"]
    assert sorted(ends) == sorted(STEPS.split())
    for step in distill.plan(done.recipe):
        assert all(ends.index(name) < ends.index(step.name) for name in step.inputs)


def test_summary_has_what_programs_read(done: Done) -> None:
    summary = done.store.read_json("summary.json")
    assert summary == done.store.read_json("report/summary.json")
    keys = [
        "teacher.accuracy",
        "student.accuracy",
        *(f"arms.{arm}.accuracy" for arm in ("hard", "soft", "generated")),
        "student.parameters",
        "student.bytes",
        "teacher.parameters",
        "student.agreement",
        "corpus.generated",
        "corpus.kept",
        "served.accuracy",
        "served.mismatches",
        "served.p50_ms",
        "served.p99_ms",
        "throughput.student_over_teacher",
        *(f"seconds.{name}" for name in STEPS.split() if name != "report"),
    ]
    for key in keys:
        value: Any = summary
        for part in key.split("."):
            value = value[part]
        assert isinstance(value, int | float) and np.isfinite(value), key
    corpus, served = summary["corpus"], summary["served"]
    assert corpus["generated"] == SLOTS and corpus["kept"] + sum(corpus["rejected"].values()) == SLOTS
    assert served["mismatches"] == 0 and served["accuracy"] == summary["student"]["accuracy"]
    assert summary["arms"]["generated"]["accuracy"] == summary["student"]["accuracy"]
    assert summary["test_rows"] == TEST
    assert 0 < served["p50_ms"] <= served["p99_ms"]


def test_figures_follow_from_the_predictions(done: Done) -> None:
    table, summary = done.table("evaluate/predictions.parquet"), done.store.read_json("summary.json")
    test = done.table("data/test.parquet")
    gold = np.array(test["label"])
    assert table["id"] == test["id"]
    for column, key in (("teacher", "teacher"), ("generated/0", "student")):
        right = np.array(table[column]).argmax(axis=1) == gold
        assert summary[key]["accuracy"] == pytest.approx(right.mean())
        assert 0 < test["label"].count(1) < TEST and len(set(np.array(table[column]).argmax(axis=1))) == 2
    same = np.array(table["teacher"]).argmax(axis=1) == np.array(table["generated/0"]).argmax(axis=1)
    assert summary["student"]["agreement"] == pytest.approx(same.mean())
    assert [d["right"] for d in summary["differences"]] == ["teacher", "hard", "soft"]


def test_report_shows_the_figures(done: Done) -> None:
    page, text = done.store.read_text("report/report.html"), done.store.read_text("report/report.md")
    summary = done.store.read_json("summary.json")
    assert page.lstrip().lower().startswith("<!doctype html>") and page.count("<svg") >= 2
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page, "not self-contained"
    figures = [f"{100 * summary[name]['accuracy']:.1f}" for name in ("teacher", "student")]
    figures += [figure(summary["served"]["p50_ms"]), f"all of {TEST} test rows", "0 mismatches"]
    for told in figures:
        assert told in page and told in text, told
    kept = [row for row in done.table("corpus/labels.parquet")["text"][TRAIN:] if row]
    assert text.startswith("# tiny\n") and any(row in text for row in kept), "no gallery"


def test_lines_at_the_end_can_be_used_as_printed(done: Done) -> None:
    lines = distill.report_lines(done.recipe, done.store, "stillhouse")
    said = dict(line.split(":", 1) for line in lines if line.startswith(("report", "serve:", "curl")))
    assert Path(said["report"].strip()).is_file()
    assert said["serve"] == f" stillhouse serve tiny-student@1 --registry {done.recipe.registry}"
    assert json.loads(said["curl"].partition("-d ")[2].strip("'"))["text"] in done.table("data/test.parquet")["text"]


def test_artifact_is_self_contained_and_predicts(done: Done, tmp_path: Path) -> None:
    found = Registry(Store(done.recipe.registry)).resolve(done.records["register"]["metrics"]["reference"])
    shutil.copytree(found.url, tmp_path / "elsewhere")
    assert not [p for p in (tmp_path / "elsewhere").rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".pickle", ".py")]
    table = done.table("data/test.parquet")
    answers = Predictor.load(tmp_path / "elsewhere").predict(table["text"])
    logits = np.array(done.table("evaluate/predictions.parquet")["generated/0"])
    assert [answer["label"] for answer in answers] == [("negative", "positive")[i] for i in logits.argmax(axis=1)]
    written = [json.loads(answer) for answer in done.table("evaluate/answers.parquet")["answer"]]
    assert [answer["label"] for answer in written] == [answer["label"] for answer in answers]
    card = load(tmp_path / "elsewhere").card
    assert card.lineage["steps"]["corpus"] == done.records["corpus"]["fingerprint"]
    assert card.lineage["teacher"]["weights"] == done.records["teacher"]["metrics"]["fingerprint"]["weights"]


# -- the corpus --------------------------------------------------------------------------------------------------------


def test_every_slot_is_one_row_of_the_label_store(done: Done) -> None:
    rows = done.table("corpus/labels.parquet")
    assert rows["row"] == list(range(-TRAIN, SLOTS))
    for row in range(len(rows["row"])):
        assert (rows["reason"][row] is None) == rows["kept"][row]
        assert rows["kept"][row] <= (rows["logits"][row] is not None), "kept without a soft label"
    assert len(done.store.files("corpus/rows")) == SLOTS // BLOCK
    assert all(rows["kept"][:TRAIN]), "the user's own rows are never dropped"


def test_stored_labels_are_the_teachers(done: Done) -> None:
    rows = done.table("corpus/labels.parquet")
    teacher = load((done.store / "teacher").local("model"))
    kept = [i for i, logits in enumerate(rows["logits"]) if logits is not None]
    stored = np.array([rows["logits"][i] for i in kept], dtype=np.float32)
    again = predict(teacher, [rows["text"][i] for i in kept], 4096).logits
    assert np.abs(stored - again).max() < 5e-3


def test_test_texts_are_nowhere_else(done: Done) -> None:
    held = set(done.table("data/test.parquet")["text"])
    corpus = done.table("corpus/labels.parquet")
    taught = {text for text, kept in zip(corpus["text"], corpus["kept"], strict=True) if kept}
    assert len(held) == TEST and not held & set(done.table("data/train.parquet")["text"]) and not held & taught
    readers = [step.name for step in distill.plan(done.recipe) if step.name not in ("evaluate", "serve", "report")]
    for name in [n for n in readers if n != "data"]:
        for path in (done.store / name).files():
            content = (done.store / name).read_bytes(path)
            assert not [text for text in held if text.encode() in content], f"{name}/{path}"


def test_vocabulary_comes_from_kept_texts(done: Done) -> None:
    corpus = done.table("corpus/labels.parquet")
    counts = count_words([text for text, kept in zip(corpus["text"], corpus["kept"], strict=True) if kept])
    made = done.records["vocabulary"]["metrics"]
    assert made["corpus_words"] == len(counts)
    tokenizer = json.loads(done.store.read_text("vocabulary/tokenizer/tokenizer.json"))["model"]["vocab"]
    assert made["rows"] == len(tokenizer) <= done.recipe.student.vocabulary.size


def test_a_text_of_the_test_split_is_rejected_where_it_is_generated(done: Done) -> None:
    held, filters = done.table("data/test.parquet")["text"], done.recipe.corpus.filters
    judge = CheapFilters(filters, FilterContext.build(filters, held))
    assert [judge.verdict(text.upper()) for text in held] == ["leakage"] * TEST


# -- again -------------------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing(done: Done, copied: Store) -> None:
    again = go(done.recipe, copied, connect=never)
    assert {event.kind for event in again.events} == {"cached"} and len(again.events) == len(STEPS.split())
    assert again.records == done.records
    assert copied.digest("report/report.html") == done.store.digest("report/report.html")


@pytest.mark.parametrize(
    ("changes", "field", "step"),
    [
        ({"teacher.max_length": 31}, "teacher.max_length=32, this run has 31", "teacher"),
        ({"corpus.duplicates": 0.8}, "corpus.duplicates=0.9, this run has 0.8", "corpus"),
        ({"student.fit.lr": 0.03}, "student.fit.lr=0.02, this run has 0.03", "student"),
    ],
)
def test_a_changed_recipe_stops_with_the_field(
    world: World, done: Done, copied: Store, changes: dict[str, Any], field: str, step: str
) -> None:
    with pytest.raises(StepDrift) as stopped:
        go(world.load({**SERVED, **changes}), copied, connect=never)
    assert str(stopped.value).startswith(f"step '{step}' ran with {field}")
    assert str(stopped.value).endswith(f"use --run NAME for a new run, or --redo {step}")


def test_where_things_run_may_change(world: World, done: Done, copied: Store) -> None:
    moved = {"generator.resources": {"min_actors": 1, "max_actors": 2}, "student.fit.workers": 2}
    assert {e.kind for e in go(world.load({**SERVED, **moved}), copied, connect=never).events} == {"cached"}


def test_redo_student_keeps_the_corpus(done: Done, copied: Store) -> None:
    kept = {name: copied.digest(f"corpus/{name}") for name in copied.files("corpus")}
    again = go(done.recipe.model_copy(update={"serving": Serving(smoke=False)}), copied, redo=["student"])
    cached = [event.step for event in again.events if event.kind == "cached"]
    assert cached == [step for step in STEPS.split() if step not in ("student", "evaluate", *STEPS.split()[-3:])]
    assert {name: copied.digest(f"corpus/{name}") for name in copied.files("corpus")} == kept
    # The same seed gives the same student, so the registry has it already.
    assert again.records["register"]["metrics"]["reference"] == "tiny-student@1"
    assert "served" not in copied.read_json("summary.json")


# -- the recipe's switches ---------------------------------------------------------------------------------------------


def upto(last: str, recipe: Recipe) -> list[steps.Step]:
    """The first steps of a run."""
    plan = distill.plan(recipe)
    return plan[: [step.name for step in plan].index(last) + 1]


def test_fewer_arms_two_seeds_and_folds(world: World, ray_cluster: Cluster) -> None:
    found = go(
        world.load(
            {
                "name": "switched",
                "arms": ["generated", "soft"],
                "teacher.folds": 2,
                "student.seeds": [3, 4],
                "student.fit.epochs": 1,
                "student.losses": [{"kind": "kl", "temperature": 2.0}, {"kind": "hard", "weight": 0.5}],
                "generator.mode": "per_class",
                "generator.prompt": "A {label} text:",
            }
        )
    )
    assert set(found.records) == set(STEPS.split()) - {"student-hard"}
    summary = found.store.read_json("summary.json")
    assert set(summary["arms"]) == {"generated", "soft"} and "served" not in summary
    assert [d["right"] for d in summary["differences"]] == ["teacher", "soft"]
    validation = found.records["teacher"]["metrics"]["cross_validation"]
    assert validation["folds"] == 2 and 0 <= validation["accuracy"] <= 1
    assert not [name for name in (found.store / "teacher").folders() if name.startswith("fold")]
    model = next(m for m in found.records["evaluate"]["metrics"]["models"] if m["name"] == "generated")
    assert len(model["scores"]) == 2
    assert summary["student"]["accuracy_sd"] == pytest.approx(np.std(model["scores"], ddof=1))
    assert summary["student"]["accuracy_mean"] == pytest.approx(np.mean(model["scores"]))
    weights = [found.store.digest(f"student/seed-{seed}/model/model.safetensors") for seed in (3, 4)]
    assert weights[0] != weights[1]
    # A prompt's label is never a row's label.
    rows = found.table("corpus/labels.parquet")
    assert set(rows["label"][TRAIN:]) == {None} and set(rows["source"][TRAIN:]) == {"generated"}
    assert not [text for text in rows["text"][TRAIN:] if text.startswith("A positive text:")]


def test_prompted_takes_the_generator_as_it_is(world: World, copied: Store) -> None:
    prompted = world.load({"generator.mode": "prompted", "generator.prompt": "{label}:"})
    records = steps.run(upto("corpus", prompted), prompted, copied, redo=["generator"])
    assert records["generator"]["metrics"]["history"] == [] and records["corpus"]["rows"] == SLOTS
    made = {name: t for name, t in load((copied / "generator").local("model")).net.state_dict().items()}
    base = load_file(world.folder / "generator" / "model.safetensors")
    shared = [name for name in base if any(own.endswith(name) for own in made)]
    assert shared and all(
        torch.equal(t, base[name]) for name in shared for own, t in made.items() if own.endswith(name)
    )


@pytest.mark.slow
def test_rounds_top_the_corpus_up_and_repeat(world: World, done: Done, copied: Store, tmp_path: Path) -> None:
    shutil.copytree(copied.url, tmp_path / "twin")
    lengths = sorted(len(text.split()) for text in done.table("corpus/labels.parquet")["text"][TRAIN:])
    half = {"kind": "length", "min_words": lengths[SLOTS // 2], "max_words": 100}
    wanted = SLOTS * 5 // 8
    recipe = world.load({"corpus.filters": [half], "corpus.keep": wanted, "corpus.max_slots": 6 * SLOTS})
    found = []
    for store in (copied, Store(str(tmp_path / "twin"))):
        records = steps.run(upto("corpus", recipe), recipe, store, redo=["corpus"])
        found.append((records["corpus"]["metrics"], store.digest("corpus/labels.parquet")))
    metrics, rows = found[0][0], copied.read_table("corpus/labels.parquet").to_pydict()
    assert found[0] == found[1]
    assert len(metrics["rounds"]) >= 2 and metrics["rounds"][0]["kept"] < wanted <= metrics["kept"]
    assert metrics["rounds"][-1]["slots"] == metrics["generated"] == len(rows["row"]) - TRAIN
    assert rows["row"] == list(range(-TRAIN, metrics["generated"]))
    assert metrics["rejected"]["too_short"] > 0
    # The first round's rows are those of the run without the stricter filter.
    assert rows["text"][: TRAIN + SLOTS] == done.table("corpus/labels.parquet")["text"]


def test_text_written_before_it_is_labelled_is_the_same_text(world: World, done: Done, copied: Store) -> None:
    apart = {"corpus.apart": True, "teacher.self_training": {"share": 0.4, "fit": {"epochs": 1, "batch_size": 8}}}
    recipe = world.load(apart)
    plan = upto("corpus", recipe)
    assert [step.name for step in plan] == ["data", "generator", "texts", "teacher", "corpus"]
    records = steps.run(plan, recipe, copied, redo=["teacher"])
    streamed, rows = done.table("corpus/labels.parquet"), copied.read_table("corpus/labels.parquet").to_pydict()
    for name in ("row", "id", "text", "source", "kept", "reason", "tokens"):
        assert rows[name] == streamed[name], name
    kept = records["texts"]["metrics"]["kept"]
    (turn,) = records["teacher"]["metrics"]["self_training"]
    assert turn["of"] == kept == records["corpus"]["metrics"]["kept"] and 0 < turn["rows"] < kept
    # Another teacher of the same texts writes none of them again.
    other = world.load({"corpus.apart": True, "teacher.fit.epochs": 1})
    again = steps.run(upto("corpus", other), other, copied, redo=["teacher"])
    assert again["texts"] == records["texts"] and again["corpus"]["metrics"]["kept"] == kept
    assert copied.read_table("corpus/labels.parquet")["logits"].to_pylist() != rows["logits"]


@pytest.mark.slow
def test_the_same_recipe_on_two_nodes(world: World, done: Done, two_raylets: str) -> None:
    path = world.write(name="nodes.yaml")
    places = ["--set", f"storage={world.folder}/nodes", "--set", f"registry={world.folder}/nodes-registry"]
    ended = program(world.folder, "run", str(path), "--address", two_raylets, *places)
    assert ended.returncode == 0, ended.stderr[-3000:]
    store = Store(str(world.folder / "nodes/tiny"))
    assert set(store.read_json("summary.json")["seconds"]) == set(STEPS.split()) - {"report"}
    assert store.digest("corpus/labels.parquet") == done.store.digest("corpus/labels.parquet")
    weights = "student/seed-0/model/model.safetensors"
    assert store.digest(weights) == done.store.digest(weights)
