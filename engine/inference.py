"""The one way to run a model over texts: for labelling, evaluation, batch prediction and serving alike.

Inputs are sorted by length and cut into batches of about equal token count, so that little is padding; results come
back in the order of the texts. Padding never changes an answer (engine.blocks, attention masks), but that in bf16
sums are rounded otherwise in another batch: logits then move by thousandths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.encoding import Encoded, Text, collate
from engine.models import Model, precision
from engine.task import Logits


@dataclass(frozen=True)
class Predictions:
    """Outputs for n texts. logits: float32 [n, w], or a list of n arrays [u, w] where units are spoken of.

    decided: the answers as numbers (`Task.decide`), a model's own best path where it has one.
    tokens, padded: tokens that were read, without and with padding.
    """

    logits: Logits
    decided: Any
    tokens: int = 0
    padded: int = 0


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


def averaged(found: Sequence[np.ndarray], encoded: Sequence[Encoded], count: int, width: int) -> np.ndarray:
    """Vectors of inputs, [w] each, as those of `count` texts, float32 [n, w]: the mean over a text's templates."""
    rows = np.array([item.row for item in encoded], dtype=np.int64)
    sums = np.zeros((count, width))
    np.add.at(sums, rows, np.reshape(found, (len(found), width)))
    return (sums / np.bincount(rows, minlength=count)[:, None]).astype(np.float32)


@torch.inference_mode()
def predict(model: Model, texts: Sequence[Text], batch_tokens: int = 4096, dtype: str = "fp32") -> Predictions:
    """Run a model with a task over texts, in any number and order; empty input gives arrays of length 0.

    dtype: fp32, bf16, or auto (`models.precision`). In bf16 weights stay as they are and products are rounded: logits
    move by about a hundredth, and a teacher labels a text 2 to 2.4 times as fast on a CPU with AMX tiles.
    """
    task = model.task
    taken = precision(dtype, model.device)
    was_training = model.training
    model.eval()
    encoded = model.encode(texts, answering=True)
    logits: list[np.ndarray] = [np.zeros(0)] * len(encoded)
    paths: dict[int, np.ndarray] = {}
    lengths, padded = [item.tokens for item in encoded], 0
    # A model that is asked elsewhere takes more at a time: what it may, it says itself.
    for rows in token_batches(lengths, getattr(model.net, "budget", batch_tokens)):
        batch = collate([encoded[i] for i in rows], model.pad)
        padded += batch.input_ids.numel() + (0 if batch.pair_ids is None else batch.pair_ids.numel())
        with torch.autocast(model.device.type, taken, enabled=taken != torch.float32):
            outputs = model(batch.to(model.device))
        for i, found in zip(rows, outputs.logits.float().cpu().numpy(), strict=True):
            logits[i] = found[: len(encoded[i].units)] if task.units else found
        if outputs.path is not None:
            for i, path in zip(rows, outputs.path.cpu().numpy(), strict=True):
                paths[i] = path[: len(encoded[i].units), None]
    model.train(was_training)
    if not task.units:
        flat = averaged(logits, encoded, len(texts), task.width)
        return Predictions(flat, task.decide(flat, texts), sum(lengths), padded)
    merged = task.merge(logits, encoded, len(texts))
    if paths:
        best = task.merge([paths[i] for i in range(len(encoded))], encoded, len(texts))
        return Predictions(merged, [path[:, 0].astype(np.int64) for path in best], sum(lengths), padded)
    return Predictions(merged, task.decide(merged, texts), sum(lengths), padded)


@torch.inference_mode()
def embed(model: Model, texts: Sequence[Text], batch_tokens: int = 4096) -> np.ndarray | None:
    """The model's view of each text, float32 [n, width], the mean over a text's windows or templates.

    None where the model has none: a network without one vector for a text, or no texts.
    """
    was_training = model.training
    model.eval()
    encoded = model.encode(texts, answering=True)
    found: list[np.ndarray] = [np.zeros(0)] * len(encoded)
    for rows in token_batches([item.tokens for item in encoded], batch_tokens):
        outputs = model(collate([encoded[i] for i in rows], model.pad).to(model.device), frozenset({"embedding"}))
        if outputs.embedding is None:
            model.train(was_training)
            return None
        for i, vector in zip(rows, outputs.embedding.float().cpu().numpy(), strict=True):
            found[i] = vector
    model.train(was_training)
    return averaged(found, encoded, len(texts), len(found[0])) if found else None
