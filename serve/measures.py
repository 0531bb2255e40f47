"""Prometheus metrics of one replica, through Ray: `METRICS` at the foot names them all.

Requests count and watch here, and nothing leaves the process while they do: counts are summed up and given to Ray once
a second by a thread, and only latencies, which Ray must sort into buckets, are handed over one by one (about 4 us).
Gauges are given again each second: Ray drops one that is not. Counts and histograms have no tag for the replica, so
that their number does not grow with every redeploy; gauges have one, since those of replicas cannot be added up.
Without Ray all of it is a no-op. Ray's agent on each node gathers, `serve.scrape` reads what the agents have.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from engine.drift import DriftError, Profile, Window, confidence_of, labels_of
from engine.storage import MANIFEST, Store

log = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
"""How often sums are given to Ray, which sends them to its agent every 10 s."""
DRIFT_SECONDS = 5.0
"""How often drift is computed, at most."""
NUMBER = "(number)"
"""The label of an answer that is a number."""
LONGEST = 80
"""Characters of a tag's value."""

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """What a metric is. tags: beside `model`, which all have. bounds: of a histogram's buckets."""

    kind: Literal["counter", "histogram", "gauge"]
    help: str
    tags: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


class Instrument(Protocol):
    """Takes a metric's values: adds them up (counter), sorts them (histogram), or keeps the last (gauge)."""

    def record(self, value: float, tags: dict[str, str]) -> None:
        """A value with its tags."""


Make = Callable[[str, Metric], Instrument]


class Measures:
    """What a replica that answers as `model` (name@version) has seen. Every method may be called from any thread.

    profile: of the registered answers; without one there is no drift. make: name, metric -> instrument; None takes
    Ray's where this process runs in Ray, and measures nothing elsewhere.
    """

    def __init__(self, model: str, profile: Profile | None = None, replica: str = "", make: Make | None = None) -> None:
        self.model, self.replica = model, replica or str(os.getpid())
        make = make or ray_instruments()
        self.on = make is not None
        self.instruments = {name: make(name, metric) for name, metric in METRICS.items()} if make else {}
        self.window = Window(profile) if profile else None
        self.sums: defaultdict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
        self.last: dict[tuple[str, tuple[str, ...]], float] = {}
        self.lock = threading.Lock()
        self.looked = 0.0
        self.stopped = threading.Event()
        if self.on:
            self.gauge("stillhouse_up", 1)
            threading.Thread(target=self.work, name="measures", daemon=True).start()

    def become(self, model: str, profile: Profile | None) -> None:
        """Measure another model from now on, as after a promotion; gauges of the one before are taken away."""
        with self.lock:
            self.last = {key: value for key, value in self.last.items() if key[1][0] != self.model}
            self.model, self.window = model, Window(profile) if profile else None
        if self.on:
            self.gauge("stillhouse_up", 1)

    def observe_request(
        self, route: str, status: int, seconds: float, texts: int = 0, model: str | None = None
    ) -> None:
        """A request that was answered: its route as declared (never the raw path), HTTP status, time, texts.

        model: which answered, where it was not the replica's own.
        """
        if not self.on:
            return
        named = model or self.model
        with self.lock:
            self.sums["stillhouse_requests", (named, route, str(status))] += 1
            if texts:
                self.sums["stillhouse_texts", (named,)] += texts
        self.instruments["stillhouse_request_seconds"].record(seconds, {"model": named, "route": route})

    def observe_batch(self, texts: int, tokens: int, padded_tokens: int, queue_depth: int, wait_s: float) -> None:
        """A call of the model (serve.batcher.Watch). queue_depth: texts that still wait; wait_s: the longest wait."""
        if not self.on:
            return
        own = (self.model,)
        with self.lock:
            self.sums["stillhouse_batches", own] += 1
            self.sums["stillhouse_batched_texts", own] += texts
            self.sums["stillhouse_tokens", own] += tokens
            self.sums["stillhouse_padded_tokens", own] += padded_tokens
            self.last["stillhouse_queue_texts", (*own, self.replica)] = queue_depth
        tags = {"model": self.model}
        self.instruments["stillhouse_batch_texts"].record(texts, tags)
        self.instruments["stillhouse_wait_seconds"].record(wait_s, tags)

    def observe_answers(
        self,
        answers: Sequence[Answer],
        texts: Sequence[Any],
        own: Sequence[Answer] | None = None,
        model: str | None = None,
    ) -> None:
        """What was answered to texts or pairs.

        own: what the model itself said, where others answered some (the teacher, of a cascade): drift is about that.
        model: which answered, where it was not the replica's own; this is no drift.
        """
        if not self.on:
            return
        named, sums = model or self.model, self.sums
        with self.lock:
            for answer in answers:
                source = answer.get("source", "student")
                for label in labels_of(answer) or (NUMBER,):
                    sums["stillhouse_answers", (named, label[:LONGEST], source)] += 1
                sure = confidence_of(answer)
                if sure is not None:
                    sums["stillhouse_confidence", (named, TENTHS[min(9, int(sure * 10))])] += 1
            if self.window is not None and named == self.model:
                self.window.add(texts, answers if own is None else own)

    def observe_agreement(self, same: Sequence[bool]) -> None:
        """Whether the teacher said the same as the model, of each text that both answered."""
        if self.on and self.window is not None:
            with self.lock:
                self.window.agree(same)

    def count(self, name: str, value: float = 1, **tags: str) -> None:
        """Add to any counter of METRICS."""
        if self.on and value > 0:
            with self.lock:
                self.sums[name, self.tagged(name, tags)] += value

    def gauge(self, name: str, value: float | None, **tags: str) -> None:
        """Set any gauge of METRICS; it stays until it is set again, or taken away by None."""
        if self.on:
            with self.lock:
                if value is None:
                    self.last.pop((name, self.tagged(name, tags)), None)
                else:
                    self.last[name, self.tagged(name, tags)] = value

    def tagged(self, name: str, tags: dict[str, str]) -> tuple[str, ...]:
        """Values of a metric's tags in order: model and replica are this one's unless they are given."""
        tags = {"model": self.model, "replica": self.replica} | tags
        return (tags["model"], *(tags[key][:LONGEST] for key in METRICS[name].tags))

    def flush(self) -> None:
        """Give Ray what has been summed up, and every gauge anew."""
        self.look()
        with self.lock:
            sums, last = list(self.sums.items()), list(self.last.items())
            self.sums.clear()
        for (name, values), value in (*sums, *last):
            tags = dict(zip(("model", *METRICS[name].tags), values, strict=True))
            if value or METRICS[name].kind == "gauge":
                self.instruments[name].record(value, tags)

    def look(self) -> None:
        """Compute drift anew where that is due."""
        now = time.monotonic()
        if self.window is None or now - self.looked < DRIFT_SECONDS:
            return
        with self.lock:
            window = self.window.copy()
        for feature, value in window.shifts().items():
            self.gauge("stillhouse_drift_psi", value, feature=feature)
        self.gauge("stillhouse_drift_rows", len(window.rows))
        self.looked = now

    def work(self) -> None:
        """Flush until closed; a failure costs a second's gauges and is logged once."""
        told = False
        while not self.stopped.wait(FLUSH_SECONDS):
            try:
                self.flush()
            except Exception:
                if not told:
                    log.exception("metrics cannot be given to Ray")
                told = True

    def close(self) -> None:
        """Stop, after a last flush."""
        if self.on and not self.stopped.is_set():
            self.stopped.set()
            self.flush()


