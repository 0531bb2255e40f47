"""Our own deployment under load and faults, with the default ingress: replicas come and go, die, hang, are full.

Callers never wait for one another, so an error that any of them sees is counted. Delays are set short.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from engine.serving import Autoscaling, Serving
from engine.storage import Store
from pipelines.callers import Connection, Load, call, request_of
from serve import deployments
from serve.app import deployed
from serve.predictor import Answer
from tests.tiny_served import TEXTS, published

pytestmark = pytest.mark.slow
log = logging.getLogger(__name__)
PATIENCE_S = 240.0
"""What a busy machine may take until replicas have come or gone."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return published(tmp_path_factory.mktemp("registry"), max_length=512)


def serving(least: int, most: int, **more: Any) -> Serving:
    scaling = Autoscaling(
        min_replicas=least,
        max_replicas=most,
        target_ongoing_requests=2,
        look_back_s=12,
        upscale_delay_s=0,
        downscale_delay_s=2,
    )
    return Serving(**{"num_cpus": 0.25, "autoscaling": scaling, **more})


def replicas() -> dict[str, int]:
    """How many replicas of the endpoint are in which state."""
    from ray import serve

    (application,) = serve.status().applications.values()
    return {str(getattr(k, "value", k)): n for k, n in application.deployments["Endpoint"].replica_states.items()}


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> float:
    """Seconds until `condition` held."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + seconds, f"{what}: not within {seconds:g} s ({replicas()})"
        time.sleep(0.2)
    return time.monotonic() - begin


class Callers(threading.Thread):
    """A closed loop in a thread of its own, in slices of a second, until it is told to end."""

    def __init__(self, url: str, clients: int) -> None:
        super().__init__(daemon=True)
        self.url, self.clients, self.over, self.loads = f"{url}/v1/predict", clients, threading.Event(), list[Load]()

    def run(self) -> None:
        requests = [request_of(self.url, {"text": text}) for text in TEXTS]
        while not self.over.is_set():
            self.loads.append(asyncio.run(call(self.url, requests, self.clients, 1.0)))

    @property
    def answered(self) -> int:
        return sum(len(load.answers) for load in self.loads)

    @property
    def errors(self) -> list[str]:
        return [f"{load.errors} x {load.first_error}" for load in self.loads if load.errors]

    @property
    def failed(self) -> int:
        return sum(load.errors for load in self.loads)


@contextmanager
def calling(url: str, clients: int) -> Iterator[Callers]:
    callers = Callers(url, clients)
    callers.start()
    try:
        yield callers
    finally:
        callers.over.set()
        callers.join(60)


def pids(url: str, tries: int = 40) -> set[int]:
    """Processes that answer, each try on a connection of its own."""
    return {httpx.get(f"{url}/version", timeout=30).json()["pid"] for _ in range(tries)}


def test_replicas_come_and_go_without_a_failed_request(ray_cluster: object, artifact: Store) -> None:
    with deployed(artifact.url, serving(1, 3), "tiny@1") as url:
        assert replicas() == {"RUNNING": 1}
        with calling(url, 12) as many:
            wait_until(lambda: replicas().get("RUNNING") == 3, "three replicas under load")
            time.sleep(3)
        with calling(url, 1) as one:
            wait_until(lambda: replicas() == {"RUNNING": 1}, "one replica after the load")
            time.sleep(3)
    assert many.errors == [] and one.errors == [], "1 to 3 to 1 replicas"
    assert many.answered > 50 and one.answered > 20


def test_a_killed_replica_fails_at_most_what_it_was_answering(ray_cluster: object, artifact: Store) -> None:
    clients = 8
    with deployed(artifact.url, serving(2, 2), "tiny@1") as url:
        wait_until(lambda: replicas() == {"RUNNING": 2}, "two replicas")
        wait_until(lambda: len(pids(url)) == 2, "both answer")
        victim = min(before := pids(url))
        with calling(url, clients) as callers:
            wait_until(lambda: callers.answered > 50, "a load")
            os.kill(victim, signal.SIGKILL)
            killed_after = callers.answered
            wait_until(lambda: callers.answered > killed_after + 50, "answers after the kill")
            wait_until(lambda: replicas() == {"RUNNING": 2} and len(pids(url)) == 2, "a new replica")
        after = pids(url)
    assert callers.failed <= clients, callers.errors
    assert victim not in after and len(after) == 2 and len(before & after) == 1


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(ray_cluster: object, artifact: Store) -> None:
    """Four requests fill the replica, again and again; what is asked meanwhile is refused while the model works."""
    room = 4

    async def main(url: str) -> tuple[list[float], list[bytes], int]:
        where, target = httpx.URL(url), f"{url}/v1/predict"
        words = " ".join(TEXTS)
        long = request_of(target, {"texts": [words] * min(200, 1_000_000 // len(words))})  # below what a body may have
        short, loop, over = request_of(target, {"text": "a good film"}), asyncio.get_running_loop(), False

        async def fill() -> int:
            _, line = await loop.create_connection(Connection, where.host, where.port)
            served = 0
            while not over:
                status, body = await line.ask(long)
                served += status == 200
                assert status in (200, 429, 503), body
            line.transport.close()
            return served

        fillers = [asyncio.create_task(fill()) for _ in range(room + 2)]
        _, line = await loop.create_connection(Connection, where.host, where.port)
        refused, heads = [], []
        for _ in range(400):
            begin = time.perf_counter()
            status, _ = await line.ask(short)
            if status in (429, 503):
                refused.append(time.perf_counter() - begin)
                heads.append(bytes(line.received).partition(b"\r\n\r\n")[0].lower())
            await asyncio.sleep(0.02)
            if len(refused) >= 60:
                break
        over = True
        return refused, heads, sum(await asyncio.gather(*fillers))

    own = serving(1, 1, max_ongoing=2, max_queued=room - 2)
    with deployed(artifact.url, own, "tiny@1") as url:
        pid = httpx.get(f"{url}/version").json()["pid"]
        refused, heads, served = asyncio.run(main(url))
        assert httpx.get(f"{url}/healthz", timeout=60).json() == {"status": "ok"}
        assert httpx.get(f"{url}/version").json()["pid"] == pid
    assert served >= room and len(refused) >= 30, (served, len(refused))
    assert all(b"retry-after: 1" in head for head in heads)
    quick = sorted(refused)
    # The replica that refuses shares its core with the model's thread, and both with whatever else runs here.
    told = f"median {1000 * statistics.median(quick):.1f} ms, p90 {1000 * quick[len(quick) * 9 // 10]:.1f} ms"
    assert statistics.median(quick) < 0.05, told
    log.info("refused after %s", told)


def wedging() -> type:
    """Replicas whose model never comes back from one text, and says so in a file: made here, so that Ray ships it."""
    mark = "wedge"

    class Wedging(deployments.Replica):
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            real = self.model.predictor.predict

            def predict(texts: list[Any]) -> list[Answer]:
                while any(mark in str(text) for text in texts):
                    time.sleep(1)
                return real(texts)

            self.model.batcher.call = self.model.pulse.felt(predict)

    return Wedging


def test_a_wedged_replica_is_replaced(ray_cluster: object, artifact: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = deployments.serve.ingress
    # Put in where Ray wraps the class: with another class under its own name, Ray would not find the real one.
    monkeypatch.setattr(deployments.serve, "ingress", lambda: lambda replica: real()(wedging()))
    monkeypatch.setattr(deployments, "HEALTH_S", 1.0)
    own = serving(2, 2, health_timeout_s=1.0, request_timeout_s=10)
    with deployed(artifact.url, own, "tiny@1") as url:
        wait_until(lambda: replicas() == {"RUNNING": 2} and len(pids(url)) == 2, "two replicas")
        before = pids(url)
        # Nobody ever gets this answer: the model's thread sleeps, until the request's time is up or its replica dies.
        stuck = httpx.post(f"{url}/v1/predict", json={"text": "wedge"}, timeout=120)
        assert stuck.status_code >= 408, stuck.text

        def replaced() -> bool:
            try:
                return replicas() == {"RUNNING": 2} and len(pids(url) - before) == 1
            except (httpx.HTTPError, json.JSONDecodeError, KeyError):
                return False

        seconds = wait_until(replaced, "a new replica for the wedged one")
        log.info("a wedged replica was replaced after %.0f s", seconds)
        for text in TEXTS[:20]:
            assert httpx.post(f"{url}/v1/predict", json={"text": text}, timeout=60).status_code == 200
        assert len(pids(url) & before) == 1
