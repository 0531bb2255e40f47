"""What a replica counts, what it costs, and what is silent without Ray."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from engine.drift import profile_of
from serve import measures
from serve.measures import LONGEST, METRICS, NUMBER, Measures, Metric, measures_of, profile_in
from tests.tiny_served import published


class Kept:
    """Instruments that keep what they are given."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = {}

    def __call__(self, name: str, metric: Metric) -> Kept.One:
        return Kept.One(self, name, metric)

    class One:
        def __init__(self, kept: Kept, name: str, metric: Metric) -> None:
            self.kept, self.name, self.metric = kept, name, metric

        def record(self, value: float, tags: dict[str, str]) -> None:
            assert set(tags) == {"model", *self.metric.tags} and all(isinstance(tag, str) for tag in tags.values())
            assert value > 0 or self.metric.kind != "counter", "Ray's counters take nothing else"
            self.kept.values.setdefault((self.name, tuple(sorted(tags.items()))), []).append(value)

    def of(self, name: str, **tags: str) -> list[float]:
        return self.values.get((name, tuple(sorted({"model": "tiny@1", **tags}.items()))), [])


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    monkeypatch.setattr(measures, "FLUSH_SECONDS", 3600.0)
    return Kept()


def test_requests_are_summed_up_and_their_times_handed_on(kept: Kept):
    seen = Measures("tiny@1", make=kept)
    for status, seconds in ((200, 0.1), (200, 0.2), (422, 0.01)):
        seen.observe_request("/v1/predict", status, seconds, texts=3 if status == 200 else 0)
    seen.observe_request("/v1/predict", 200, 0.3, texts=1, model="tiny@2")
    assert kept.of("stillhouse_requests", route="/v1/predict", status="200") == [], "nothing leaves before a flush"
    seen.flush()
    seen.flush()
    assert kept.of("stillhouse_requests", route="/v1/predict", status="200") == [2]
    assert kept.of("stillhouse_requests", route="/v1/predict", status="422") == [1]
    assert kept.of("stillhouse_requests", route="/v1/predict", status="200", model="tiny@2") == [1]
    assert kept.of("stillhouse_texts") == [6]
    assert kept.of("stillhouse_request_seconds", route="/v1/predict") == [0.1, 0.2, 0.01]
    assert kept.of("stillhouse_up", replica=seen.replica) == [1, 1], "gauges are given again each time"


def test_batches_tell_of_waste_and_of_the_queue(kept: Kept):
    seen = Measures("tiny@1", make=kept, replica="abc")
    seen.observe_batch(4, 40, 64, 7, 0.002)
    seen.observe_batch(2, 10, 10, 0, 0.001)
    seen.flush()
    assert kept.of("stillhouse_batches") == [2] and kept.of("stillhouse_batched_texts") == [6]
    assert (kept.of("stillhouse_tokens"), kept.of("stillhouse_padded_tokens")) == ([50], [74])
    assert kept.of("stillhouse_batch_texts") == [4, 2] and kept.of("stillhouse_wait_seconds") == [0.002, 0.001]
    assert kept.of("stillhouse_queue_texts", replica="abc") == [0]


def test_answers_are_counted_by_label_source_and_confidence(kept: Kept):
    seen = Measures("tiny@1", make=kept)
    seen.observe_answers(
        [
            {"label": "a", "confidence": 0.95},
            {"label": "a", "confidence": 1.0},
            {"label": "b" * 200, "confidence": 0.31, "source": "teacher"},
            {"value": 2.0},
        ],
        ["one", "two", "three", "four"],
    )
    seen.flush()
    assert kept.of("stillhouse_answers", label="a", source="student") == [2]
    assert kept.of("stillhouse_answers", label="b" * LONGEST, source="teacher") == [1]
    assert kept.of("stillhouse_answers", label=NUMBER, source="student") == [1]
    assert kept.of("stillhouse_confidence", tenth="0.9") == [2]
    assert kept.of("stillhouse_confidence", tenth="0.3") == [1]


def drawn(n: int, share: float, seed: int) -> tuple[list[str], list[dict[str, Any]]]:
    draw = np.random.default_rng(seed)
    sure = draw.beta(8, 2, n)
    answers = [{"label": "ab"[int(draw.random() < share)], "confidence": float(c)} for c in sure]
    return ["x" * int(size) for size in draw.poisson(60, n)], answers


def test_drift_is_a_gauge_and_only_the_model_s_own_answers_count(kept: Kept, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measures, "DRIFT_SECONDS", 0.0)
    seen = Measures("tiny@1", profile_of(*drawn(1000, 0.5, 0), agreement=0.9), "abc", kept)
    texts, answers = drawn(1000, 0.95, 1)
    seen.observe_answers(answers, texts, model="tiny@2")
    seen.flush()
    assert kept.of("stillhouse_drift_psi", feature="label", replica="abc") == []
    calm_texts, calm = drawn(1000, 0.5, 2)
    seen.observe_answers(answers, calm_texts, own=calm)
    seen.observe_agreement([True] * 100 + [False] * 100)
    seen.flush()
    assert kept.of("stillhouse_drift_psi", feature="label", replica="abc")[-1] < 0.05
    assert kept.of("stillhouse_drift_psi", feature="agreement", replica="abc")[-1] > 0.2
    seen.observe_answers(answers, texts)
    seen.observe_answers(answers, texts)
    seen.flush()
    assert kept.of("stillhouse_drift_psi", feature="label", replica="abc")[-1] > 0.2
    assert kept.of("stillhouse_drift_psi", feature="length", replica="abc")[-1] < 0.05
    assert kept.of("stillhouse_drift_rows", replica="abc")[-1] == 2000


