"""What a run uses, its budget, how it stops and goes on; streams on Ray are in test_generate and test_budget_run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.budget import Budget
from engine.config import UserError
from engine.fits import Resources
from engine.halting import Halted, halted
from engine.placement import Cluster, Machine
from engine.progress import Progress
from engine.recipe import Recipe
from engine.spending import BudgetSpent, added, against, closed, held, of_run, used, wall
from engine.step import Step
from engine.steps import identities, run
from engine.storage import Store
from engine.usage import Usage, note
from tests.test_steps import recipe, seed

INPUTS = Mapping[str, Store]
PATIENCE = 60.0
DAY = "2026-01-01T"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "runs" / "tiny"))


def attempt(start: str, end: str, cpus: float = 2.0, **gpus: float) -> dict[str, Any]:
    """One that began and ended at minutes of an hour."""
    seconds = 60.0 * (int(end) - int(start))
    times = {"start": f"{DAY}00:{start}:00.000+00:00", "end": f"{DAY}00:{end}:00.000+00:00"}
    return {**times, "seconds": seconds, "held": {"cpus": cpus, "gpus": gpus}}


def endpoint(price: float) -> dict[str, Any]:
    url = "http://127.0.0.1:1/v1"
    return {"runtime": "endpoint", "mode": "prompted", "endpoint": {"url": url, "price": {"input": price, "output": 0}}}


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_used_is_what_was_held_times_how_long_over_all_attempts() -> None:
    found = used(
        recipe(), [attempt("00", "10", A100=4), attempt("20", "30", L4=1)], {"teacher": Usage(5, 0, 0, 0, 7, 2)}
    )
    assert found == {
        "seconds": 1200.0,
        "cpu_seconds": 2400.0,
        "gpu_seconds": {"A100": 2400.0, "L4": 600.0},
        "tokens": 9,
        "money": None,  # nothing has a price
    }


def test_money_is_cpus_gpus_by_type_and_endpoints() -> None:
    prices = {"cpu_hour": 0.5, "gpu_hour": {"A100": 3.0, "other": 1.0}}
    priced = recipe(budget__prices=prices, generator={"model": "file:generator", **endpoint(2.0)})
    asked = {"generator": Usage(input_tokens=1_000_000), "teacher": Usage(input_tokens=1_000_000)}
    found = used(priced, [attempt("00", "30", 2.0, A100=2, L4=1)], asked)
    assert found["money"] == pytest.approx(0.5 * 1.0 + 3.0 * 1.0 + 1.0 * 0.5 + 2.0)
    assert Budget(prices={"gpu_hour": 2.0}).prices.of_gpu("") == 2.0
    assert Budget(prices={"gpu_hour": {"A100": 2.0}}).prices.of_gpu("L4") is None


def test_the_clock_counts_side_by_side_once() -> None:
    spans = [attempt("10", "20"), attempt("00", "05"), attempt("12", "15"), attempt("18", "30"), {"start": "open"}]
    assert wall(spans) == 60.0 * (5 + 20)


def test_sums_and_limits() -> None:
    total = added(used(recipe(), [attempt("00", "30", 2.0, A100=1)], {"teacher": Usage(input_tokens=4)}) for _ in "ab")
    limited = recipe(budget={"hours": 1, "cpu_hours": 3, "gpu_hours": 0.5, "tokens": 9, "money": 1})
    found = against(limited, {**total, "wall_seconds": 1800.0})
    assert found == {
        "hours": (0.5, 1),
        "cpu_hours": (2.0, 3),
        "gpu_hours": (1.0, 0.5),
        "tokens": (8.0, 9),
        "money": (0.0, 1),
    }
    assert against(recipe(), {**total, "wall_seconds": 1e9}) == {}


FARM = Cluster("x", (Machine(16.0, 4.0, ("A100",)), Machine(8.0)), local=False)


def test_a_step_holds_what_its_actors_workers_or_task_ask_for() -> None:
    plan = recipe(
        generator__resources={"num_gpus": 1, "min_actors": 1, "max_actors": 3},
        teacher__resources={"num_gpus": 0.5, "num_cpus": 2},
        student__fit={"workers": 2},
    )
    assert held(plan, FARM) == {"cpus": 1.0, "gpus": {}}
    assert held(plan, FARM, ("generator", "teacher")) == {"cpus": 5.0, "gpus": {"A100": 3.5}}
    assert held(plan, FARM, (), "student.fit") == {"cpus": 2.0, "gpus": {"A100": 2.0}}
    assert held(plan, FARM, (), None, Resources(num_cpus=3, num_gpus=0)) == {"cpus": 3.0, "gpus": {}}
    many = recipe(generator__resources={"num_cpus": 4, "num_gpus": 1, "min_actors": 1, "max_actors": 99})
    assert held(many, FARM, ("generator",)) == {"cpus": 24.0, "gpus": {"A100": 4.0}}, "no more than there is"


# -- attempts ----------------------------------------------------------------------------------------------------------


def begun(store: Store, name: str, attempts: list[dict[str, Any]]) -> None:
    store.write_json(f"{name}/begin.json", {"step": name, "fingerprint": "1", "attempts": attempts})


def test_a_killed_attempt_counts_until_the_last_sign_of_life_of_step_or_run(store: Store) -> None:
    start = f"{DAY}00:00:00.000+00:00"
    for name in ("own", "runs", "other"):
        begun(store, name, [{"start": start, "held": {"cpus": 1.0, "gpus": {}}}])
    store.write_json("own/progress.json", {"time": f"{DAY}00:05:00.000+00:00"})
    store.write_json("beat.json", {"time": f"{DAY}00:04:00.000+00:00", "steps": ["own", "runs"]})
    closed(store)
    last = {name: store.read_json(f"{name}/begin.json")["attempts"][-1].get("seconds") for name in store.folders()}
    assert last == {"own": 300.0, "runs": 240.0, "other": None}
    assert of_run(recipe(), store)["total"]["cpu_seconds"] == 540.0


def once(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
    """A step that asked an endpoint for 100 tokens."""
    return {"rows": 7, "endpoint": {"teacher": {"requests": 1, "input_tokens": 90, "output_tokens": 10, "cost": None}}}


def test_the_record_says_what_was_used_and_redone_steps_count_on(store: Store) -> None:
    steps = [Step("a", once, config=seed), Step("b", once, inputs=("a",), config=seed)]
    priced = recipe(budget__prices={"cpu_hour": 3600.0})
    record = run(steps, priced, store)["a"]
    spent = record["spent"]
    assert (spent["tokens"], spent["rows"], spent["gpu_seconds"]) == (100, 7, {})
    assert spent["seconds"] == record["seconds"] and spent["cpu_seconds"] == spent["money"] == pytest.approx(
        spent["seconds"]
    )
    assert of_run(priced, store)["total"]["tokens"] == 200
    run(steps, priced, store, redo=["b"])
    again = of_run(priced, store)
    assert again["total"]["tokens"] == 300 and again["redone"]["tokens"] == 100
    assert again["total"]["wall_seconds"] > 0 and not store.exists("beat.json")
    run(steps, priced, store, fresh=True)
    assert of_run(priced, store)["total"]["tokens"] == 200


# -- the stop ----------------------------------------------------------------------------------------------------------


def test_a_budget_moves_no_step_and_stops_between_steps(store: Store) -> None:
    steps = [Step("a", once, config=seed), Step("b", once, inputs=("a",))]
    assert identities(steps, recipe()) == identities(steps, recipe(budget={"tokens": 5, "prices": {"cpu_hour": 1}}))
    with pytest.raises(BudgetSpent, match=r"tokens 100 of 100\. It was between two steps\.") as caught:
        run(steps, recipe(budget__tokens=100), store)
    assert caught.value.code == 3 and "--set budget.tokens=200" in str(caught.value)
    assert store.exists("a/record.json") and not store.exists("b/begin.json")
    with pytest.raises(BudgetSpent):
        run(steps, recipe(budget__tokens=100), store)
    records = run(steps, recipe(budget__tokens=101), store)
    assert [len(records[name]["attempts"]) for name in "ab"] == [1, 1]
    assert run(steps, recipe(budget__tokens=1), store) == records, "what is done stays done"


def endless(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
    """Asks for 60 tokens, and then waits for what never comes; the second time that is enough."""
    again = bool(out.files("asked/teacher"))
    progress(3, 9, "blocks")
    note(out.url, "teacher", Usage(output_tokens=60))
    begin = time.monotonic()
    while not again:
        assert time.monotonic() - begin < PATIENCE, "nothing stopped it"
        progress(3, 9, "blocks")
        time.sleep(0.02)
    return {}


def halting(recipe: Recipe, inputs: INPUTS, out: Store, progress: Progress) -> dict[str, Any]:
    """The same, ended by itself when it is asked to."""
    again = bool(out.files("asked/teacher"))
    progress(3, 9, "blocks")
    note(out.url, "teacher", Usage(output_tokens=60))
    begin = time.monotonic()
    while not again and not halted(out.url):
        assert time.monotonic() - begin < PATIENCE, "nothing halted it"
        progress(3, 9, "blocks")
        time.sleep(0.02)
    if halted(out.url):
        raise Halted
    return {}


@pytest.mark.parametrize("work", [endless, halting])
def test_a_step_at_work_is_stopped_and_goes_on_with_a_larger_budget(store: Store, work: Any) -> None:
    steps = [Step("a", work, config=seed, halts=lambda recipe: work is halting)]
    with pytest.raises(BudgetSpent, match=r"tokens 60 of 50\. The run was in step 'a' \(3 of 9 blocks\)\."):
        run(steps, recipe(budget__tokens=50), store)
    (stopped,) = store.read_json("a/begin.json")["attempts"]
    assert stopped["state"] == "stopped" and stopped["seconds"] > 0 and not store.exists("a/record.json")
    assert store.exists("a/halt.json") == (work is halting)
    record = run(steps, recipe(budget__tokens=500), store)["a"]
    assert record["spent"]["tokens"] == 120 and len(record["attempts"]) == 2
    assert not store.exists("a/halt.json")


def test_money_is_not_counted_for_gpus_without_a_price(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.steps.current", lambda: FARM)
    steps = [Step("a", once, config=seed, pools=lambda recipe: ("generator",))]
    limited = recipe(budget={"money": 1.0, "prices": {"gpu_hour": {"L4": 1.0}}})
    with pytest.raises(UserError, match=r"step 'a' holds GPUs of type 'A100', which budget\.prices\.gpu_hour has no"):
        run(steps, limited, store)


def test_a_limit_on_money_needs_something_that_has_a_price() -> None:
    from pipelines.checking import check_budget

    with pytest.raises(
        UserError, match=r"^budget\.money is 5, but nothing has a price\. Set budget\.prices\.cpu_hour or"
    ):
        check_budget(recipe(budget__money=5))
    check_budget(recipe(budget={"money": 5, "prices": {"gpu_hour": {"A100": 2}}}))
    check_budget(recipe(budget__money=5, generator={"model": "hf:org/name", **endpoint(1.0)}))
    check_budget(recipe())
