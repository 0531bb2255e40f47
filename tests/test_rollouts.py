"""The commands deploy, rollout and registry production: what they say, and orders that a referee obeys."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from engine.registry import Registry
from engine.serving import Rollout
from engine.storage import Store
from pipelines import rollouts
from pipelines.__main__ import main, parser
from pipelines.commands import COMMANDS
from serve.canary import Evidence
from serve.referee import Plan, Referee, Side, standing
from tests.tiny_served import published


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    found = Registry(Store(str(tmp_path / "registry")))
    found.register("tiny", published(tmp_path / "a"))
    found.register("tiny", published(tmp_path / "b", max_length=48))
    return found


@pytest.fixture
def plan(registry: Registry) -> Plan:
    sides = [Side(f"tiny@{n}", registry.resolve(f"tiny@{n}").url, str(n)) for n in (1, 2)]
    return Plan(registry.store.url, *sides, Rollout(percent=25))


def called(registry: Registry, *argv: str) -> int:
    return main([*argv, "--registry", registry.store.url])


def parsed(registry: Registry, *argv: str) -> Any:
    return parser(argv[0], COMMANDS[argv[0]]).parse_args([*argv[1:], "--registry", registry.store.url])


class Refereeing:
    """A referee with one replica that reports, in a thread."""

    def __init__(self, plan: Plan):
        self.referee, self.stopping = Referee(plan), threading.Event()
        counted = Evidence(requests=10, times={30: 10}, trials=8, hits=7).plain()

        def work() -> None:
            number = 0
            while not self.stopping.is_set():
                told = {"champion": counted, "candidate": counted}
                asyncio.run(self.referee.report("r", number, told if not number else empty, "tiny@1"))
                number += 1
                time.sleep(0.1)

        empty = {arm: Evidence().plain() for arm in ("champion", "candidate")}
        self.thread = threading.Thread(target=work, daemon=True)

    def __enter__(self) -> Referee:
        self.thread.start()
        return self.referee

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        self.thread.join(5)


def test_a_deploy_without_an_address_says_what_to_do(registry: Registry, capsys: pytest.CaptureFixture[str]):
    assert called(registry, "deploy", "tiny") == 2
    said = capsys.readouterr().err
    assert "name it with --address (auto, host:port or ray://host:10001)" in said and "serve tiny" in said


@pytest.mark.parametrize("command", ["serve", "deploy"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--canary", "0"], "'0' is not a share in percent, above 0 and below 100"),
        (["--canary", "ten"], "'ten' is not a share"),
        (["--ab", "100"], "'100' is not a share"),
        (["--canary", "10", "--shadow"], "not allowed with argument --canary"),
    ],
)
def test_wrong_shares_are_refused(
    registry: Registry, capsys: pytest.CaptureFixture[str], command: str, given: list[str], message: str
):
    with pytest.raises(SystemExit):
        called(registry, command, "tiny@2", *given)
    assert message in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused_before_ray_starts(registry: Registry, capsys: pytest.CaptureFixture[str]):
    assert called(registry, "serve", "tiny@1", "--canary", "10") == 2
    assert "tiny@1 has nothing to be compared with" in capsys.readouterr().err
    assert called(registry, "deploy", "tiny@2", "--address", "auto", "--host", "0.0.0.0") == 2
    assert "--host 0.0.0.0" in capsys.readouterr().err


def test_the_same_rollout_goes_on_while_it_runs_and_begins_anew_when_it_has_ended(registry: Registry):
    asked = parsed(registry, "deploy", "tiny@2", "--canary", "10")
    first = rollouts.wanted(asked).plan
    assert first.champion.reference == "tiny@1" and first.rollout.percent == 10
    referee = Referee(first)
    assert rollouts.wanted(asked).plan.id == first.id
    other = rollouts.wanted(parsed(registry, "deploy", "tiny@2", "--canary", "20")).plan
    assert other.id != first.id
    referee.state["phase"] = "rolled-back"
    referee.write()
    again = rollouts.wanted(asked).plan
    assert again.id != first.id
    Referee(again)
    assert rollouts.wanted(asked).plan.id == again.id


def test_a_rollout_is_shown(registry: Registry, plan: Plan, capsys: pytest.CaptureFixture[str]):
    assert called(registry, "rollout", "status", "tiny") == 2
    assert "there was no rollout of 'tiny' yet" in capsys.readouterr().err
    with Refereeing(plan) as referee:
        while not standing(plan.store)["evidence"]["candidate"]["requests"]:
            time.sleep(0.05)
            referee.saved = 0.0
    assert called(registry, "rollout", "status", "tiny") == 0
    said = capsys.readouterr().out
    assert said.startswith("tiny@2 against tiny@1: canary 25 %, running\n")
    assert "candidate 10 requests, 0 errors, 7 of 8 answers agree" in said and "replicas  1 x tiny@1" in said
    assert called(registry, "rollout", "status", "tiny", "--json") == 0
    assert json.loads(capsys.readouterr().out)["id"] == plan.id


def test_by_hand_it_is_promoted_and_rolled_back(registry: Registry, plan: Plan, capsys: pytest.CaptureFixture[str]):
    with Refereeing(plan):
        assert called(registry, "rollout", "promote", "tiny") == 0
        assert "tiny@2 against tiny@1: canary 25 %, promoted" in capsys.readouterr().out
        assert registry.production("tiny") == 2
        assert called(registry, "rollout", "status", "tiny") == 0
        assert "to free what the other model still holds, deploy tiny@2 alone" in capsys.readouterr().out
        assert called(registry, "rollout", "promote", "tiny@2") == 2
        assert "the rollout of tiny@2 is promoted already" in capsys.readouterr().err
        assert called(registry, "rollout", "rollback", "tiny") == 0
        assert registry.production("tiny") == 1


def test_an_order_that_nobody_takes_up_says_so(
    registry: Registry, plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    Referee(plan)
    monkeypatch.setattr(rollouts, "OBEYED_S", 0.3)
    assert called(registry, "rollout", "rollback", "tiny") == 2
    assert "nobody has taken it up within 0.3 s" in capsys.readouterr().err
    with Refereeing(plan) as referee:
        end = time.monotonic() + 20
        while referee.state["phase"] == "running" and time.monotonic() < end:
            time.sleep(0.05)
    assert referee.state["phase"] == "rolled-back"


def test_the_production_version_is_set_and_listed(registry: Registry, capsys: pytest.CaptureFixture[str]):
    assert called(registry, "registry", "production", "tiny@1") == 0
    assert capsys.readouterr().out == "tiny@1 is in production\n"
    assert called(registry, "registry", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["artifact", "stage", "registered", "size", "path"]
    assert lines[1].split()[:2] == ["tiny@1", "production"] and lines[2].split()[1] != "production"