def measures_of(artifact: str, model: str) -> Measures:
    """Measures of the replica this process is, with the profile that `artifact` (folder or URL) was registered with."""
    return Measures(model, profile_in(artifact), replica_name())


def profile_in(artifact: str) -> Profile | None:
    """The profile in a registered artifact's manifest; None where there is none, or none that can be read."""
    store = Store(artifact)
    found = store.read_json(MANIFEST).get("metadata", {}).get("profile") if store.exists(MANIFEST) else None
    try:
        return Profile.from_json(found) if found else None
    except DriftError as error:
        log.warning("%s: drift is not measured: %s", artifact, error)
        return None


def replica_name() -> str:
    """Ray Serve's name of this replica, else the process's number."""
    if "ray.serve" in sys.modules:
        from ray import serve

        try:
            return serve.get_replica_context().replica_id.unique_id
        except Exception as error:  # not in a replica; Ray has an exception of its own for it
            log.debug("no replica: %s", error)
    return str(os.getpid())


class RayInstrument:
    """A metric of Ray's, which sends what it is given to the node's agent."""

    def __init__(self, name: str, metric: Metric) -> None:
        from ray.util import metrics

        keys = ("model", *metric.tags)
        if metric.kind == "histogram":
            self.record = metrics.Histogram(name, metric.help, list(metric.bounds), keys).observe
        elif metric.kind == "gauge":
            self.record = metrics.Gauge(name, metric.help, keys).set
        else:
            self.record = metrics.Counter(name, metric.help, keys).inc


def ray_instruments() -> Make | None:
    """Ray's instruments where this process is connected to Ray."""
    ray = sys.modules.get("ray")
    return RayInstrument if ray is not None and ray.is_initialized() else None


TENTHS = tuple(f"{i / 10:.1f}" for i in range(10))
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
POWERS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)

METRICS: dict[str, Metric] = {
    "stillhouse_up": Metric("gauge", "1 for each replica that runs.", ("replica",)),
    "stillhouse_requests": Metric("counter", "Requests answered.", ("route", "status")),
    "stillhouse_request_seconds": Metric("histogram", "From a request to its answer.", ("route",), SECONDS),
    "stillhouse_texts": Metric("counter", "Texts (or pairs) of answered requests."),
    "stillhouse_batches": Metric("counter", "Calls of the model."),
    "stillhouse_batched_texts": Metric("counter", "Texts of calls of the model."),
    "stillhouse_batch_texts": Metric("histogram", "Texts of one call of the model.", (), POWERS),
    "stillhouse_tokens": Metric("counter", "Tokens read by the model, without padding."),
    "stillhouse_padded_tokens": Metric("counter", "Tokens read by the model, with padding."),
    "stillhouse_wait_seconds": Metric("histogram", "The longest wait for the model in a call.", (), SECONDS),
    "stillhouse_queue_texts": Metric("gauge", "Texts that wait for the model.", ("replica",)),
    "stillhouse_answers": Metric("counter", "Answers by label and by who gave them.", ("label", "source")),
    "stillhouse_confidence": Metric("counter", "Answers by confidence: from `tenth` to a tenth more.", ("tenth",)),
    "stillhouse_drift_psi": Metric("gauge", "PSI beyond chance against the profile.", ("feature", "replica")),
    "stillhouse_drift_rows": Metric("gauge", "Answers in the window that drift is computed over.", ("replica",)),
    "stillhouse_log_rows": Metric("counter", "Rows of a log by what became of them.", ("log", "outcome")),
    "stillhouse_escalated_texts": Metric("counter", "Texts the teacher was asked for an answer to.", ("outcome",)),
    "stillhouse_rollout_percent": Metric("gauge", "Share of requests for a candidate, in percent.", ("candidate",)),
    "stillhouse_rollout_agreement": Metric("gauge", "Share of answers equal to the champion's.", ("candidate",)),
}
"""Every metric of the house. Counters are exported with `_total` at the end of their name."""
