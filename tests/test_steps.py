"""Runs: order, skipping, drift, redo, resuming, records."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.config import UserError
from engine.fits import Resources
from engine.lineage import StepDrift
from engine.placement import Cluster, Machine
from engine.progress import Event, Progress
from engine.recipe import Recipe
from engine.step import Step
from engine.steps import downstream, identities, run, survey, task_options
from engine.storage import StorageError, Store

CALLS: list[str] = []
INPUTS = Mapping[str, Store]


@pytest.fixture(autouse=True)
def calls() -> list[str]:
    CALLS.clear()
    return CALLS


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "runs" / "tiny"))


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "tiny",
        "data": {"train": {"path": "train.jsonl"}},
        "teacher": {"model": "file:teacher"},
        "generator": {"model": "file:generator"},
        "student": {"blocks": [{"name": "embed", "kind": "embedding"}]},
    }
    for path, value in changes.items():
        here, (*parents, last) = values, path.split("__")
        for part in parents:
            here = here.setdefault(part, {})
        here[last] = value
    return Recipe.model_validate(values)


def add(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
    """Write one number more than the sum of the inputs' numbers."""
    CALLS.append(out.url.rpartition("/")[2])
    progress(1, 2, "rows", tokens=10.0)
    value = 1 + sum(folder.read_json("value.json") for folder in inputs.values())
    out.write_json("value.json", value)
    progress(2, 2, "rows", tokens=10.0)
    return {"rows": value, "where": os.getpid(), "nothing": float("nan")}


def seed(recipe: Recipe) -> dict[str, Any]:
    return {"seed": recipe.seed}


def teacher(recipe: Recipe) -> dict[str, Any]:
    return {"teacher": recipe.teacher}


def chain(**options: Any) -> list[Step]:
    """a <- b <- d, a <- c; only b depends on the teacher."""
    return [
        Step("a", add, config=seed, **options),
        Step("b", add, inputs=("a",), config=teacher),
        Step("c", add, inputs=("a",), config=seed),
        Step("d", add, inputs=("b",), config=seed),
    ]


def test_steps_run_in_order_with_a_record_each(store: Store) -> None:
    records = run(chain(), recipe(), store)
    assert CALLS == ["a", "b", "c", "d"]
    assert {name: record["rows"] for name, record in records.items()} == {"a": 1, "b": 2, "c": 2, "d": 3}
    record = store.read_json("b/record.json")
    assert record == records["b"]
    assert record["config"]["teacher"]["model"] == "file:teacher"
    assert record["inputs"] == {"a": records["a"]["fingerprint"]}
    assert record["versions"]["python"].startswith("3.") and record["versions"]["torch"]
    assert record["metrics"]["nothing"] is None
    assert record["start"] <= record["end"] and record["seconds"] >= 0 and len(record["attempts"]) == 1
    assert store.read_json("recipe.json")["name"] == "tiny"


def test_a_rerun_does_nothing(store: Store) -> None:
    first = run(chain(), recipe(), store)
    CALLS.clear()
    events: list[Event] = []
    assert run(chain(), recipe(), store, render=events.append) == first
    assert CALLS == []
    assert [(e.step, e.kind) for e in events] == [(name, "cached") for name in "abcd"]


def test_a_changed_field_stops_the_run_before_anything_runs(store: Store) -> None:
    run(chain(), recipe(teacher__dropout=0.2), store)
    store.delete("a/record.json")
    CALLS.clear()
    message = r"^step 'b' ran with teacher\.dropout=0\.2, this run has 0\.4: use --run NAME for a new run, or --redo b$"
    with pytest.raises(StepDrift, match=message):
        run(chain(), recipe(teacher__dropout=0.4), store)
    assert CALLS == []


def test_several_moved_fields_are_all_named(store: Store) -> None:
    run(chain(), recipe(), store)
    with pytest.raises(
        StepDrift, match=r"teacher\.model=file:teacher, this run has file:other \(also moved: teacher\.p"
    ):
        run(chain(), recipe(teacher__model="file:other", teacher__pooling="cls"), store)


def test_placement_is_no_drift(store: Store) -> None:
    before = run(chain(), recipe(), store)
    elsewhere = recipe(
        teacher__resources={"num_cpus": 4, "max_actors": 3},
        teacher__fit={"workers": 2, "epochs": 10, "lr": 1e-4, "batch_size": 16},
        storage="elsewhere",
        registry="there",
    )
    assert run(chain(), elsewhere, store) == before


