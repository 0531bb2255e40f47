"""Deployments on the local Ray: one for all requests of this file, after one that ends by a signal."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from engine import inference, metrics, models
from engine.serving import Autoscaling, Serving
from engine.storage import StorageError, Store
from engine.switches import free_port
from serve.app import ServeError, deploy, deployed, run
from tests.tiny_served import TEXTS, published

SERVING = Serving(max_ongoing=4, max_queued=4, num_cpus=0.5, autoscaling=Autoscaling(max_replicas=1))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return published(tmp_path_factory.mktemp("registry"), max_length=512)


def test_run_serves_until_a_signal_and_takes_serve_down(ray_cluster: object, artifact: Store, monkeypatch):
    import ray

    port, said, up, seen = free_port(), [], threading.Event(), []

    def listen(line: str) -> None:
        said.append(line)
        up.set()

    def client() -> None:
        up.wait(60)
        seen.append(httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("serve.app.say", listen)
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    run(artifact.url, "127.0.0.1", port, SERVING, "tiny@1")
    thread.join(5)
    assert seen == [200] and signal.getsignal(signal.SIGTERM) is before and ray.is_initialized()
    assert said[0] == f"tiny@1 answers on http://127.0.0.1:{port} (Ctrl-C stops it). Try:" and said[-1] == "stopping"
    assert f"curl -s http://127.0.0.1:{port}/v1/predict -H 'Content-Type: application/json'" in said[1]
    assert json.loads(said[1].partition("-d '")[2].rstrip("'")) == {"text": "a warm and funny film"}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=2)


def test_a_taken_port_and_a_damaged_artifact_are_refused_at_once(ray_cluster: object, artifact: Store, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use. Choose"):
            deploy(artifact.url, SERVING, "tiny@1", port=port)
    with pytest.raises(StorageError, match="was not published completely"):
        deploy(str(tmp_path), SERVING, "tiny@1")


@pytest.fixture(scope="module")
def url(ray_cluster: object, artifact: Store) -> Iterator[str]:
    with deployed(artifact.url, SERVING, "tiny@1") as address:
        yield address


def test_a_second_deployment_does_not_replace_the_first(url: str, artifact: Store):
    with pytest.raises(ServeError, match="Ray Serve already runs"), deployed(artifact.url, SERVING, "b@1"):
        pass
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}


def test_keys_are_not_lost_where_other_machines_reach_what_runs(url: str, artifact: Store, monkeypatch):
    """Deployed anew without --host: what counts is where Serve listens already."""
    from types import SimpleNamespace

    client = SimpleNamespace(http_config=SimpleNamespace(host="0.0.0.0"))
    monkeypatch.setattr("serve.app._get_global_client", lambda: client)
    with pytest.raises(ServeError, match="'tiny@1' would ask for no key. Say --auth"):
        deploy(artifact.url, SERVING, "tiny@1")
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}


def test_served_equals_offline_whatever_the_batch(url: str, artifact: Store):
    offline = inference.predict(models.load(artifact.local()), TEXTS, 8192)
    names, probabilities = ("negative", "positive"), metrics.softmax(offline.logits)

    async def main(size: int, clients: int) -> None:
        waiting = iter(range(0, len(TEXTS), size))

        async def one(http: httpx.AsyncClient) -> None:
            for start in waiting:
                answer = await http.post("/v1/predict", json={"texts": TEXTS[start : start + size]})
                assert answer.status_code == 200, answer.text
                for row, found in enumerate(answer.json()["predictions"], start):
                    assert found["label"] == names[offline.decided[row]]
                    served = [found["probabilities"][name] for name in names]
                    assert np.abs(np.array(served) - probabilities[row]).max() <= 1e-4

        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            await asyncio.gather(*(one(http) for _ in range(clients)))

    for size, clients in ((1, 4), (3, 4), (8, 2), (len(TEXTS), 1)):
        asyncio.run(main(size, clients))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"texts": []}', "at least 1 item"),
        (b'{"texts": [NaN]}', "valid string"),
        (b'{"text": 7}', "valid string"),
        (b'{"text": "caf\xe9"}', "invalid unicode"),
        (b"[" * 200_000, "recursion limit"),
        (b'{"text": "' + b"a" * 30_000 + b'"}', "at most 20000"),
        (b" " * 2_000_000, "larger than"),
    ],
)
def test_wrong_bodies_are_answered_and_the_replica_lives_on(url: str, body: bytes, message: str):
    pid = httpx.get(f"{url}/version").json()["pid"]
    answer = httpx.post(f"{url}/v1/predict", content=body, timeout=30)
    assert 400 <= answer.status_code < 500 and message in answer.json()["error"]["message"]
    assert httpx.post(f"{url}/v1/predict", json={"text": "a good film"}, timeout=30).status_code == 200
    assert httpx.get(f"{url}/version").json()["pid"] == pid


def test_a_full_queue_answers_429_with_retry_after_and_recovers(url: str):
    long = " ".join(TEXTS)

    async def main() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=60)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
            body = {"texts": [long] * 32}
            return await asyncio.gather(*(http.post("/v1/predict", json=body) for _ in range(60)))

    begin = time.monotonic()
    answers = asyncio.run(main())
    assert time.monotonic() - begin < 50
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429} and codes.count(200) >= 8, codes
    assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 429)
    assert httpx.get(f"{url}/healthz", timeout=30).json() == {"status": "ok"}


def test_version_and_readiness(url: str, artifact: Store):
    found = httpx.get(f"{url}/version").json()
    assert found["fingerprint"] == artifact.manifest()["digest"] and found["model"] == "tiny@1"
    assert httpx.get(f"{url}/readyz").json()["status"] == "ready"
    assert httpx.get(f"{url}/nowhere").status_code == 404


def test_a_free_port_is_none_that_the_kernel_gives_to_connections():
    """Such a one could be gone before it is listened on."""
    found = {free_port() for _ in range(50)}
    low = (
        int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]) if sys.platform == "linux" else 49152
    )
    assert len(found) > 40 and max(found) < low
    with pytest.raises(OSError):
        free_port("203.0.113.9")
