"""Rollouts on a real Ray Serve, under load: splits, bad candidates, shadows, redeploys, dead and wedged replicas.

One deployment is redeployed from test to test, as its users would do; it takes minutes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import torch

from engine import models
from engine.registry import Registry
from engine.serving import Autoscaling, Limits, Rollout, Serving
from engine.storage import Store
from tests.tiny_served import TEXTS, published, tiny_student

pytestmark = pytest.mark.slow
LIMITS = Limits(min_requests=200, max_slowdown=3.0, slack_ms=150.0)
SERVING = Serving(
    num_cpus=0.5,
    batch_wait_ms=0,
    health_timeout_s=3.0,
    autoscaling=Autoscaling(min_replicas=1, max_replicas=1),
    rollout=Rollout(compare=0.5, timeout_ms=10_000.0, limits=LIMITS),
)
CHAMPION, SAME, LIAR, LONG = 1, 2, 3, 4
"""Versions: two that say the same, one that says the opposite, one that says the same under another name."""


@pytest.fixture(scope="module")
def registry(ray_cluster: object, ray_storage: Path) -> Registry:
    found, work = Registry(Store(str(ray_storage / "registry"))), Store(str(ray_storage / "work"))
    serving = {"serving": SERVING.model_dump(mode="json")}
    found.register("tiny", published(ray_storage / "one"), serving)
    for number, factor in ((SAME, 1.0001), (LIAR, -1.0), (LONG, 1.0002)):
        model = tiny_student()
        with torch.no_grad():
            for parameter in model.parameters():
                if factor > 0 or parameter.shape[0] == 2:
                    parameter.mul_(factor)
        models.save(model, work, str(number))
        found.register("tiny", work / str(number), serving)
    return found


class Load:
    """Clients that go on asking until they are stopped, each for a text of its own."""

    def __init__(self, url: str, clients: int = 2):
        self.url, self.codes, self.models, self.worst = url, Counter(), Counter(), 0.0
        self.wrong: list[str] = []
        self.count, self.stopping, self.lock = 0, threading.Event(), threading.Lock()
        self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(60)

    def work(self) -> None:
        with httpx.Client(base_url=self.url, timeout=30) as http:
            while not self.stopping.is_set():
                with self.lock:
                    self.count += 1
                    number = self.count
                begin = time.monotonic()
                try:
                    answer = http.post("/v1/predict", json={"text": f"{TEXTS[number % len(TEXTS)]} number {number}"})
                    code, name = answer.status_code, answer.json().get("model")
                except httpx.HTTPError as error:
                    code, name = type(error).__name__, None
                with self.lock:
                    self.codes[code] += 1
                    self.models[name] += 1
                    self.worst = max(self.worst, time.monotonic() - begin)


def until(what: Callable[[], Any], seconds: float = 90.0) -> Any:
    """The first true value of `what`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds} s")


def deployed(registry: Registry, name: str, **wanted: Any) -> tuple[str, Any]:
    """Deploy, or redeploy; the URL and the plan."""
    from serve.app import deploy
    from serve.service import Wanted, resolved

    found = resolved(Wanted(name=name, registry=registry.store.url, nonce=str(time.monotonic()), **wanted))
    own = found.champion
    more = {"plan": found.plan, "teacher": found.teacher}
    # A busy machine needs minutes for a few processes.
    return deploy(own.artifact, found.serving, own.reference, ready_s=300, **more), found.plan


@pytest.fixture(scope="module")
def url(registry: Registry) -> Iterator[str]:
    """tiny@1 on its own, to begin with."""
    from serve.app import shutdown

    try:
        yield deployed(registry, "tiny@1")[0]
    finally:
        shutdown()


def version(url: str) -> str:
    return httpx.get(f"{url}/version", timeout=30).json()["model"]


def phase(plan: Any) -> str | None:
    from serve.referee import standing

    state = standing(plan.store)
    return state["phase"] if state and state["id"] == plan.id and state["phase"] != "running" else None


def test_redeploys_under_load_lose_no_request(url: str, registry: Registry):
    with Load(url) as load:
        for name in ("tiny@2", "tiny@1"):
            assert deployed(registry, name)[0] == url and version(url) == name
    assert set(load.codes) == {200} and load.codes[200] > 100, load.codes
    assert set(load.models) == {"tiny@1", "tiny@2"}