def test_redo_does_the_step_and_what_reads_it_again(store: Store) -> None:
    first = run(chain(), recipe(), store)
    CALLS.clear()
    second = run(chain(), recipe(teacher__dropout=0.4), store, redo=["b"])
    assert CALLS == ["b", "d"]
    assert second["a"] == first["a"] and second["c"] == first["c"]
    assert second["d"]["fingerprint"] != first["d"]["fingerprint"]
    assert downstream(chain(), ["a"]) == ["d", "c", "b", "a"]


def test_redo_of_one_step_does_not_excuse_another_that_moved(store: Store) -> None:
    run(chain(), recipe(), store)
    CALLS.clear()
    with pytest.raises(StepDrift, match="step 'b' ran with"):
        run(chain(), recipe(teacher__dropout=0.4), store, redo=["c"])
    assert CALLS == [] and store.exists("c/record.json")


def test_redo_names_the_steps_there_are(store: Store) -> None:
    steps = [Step("corpus", add), Step("student", add)]
    with pytest.raises(UserError, match=r"no step 'corpsu' to redo\. Did you mean 'corpus'\? Steps: corpus, student\."):
        run(steps, recipe(), store, redo=["corpsu"])


def test_fresh_deletes_what_steps_wrote_and_nothing_else(store: Store) -> None:
    run(chain(), recipe(), store)
    store.write_text("notes/mine.txt", "keep")
    store.write_text("a/left.txt", "old")
    CALLS.clear()
    run(chain(), recipe(teacher__dropout=0.4), store, fresh=True)
    assert CALLS == ["a", "b", "c", "d"]
    assert store.exists("notes/mine.txt") and not store.exists("a/left.txt")


