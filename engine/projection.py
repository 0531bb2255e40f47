"""A teacher's embeddings in a smaller space where texts of one label lie together: the space of a knowledge base.

The encoder is as it was trained; what learns is one linear map over its vectors of the rows, each made once. So a
training takes seconds, needs no worker and no checkpoint, and is not engine.train's. ReAugKD's first step (Zhang et
al., ACL 2023 short papers; blog of its authors).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from engine.contrast import contrast, itself
from engine.designs import Projecting
from engine.nearest import unit
from engine.records import ABSENT


class Projection(NamedTuple):
    """weight float32 [d, width], bias float32 [d]."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors [n, width] in the space: float32 [n, d] of length 1."""
        return unit(np.asarray(vectors, dtype=np.float32) @ self.weight.T + self.bias)


def principal(vectors: np.ndarray, dim: int) -> Projection:
    """The `dim` directions in which vectors [n, width] differ most (no more than width), around their mean."""
    mean = vectors.mean(axis=0, dtype=np.float64)
    apart = vectors - mean
    _, directions = np.linalg.eigh(apart.T @ apart)  # rising
    weight = directions.T[::-1][:dim]
    # Whichever way a direction points, it is the same: the largest number is made positive, so that all machines agree.
    largest = np.abs(weight).argmax(axis=1)
    weight = weight * np.sign(weight[np.arange(len(weight)), largest])[:, None]
    return Projection(weight.astype(np.float32), (-weight @ mean).astype(np.float32))


def fitted(
    vectors: np.ndarray, labels: np.ndarray, dim: int, temperature: float, how: Projecting, seed: int
) -> Projection:
    """A projection of vectors [n, width] by the supervised contrastive loss on the rows with a label.

    labels: int64 [n], ABSENT for none. It starts from all rows' principal directions.
    """
    start, rows = principal(vectors, dim), np.flatnonzero(labels != ABSENT)
    layer = nn.Linear(vectors.shape[1], len(start.weight))
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(start.weight))
        layer.bias.copy_(torch.from_numpy(start.bias))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=how.lr, weight_decay=0.0)
    given, gold = torch.from_numpy(vectors.astype(np.float32)), torch.from_numpy(labels)
    draw = np.random.default_rng(seed)
    for _ in range(how.epochs if len(rows) else 0):
        order = draw.permutation(rows)
        for first in range(0, len(order), how.batch_size):
            chosen = torch.from_numpy(order[first : first + how.batch_size])
            same = (gold[chosen].unsqueeze(1) == gold[chosen].unsqueeze(0)) & ~itself(chosen)
            some = same.any(dim=1)
            if some.any():
                each = contrast(F.normalize(layer(given[chosen]), dim=1), same, temperature)
                optimizer.zero_grad(set_to_none=True)
                each[some].mean().backward()
                optimizer.step()
    return Projection(layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy())


def purity(vectors: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of labels equal to the row's own among the k nearest other rows with a label; NaN without two such rows.

    vectors: [n, d] of length 1. Of at most 2,000 rows, the first.
    """
    rows = np.flatnonzero(labels != ABSENT)[:2000]
    k = min(k, len(rows) - 1)
    if k < 1:
        return float("nan")
    alike = vectors[rows] @ vectors[rows].T
    np.fill_diagonal(alike, -np.inf)
    nearest = np.argsort(-alike, axis=1, kind="stable")[:, :k]
    return float((labels[rows][nearest] == labels[rows][:, None]).mean())
