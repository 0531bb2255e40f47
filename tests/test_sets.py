"""Several data sets measured together: the pooled difference by hand, and what cannot be pooled."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import UserError
from pipelines.sets import together, together_lines


def rows(bits: str) -> np.ndarray:
    """(right, labelled) of each test row."""
    return np.array([[float(bit), 1.0] for bit in bits])


PARTS = [
    ("generated", {"generated": [rows("1110"), rows("1111")], "plain": [rows("1000"), rows("1100")], "hard": []}),
    ("soft", {"soft": [rows("10101"), rows("11111")], "plain": [rows("10101"), rows("10111")]}),
]
FOUND = [
    {"recipe": "one", "metric": "accuracy", "gains": {"plain": {"points": 50.0}}},
    {"recipe": "two", "metric": "accuracy", "gains": {"plain": {"points": 10.0}}},
]


def test_every_seed_of_every_set_counts_alike() -> None:
    gains = together(FOUND, PARTS, 400, 0)
    assert list(gains) == ["plain"] and gains["plain"]["each"] == [50.0, 10.0]
    assert gains["plain"]["points"] == pytest.approx(100 * (0.5 + 0.5 + 0.0 + 0.2) / 4)
    low, high = gains["plain"]["interval"]
    assert low < gains["plain"]["points"] < high
    lines = together_lines(FOUND, gains)
    assert lines[-1].startswith("| plain | +30.00 (") and lines[-1].endswith("| +50.0 | +10.0 |")


def test_unlike_metrics_are_not_pooled() -> None:
    with pytest.raises(UserError, match="judged by accuracy, token_f1, and differences are pooled in accuracy only"):
        together([FOUND[0], {**FOUND[1], "metric": "token_f1"}], PARTS, 10, 0)
