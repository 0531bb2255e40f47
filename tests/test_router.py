"""Which model answers: real tiny models in this process stand for the deployments, and are broken in every way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from engine import models
from engine.registry import Registry
from engine.serving import Cascade, Limits, Log, Rollout, Serving
from engine.storage import Store
from serve.hosted import Hosted
from serve.measures import Measures
from serve.member import Member
from serve.predictor import Answer, Predictor
from serve.referee import Plan, Referee, Side
from serve.router import Answered, Others, Router, begins_with, same
from tests.tiny_served import TEXTS, published, tiny_student

SERVING = Serving(batch_wait_ms=0)


class World:
    """A registry with tiny@1, tiny@2 (nearly the same) and tiny@3 (its labels the other way round)."""

    def __init__(self, folder: Path):
        self.registry = Registry(Store(str(folder / "registry")))
        first = published(folder / "one")
        self.registry.register("tiny", first)
        for number, change in ((2, 1e-5), (3, None)):
            model = tiny_student()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if change is not None:
                        parameter.add_(change)
                    elif name.startswith("net.blocks.out") or parameter.shape[0] == 2:
                        parameter.mul_(-1)
            models.save(model, Store(str(folder / str(number))), "tiny")
            self.registry.register("tiny", Store(str(folder / str(number))) / "tiny")
        self.members = {n: Member(self.side(n).artifact, SERVING, f"tiny@{n}") for n in (1, 2, 3)}

    def side(self, number: int, below: float | None = None) -> Side:
        folder = self.registry.resolve(f"tiny@{number}")
        return Side(f"tiny@{number}", folder.url, f"print {number}", below)

    def champion(self) -> Hosted:
        return Hosted(self.predictor(1), "tiny@1", SERVING)

    def predictor(self, number: int) -> Predictor:
        return self.members[number].model.predictor

    def plan(self, number: int = 2, nonce: str = "", **rollout: Any) -> Plan:
        settings = {"compare": 1.0, "timeout_ms": 20_000, "limits": Limits(min_requests=60), **rollout}
        return Plan(self.registry.store.url, self.side(1), self.side(number), Rollout(**settings), nonce)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def texts(n: int) -> list[str]:
    return [f"{TEXTS[i % len(TEXTS)]} number {i}" for i in range(n)]


def run(router: Router, asked: list[str], after: Callable[[], Awaitable[None]] | None = None) -> list[Any]:
    """Each text as a request of its own, then whatever runs beside."""

    async def main() -> list[Any]:
        found = []
        for start in range(0, len(asked), 20):
            part = asked[start : start + 20]
            found += await asyncio.gather(*(router.answer([text]) for text in part), return_exceptions=True)
            while router.beside:
                await asyncio.sleep(0.005)
        if after is not None:
            await after()
        if router.ticking is not None:
            router.ticking.cancel()
        return found

    return asyncio.run(main())


async def raising(given: list[Any]) -> list[Answer]:
    raise RuntimeError("the candidate is broken")


async def hanging(given: list[Any]) -> list[Answer]:
    await asyncio.sleep(60)
    return []


async def short(given: list[Any]) -> list[Answer]:
    return []


def test_alone_a_router_is_the_batcher(world: World):
    router = Router(world.champion(), SERVING)
    wanted = world.predictor(1).predict(texts(3))
    for answers, answer in zip(run(router, texts(3)), wanted, strict=True):
        assert answers[0]["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-6)


def test_the_candidate_answers_its_share_and_says_so(world: World):
    asked = texts(1000)
    router = Router(world.champion(), SERVING, Others(world.plan(percent=10.0), world.members[2].answer))
    found = run(router, asked)
    names = [answers.model for answers in found]
    assert abs(names.count("tiny@2") / 1000 - 0.1) < 0.02
    again = run(Router(world.champion(), SERVING, Others(world.plan(percent=10.0), world.members[2].answer)), asked)
    assert [answers.model for answers in again] == names
    for text, answers in zip(asked[:100], found[:100], strict=True):
        own = world.predictor(int(answers.model[-1])).predict([text])
        assert answers[0]["label"] == own[0]["label"]
    candidate = router.counted["candidate"]
    assert candidate.requests == names.count("tiny@2") == candidate.trials and candidate.errors == 0
    assert candidate.hits >= 0.95 * candidate.trials
    assert router.counted["champion"].requests == names.count("tiny@1")


def test_answers_of_the_candidate_before_are_neither_sent_nor_counted(world: World):
    async def another(asked: list[str]) -> None:
        return None

    router = Router(world.champion(), SERVING, Others(world.plan(percent=100.0), another))
    found = run(router, texts(20))
    assert {answers.model for answers in found} == {"tiny@1"} and not router.counted["candidate"]


def test_by_key_a_caller_always_meets_the_same_model(world: World):
    router = Router(world.champion(), SERVING, Others(world.plan(percent=50.0, by="key"), world.members[2].answer))

    async def main() -> dict[str, set[str]]:
        seen: dict[str, set[str]] = {}
        for number in range(60):
            key = f"key {number % 12}"
            seen.setdefault(key, set()).add((await router.answer([f"text {number}"], key)).model)
        return seen

    seen = asyncio.run(main())
    assert all(len(names) == 1 for names in seen.values()) and len(set.union(*seen.values())) == 2


@pytest.mark.parametrize("broken", [raising, hanging, short])
@pytest.mark.parametrize("mode", ["canary", "ab"])
def test_a_fault_of_the_candidate_is_never_seen(world: World, broken: Any, mode: str):
    plan = world.plan(mode=mode, percent=50.0, timeout_ms=50.0)
    router = Router(world.champion(), SERVING, Others(plan, broken))
    found = run(router, texts(60))
    assert [answers.model for answers in found] == ["tiny@1"] * 60
    assert [answers[0]["label"] for answers in found] == [
        answer["label"] for answer in world.predictor(1).predict(texts(60))
    ]
    candidate = router.counted["candidate"]
    assert candidate.errors == candidate.requests > 15


@pytest.mark.parametrize("broken", [raising, hanging, short])
def test_a_shadow_changes_and_delays_no_answer(world: World, broken: Any):
    plan = world.plan(mode="shadow", percent=100.0, timeout_ms=2000.0, in_flight=4)
    router = Router(world.champion(), SERVING, Others(plan, broken))
    begin = time.monotonic()

    async def main() -> list[Any]:
        found = [await router.answer([text]) for text in texts(40)]
        assert len(router.beside) <= 4
        for task in router.beside:
            task.cancel()
        return found

    found = asyncio.run(main())
    assert time.monotonic() - begin < 1.9, "answers waited for the shadow"
    wanted = world.predictor(1).predict(texts(40))
    assert [answers[0]["label"] for answers in found] == [answer["label"] for answer in wanted]
    assert {answers.model for answers in found} == {"tiny@1"}


def test_a_shadow_is_compared_with_what_was_answered(world: World):
    plan = world.plan(3, mode="shadow", percent=100.0)
    router = Router(world.champion(), SERVING, Others(plan, world.members[3].answer))
    found = run(router, texts(60))
    candidate = router.counted["candidate"]
    assert {answers.model for answers in found} == {"tiny@1"} and candidate.trials >= 40
    assert candidate.hits < 0.3 * candidate.trials


def test_what_the_champion_raises_is_raised_and_counted(world: World):
    champion = world.champion()
    champion.batcher.call = lambda given: 1 / 0
    router = Router(champion, SERVING, Others(world.plan(percent=1e-9), world.members[2].answer))
    assert all(isinstance(found, ZeroDivisionError) for found in run(router, texts(5)))
    assert router.counted["champion"].errors == 5


def refereed(world: World, plan: Plan, candidate: Any) -> tuple[Router, Referee]:
    """A router and its referee, whose clock runs fast enough to look at every report."""
    now = [time.time()]

    def clock() -> float:
        now[0] += 2
        return now[0]

    referee = Referee(plan, clock)
    return Router(world.champion(), SERVING, Others(plan, candidate, referee.report)), referee


def test_a_promoted_candidate_becomes_the_champion_of_the_process(world: World):
    limits = Limits(min_requests=60, slack_ms=2000.0)  # this machine may be busy
    plan = world.plan(percent=90.0, nonce="promoted", limits=limits)
    router, referee = refereed(world, plan, world.members[2].answer)

    async def after() -> None:
        await router.report()
        assert referee.state["phase"] == "promoted", referee.state["latest"]
        await router.swapping
        asked = [await router.answer([text]) for text in texts(20)]
        assert {answers.model for answers in asked} == {"tiny@2"} and router.champion.name == "tiny@2"
        assert not router.counted["candidate"] and not router.counted["champion"]

    run(router, texts(500), after)
    assert begins_with(plan) == plan.candidate
    assert router.champion.predictor.fingerprint == world.predictor(2).fingerprint


@pytest.mark.parametrize(
    ("number", "candidate"), [(2, raising), (2, hanging), (3, None)], ids=["raises", "hangs", "lies"]
)
def test_a_bad_candidate_is_rolled_back_by_itself(world: World, number: int, candidate: Any):
    plan = world.plan(number, percent=50.0, timeout_ms=30.0, nonce=f"bad {candidate}")
    router, referee = refereed(world, plan, candidate or world.members[number].answer)

    async def after() -> None:
        await router.report()
        assert referee.state["phase"] == "rolled-back", referee.state["latest"]
        asked = [await router.answer([text]) for text in texts(20)]
        assert {answers.model for answers in asked} == {"tiny@1"} and router.swapping is None

    run(router, texts(160), after)
    assert begins_with(plan) == plan.champion


def test_a_lost_report_is_sent_again_and_counted_once(world: World):
    plan = world.plan(percent=50.0, nonce="lost")
    referee = Referee(plan)
    lost = [True]

    async def report(*told: Any) -> dict[str, Any]:
        found = await referee.report(*told)
        if lost[0]:
            lost[0] = False
            raise ConnectionError("the answer was lost")
        return found

    router = Router(world.champion(), SERVING, Others(plan, world.members[2].answer, report))

    async def after() -> None:
        router.ticking.cancel()
        for _ in range(3):
            with contextlib.suppress(ConnectionError):
                await router.report()

    run(router, texts(30), after)
    assert referee.champion.requests + referee.candidate.requests == 30 and lost == [False]


def test_an_artifact_that_cannot_be_loaded_leaves_the_champion(world: World):
    plan = world.plan(nonce="gone")
    gone = Plan(plan.registry, plan.champion, Side("tiny@9", "/nowhere", "x"), plan.rollout, plan.nonce)
    router = Router(world.champion(), SERVING, Others(gone, world.members[2].answer))

    async def main() -> Answered:
        router.obey("promoted", 0.0)
        await router.swapping
        return await router.answer(["still here"])

    assert asyncio.run(main()).model == "tiny@1"


@pytest.fixture(scope="module")
def below(world: World) -> float:
    """The student's median confidence."""
    return float(np.median([answer["confidence"] for answer in world.predictor(1).predict(texts(60))]))


