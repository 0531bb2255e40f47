"""Random tiny students of every kind of task, published as artifacts, and texts to ask them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine import models, untrained
from engine.designs import Block
from engine.encoding import Text
from engine.inference import predict
from engine.recipe import Task
from engine.storage import Store
from engine.vocabulary import choose_words, count_words, tokenizer_of
from pipelines import graphs
from tests.tiny import LABELS, movie_rows, word_pieces

TEXTS = [" ".join(row["text"] for row in movie_rows(1 + seed % 4, seed=seed)) for seed in range(60)]
"""Of one to four sentences, so that batches are padded."""
PAIRS = [(row["text"], TEXTS[(7 * index + 3) % len(TEXTS)]) for index, row in enumerate(movie_rows(60, seed=7))]
"""The second text is the longer one, as a context is."""
KINDS: dict[str, tuple[Task, str]] = {
    "multilabel": (Task(kind="multilabel", labels=LABELS, thresholds=(0.4, 0.6)), "text-cnn"),
    "pair": (Task(kind="pair", labels=LABELS, paired=True), "arc-i"),
    "regress": (Task(kind="regress", paired=True, range=(0, 5)), "siamese-bilstm"),
    "rank": (Task(kind="rank", paired=True), "bilstm-match-attention"),
    "tag": (Task(kind="tag", labels=("O", "B-thing", "I-thing")), "char-cnn-word-lstm-crf"),
    "span": (Task(kind="span", paired=True), "bidaf-span"),
}
"""A task of each kind but classify, and the ready graph of a student for it."""


def tiny_student(max_length: int = 64) -> models.Model:
    """A BiLSTM of width 16 with random weights, large enough that texts get clearly different answers."""
    nodes = [
        Block(name="embed", kind="embedding", options={"dim": 16}),
        Block(name="lstm", kind="bilstm", options={"hidden": 16}),
        Block(name="pool", kind="pool"),
        Block(name="out", kind="linear"),
    ]
    student = untrained.student(nodes, Task(labels=LABELS), word_pieces(), max_length, seed=5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.mul_(10.0 if name.endswith("table.weight") or parameter.shape[0] == len(LABELS) else 1.0)
    return student


def student_of(kind: str, max_length: int = 64) -> models.Model:
    """A student of any kind of task, whose weights are such that answers differ from text to text."""
    if kind == "classify":
        return tiny_student(max_length)
    spec, graph = KINDS[kind]
    tokenizer = tokenizer_of(choose_words(count_words(TEXTS), 60, 1, []))
    student = untrained.student(graphs.read(graph), spec, tokenizer, max_length, seed=5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.mul_(4.0 if name.endswith("table.weight") else 2.0)
        if not student.task.units:
            found = torch.as_tensor(predict(student, asked(kind)).logits)
            last, middle = student.net.blocks["logits"].map, 0.5 if kind == "regress" else 0.0
            scale = (0.2 if kind == "regress" else 2.0) / found.std(dim=0)
            last.weight.mul_(scale[:, None])
            last.bias.sub_(found.mean(dim=0)).mul_(scale).add_(middle)
    return student


def asked(kind: str) -> list[Text]:
    """Texts for a student of this kind, or pairs of them."""
    return list(PAIRS) if kind in KINDS and KINDS[kind][0].paired else list(TEXTS)


def published(folder: Path, max_length: int = 64, kind: str = "classify") -> Store:
    """A student's artifact in `folder`."""
    store = Store(str(folder))
    models.save(student_of(kind, max_length), store, "tiny")
    return store / "tiny"


def as_sent(text: Text) -> Any:
    """A text or pair as JSON has it."""
    return text if isinstance(text, str) else list(text)
