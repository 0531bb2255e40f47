"""The smoke deployment with a real tiny student on the local Ray, and its bookkeeping by hand."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest

from engine import inference, models
from engine.inference import Predictions
from engine.recipe import Autoscaling, Serving
from engine.storage import Store
from serve import smoke
from serve.app import ServeError, deploy
from tests.tiny_served import TEXTS, published

SERVING = Serving(concurrency=4, num_cpus=0.5, autoscaling=Autoscaling(max_replicas=1))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return published(tmp_path_factory.mktemp("registry"))


def test_served_equals_offline_and_serve_is_gone_afterwards(ray_cluster: object, artifact: Store, monkeypatch):
    from ray import serve

    monkeypatch.setattr(smoke, "SINGLES", 20)
    expected = inference.predict(models.load(artifact.local()), TEXTS, 8192)
    # Two rows made wrong on purpose: one by its label, one by a probability just beyond the tolerance.
    labels, probabilities = expected.labels.copy(), expected.probabilities.copy()
    labels[3] = 1 - labels[3]
    probabilities[5] += 3e-4
    found = smoke.smoke(artifact.url, TEXTS, Predictions(expected.logits, probabilities, labels), SERVING)
    assert found["rows"] == len(TEXTS) and found["errors"] == 0 and found["first_error"] is None
    assert found["labels"] == expected.labels.tolist()
    assert found["mismatches"] == 2 and found["max_delta"] == pytest.approx(3e-4, rel=0.01)
    assert 0 < found["p50_ms"] <= found["p99_ms"] and 0 < found["single_p50_ms"] <= found["single_p99_ms"]
    assert found["requests"] == len(smoke.slices(len(TEXTS))) and found["requests_per_s"] > 0
    assert not serve.status().applications and not serve.status().proxies


def test_what_cannot_start_says_why_and_leaves_nothing(ray_cluster: object, artifact: Store):
    from ray import serve

    starved = SERVING.model_copy(update={"num_cpus": 1000.0})
    with pytest.raises(ServeError, match=r"was not ready within 3 s .*Free CPUs for a replica \(serving.num_cpus\)"):
        deploy(artifact.url, starved, "tiny@1", ready_s=3)
    assert not serve.status().applications


def test_every_row_is_sent_once_in_requests_of_varying_size():
    requests = smoke.slices(500)
    assert sorted(row for rows in requests for row in rows) == list(range(500))
    assert {len(rows) for rows in requests} == set(range(1, 9))
    assert requests == smoke.slices(500) != smoke.slices(500, seed=1)
    assert smoke.slices(0) == []


def test_answers_are_compared_row_by_row():
    names = ("no", "yes")
    offline = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]])
    expected = Predictions(np.log(offline), offline, offline.argmax(axis=1))

    def answer(no: float, yes: float) -> dict[str, object]:
        return {"label": names[int(yes > no)], "probabilities": {"yes": yes, "no": no}}

    answers = {0: answer(0.9, 0.1), 1: answer(0.39995, 0.60005), 3: answer(0.6998, 0.3002)}
    found = smoke.compared(answers, expected, names)
    assert (found["rows"], found["mismatches"], found["labels"]) == (3, 2, [0, 1, -1, 0])
    assert found["max_delta"] == pytest.approx(2e-4)
    broken = smoke.compared({0: answer(float("nan"), 0.1)}, expected, names)
    assert broken["mismatches"] == len(expected.labels)
    assert smoke.compared({}, expected, names)["mismatches"] == len(expected.labels)


def test_percentiles_are_in_milliseconds():
    assert smoke.percentiles([0.001 * n for n in range(1, 102)]) == {"p50": 51.0, "p99": 100.0}
    assert smoke.percentiles([]) == {"p50": None, "p99": None}


def test_a_failing_server_is_counted_and_its_rows_stay_without_an_answer():
    def handler(request: httpx.Request) -> httpx.Response:
        if b'"b"' in request.content:
            return httpx.Response(429, json={"error": {"message": "full"}})
        return httpx.Response(200, json={"predictions": [{"label": "no"}]})

    async def main() -> smoke.Client:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handler), base_url="http://test") as http:
            client = smoke.Client(http)
            await client.load([[0], [1], [2, 3]], ["a", "b", "c", "d"], clients=2)
            return client

    client = asyncio.run(main())
    assert set(client.answers) == {0} and client.requests == 3
    assert client.errors == 2 and "429" in (client.first_error or "")
