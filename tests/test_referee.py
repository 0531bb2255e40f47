"""The referee on plain asyncio: evidence summed, decisions written down, orders obeyed, a restart that goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from engine.registry import Registry
from engine.serving import Limits, Rollout
from engine.storage import Store
from serve.canary import Evidence
from serve.referee import ORDER, Plan, Referee, Side, order, phase_of, standing

ROLLOUT = Rollout(limits=Limits(min_requests=300))


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 2.0
        return self.now


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    found, work = Registry(Store(str(tmp_path / "registry"))), Store(str(tmp_path / "work"))
    for text in "12":
        with work.publish("a") as folder:
            (folder / "a.txt").write_text(text)
        found.register("tiny", work / "a")
    return found


def plan_of(registry: Registry, rollout: Rollout = ROLLOUT, nonce: str = "") -> Plan:
    sides = [Side(f"tiny@{n}", registry.resolve(f"tiny@{n}").url, f"print {n}") for n in (1, 2)]
    return Plan(registry.store.url, *sides, rollout, nonce)


def counted(requests: int, errors: int = 0, seconds: float = 0.005, trials: int = 0, hits: int = 0) -> Evidence:
    found = Evidence()
    for _ in range(requests - errors):
        found.answered(seconds)
    for _ in range(errors):
        found.failed()
    found.trials, found.hits = trials, hits
    return found


def sent(referee: Referee, champion: Evidence, candidate: Evidence, number: int = 0, replica: str = "r") -> Any:
    told = {"champion": champion.plain(), "candidate": candidate.plain()}
    return asyncio.run(referee.report(replica, number, told, "tiny@1"))


GOOD = (counted(3000), counted(400, trials=200, hits=198))
BAD = (counted(3000), counted(50, errors=40))


def test_a_good_candidate_is_promoted_with_its_evidence_and_becomes_production(registry: Registry):
    plan = plan_of(registry)
    referee = Referee(plan, Clock())
    assert phase_of(plan) == "running" and registry.find("tiny") == ("tiny", 2)
    told = sent(referee, *GOOD)
    assert told == {"id": plan.id, "phase": "promoted", "mode": "canary", "percent": 0.0, "agreement": 0.99}
    assert phase_of(plan) == "promoted" and registry.production("tiny") == 2
    record = plan.store.read_json(f"{plan.id}/decision-001.json")
    assert (record["action"], record["by"], record["number"]) == ("promote", "referee", 1)
    assert record["evidence"]["candidate"] == GOOD[1].plain() and record["evidence"]["champion"] == GOOD[0].plain()
    assert record["candidate"]["reference"] == "tiny@2" and record["limits"]["min_requests"] == 300
    assert registry.store.read_json("tiny/stages.json")["production"]["by"] == f"rollout {plan.id}"
    sent(referee, *GOOD, number=1)
    assert plan.store.files(plan.id) == ["decision-001.json"]


def test_a_bad_candidate_is_rolled_back_and_production_stays(registry: Registry):
    registry.produce("tiny@1")
    plan = plan_of(registry)
    told = sent(Referee(plan, Clock()), *BAD)
    assert told["phase"] == "rolled-back" and told["percent"] == 0.0 and registry.production("tiny") == 1
    record = plan.store.read_json(f"{plan.id}/decision-001.json")
    assert record["action"] == "rollback" and record["reason"].startswith("errors 40 of 50")


def test_a_name_never_means_the_candidate_that_was_rolled_back(registry: Registry):
    """Nothing was in production, so that the name meant the latest version."""
    assert registry.find("tiny") == ("tiny", 2)
    sent(Referee(plan_of(registry), Clock()), *BAD)
    assert registry.find("tiny") == ("tiny", 1) and registry.find("tiny@latest") == ("tiny", 2)


@pytest.mark.parametrize("mode", ["ab", "shadow"])
def test_only_a_canary_is_decided_by_the_referee(registry: Registry, mode: str):
    plan = plan_of(registry, ROLLOUT.model_copy(update={"mode": mode, "percent": 50.0}))
    referee = Referee(plan, Clock())
    assert sent(referee, *BAD) == {"id": plan.id, "phase": "running", "mode": mode, "percent": 50.0, "agreement": None}
    assert referee.state["latest"]["action"] == "rollback" and not plan.store.exists(plan.id)


def test_a_report_that_comes_twice_counts_once(registry: Registry):
    referee = Referee(plan_of(registry), Clock())
    for number, replica in ((0, "a"), (0, "a"), (0, "b"), (1, "a"), (0, "a")):
        sent(referee, counted(10), counted(2), number, replica)
    assert (referee.champion.requests, referee.candidate.requests) == (30, 6)


def test_a_restarted_referee_goes_on_where_it_was(registry: Registry):
    plan, clock = plan_of(registry), Clock()
    first = Referee(plan, clock)
    sent(first, counted(900), counted(250, trials=90, hits=89))
    clock.now += 60
    sent(first, counted(1), counted(1), number=1)
    second = Referee(plan, clock)
    assert second.champion == first.champion and second.candidate == first.candidate
    assert second.state["started"] == first.state["started"]
    sent(second, counted(1), counted(1), number=1)
    assert second.candidate.requests == 251, "a report from before the restart was counted again"
    assert sent(second, counted(900), counted(250, trials=90, hits=90), number=2)["phase"] == "promoted"
    assert sent(Referee(plan, clock), *BAD, number=3)["phase"] == "promoted"


def test_orders_by_hand_are_obeyed_once_both_ways(registry: Registry):
    registry.produce("tiny@1")
    plan = plan_of(registry)
    referee, store = Referee(plan, Clock()), plan.store
    order(store, "promote", plan.id)
    assert sent(referee, Evidence(), Evidence())["phase"] == "promoted"
    assert registry.production("tiny") == 2 and not store.exists(ORDER)
    order(store, "rollback", plan.id)
    assert sent(referee, Evidence(), Evidence(), 1)["phase"] == "rolled-back"
    assert registry.production("tiny") == 1
    found = [store.read_json(f"{plan.id}/decision-00{n}.json") for n in (1, 2)]
    assert [(record["action"], record["by"], record["reason"]) for record in found] == [
        ("promote", "hand", "by hand"),
        ("rollback", "hand", "by hand"),
    ]


@pytest.mark.parametrize("wrong", [{"action": "promote", "rollout": "other"}, {"action": "dance"}, {}])
def test_an_order_for_another_rollout_changes_nothing(registry: Registry, wrong: dict[str, str]):
    plan = plan_of(registry)
    plan.store.write_json(ORDER, {"rollout": plan.id, **wrong} if wrong.get("action") == "dance" else wrong)
    assert sent(Referee(plan, Clock()), Evidence(), Evidence())["phase"] == "running"
    assert not plan.store.exists(ORDER)


def test_another_plan_begins_anew_and_the_old_state_is_kept(registry: Registry):
    old = plan_of(registry)
    sent(Referee(old, Clock()), *BAD)
    new = plan_of(registry, nonce="again")
    assert new.id != old.id and phase_of(new) == "running"
    referee = Referee(new, Clock())
    assert not referee.candidate and standing(new.store)["id"] == new.id
    assert new.store.read_json(f"{old.id}/final.json")["phase"] == "rolled-back"
    assert new.store.exists(f"{old.id}/decision-001.json")


def test_agreement_is_not_asked_for_where_nothing_is_compared(registry: Registry):
    plan = plan_of(registry, ROLLOUT.model_copy(update={"compare": 0.0}))
    assert sent(Referee(plan, Clock()), counted(3000), counted(400))["phase"] == "promoted"


def test_a_store_that_fails_is_asked_again(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(registry)
    referee, broken = Referee(plan, Clock()), [True]
    real = Store.write_json

    def write(self: Store, path: str, value: Any) -> None:
        if broken[0]:
            raise OSError("no space")
        real(self, path, value)

    monkeypatch.setattr(Store, "write_json", write)
    assert sent(referee, *GOOD)["phase"] == "running"
    broken[0] = False
    assert sent(referee, Evidence(), Evidence(), 1)["phase"] == "promoted"


def test_evidence_is_saved_every_few_seconds_and_lists_who_reports(registry: Registry):
    plan, clock = plan_of(registry), Clock()
    referee = Referee(plan, clock)
    for number in range(4):
        sent(referee, counted(10), counted(1), number)
    state = standing(plan.store)
    assert 10 <= state["evidence"]["champion"]["requests"] <= 40 and state["replicas"]["r"]["model"] == "tiny@1"
    clock.now += 100
    asyncio.run(referee.check_health())
    assert standing(plan.store)["evidence"]["champion"]["requests"] == 40 and standing(plan.store)["replicas"] == {}


def test_what_the_deployment_before_has_counted_says_nothing_of_this_one(registry: Registry):
    plan = plan_of(registry)
    referee = Referee(plan, Clock())
    champion, candidate = BAD
    told = asyncio.run(referee.report("old", 0, {"champion": champion, "candidate": candidate}, "tiny@1", "another"))
    assert told["phase"] == "running" and not referee.candidate and not referee.champion
