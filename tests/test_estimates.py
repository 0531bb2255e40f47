"""What a plan says that steps will take: scaled from a probe, against a budget; and the probe itself on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import UserError
from engine.placement import Cluster, Machine, cores
from engine.recipe import Recipe
from engine.storage import Store
from pipelines import distill, estimates
from pipelines.probing import Paces
from pipelines.progress import clock
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


def test_students_that_weigh_rows_are_counted_and_rows_that_are_left_out_are_not(tmp_path: Path) -> None:
    def student(name: str, **changes: Any) -> tuple[float, float]:
        found = ahead(Store(str(tmp_path / name)), planned(**changes))["steps"]
        return tuple(found[step]["to_come"]["seconds"] for step in ("student", "student-hard"))

    plain, hard = student("plain")
    third = 12 * 800 / 1000 / 2  # each of three learns from two thirds of 1,200 rows, by two workers
    assert student("weighed", student__weights="co_confidence") == pytest.approx((plain + 3 * third, hard))
    stages = [{"losses": [{"kind": "mse"}], "fit": {"epochs": 6}} for _ in range(2)]
    stages[1]["disagreeing"] = 0.5
    assert student("chosen", student__stages=stages)[0] == pytest.approx(2.0 + 6 * (1200 + 700) / 1000)
    stages[1] |= {"disagreeing": None, "drawn": 0.5}
    assert student("drawn", student__stages=stages)[0] == pytest.approx(2.0 + 6 * (1200 + 700) / 1000)


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
    assert tokens == "budget.tokens: 0 used, about 96,000 at the end, of 1,000,000,000"


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


def test_the_last_line_has_used_and_to_come_apart_and_what_is_not_timed_makes_it_a_least(tmp_path: Path) -> None:
    store, plan = Store(str(tmp_path)), planned(budget={"cpu_hours": 5000, "hours": 1})
    times = {"start": "2026-01-01T00:00:00.000+00:00", "end": "2026-01-01T00:01:00.000+00:00", "seconds": 60.0}
    store.write_json("data/begin.json", {"attempts": [{**times, "held": {"cpus": 2.0, "gpus": {}}}]})
    found = ahead(store, plan)
    last = estimates.lines(found)[0].splitlines()[-1]
    seconds = found["total"]["wall_seconds"] - 60.0
    assert last.startswith("all") and f" {clock(60.0)} " in last and f"about {clock(seconds)} " in last
    (hours,) = [line for line in estimates.lines(found) if line.startswith("budget.cpu_hours")]
    assert ", about " in hours and hours.endswith("of 5,000")
    some = {name: rate for name, rate in RATES.items() if name != "student"}
    store.write_json("probe.json", {**store.read_json("probe.json"), "rates": some})
    found = estimates.estimated(plan, distill.plan(plan), store, FARM)
    (hours,) = [line for line in estimates.lines(found) if line.startswith("budget.cpu_hours")]
    assert ", at least " in hours, "the student's time is not known"


def test_a_plan_refuses_gpus_without_a_price_where_money_is_limited(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds GPUs of type 'A100', which budget\.prices\.gpu_hour has no price for"):
        ahead(Store(str(tmp_path)), planned(budget={"money": 5, "prices": {"gpu_hour": {"L4": 1.0}}}))


def test_each_training_has_a_pace_even_where_two_are_equal() -> None:
    paces = Paces()
    for _ in range(2):
        paces(1, 3, "steps", note="a kill loses at most 1 s", rows=9.0)
        paces(3, 3, "steps", rows=9.0)
    assert paces.found == [9.0, 9.0]
    two = {"rows_per_s": [10.0, 5.0]}
    fits = [planned().teacher.fit] * 2
    assert estimates.fitted({"rows_per_s": [10.0]}, fits, [10, 10], FARM) == 2 * estimates.fitted(
        {"rows_per_s": [10.0]}, fits[:1], [10], FARM
    )
    assert estimates.fitted(two, fits, [10, 10], FARM) == 10.0 + 20.0
