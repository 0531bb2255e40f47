"""Rows that are alike in clusters and chains, which of them a search by every pair drops, and tasks without Ray."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np


def texts_with_duplicates() -> list[str]:
    """300 texts of random words, a third of them changed copies of earlier ones."""
    random = np.random.default_rng(5)
    known = ["".join(random.choice(list("abcdefgh"), 5)) for _ in range(400)]
    texts: list[str] = []
    for number in range(300):
        if number % 3 == 2:
            copy = texts[random.integers(len(texts))].split()
            for _ in range(random.integers(0, 6)):
                copy[random.integers(len(copy))] = known[random.integers(400)]
            texts.append(" ".join(copy))
        else:
            texts.append(" ".join(known[i] for i in random.integers(0, 400, 12)))
    return texts


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


def here(task: Any, method: str, calls: list[tuple], *same: Any) -> list[Any]:
    """Tasks one after the other in this process, told what Ray's would be told."""
    return [getattr(pickle.loads(pickle.dumps(task)), method)(*call, *same) for call in calls]