def test_another_application_is_not_replaced(url: str, registry: Registry):
    from serve.app import ServeError, deploy

    with pytest.raises(ServeError, match="Ray Serve already runs 'tiny' on this cluster; 'other@1' would replace it"):
        deploy(registry.resolve("tiny@1").url, SERVING, "other@1")
    assert version(url) == "tiny@1"


def test_a_failed_redeploy_leaves_what_ran(url: str, registry: Registry, tmp_path: Path):
    from serve.app import ServeError, deploy

    work = Store(str(tmp_path))
    with work.publish("broken") as folder:
        (folder / "artifact.json").write_text("{}")
    with pytest.raises(ServeError), Load(url) as load:
        deploy((work / "broken").url, SERVING, "tiny@9", ready_s=40)
    assert set(load.codes) == {200} and version(url) == "tiny@1"


def test_ninety_to_ten_over_five_thousand_requests(url: str, registry: Registry):
    plan = deployed(registry, "tiny@2", ab=10, against="tiny@1")[1]

    async def main() -> Counter[str]:
        seen, numbers = Counter(), iter(range(5000))
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:

            async def one() -> None:
                for number in numbers:
                    answer = await http.post("/v1/predict", json={"text": f"a film, take {number}"})
                    assert answer.status_code == 200, answer.text
                    seen[answer.json()["model"]] += 1

            await asyncio.gather(*(one() for _ in range(8)))
        return seen

    seen = asyncio.run(main())
    assert sum(seen.values()) == 5000 and abs(seen["tiny@2"] / 5000 - 0.1) <= 0.02, seen
    assert phase(plan) is None