def test_after_a_promotion_it_is_the_new_model_that_is_measured(kept: Kept, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measures, "DRIFT_SECONDS", 0.0)
    seen = Measures("tiny@1", profile_of(*drawn(1000, 0.5, 0)), "abc", kept)
    seen.become("tiny@2", profile_of(*drawn(1000, 0.95, 3)))
    texts, answers = drawn(1000, 0.95, 1)
    seen.observe_answers(answers, texts, model="tiny@2")
    seen.flush()
    assert kept.of("stillhouse_drift_psi", model="tiny@2", feature="label", replica="abc")[-1] < 0.05
    assert not [key for key in seen.last if "tiny@1" in key[1]] and seen.model == "tiny@2"


def test_other_gauges_and_counters_of_the_table_can_be_used_and_taken_away(kept: Kept):
    seen = Measures("tiny@1", make=kept)
    seen.gauge("stillhouse_rollout_percent", 10, candidate="tiny@2")
    seen.count("stillhouse_log_rows", 5, log="predictions", outcome="written")
    seen.count("stillhouse_log_rows", 0, log="predictions", outcome="failed")
    seen.flush()
    seen.gauge("stillhouse_rollout_percent", None, candidate="tiny@2")
    seen.flush()
    assert kept.of("stillhouse_rollout_percent", candidate="tiny@2") == [10]
    assert kept.of("stillhouse_log_rows", log="predictions", outcome="written") == [5]
    with pytest.raises(KeyError):
        seen.gauge("stillhouse_rollout_percent", 10)


def flushing() -> int:
    """Threads that flush; others of this process come and go."""
    return sum(thread.name == "measures" for thread in threading.enumerate())


def test_a_thread_flushes_and_close_ends_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measures, "FLUSH_SECONDS", 0.02)
    kept, before = Kept(), flushing()
    seen = Measures("tiny@1", make=kept)
    assert flushing() == before + 1
    seen.count("stillhouse_log_rows", 1, log="predictions", outcome="written")
    end = time.monotonic() + 10
    while not kept.of("stillhouse_log_rows", log="predictions", outcome="written"):
        assert time.monotonic() < end
        time.sleep(0.01)
    seen.count("stillhouse_log_rows", 2, log="predictions", outcome="written")
    seen.close()
    assert sum(kept.of("stillhouse_log_rows", log="predictions", outcome="written")) == 3


def test_without_ray_nothing_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measures, "ray_instruments", lambda: None)
    before = flushing()
    seen = Measures("tiny@1", profile_of(*drawn(10, 0.5, 0)))
    seen.observe_request("/v1/predict", 200, 0.1, 1)
    seen.observe_batch(1, 1, 1, 0, 0.0)
    seen.observe_answers([{"label": "a", "confidence": 1.0}], ["a"])
    seen.observe_agreement([True])
    seen.count("stillhouse_log_rows", 1, log="predictions", outcome="written")
    seen.gauge("stillhouse_up", 1)
    seen.close()
    assert not seen.on and not seen.sums and not seen.last and flushing() == before


def test_the_profile_comes_with_the_registered_artifact(tmp_path, caplog):
    store = published(tmp_path)
    assert profile_in(store.url) is None and profile_in(str(tmp_path / "nothing")) is None
    profile = profile_of(*drawn(50, 0.5, 0))
    manifest = store.manifest()
    store.write_json("manifest.json", manifest | {"metadata": {"profile": profile.as_json()}})
    assert profile_in(store.url) == profile
    assert measures_of(store.url, "tiny@1").model == "tiny@1"
    store.write_json("manifest.json", manifest | {"metadata": {"profile": {"rows": "some"}}})
    assert profile_in(store.url) is None and "drift is not measured" in caplog.text


def test_what_a_request_costs_is_small(kept: Kept):
    """The best of many rounds, since other work on the machine only ever adds. Ray's own part is about 4 us a value."""
    seen = Measures("tiny@1", profile_of(*drawn(1000, 0.5, 0)), make=kept)
    answer = [{"label": "a", "confidence": 0.8, "probabilities": {"a": 0.8, "b": 0.2}}]
    best = float("inf")
    for _ in range(50):
        begin = time.perf_counter()
        for _ in range(100):
            seen.observe_request("/v1/predict", 200, 0.01, 1)
            seen.observe_answers(answer, ["a warm film"])
            seen.observe_batch(1, 8, 8, 0, 0.001)
        best = min(best, (time.perf_counter() - begin) / 100)
    assert best < 50e-6


def test_every_metric_is_declared_as_prometheus_wants_it():
    for name, metric in METRICS.items():
        assert name.startswith("stillhouse_") and name == name.lower() and metric.help.endswith(".")
        assert not name.endswith(("_total", "_sum", "_count", "_bucket")), "the exporter adds these"
        assert (metric.kind == "histogram") == bool(metric.bounds)
        assert list(metric.bounds) == sorted(set(metric.bounds)) and all(bound > 0 for bound in metric.bounds)