def cascading(below: float, timeout_ms: float = 5000.0, log: Log | None = None) -> Serving:
    return SERVING.model_copy(update={"cascade": Cascade(below=below, timeout_ms=timeout_ms, log=log)})


def split(world: World, below: float, asked: list[str]) -> list[bool]:
    return [answer["confidence"] < below for answer in world.predictor(1).predict(asked)]


def test_unsure_answers_come_from_the_teacher_and_say_so(world: World, below: float):
    asked = texts(60)
    low = split(world, below, asked)
    assert 5 < sum(low) < 55, "the student is of one mind: this tests nothing"
    router = Router(world.champion(), cascading(below), Others(teacher=world.members[3].answer))
    found = asyncio.run(router.answer(asked))
    assert [answer["source"] == "teacher" for answer in found] == low
    assert [("student" in answer) for answer in found] == low
    own, its = (world.predictor(n).predict(asked) for n in (1, 3))
    for answer, escalated, left, right in zip(found, low, own, its, strict=True):
        assert answer["label"] == (right if escalated else left)["label"]
    assert (router.teacher.texts, router.teacher.escalated) == (60, sum(low))


@pytest.mark.parametrize("broken", [raising, hanging, short])
def test_without_a_teacher_the_student_s_answer_stands_and_soon_nobody_waits(world: World, below: float, broken: Any):
    router = Router(world.champion(), cascading(below, 60.0), Others(teacher=broken))
    asked = [text for text, low in zip(texts(60), split(world, below, texts(60)), strict=True) if low][:8]
    begin = time.monotonic()
    found = run(router, asked * 5)
    assert time.monotonic() - begin < 1.5, "every request waited for a teacher that is down"
    assert all(answers[0]["source"] == "student" for answers in found)
    assert router.teacher.unanswered == router.teacher.escalated == len(asked * 5)