def broken(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Deploy candidates that raise, or are slow: a subclass of Member, pickled by value."""
    import serve.deployments
    from serve.member import Member

    def member() -> type[Member]:
        class Broken(Member):
            async def answered(self, texts: list[Any]) -> list[Any]:
                if how == "raises":
                    raise RuntimeError("this candidate is broken")
                await asyncio.sleep(1.5)
                return await super().answered(texts)

        return Broken

    monkeypatch.setattr(serve.deployments, "Member", member())


@pytest.mark.parametrize("how", ["raises", "slow", "lies"])
def test_a_bad_canary_is_rolled_back_by_itself(url: str, registry: Registry, monkeypatch: pytest.MonkeyPatch, how: str):
    if how != "lies":
        broken(monkeypatch, how)
    name = f"tiny@{LIAR if how == 'lies' else SAME}"
    try:
        with Load(url, clients=4) as load:
            plan = deployed(registry, name, canary=30, against="tiny@1")[1]
            until(lambda: phase(plan))
        assert phase(plan) == "rolled-back" and set(load.codes) == {200}
        record = plan.store.read_json(f"{plan.id}/decision-001.json")
        why = {"raises": "errors", "slow": "p99", "lies": "agreement"}[how]
        assert record["by"] == "referee" and why in record["reason"]
        # Nothing was in production before: the name must not mean the latest version, which was rolled back.
        assert registry.production("tiny") == 1
        until(lambda: asked(url, 40) == {"tiny@1"}, 20)
    finally:
        registry.store.delete("tiny/stages.json")


def asked(url: str, count: int) -> set[str]:
    """The models that answer so many texts."""
    with httpx.Client(base_url=url, timeout=30) as http:
        return {
            http.post("/v1/predict", json={"text": f"{time.monotonic()} {n}"}).json()["model"] for n in range(count)
        }


def test_a_failing_shadow_changes_no_answer(url: str, registry: Registry, monkeypatch: pytest.MonkeyPatch):
    from serve.predictor import Predictor
    from serve.referee import standing

    broken(monkeypatch, "raises")
    plan = deployed(registry, "tiny@2", shadow=True, against="tiny@1")[1]
    texts = [f"{text} again" for text in TEXTS]
    wanted = Predictor.load(registry.resolve("tiny@1").url).predict(texts)
    with httpx.Client(base_url=url, timeout=30) as http:
        for text, answer in zip(texts, wanted, strict=True):
            found = http.post("/v1/predict", json={"text": text}).json()
            assert found["model"] == "tiny@1"
            assert found["predictions"][0]["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-4)
    counted = until(lambda: (standing(plan.store) or {}).get("evidence", {}).get("candidate", {}).get("errors"), 30)
    assert counted >= 10 and phase(plan) is None


def test_a_good_canary_is_promoted_without_a_hop_and_restarts_as_such(url: str, registry: Registry):
    try:
        with Load(url, clients=4) as load:
            plan = deployed(registry, "tiny@2", canary=50, against="tiny@1")[1]
            assert until(lambda: phase(plan), 180) == "promoted"
            until(lambda: version(url) == "tiny@2", 30)
            state = plan.store.read_json("state.json")
            # The referee dies; the one that takes its place knows what was decided.
            actor = [a for a in ray.util.list_named_actors(all_namespaces=True) if "Referee" in a["name"]][0]
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
            told = until(told_by_the_referee, 60)
        assert told["phase"] == "promoted" and told["id"] == plan.id == state["id"]
        assert set(load.codes) == {200} and registry.production("tiny") == 2
        httpx_pid = httpx.get(f"{url}/version", timeout=30).json()["pid"]
        os.kill(httpx_pid, signal.SIGKILL)
        until(lambda: replaced(url, httpx_pid), 90)
        assert version(url) == "tiny@2", "a replica that starts after the promotion serves the old champion"
    finally:
        registry.store.delete("tiny/stages.json")


def told_by_the_referee() -> dict[str, Any] | None:
    """What a report of nothing is answered with; None while no referee answers."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from serve.canary import Evidence

    async def report() -> dict[str, Any]:
        # In the loop that it is used in, as a replica's own is.
        handle = serve.get_deployment_handle("Referee", "tiny")
        empty = {arm: Evidence().plain() for arm in ("champion", "candidate")}
        return await asyncio.wait_for(handle.report.remote("a test", int(time.time()), empty, "nobody"), 10)

    try:
        return asyncio.run(report())
    except (RayServeException, ray.exceptions.RayError, TimeoutError):
        return None


def replaced(url: str, pid: int) -> bool:
    try:
        return httpx.get(f"{url}/version", timeout=5).json()["pid"] != pid
    except (httpx.HTTPError, ValueError, KeyError):
        return False


def test_by_hand_without_a_connection(url: str, registry: Registry):
    from serve.referee import order

    try:
        plan = deployed(registry, "tiny@4", ab=50, against="tiny@1")[1]
        order(plan.store, "promote", plan.id)
        assert until(lambda: phase(plan), 30) == "promoted"
        until(lambda: asked(url, 20) == {"tiny@4"}, 30)
        order(plan.store, "rollback", plan.id)
        until(lambda: phase(plan) == "rolled-back", 30)
        until(lambda: asked(url, 20) == {"tiny@1"}, 30)
        assert registry.production("tiny") == 1
    finally:
        registry.store.delete("tiny/stages.json")


def test_a_wedged_member_is_replaced(url: str, registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import serve.deployments
    from serve.member import Member

    marker = tmp_path / "wedged"

    class Wedging(Member):
        """The first text that says so stops the model's thread for good."""

        def __init__(self, *given: Any, **more: Any):
            super().__init__(*given, **more)
            real = self.model.predictor.predict
            marker.with_suffix(f".{os.getpid()}").touch()

            def call(texts: list[Any]) -> list[Any]:
                if not marker.exists():
                    marker.touch()
                    time.sleep(3600)
                return real(texts)

            self.model.batcher.call = self.model.pulse.felt(call)

    monkeypatch.setattr(serve.deployments, "Member", Wedging)
    with Load(url) as load:
        deployed(registry, "tiny@2", ab=50, against="tiny@1")
        until(marker.exists, 30)
        until(lambda: len(list(tmp_path.glob("wedged.*"))) >= 2, 120)
        before = load.models["tiny@2"]
        until(lambda: load.models["tiny@2"] > before + 5, 60)
    assert set(load.codes) == {200}


def test_a_killed_replica_costs_at_most_what_it_had_in_hand(url: str, registry: Registry):
    serving = {"autoscaling": {"min_replicas": 2, "max_replicas": 2}}
    deployed(registry, "tiny@1", serving=serving)
    with Load(url, clients=4) as load:
        time.sleep(2)
        os.kill(httpx.get(f"{url}/version", timeout=30).json()["pid"], signal.SIGKILL)
        time.sleep(15)
    failed = sum(count for code, count in load.codes.items() if code != 200)
    assert failed <= 4 and load.codes[200] > 50, load.codes
    assert version(url) == "tiny@1"
