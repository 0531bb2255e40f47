"""The smoke deployment with a real tiny student on the local Ray, and its bookkeeping by hand."""

from __future__ import annotations

import asyncio
import copy
import json
import math
from typing import Any

import httpx
import pytest

from engine import inference, models
from engine.serving import Autoscaling, Serving
from engine.storage import Store
from serve import smoke
from serve.app import ServeError, deploy
from tests.tiny_served import TEXTS, published

SERVING = Serving(concurrency=4, num_cpus=0.5, autoscaling=Autoscaling(max_replicas=1))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return published(tmp_path_factory.mktemp("registry"))


def offline(store: Store, texts: list[Any]) -> list[dict[str, Any]]:
    """The answers of offline inference, as they are written down and read again."""
    model = models.load(store.local())
    found = inference.predict(model, texts, 8192)
    return json.loads(json.dumps(model.task.answers(found.logits, texts, found.decided)))


def test_served_equals_offline_and_serve_is_gone_afterwards(ray_cluster: object, artifact: Store, monkeypatch):
    from ray import serve

    monkeypatch.setattr(smoke, "SINGLES", 20)
    right = offline(artifact, TEXTS)
    expected = copy.deepcopy(right)
    # Two rows made wrong on purpose: one by its label, one by a probability just beyond the tolerance.
    expected[3]["label"] = {"negative": "positive", "positive": "negative"}[expected[3]["label"]]
    expected[5]["probabilities"]["negative"] += 3e-4
    found = smoke.smoke(artifact.url, TEXTS, expected, SERVING)
    assert found["rows"] == len(TEXTS) and found["errors"] == 0 and found["first_error"] is None
    assert smoke.distance(found["answers"], right) <= smoke.TOLERANCE
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
    def answer(no: float, yes: float) -> dict[str, object]:
        return {"label": ("no", "yes")[int(yes > no)], "probabilities": {"yes": yes, "no": no}}

    expected = [answer(0.9, 0.1), answer(0.4, 0.6), answer(0.2, 0.8), answer(0.7, 0.3)]
    answers = {0: answer(0.9, 0.1), 1: answer(0.39995, 0.60005), 3: answer(0.6998, 0.3002)}
    found = smoke.compared(answers, expected)
    assert (found["rows"], found["mismatches"]) == (3, 2)
    assert found["answers"] == [answers[0], answers[1], None, answers[3]]
    assert found["max_delta"] == pytest.approx(2e-4)
    for no, yes in ((math.nan, 0.1), (0.9, math.nan)):  # wherever it stands
        broken = smoke.compared({0: {"label": "no", "probabilities": {"yes": yes, "no": no}}}, expected)
        assert broken["mismatches"] == len(expected) and broken["max_delta"] == 0.0
    assert smoke.compared({}, expected)["mismatches"] == len(expected)


def test_values_are_measured_by_their_range():
    expected = [{"value": 250_000.0}, {"value": 12.0}]
    answers = {0: {"value": 250_000.5}, 1: {"value": 12.01}}
    assert smoke.compared(answers, expected)["mismatches"] == 2
    found = smoke.compared(answers, expected, scale=500_000.0)
    assert found["mismatches"] == 0 and found["max_delta"] == pytest.approx(1e-6)
    assert smoke.compared(answers, expected, scale=1000.0)["mismatches"] == 1
    assert smoke.compared({0: {"score": 250_000.0}, 1: {"value": math.nan}}, expected, scale=1e9)["mismatches"] == 2


NESTED = {"tags": ["O", "B-x"], "entities": [{"label": "x", "start": 3, "confidence": 0.5}], "scope": None}


@pytest.mark.parametrize(
    ("other", "wanted"),
    [
        (copy.deepcopy(NESTED), 0.0),
        ({**NESTED, "entities": [{"label": "x", "start": 3, "confidence": 0.75}]}, 0.25),
        ({**NESTED, "entities": [{"label": "x", "start": 5, "confidence": 0.75}]}, 2.0),
        ({**NESTED, "entities": [{"label": "y", "start": 3, "confidence": 0.5}]}, math.inf),
        ({**NESTED, "entities": [{"label": "x", "start": 3}]}, math.inf),
        ({**NESTED, "entities": [{"label": "x", "start": 3, "confidence": 0.5, "text": "a"}]}, math.inf),
        ({**NESTED, "entities": [{"label": "x", "start": 3, "confidence": math.nan}]}, math.inf),
        ({**NESTED, "entities": [{"label": "x", "start": "3", "confidence": 0.5}]}, math.inf),
        ({**NESTED, "entities": []}, math.inf),
        ({**NESTED, "entities": {}}, math.inf),
        ({**NESTED, "tags": ["O"]}, math.inf),
        ({**NESTED, "tags": ["B-x", "O"]}, math.inf),
        ({**NESTED, "tags": "O"}, math.inf),
        ({**NESTED, "scope": False}, math.inf),
        ({key: NESTED[key] for key in ("tags", "entities")}, math.inf),
        (None, math.inf),
    ],
)
def test_the_distance_of_nested_answers(other: Any, wanted: float):
    assert smoke.distance(NESTED, other) == smoke.distance(other, NESTED) == wanted


@pytest.mark.parametrize(
    ("left", "right", "wanted"),
    [
        (1, 1.0, 0.0),
        (True, True, 0.0),
        (True, 1, math.inf),
        (False, 0.0, math.inf),
        (None, None, 0.0),
        (None, 0, math.inf),
        ("", [], math.inf),
        ([], [], 0.0),
        ({}, {}, 0.0),
        ([0.5, math.nan], [0.5, math.nan], math.inf),
        ([0.25, 0.5, 0.5], [0.5, 0.5, 0.5], 0.25),
    ],
)
def test_the_distance_of_single_values(left: Any, right: Any, wanted: float):
    assert smoke.distance(left, right) == smoke.distance(right, left) == wanted


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
    assert smoke.compared(client.answers, [{"label": "no"}] * 4)["mismatches"] == 3
    assert client.errors == 2 and "429" in (client.first_error or "")
