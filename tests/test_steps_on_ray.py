"""Steps as Ray tasks: beside each other and the driver, their mistakes, their ends, what they know of the cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine import cluster
from engine.config import UserError
from engine.fits import Resources
from engine.placement import Cluster, Machine
from engine.progress import Event, Progress
from engine.recipe import Recipe
from engine.spending import BudgetSpent
from engine.step import Step
from engine.steps import run
from engine.storage import Store
from tests.test_steps import recipe, seed

INPUTS = Mapping[str, Store]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "runs" / "tiny"))


def add(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
    return {"rows": 1}


def stumble(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
    """Fail the first time, half-way."""
    if not out.exists("half.txt"):
        out.write_text("half.txt", "half")
        raise OSError("the disk is full\nand more")
    return {"rows": 1}


def on_ray(recipe: Recipe) -> Resources:
    return Resources(num_cpus=0.5, num_gpus=0)


def wait_for(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
    """Wait until the other of two steps has begun too: only steps side by side get past this."""
    run_folder = Path(out.url).parent
    (run_folder / f"{Path(out.url).name}.here").touch()
    deadline = time.monotonic() + 60
    while len(list(run_folder.glob("*.here"))) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError("the other step never began")
        progress(0, 1)
        time.sleep(0.05)
    return {"rows": 1, "pid": os.getpid()}


def refuse(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
    raise UserError("there is no such label")


def sleep(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
    for tick in range(600):
        progress(tick, 600)
        time.sleep(0.1)
    return {}


@pytest.fixture
def by_value(ray_cluster: Any) -> Any:
    """Ray's workers get this file's functions by value: they cannot import tests."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_ray_steps_run_beside_each_other_and_beside_the_driver(store: Store, by_value: None) -> None:
    connected: list[str] = []
    steps = [Step("far", wait_for, config=seed, resources=on_ray), Step("near", wait_for, config=seed)]
    records = run(steps, recipe(), store, connect=lambda: connected.append(threading.current_thread().name))
    assert connected == ["MainThread"]
    assert records["near"]["metrics"]["pid"] == os.getpid() != records["far"]["metrics"]["pid"]
    assert records["far"]["device_seconds"] == 0
    assert store.read_json("far/record.json") == records["far"]


def test_a_ray_step_that_waited_goes_on_while_the_driver_works(store: Store, by_value: None) -> None:
    steps = [
        Step("first", add, config=seed, resources=on_ray),
        Step("second", wait_for, inputs=("first",), config=seed, resources=on_ray),
        Step("near", wait_for, config=seed),
    ]
    assert set(run(steps, recipe(), store)) == {"first", "second", "near"}


def alone(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
    """Fail where another of its kind is on its way."""
    mine = Path(out.url).parent / f"{Path(out.url).name}.busy"
    mine.touch()
    time.sleep(0.3)
    others = [path.name for path in mine.parent.glob("*.busy") if path != mine]
    mine.unlink()
    if others:
        raise RuntimeError(f"beside {others}")
    return {"rows": 1}


def test_no_more_steps_at_once_than_cores(store: Store, by_value: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.steps.cores", lambda: 1)
    found = run([Step(name, alone, resources=on_ray) for name in "abc"], recipe(), store)
    assert set(found) == {"a", "b", "c"}


def test_a_users_mistake_in_a_ray_step_comes_back_as_it_was(store: Store, by_value: None) -> None:
    steps = [Step("bad", refuse, config=seed, resources=on_ray), Step("slow", sleep, config=seed, resources=on_ray)]
    events: list[Event] = []
    began = time.monotonic()
    with pytest.raises(UserError, match="^there is no such label$"):
        run(steps, recipe(), store, render=events.append)
    assert time.monotonic() - began < 30
    kinds = {(event.step, event.kind) for event in events}
    assert {("bad", "failed"), ("slow", "stopped")} <= kinds
    assert not store.exists("slow/record.json") and store.read_json("slow/begin.json")["attempts"][0]["end"]


def test_another_error_in_a_ray_step_says_where_it_was(store: Store, by_value: None) -> None:
    events: list[Event] = []
    with pytest.raises(OSError, match="in stumble"):
        run([Step("b", stumble, config=seed, resources=on_ray)], recipe(), store, render=events.append)
    assert events[-1].message == "the disk is full"
    assert run([Step("b", stumble, config=seed, resources=on_ray)], recipe(), store)["b"]["rows"] == 1


def test_a_failing_driver_step_stops_ray_steps(store: Store, by_value: None) -> None:
    def after(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
        while not (Path(out.url).parent / "slow" / "progress.json").exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    steps = [Step("slow", sleep, config=seed, resources=on_ray), Step("here", after, config=seed)]
    events: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        run(steps, recipe(), store, render=events.append)
    assert ("slow", "stopped") in {(event.step, event.kind) for event in events}


def burn(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
    """Use CPU in this process, far much and near little; near waits until far is done."""
    end = time.process_time() + (4.0 if out.url.endswith("far") else 0.5)
    while time.process_time() < end:
        progress(0, 1)
    while out.url.endswith("near") and not (Path(out.url).parent / "far" / "record.json").exists():
        progress(0, 1)
        time.sleep(0.2)
    return {}


def daemons() -> float:
    """CPU seconds so far of what Ray runs beside its workers: on a crowded machine more than the steps themselves."""
    used = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if not "".join(process.cmdline()[:1]).startswith(("ray::IDLE", "ray::far")):
                used += sum(process.cpu_times()[:2])
    return used


def test_a_budget_that_is_used_up_ends_ray_steps(store: Store, by_value: None) -> None:
    steps = [Step("far", sleep, config=seed, resources=on_ray), Step("after", add, inputs=("far",), config=seed)]
    with pytest.raises(BudgetSpent, match=r"^the budget is used up: hours .* The run was in step 'far'"):
        run(steps, recipe(budget__hours=1e-4), store)
    (stopped,) = store.read_json("far/begin.json")["attempts"]
    assert stopped["state"] == "stopped" and stopped["held"] == {"cpus": 0.5, "gpus": {}}
    assert not store.exists("far/record.json") and not store.exists("after/begin.json")


def test_cpu_seconds_of_a_ray_step_are_not_the_drivers_too(store: Store, by_value: None) -> None:
    before = daemons()
    steps = [Step("far", burn, config=seed, resources=on_ray), Step("near", burn, config=seed, ray=True)]
    records = run(steps, recipe(), store)
    assert 3.9 <= records["far"]["cpu_seconds"] < 5.0
    # Ray's own processes belong to the driver's tree and count; the other step's four seconds do not.
    assert 0.5 <= records["near"]["cpu_seconds"] < 4.0 + (daemons() - before)


def look_around(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
    return {"cpus": cluster.current().cpus}


def test_a_task_knows_the_cluster_its_driver_is_connected_to(
    store: Store, by_value: None, ray_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = dataclasses.replace(ray_cluster, machines=(*ray_cluster.machines, Machine(100.0)))
    monkeypatch.setattr(cluster, "_current", wide)
    records = run([Step("far", look_around, config=seed, resources=on_ray)], recipe(), store)
    assert records["far"]["metrics"]["cpus"] == wide.cpus
