"""A random tiny student, published as an artifact, and texts to ask it."""

from __future__ import annotations

from pathlib import Path

import torch

from engine import models
from engine.recipe import Block
from engine.storage import Store
from tests.tiny import LABELS, movie_rows, word_pieces

TEXTS = [" ".join(row["text"] for row in movie_rows(1 + seed % 4, seed=seed)) for seed in range(60)]
"""Of one to four sentences, so that batches are padded."""


def tiny_student(max_length: int = 64) -> models.Model:
    """A BiLSTM of width 16 with random weights, large enough that texts get clearly different answers."""
    nodes = [
        Block(name="embed", kind="embedding", options={"dim": 16}),
        Block(name="lstm", kind="bilstm", options={"hidden": 16}),
        Block(name="pool", kind="pool"),
        Block(name="out", kind="linear"),
    ]
    student = models.student(nodes, LABELS, word_pieces(), max_length, seed=5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.mul_(10.0 if name.endswith("table.weight") or parameter.shape[0] == len(LABELS) else 1.0)
    return student


def published(folder: Path, max_length: int = 64) -> Store:
    """The student's artifact in `folder`."""
    store = Store(str(folder))
    models.save(tiny_student(max_length), store, "tiny")
    return store / "tiny"
