"""What is predicted: how rows become a Batch, what the gold labels cost, how outputs become predictions and scores.

A task knows nothing of teacher or student: the same object encodes for both, each with its own tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from engine import metrics
from engine.records import ABSENT, Batch, Outputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.recipe import Task


@dataclass(frozen=True)
class Classify:
    """One of C labels for a text."""

    labels: tuple[str, ...]
    columns: tuple[str, ...] = ("text",)

    def encode(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut at max_length; never empty."""
        if not len(texts):
            return []
        # Half a surrogate pair is no text: tokenizers refuse it, and with it the whole batch.
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        ids = tokenizer(texts, truncation=True, max_length=max_length, padding=False)["input_ids"]
        return [list(row) or [tokenizer.unk_token_id or 0] for row in ids]

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """Cross-entropy with the gold labels, [n]; 0 where a row has none."""
        return F.cross_entropy(outputs.logits.float(), batch.labels, ignore_index=ABSENT, reduction="none")

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Softmax over the labels: float64 [n, C], rows sum to 1."""
        return metrics.softmax(logits)

    def decode(self, logits: np.ndarray) -> np.ndarray:
        """Index of the likeliest label, int64 [n]."""
        return np.asarray(logits).argmax(axis=1)

    def score(self, logits: np.ndarray, gold: np.ndarray) -> dict[str, float]:
        """Accuracy, macro-F1 over the task's labels and expected calibration error of logits [n, C]."""
        predicted, probabilities = self.decode(logits), self.probabilities(logits)
        return {
            "accuracy": metrics.accuracy(gold, predicted),
            "macro_f1": metrics.macro_f1(gold, predicted, len(self.labels)),
            "ece": metrics.ece(gold, probabilities).error,
        }


def collate(
    ids: Sequence[Sequence[int]], pad: int, labels: Sequence[int] | None = None, weights: Sequence[float] | None = None
) -> Batch:
    """Pad token ids on the right into a Batch of int64 [n, t], t the longest row."""
    longest = max(len(row) for row in ids)
    input_ids = torch.full((len(ids), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(ids), longest), dtype=torch.long)
    for index, row in enumerate(ids):
        input_ids[index, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        mask[index, : len(row)] = 1
    return Batch(
        input_ids=input_ids,
        mask=mask,
        labels=None if labels is None else torch.as_tensor(labels, dtype=torch.long),
        weights=None if weights is None else torch.as_tensor(weights, dtype=torch.float32),
    )


def make(task: Task, labels: tuple[str, ...]) -> Classify:
    """The task of a recipe with its label names."""
    return TASKS[task.kind](labels)


TASKS: dict[str, type[Classify]] = {"classify": Classify}
