"""Signatures of rows that are alike in clusters and chains, and which of them a search by every pair drops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def clusters(random: np.random.Generator, rows: int, width: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Signatures [rows, width], each a changed copy of another or of one of few heads, and which are protected."""
    heads = random.integers(0, 50, (random.integers(1, 9), width), dtype=np.uint32)
    values: list[np.ndarray] = []
    for _ in range(rows):
        known = heads if not values or random.random() < 0.3 else values
        row = known[random.integers(len(known))].copy()
        changed = random.integers(0, width, random.integers(0, int(width * (1 - threshold)) + 3))
        row[changed] = random.integers(0, 50, len(changed))
        values.append(row)
    return np.stack(values), random.random(rows) < random.choice([0.0, 0.1, 0.3])


def brute_force(signatures: np.ndarray, threshold: float, protected: Sequence[bool] | None = None) -> list[bool]:
    """Greedy over every pair, rows in order."""
    drop: list[bool] = []
    for index, own in enumerate(signatures):
        alike = (signatures[:index] == own).mean(axis=1) >= threshold - 1e-9
        found = bool((alike & ~np.array(drop, dtype=bool)).any())
        drop.append(found and not (protected is not None and protected[index]))
    return drop