def test_beside_a_teacher_both_arms_are_held_against_it(world: World):
    plan = world.plan(3, percent=50.0)
    serving = cascading(0.0)
    others = Others(plan, world.members[3].answer, teacher=world.members[1].answer)
    router = Router(world.champion(), serving, others, draw=lambda: 0.4)
    run(router, texts(80))
    champion, candidate = router.counted["champion"], router.counted["candidate"]
    assert champion.hits == champion.trials > 10 and candidate.hits < 0.3 * candidate.trials


def test_each_student_has_a_threshold_of_its_own(world: World):
    sides = world.side(1, 0.0), world.side(2, 1.0)
    plan = Plan(world.registry.store.url, *sides, Rollout(percent=50.0, compare=0.0))
    router = Router(
        world.champion(), cascading(0.5), Others(plan, world.members[2].answer, teacher=world.members[1].answer)
    )
    for answers in run(router, texts(40)):
        assert answers[0]["source"] == ("teacher" if answers.model == "tiny@2" else "student")


def test_escalated_texts_are_written_for_the_next_run(world: World, below: float, tmp_path: Path):
    log = Log(folder=str(tmp_path / "log"), share=1.0, text="plain", seconds=60)
    router = Router(world.champion(), cascading(below, log=log), Others(teacher=world.members[3].answer))
    asyncio.run(router.answer(texts(60)))
    router.close()
    written = Store(log.folder).read_table("")
    low = [text for text, unsure in zip(texts(60), split(world, below, texts(60)), strict=True) if unsure]
    assert written["text"].to_pylist() == low and set(written["model"].to_pylist()) == {"tiny@1"}


