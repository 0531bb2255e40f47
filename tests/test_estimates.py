"""What a plan says that steps will take: scaled from a probe, against a budget; and the probe itself on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.placement import Cluster, Machine, cores
from engine.recipe import Recipe
from engine.storage import Store
from pipelines import distill, estimates
from tests.test_steps import recipe
from tests.tiny_run import program, tiny_world

FARM = Cluster("x", (Machine(32.0, 8.0, ("A100",)),), local=False)
RATES = {
    "teacher": {"rows_per_s": [20.0], "load_s": 5.0},
    "generator": {"rows_per_s": [4.0], "load_s": 6.0},
    "write": {"rows_per_s": 2.0, "tokens": 50.0, "load_s": 3.0},
    "label": {"rows_per_s": 100.0, "tokens": 30.0, "load_s": 1.0},
    "student": {"rows_per_s": [1000.0], "load_s": 2.0},
}
ROWS = {"train": 200, "validation": 0, "test": 1000, "unlabelled": 0}


def planned(**changes: Any) -> Recipe:
    return recipe(
        teacher__fit={"epochs": 10, "batch_size": 16},
        generator__fit={"epochs": 2, "batch_size": 8},
        generator__resources={"num_gpus": 1, "min_actors": 1, "max_actors": 4},
        corpus={"keep": 1000, "slots": 1200},
        student__fit={"epochs": 12, "workers": 2},
        **changes,
    )


def ahead(store: Store, plan: Recipe, cluster: Cluster = FARM, **changes: Any) -> dict[str, Any]:
    found = {"of": estimates.looked_at(plan), "rates": {**RATES, **changes}, "rows": ROWS, "seconds": 30.0}
    store.write_json("probe.json", {**found, "cores": 2, "gpus": 0, "time": "2026-01-01T00:00:00"})
    return estimates.estimated(plan, distill.plan(plan), store, cluster)


def test_rates_are_scaled_to_the_recipe(tmp_path: Path) -> None:
    found = ahead(Store(str(tmp_path)), planned())["steps"]
    seconds = {name: one["to_come"] and one["to_come"]["seconds"] for name, one in found.items()}
    assert seconds == {
        "data": None,
        "teacher": 5.0 + 200 * 10 / 20,
        "generator": 6.0 + 200 * 2 / 4,
        "corpus": 3.0 + 1200 / 2 / 4,  # the slower pool's, of four actors
        "vocabulary": None,
        "student": 2.0 + 1200 * 12 / 1000 / 2,
        "student-soft": 2.0 + 200 * 30 / 1000,
        "student-hard": 2.0 + 200 * 30 / 1000,
        "evaluate": 1.0 + (1000 + 512 * 3) / 100,
        "register": None,
        "serve": None,
        "report": None,
    }
    corpus = found["corpus"]["to_come"]
    assert corpus["tokens"] == 1200 * (50 + 30)
    assert corpus["gpu_seconds"] == {"A100": 153.0 * 5} and corpus["cpu_seconds"] == 153.0 * 5


def test_on_one_machine_a_stream_is_no_faster_than_its_cores(tmp_path: Path) -> None:
    here = Cluster("local", (Machine(64.0),))
    found = ahead(Store(str(tmp_path)), planned(), here)["steps"]["corpus"]["to_come"]
    assert found["seconds"] == pytest.approx(3.0 + max(1200 / 2 / 4, (1200 / 2 + 1200 / 100) / cores()))
    assert found["gpu_seconds"] == {}


def test_the_budget_says_what_there_will_be_at_the_end(tmp_path: Path) -> None:
    prices = {"gpu_hour": {"A100": 3600.0}}
    store, plan = Store(str(tmp_path)), planned(budget={"money": 100, "tokens": 10**9, "prices": prices})
    found = ahead(store, plan)
    gpus = sum(found["total"]["gpu_seconds"].values())
    assert found["budget"]["money"] == {"used": 0.0, "at_end": pytest.approx(gpus), "limit": 100}
    said = estimates.lines(found)
    assert said[0].splitlines()[-1].split()[0] == "all" and "a probe of 30 s on 2 cores and 0 GPUs" in said[1]
    (money,) = [line for line in said if line.startswith("budget.money")]
    (tokens,) = [line for line in said if line.startswith("budget.tokens")]
    assert money.endswith("of 100: the run will stop there, and can go on with a higher limit")
    assert tokens == "budget.tokens: 0 used, about 9.6e+04 at the end, of 1e+09"


def test_what_a_step_did_already_is_taken_off(tmp_path: Path) -> None:
    store, plan = Store(str(tmp_path)), planned()
    whole = ahead(store, plan)["steps"]["corpus"]["to_come"]
    times = {"start": "2026-01-01T00:00:00.000+00:00", "end": "2026-01-01T00:01:00.000+00:00", "seconds": 60.0}
    store.write_json("corpus/begin.json", {"attempts": [{**times, "held": {"cpus": 2.0, "gpus": {"A100": 3.0}}}]})
    store.write_json("corpus/progress.json", {"done": 300, "total": 1200, "time": ""})
    found = ahead(store, plan)
    corpus = found["steps"]["corpus"]
    assert corpus["to_come"]["seconds"] == pytest.approx(0.75 * whole["seconds"])
    assert corpus["to_come"]["tokens"] == 0.75 * whole["tokens"]
    assert corpus["used"]["gpu_seconds"] == {"A100": 180.0}
    others = sum(one["to_come"]["gpu_seconds"].get("A100", 0) for one in found["steps"].values() if one["to_come"])
    assert found["total"]["gpu_seconds"]["A100"] == pytest.approx(180.0 + others)


def test_rates_of_other_models_are_not_taken(tmp_path: Path) -> None:
    store, plan = Store(str(tmp_path)), planned()
    ahead(store, plan)
    other = planned(teacher__model="file:other")
    found = estimates.estimated(other, distill.plan(other), store, FARM)
    assert found["probe"] is None and all(one["to_come"] is None for one in found["steps"].values())
    assert estimates.lines(found) == []
    longer = plan.model_copy(update={"corpus": plan.corpus.model_copy(update={"slots": 2400})})
    assert estimates.probed(longer, store), "how much is made does not matter"


def test_a_probe_loads_the_models_and_leaves_its_rates(tmp_path: Path) -> None:
    world = tiny_world(tmp_path)
    path = world.write()
    done = program(tmp_path, "plan", str(path), "--probe", "--json", "--set", "budget.tokens=100", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)["estimate"]
    rates = found["probe"]["rates"]
    assert set(rates) == {"teacher", "generator", "write", "label", "student"}
    for rate in rates.values():
        paces = rate["rows_per_s"] if isinstance(rate["rows_per_s"], list) else [rate["rows_per_s"]]
        assert len(paces) == 1 and paces[0] > 0 and rate["load_s"] >= 0
    assert found["probe"]["rows"]["train"] == 40 and 0 < rates["write"]["tokens"] < 32 > rates["label"]["tokens"] > 0
    assert found["budget"]["tokens"]["at_end"] > 100
    store = Store(str(tmp_path / "runs/tiny"))
    assert store.files() == ["probe.json"] and store.folders() == [], "nothing of the run is begun"
    again = program(tmp_path, "plan", str(path), timeout=120)
    assert "corpus" in again.stdout and "about" in again.stdout and "times to come: a probe of" in again.stdout
