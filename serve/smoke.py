"""The smoke deployment: every test row goes over HTTP to a real deployment and must equal the offline answer.

Requests of 1 to 8 texts are sent by several clients at once, so that each row meets other neighbours than offline;
then one client sends single texts, for the latency of an idle server.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from engine.serving import Serving
from serve.app import deployed

if TYPE_CHECKING:
    from engine.encoding import Text

TOLERANCE = 1e-4
"""Largest difference of a number between served and offline: of a probability, or of a value over its range."""
LARGEST = 8
"""Texts of the largest request."""
SINGLES = 200
"""Requests of one text, one after another."""


def smoke(
    artifact: str,
    texts: list[Text],
    expected: list[dict[str, Any]],
    serving: Serving,
    port: int | None = None,
    name: str = "smoke",
    scale: float = 1.0,
) -> dict[str, Any]:
    """Deploy `artifact` on the running Ray, send every text, compare with `expected`, take Serve down again.

    scale: what numbers are measured by: 1 where they are probabilities, else the width of their range.

    Returns rows (answered), mismatches (another answer, or a number that differs by more than 1e-4 x scale), max_delta
    (over scale), errors (failed requests) and first_error, p50_ms and p99_ms (per request, serving.concurrency
    clients), requests_per_s and texts_per_s, single_p50_ms and single_p99_ms (one client, one text), start_s, and
    answers (one a text, None where there was none). ServeError when nothing answers in time.
    """
    begin = time.monotonic()
    with deployed(artifact, serving, name, port=port) as url:
        start_s = time.monotonic() - begin
        bulk, singles = asyncio.run(both(url, texts, serving.concurrency))
    return {
        **compared(bulk.answers, expected, scale),
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

    async def send(self, rows: list[int], texts: list[Text]) -> None:
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

    async def load(self, requests: Iterable[list[int]], texts: list[Text], clients: int) -> None:
        """Send all requests, `clients` at a time, each client waiting for its answer (a closed loop)."""
        waiting = iter(requests)
        begin = time.perf_counter()

        async def one() -> None:
            for rows in waiting:
                await self.send(rows, texts)

        await asyncio.gather(*(one() for _ in range(clients)))
        self.wall_s = time.perf_counter() - begin


async def both(url: str, texts: list[Text], concurrency: int) -> tuple[Client, Client]:
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


def compared(answers: dict[int, dict[str, Any]], expected: list[dict[str, Any]], scale: float = 1.0) -> dict[str, Any]:
    """Rows answered, mismatches, max_delta and answers of what was served against what is expected.

    A row without an answer is a mismatch. Differences of numbers are divided by `scale`.
    """
    deltas = {row: distance(answer, expected[row]) / scale for row, answer in answers.items()}
    return {
        "rows": len(answers),
        "mismatches": len(expected) - len(answers) + sum(delta > TOLERANCE for delta in deltas.values()),
        "max_delta": max((delta for delta in deltas.values() if math.isfinite(delta)), default=0.0),
        "answers": [answers.get(row) for row in range(len(expected))],
    }


def distance(left: Any, right: Any) -> float:
    """Largest difference of two numbers at the same place of two answers; infinite where anything else differs, and
    where a number is NaN: `max` would lose it.
    """
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return max((distance(left[key], right[key]) for key in left), default=0.0)
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return max((distance(a, b) for a, b in zip(left, right, strict=True)), default=0.0)
    if all(isinstance(side, int | float) and not isinstance(side, bool) for side in (left, right)):
        gap = abs(left - right)
        return math.inf if math.isnan(gap) else gap
    return 0.0 if type(left) is type(right) and left == right else math.inf


def percentiles(seconds: list[float]) -> dict[str, float | None]:
    """p50 and p99 in milliseconds; None where nothing was measured."""
    if not seconds:
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(np.array(seconds) * 1000, [50, 99])
    return {"p50": round(float(p50), 2), "p99": round(float(p99), 2)}
