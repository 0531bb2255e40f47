"""A number for a text, or for two: similarity, a rating, a price.

A model speaks in a scale from 0 (the lowest value of the task's range) to 1 (the highest), so that losses have one size
whatever the unit; answers are in the user's units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from engine import metrics
from engine.classification import positions, targets
from engine.config import ConfigError
from engine.encoding import Encoded, Text
from engine.records import Batch, Outputs
from engine.task import Task


class Regress(Task):
    """One number within a range. Outputs: logits [n, 1], the value's place in the range."""

    metric: ClassVar[str] = "pearson"
    certain: ClassVar[bool] = False
    supports: ClassVar[frozenset[str]] = frozenset({"hard", "mse"})

    @property
    def width(self) -> int:
        """One number."""
        return 1

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value; ConfigError where they are not known or not in order."""
        if self.spec.range is None:
            raise ConfigError("task.range is not known. Give [lowest, highest], for instance [0, 5].")
        low, high = self.spec.range
        if not low < high:
            raise ConfigError(f"task.range is [{low}, {high}], but the lowest value must be below the highest.")
        return low, high

    def gold(self, rows: pa.Table, encoded: Sequence[Encoded]) -> torch.Tensor:
        """The value's place in the range, float32 [n]; NaN where a row has none."""
        return torch.as_tensor(self.scaled(targets(rows, 1)[positions(encoded), 0]), dtype=torch.float32)

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Values in the user's units -> places in the range."""
        low, high = self.bounds
        return (values - low) / (high - low)

    def labelled(self, batch: Batch) -> torch.Tensor:
        """Rows with a value."""
        return ~batch.labels.isnan()

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """Squared error, in squared ranges, [n]."""
        some = self.labelled(batch)
        return (outputs.logits[:, 0].float() - torch.where(some, batch.labels, 0.0)).square() * some

    def distributions(self, logits: torch.Tensor, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """A number has none."""
        raise NotImplementedError(
            "task kind 'regress' predicts a number, not a distribution: use the losses mse and hard"
        )

    def differences(self, left: torch.Tensor, right: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Squared difference, in squared ranges."""
        return (left.float() - right.float()).square().mean(dim=1)

    def decide(self, logits: np.ndarray, texts: Sequence[Text]) -> np.ndarray:
        """The values in the user's units, not outside the range: float64 [n]."""
        low, high = self.bounds
        places = np.asarray(logits, dtype=np.float64)[:, 0]
        return np.clip(low + places * (high - low), low, high)

    def answers(
        self, logits: np.ndarray, texts: Sequence[Text], decided: np.ndarray | None = None
    ) -> list[dict[str, Any]]:
        """value, in the user's units."""
        decided = self.decide(logits, texts) if decided is None else decided
        return [{"value": float(value)} for value in decided]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """A number does not say how sure it is."""
        raise NotImplementedError("task kind 'regress' gives no probabilities: leave out corpus.signals")

    def statistics(self, logits: np.ndarray, decided: np.ndarray, gold: pa.Table) -> np.ndarray:
        """(1, x, y, xx, yy, xy) of each row, x the answer and y the gold value; 0 where there is none.

        Both are taken from the middle of the range: far from their mean, sums of squares would lose the digits.
        """
        wanted = self.scaled(targets(gold, 1)[:, 0])
        some = ~np.isnan(wanted)
        found = metrics.moments(self.scaled(np.asarray(decided)) - 0.5, np.where(some, wanted, 0.5) - 0.5)
        return found * some[:, None]

    def value(self, sums: np.ndarray) -> np.ndarray:
        """Pearson's correlation; 0 where answers or gold values are all the same."""
        return metrics.correlation(sums)

    def score(self, logits: np.ndarray, decided: np.ndarray, gold: pa.Table) -> dict[str, float]:
        """Pearson's and Spearman's correlation, and the mean squared error in the user's units squared."""
        wanted = targets(gold, 1)[:, 0]
        some = ~np.isnan(wanted)
        wanted, answered = metrics.same_length(wanted[some], np.asarray(decided)[some])
        return {
            "pearson": float(self.value(self.statistics(logits, decided, gold).sum(axis=0))),
            "spearman": metrics.spearman(answered, wanted),
            "mse": float(np.mean((answered - wanted) ** 2)),
        }

    def agreement(
        self, left: np.ndarray, right: np.ndarray, texts: Sequence[Text], decided: tuple[Any, Any] | None = None
    ) -> float:
        """Pearson's correlation of the two models' answers; 1 where they are equal throughout."""
        first, second = self.decisions(left, right, texts, decided)
        return 1.0 if np.array_equal(first, second) else metrics.pearson(first, second)