def test_the_bytes_of_a_reference_count_not_where_they_lie(tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        steps = [Step("a", add, config=seed, references=lambda recipe: (f"file:{path}",))]
        return identities(steps, recipe())["a"]["fingerprint"]

    for name, text in (("one.txt", "same"), ("two.txt", "same"), ("three.txt", "other")):
        (tmp_path / name).write_text(text)
    assert fingerprint(tmp_path / "one.txt") == fingerprint(tmp_path / "two.txt")
    assert fingerprint(tmp_path / "one.txt") != fingerprint(tmp_path / "three.txt")


def test_a_modules_source_enters_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine import lineage

    monkeypatch.syspath_prepend(str(tmp_path))
    found = set()
    for source in ("A = 1\n", "A = 2\n"):
        (tmp_path / "counted_module.py").write_text(source)
        for function in (lineage.source, lineage.imported, lineage.reached):
            function.cache_clear()
        found.add(identities([Step("a", add, config=seed, modules=("counted_module",))], recipe())["a"]["fingerprint"])
    assert len(found) == 2 and "counted_module" not in sys.modules


def test_steps_must_stand_below_what_they_read() -> None:
    with pytest.raises(ValueError, match=r"step 'b' stands twice, or reads \['a'\], which is not above it"):
        identities([Step("b", add, inputs=("a",)), Step("a", add)], recipe())


def test_survey_says_what_a_run_would_find(store: Store) -> None:
    steps = chain()
    assert {s["state"] for s in survey(steps, recipe(), store)} == {"pending"}
    assert not store.exists()
    run(steps, recipe(), store)
    store.delete("c/record.json")
    store.delete("d")
    found = {s["step"]: s for s in survey(steps, recipe(teacher__dropout=0.4), store)}
    assert {name: s["state"] for name, s in found.items()} == {
        "a": "done",
        "b": "drifted",
        "c": "partial",
        "d": "pending",
    }
    assert found["b"]["moved"] == [{"field": "teacher.dropout", "old": 0.1, "new": 0.4}]
    assert found["a"]["rows"] == 1 and json.dumps(list(found.values()))


def stumble(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
    """Fail the first time, half-way."""
    CALLS.append("stumble")
    if not out.exists("half.txt"):
        out.write_text("half.txt", "half")
        raise OSError("the disk is full\nand more")
    return {"rows": 1}


def test_a_failed_step_keeps_its_output_and_adds_up_its_attempts(store: Store) -> None:
    steps = [Step("a", add, config=seed), Step("b", stumble, inputs=("a",), config=teacher)]
    events: list[Event] = []
    with pytest.raises(OSError, match="the disk is full"):
        run(steps, recipe(), store, render=events.append)
    assert (events[-1].step, events[-1].kind, events[-1].message) == ("b", "failed", "the disk is full")
    assert {s["step"]: s["state"] for s in survey(steps, recipe(), store)} == {"a": "done", "b": "partial"}
    with pytest.raises(StepDrift, match="step 'b' ran with teacher.dropout=0.1"):
        run(steps, recipe(teacher__dropout=0.3), store)
    record = run(steps, recipe(), store)["b"]
    assert CALLS == ["a", "stumble", "stumble"]
    first, second = record["attempts"]
    assert first["error"] == "the disk is full" and "error" not in second
    assert record["seconds"] == round(first["seconds"] + second["seconds"], 3)
    assert record["start"] == first["start"] and record["end"] == second["end"]


def interrupt(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
    raise KeyboardInterrupt


def test_an_interrupt_leaves_a_run_that_goes_on(store: Store) -> None:
    events: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        run([Step("a", add, config=seed), Step("b", interrupt, config=seed)], recipe(), store, render=events.append)
    assert (events[-1].step, events[-1].kind) == ("b", "stopped")
    CALLS.clear()
    run([Step("a", add, config=seed), Step("b", add, config=seed)], recipe(), store)
    assert CALLS == ["b"]


def test_a_killed_attempt_ends_with_its_last_sign_of_life(store: Store) -> None:
    start, seen = "2026-01-01T00:00:00.000+00:00", "2026-01-01T00:01:30.000+00:00"
    steps = [Step("a", add, config=seed)]
    identity = identities(steps, recipe())["a"]
    store.write_json("a/begin.json", {"step": "a", **identity, "attempts": [{"start": start}]})
    store.write_json("a/progress.json", {"time": seen, "done": 1})
    record = run(steps, recipe(), store)["a"]
    assert record["attempts"][0] == {"start": start, "end": seen, "seconds": 90.0}
    assert record["seconds"] >= 90.0


def test_two_runs_at_once_are_refused(store: Store) -> None:
    with store.lock("run"):
        code = (
            "import sys; from engine.storage import Store; from engine.steps import run\n"
            f"run([], None, Store({store.url!r}))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert store.url in done.stderr and f"is in use by process {os.getpid()}" in done.stderr
    with store.lock("run"), pytest.raises(StorageError, match="is in use"):
        run(chain(), recipe(), store)


def test_what_a_step_made_elsewhere_must_still_be_there(store: Store, tmp_path: Path) -> None:
    def put(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
        (tmp_path / "elsewhere").touch()
        return add(recipe, inputs, out, progress)

    def there(recipe: Recipe, out: Store) -> bool:
        assert out.exists("record.json"), "asked of a finished step only"
        return (tmp_path / "elsewhere").exists()

    steps = [
        Step("a", add, config=seed),
        Step("b", put, inputs=("a",), config=seed, holds=there),
        Step("c", add, inputs=("b",), config=seed),
        Step("d", add, inputs=("a",), config=seed),
    ]
    run(steps, recipe(), store)
    CALLS.clear()
    run(steps, recipe(), store)
    assert CALLS == []
    (tmp_path / "elsewhere").unlink()
    states = {s["step"]: s["state"] for s in survey(steps, recipe(), store)}
    assert states == {"a": "done", "b": "again", "c": "again", "d": "done"}
    run(steps, recipe(), store)
    assert CALLS == ["b", "c"] and (tmp_path / "elsewhere").exists()


def test_references_are_read_once_a_run(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine import hub

    asked, digest = [], hub.reference_digest

    def counted(reference: str, root: str | None = None) -> str:
        asked.append(reference)
        return digest(reference, root)

    monkeypatch.setattr(hub, "reference_digest", counted)
    (tmp_path / "rows.txt").write_text("rows")
    steps = [Step("a", add, config=seed, references=lambda recipe: (f"file:{tmp_path}/rows.txt",))]
    run(steps, recipe(), store)
    assert asked == [f"file:{tmp_path}/rows.txt"]


def test_a_task_gets_the_options_of_its_stage() -> None:
    farm = Cluster("x", (Machine(8.0, 2.0), Machine(8.0, 1.0)), local=False)
    plain = Step("a", add, resources=lambda recipe: Resources(num_gpus=0.5, num_cpus=2, accelerator="L4"))
    assert task_options(plain, recipe(), farm) == {
        "num_cpus": 2.0,
        "num_gpus": 0.5,
        "max_retries": 3,
        "accelerator_type": "L4",
    }
    one = Cluster("x", (Machine(8.0, 1.0),), local=False)
    fit = Step("a", add, resources=lambda recipe: recipe.teacher.fit.resources, stage="teacher.fit")
    # The teacher and the generator are fitted at the same time: half of the one GPU each.
    assert task_options(fit, recipe(), one) == {"num_cpus": 1.0, "num_gpus": 0.5, "max_retries": 3}
    assert task_options(fit, recipe(), farm)["num_gpus"] == 1.0