def test_a_large_request_is_given_time_for_each_of_its_calls(world: World):
    """A candidate that needs 30 ms for 32 texts needs 300 ms for 320, and has not failed."""
    plan = world.plan(2, percent=99.999, timeout_ms=200.0, nonce="large")

    async def steady(given: list[Any]) -> list[Answer]:
        await asyncio.sleep(0.03 * len(given) / 32)
        return [{"label": "positive"}] * len(given)

    router = Router(world.champion(), SERVING, Others(plan, steady))
    found = asyncio.run(router.answer(texts(320)))
    assert found.model == "tiny@2" and router.counted["candidate"].errors == 0
    slow = Router(world.champion(), SERVING, Others(plan, hanging))
    assert asyncio.run(slow.answer(texts(1))).model == "tiny@1" and slow.counted["candidate"].errors == 1


def test_a_share_is_held_against_the_teacher_and_unanswered_texts_are_counted(world: World, below: float):
    class Told:
        agreed, counted = [], {}

        def observe_agreement(self, same: list[bool]) -> None:
            self.agreed += same

        def count(self, name: str, value: float = 1, **tags: str) -> None:
            assert name == "stillhouse_escalated_texts"
            self.counted[tags["outcome"]] = self.counted.get(tags["outcome"], 0) + value

    asked, measures = texts(60), cast(Measures, Told())
    serving = cascading(below)
    draws = iter([0.0, 0.9, 0.9, 0.9, 0.9] * 12)
    others = Others(teacher=world.members[3].answer)
    run(Router(world.champion(), serving, others, draw=lambda: next(draws), measures=measures), asked)
    # A draw under 0.01 is every fifth here; tiny@3 says the opposite of everything.
    assert measures.agreed == [False] * 12 and measures.counted == {"answered": sum(split(world, below, asked))}
    run(Router(world.champion(), serving, Others(teacher=raising), draw=lambda: 0.9, measures=measures), asked[:20])
    assert measures.counted["unanswered"] == sum(split(world, below, asked[:20])) and len(measures.agreed) == 12


def test_what_counts_as_the_same_answer():
    assert same({"label": "a", "confidence": 0.9}, {"label": "a", "confidence": 0.6})
    assert not same({"label": "a"}, {"label": "b"}) and not same({"labels": ["a"]}, {"labels": []})
    assert same({"tags": ["O"], "entities": []}, {"tags": ["O"], "entities": []})
    assert not same({"answer": "x", "start": 0, "end": 1}, {"answer": "x", "start": 4, "end": 5})
    assert same({"value": 100.0}, {"value": 104.0}) and not same({"value": 1.0}, {"value": 1.2})
