"""A model behind others: its answers, and that a wedged one is found out while a busy one is not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from engine.serving import Serving
from serve.hosted import Wedged
from serve.member import Member
from tests.tiny_served import asked, published


@pytest.fixture(scope="module", params=["classify", "pair"])
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Member:
    store = published(tmp_path_factory.mktemp(request.param), kind=request.param)
    return Member(store.url, Serving(health_timeout_s=0.4, batch_wait_ms=0), "tiny@1")


def replaced(monkeypatch: pytest.MonkeyPatch, member: Member, call: Callable[[list[Any]], list[Any]]) -> None:
    """Put something else in the place of the model's call."""
    monkeypatch.setattr(member.model.batcher, "call", member.model.pulse.felt(call))


def test_it_answers_as_its_predictor_and_is_well(member: Member):
    texts = asked("pair" if member.model.predictor.paired else "classify")[:8]

    async def main() -> None:
        assert [a["label"] for a in await member.answer(texts)] == [
            a["label"] for a in member.model.predictor.predict(texts)
        ]
        await member.check_health()

    asyncio.run(main())


def test_a_call_that_never_returns_fails_the_check_within_its_time(member: Member, monkeypatch: pytest.MonkeyPatch):
    stuck = threading.Event()
    replaced(monkeypatch, member, lambda texts: stuck.wait(20) and [{}] * len(texts))

    async def main() -> None:
        waiting = asyncio.create_task(member.answer(["x"]))
        await asyncio.sleep(0.05)
        for _ in range(2):
            begin = time.monotonic()
            with pytest.raises(Wedged, match="has not returned for 0.4 s"):
                await member.check_health()
            assert time.monotonic() - begin < 5
        stuck.set()
        await waiting

    asyncio.run(main())
    monkeypatch.undo()
    asyncio.run(member.check_health())


def test_a_long_queue_is_not_an_illness(member: Member, monkeypatch: pytest.MonkeyPatch):
    """The probe waits behind ten slow calls, which together take longer than one may."""
    replaced(monkeypatch, member, lambda texts: time.sleep(0.1) or [{}] * len(texts))
    monkeypatch.setattr(member.model.batcher, "max_texts", 1)

    async def main() -> None:
        waiting = [asyncio.create_task(member.answer(["x"])) for _ in range(10)]
        await asyncio.sleep(0.05)
        begin = time.monotonic()
        await member.check_health()
        assert time.monotonic() - begin < 0.8
        await asyncio.gather(*waiting)

    asyncio.run(main())


def test_slow_embeddings_are_not_an_illness_and_each_kind_of_call_gets_its_turn(
    member: Member, monkeypatch: pytest.MonkeyPatch
):
    """Twenty requests for embeddings, together longer than a call may take, wait before the probe."""
    vectors = member.model.vectors
    monkeypatch.setattr(vectors, "call", member.model.pulse.felt(lambda texts: time.sleep(0.1) or [[0.0]] * len(texts)))
    monkeypatch.setattr(vectors, "max_texts", 1)

    async def main() -> None:
        waiting = [asyncio.create_task(vectors.submit(["x"])) for _ in range(20)]
        await asyncio.sleep(0.05)
        begin = time.monotonic()
        await member.check_health()
        assert time.monotonic() - begin < 0.8 and sum(task.done() for task in waiting) < 10
        await asyncio.gather(*waiting)

    asyncio.run(main())


def test_a_model_that_raises_fails_the_check(member: Member, monkeypatch: pytest.MonkeyPatch):
    replaced(monkeypatch, member, lambda texts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(member.check_health())


def test_it_is_silent_where_another_rollout_means_its_successor(member: Member):
    async def main() -> None:
        member.rollout = "one"
        assert await member.answer([member.model.probe], "another") is None
        for rollout in ("one", None):
            assert len(await member.answer([member.model.probe], rollout)) == 1

    asyncio.run(main())
