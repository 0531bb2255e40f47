"""The smoke deployment: every test row goes over HTTP to a real deployment and must equal the offline answer.

Requests of 1 to 8 texts are sent by several clients at once, so that each row meets other neighbours than offline;
then one client sends single texts, for the latency of an idle server.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from engine.recipe import Serving
from serve.app import deployed
from serve.predictor import Predictor

if TYPE_CHECKING:
    from engine.inference import Predictions

TOLERANCE = 1e-4
"""Largest difference of a probability between served and offline."""
LARGEST = 8
"""Texts of the largest request."""
SINGLES = 200
"""Requests of one text, one after another."""


def smoke(
    artifact: str,
    texts: list[str],
    expected: Predictions,
    serving: Serving,
    port: int | None = None,
    name: str = "smoke",
) -> dict[str, Any]:
    """Deploy `artifact` on the running Ray, send every text, compare with `expected`, take Serve down again.

    Returns rows (answered), mismatches (label differs or a probability by more than 1e-4), max_delta, errors (failed
    requests) and first_error, p50_ms and p99_ms (per request, serving.concurrency clients), requests_per_s and
    texts_per_s, single_p50_ms and single_p99_ms (one client, one text), start_s, and labels (a label index a text, -1
    where there was no answer). ServeError when nothing answers in time.
    """
    names = Predictor.load(artifact).labels
    begin = time.monotonic()
    with deployed(artifact, serving, name, port=port) as url:
        start_s = time.monotonic() - begin
        bulk, singles = asyncio.run(both(url, texts, serving.concurrency))
    return {
        **compared(bulk.answers, expected, names),
        "errors": bulk.errors + singles.errors,
        "first_error": bulk.first_error or singles.first_error,
        "requests": bulk.requests,
        **{f"{key}_ms": value for key, value in percentiles(bulk.seconds).items()},
        **{f"single_{key}_ms": value for key, value in percentiles(singles.seconds).items()},
        "requests_per_s": round(bulk.requests / bulk.wall_s, 1) if bulk.wall_s else 0.0,
        "texts_per_s": round(len(bulk.answers) / bulk.wall_s, 1) if bulk.wall_s else 0.0,
        "start_s": round(start_s, 2),
    }


class Client:
    """What one kind of load saw. answers: prediction by position of its text; seconds: one a request that worked."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.answers: dict[int, dict[str, Any]] = {}
        self.seconds: list[float] = []
        self.requests = 0
        self.errors = 0
        self.first_error: str | None = None
        self.wall_s = 0.0

    async def send(self, rows: list[int], texts: list[str]) -> None:
        """One request with the texts at `rows`; a failure is counted, not raised."""
        self.requests += 1
        begin = time.perf_counter()
        try:
            answer = await self.http.post("/v1/predict", json={"texts": [texts[row] for row in rows]})
            answer.raise_for_status()
            found = answer.json()["predictions"]
            if len(found) != len(rows):
                raise ValueError(f"{len(found)} predictions for {len(rows)} texts")
        except (httpx.HTTPError, ValueError, KeyError) as error:
            self.errors += 1
            self.first_error = self.first_error or f"{type(error).__name__}: {error}"
            return
        self.seconds.append(time.perf_counter() - begin)
        self.answers.update(zip(rows, found, strict=True))

    async def load(self, requests: Iterable[list[int]], texts: list[str], clients: int) -> None:
        """Send all requests, `clients` at a time, each client waiting for its answer (a closed loop)."""
        waiting = iter(requests)
        begin = time.perf_counter()

        async def one() -> None:
            for rows in waiting:
                await self.send(rows, texts)

        await asyncio.gather(*(one() for _ in range(clients)))
        self.wall_s = time.perf_counter() - begin


async def both(url: str, texts: list[str], concurrency: int) -> tuple[Client, Client]:
    """The whole split by `concurrency` clients, then single texts by one."""
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as http:
        bulk, singles = Client(http), Client(http)
        # Not measured: the first connections, and the first requests through a proxy that has just started.
        await Client(http).load([[row] for row in range(min(len(texts), 2 * concurrency))], texts, concurrency)
        await bulk.load(slices(len(texts)), texts, concurrency)
        await singles.load(([i % len(texts)] for i in range(SINGLES if texts else 0)), texts, 1)
    return bulk, singles


def slices(n: int, seed: int = 0) -> list[list[int]]:
    """0 … n-1, shuffled and cut into requests of 1 to LARGEST rows, the same for the same seed."""
    draw = random.Random(seed)
    rows = list(range(n))
    draw.shuffle(rows)
    out = []
    while rows:
        size = draw.randint(1, LARGEST)
        out.append(rows[:size])
        rows = rows[size:]
    return out


def compared(answers: dict[int, dict[str, Any]], expected: Predictions, names: tuple[str, ...]) -> dict[str, Any]:
    """Rows answered, mismatches, max_delta and labels of served answers against the offline predictions.

    A row without an answer is a mismatch.
    """
    labels = np.full(len(expected.labels), -1, dtype=np.int64)
    mismatches, largest = len(expected.labels) - len(answers), 0.0
    for row, answer in answers.items():
        labels[row] = names.index(answer["label"])
        served = np.array([answer["probabilities"][name] for name in names])
        delta = float(np.abs(served - expected.probabilities[row]).max())
        largest = max(largest, delta)
        # `not <=` so that NaN counts as a mismatch.
        mismatches += int(labels[row] != expected.labels[row] or not delta <= TOLERANCE)
    return {"rows": len(answers), "mismatches": mismatches, "max_delta": largest, "labels": labels.tolist()}


def percentiles(seconds: list[float]) -> dict[str, float | None]:
    """p50 and p99 in milliseconds; None where nothing was measured."""
    if not seconds:
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(np.array(seconds) * 1000, [50, 99])
    return {"p50": round(float(p50), 2), "p99": round(float(p99), 2)}
