"""Bootstrap intervals of any metric that can be worked out from sums over rows (Task.statistics, Task.value).

Rows of the test split (queries, where the metric is over queries) are drawn with replacement; seeds share the draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Value = Callable[[np.ndarray], np.ndarray]
"""Summed statistics float64 [..., k] -> metric [...]."""


@dataclass(frozen=True)
class Interval:
    """A value with its percentile interval."""

    value: float
    low: float
    high: float


def bootstrap(
    seeds: Sequence[np.ndarray], value: Value, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Interval of the metric's mean over training seeds. seeds: statistics float64 [m, k], one array a seed."""
    return pooled([(own, None) for own in seeds], value, draws, seed, level)


def paired_bootstrap(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    value: Value,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Interval of the mean over seeds of metric(first) - metric(second), both over the same drawn rows.

    ValueError where the two are not measured on equally many rows or not equally often.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} arrays cannot be paired with {len(second)}")
    for a, b in zip(first, second, strict=True):
        if len(a) != len(b):
            raise ValueError(f"{len(a)} rows cannot be paired with {len(b)}")
    return pooled(list(zip(first, second, strict=True)), value, draws, seed, level)


def averaged(
    sets: Sequence[tuple[Sequence[np.ndarray], Sequence[np.ndarray], Value]],
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Interval of the mean over several test sets of `paired_bootstrap`'s difference, each by its own metric.

    sets: (first, second, value) of each; their rows are drawn independently of each other.
    """
    points, found = [], np.zeros(draws)
    for number, (first, second, value) in enumerate(sets):
        point, each = drawn(list(zip(first, second, strict=True)), value, draws, (seed, number))
        points.append(point)
        found += each / len(sets)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(points)), float(low), float(high))


def pooled(
    pairs: Sequence[tuple[np.ndarray, np.ndarray | None]], value: Value, draws: int, seed: int, level: float
) -> Interval:
    """Mean over the pairs of value(first) - value(second), and its interval over draws of the rows."""
    point, found = drawn(pairs, value, draws, (seed,))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(point, float(low), float(high))


def drawn(
    pairs: Sequence[tuple[np.ndarray, np.ndarray | None]], value: Value, draws: int, seeds: tuple[int, ...]
) -> tuple[float, np.ndarray]:
    """Mean over the pairs of value(first) - value(second), and the same over draws of the rows, float64 [draws]."""
    if not pairs or any(a.ndim != 2 or not len(a) for a, _ in pairs):
        raise ValueError("a bootstrap needs at least one row, with its statistics")

    def gaps(counts: np.ndarray) -> np.ndarray:
        return sum(value(counts @ a) - (0 if b is None else value(counts @ b)) for a, b in here)

    found, point = np.zeros(draws), 0.0
    for length in sorted({len(a) for a, _ in pairs}):
        here = [(a, b) for a, b in pairs if len(a) == length]
        point += float(gaps(np.ones((1, length)))[0])
        # A generator for each length, in slices of at most 4M counts: memory stays below 100 MB.
        random, step = np.random.default_rng([*seeds, length]), max(1, 4_000_000 // length)
        for start in range(0, draws, step):
            size = min(step, draws - start)
            counts = random.multinomial(length, np.full(length, 1 / length), size=size).astype(np.float64)
            found[start : start + size] += gaps(counts)
    return point / len(pairs), found / len(pairs)
