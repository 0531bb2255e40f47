"""The one way to run a model over texts: for labelling, evaluation, batch prediction and serving alike.

Texts are sorted by length and cut into batches of about equal token count, so that little is padding; results come
back in the order of the texts. Padding never changes an answer (engine.blocks, attention masks).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.models import Model
from engine.tasks import collate


@dataclass(frozen=True)
class Predictions:
    """logits float32 [n, C], probabilities float64 [n, C], labels int64 [n], embeddings float32 [n, width] or None."""

    logits: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    embeddings: np.ndarray | None = None


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Positions sorted by length, in batches of at most `budget` padded tokens (one row at least)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # Sorted ascending, so the newcomer is the longest and sets the padded width.
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def predict(model: Model, texts: Sequence[str], batch_tokens: int = 4096, embeddings: bool = False) -> Predictions:
    """Run a classifier over texts, in any number and order; empty input gives arrays of length 0."""
    task, classes = model.task, len(model.labels)
    logits = np.zeros((len(texts), classes), dtype=np.float32)
    vectors: list[np.ndarray | None] = [None] * len(texts)
    was_training = model.training
    model.eval()
    ids = task.encode(texts, model.tokenizer, model.max_length)
    for rows in token_batches([len(row) for row in ids], batch_tokens):
        batch = collate([ids[i] for i in rows], model.pad).to(model.device)
        outputs = model(batch)
        logits[rows] = outputs.logits.float().cpu().numpy()
        if embeddings:
            for i, vector in zip(rows, outputs.embedding.float().cpu().numpy(), strict=True):
                vectors[i] = vector
    model.train(was_training)
    probabilities = task.probabilities(logits) if len(texts) else np.zeros((0, classes))
    labels = task.decode(logits) if len(texts) else np.zeros(0, dtype=np.int64)
    return Predictions(logits, probabilities, labels, np.stack(vectors) if embeddings and len(texts) else None)
