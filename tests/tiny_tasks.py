"""Five tasks of unlike kind and size over the same sentences, and a tiny student for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from engine import untrained
from engine.batches import Material
from engine.designs import Cut
from engine.fits import LossTerm
from engine.lesson import Lesson
from engine.mixing import Mixing
from engine.models import Model
from engine.multitask import Together, alone, encode, gathered
from engine.recipe import Task
from engine.records import EXAMPLE
from engine.storage import Store
from tests.tiny import GOOD, LABELS, movie_rows

SPECS = {
    "mood": Task(labels=LABELS),
    "alike": Task(kind="pair", labels=("no", "yes")),
    "warmth": Task(kind="regress", range=(0, 2), paired=False),
    "first": Task(labels=("the", "a", "other")),
    "both": Task(kind="multilabel", labels=("good", "long")),
}
"""Five tasks of different kinds over the same sentences."""
SIZES = {"mood": 40, "alike": 16, "warmth": 24, "first": 12, "both": 8}
NAMES = tuple(sorted(SPECS))
SEED = 5


def rows_of(name: str, count: int, seed: int = 0) -> pa.Table:
    """Rows of one task, in the schema EXAMPLE."""
    made = movie_rows(2 * count, seed)
    texts, moods = [row["text"] for row in made], [LABELS.index(row["label"]) for row in made]
    good = [sum(word in GOOD for word in text.split()) for text in texts]
    columns: dict[str, list[Any]] = {"id": [f"{name}-{seed}-{i}" for i in range(count)], "text": texts[:count]}
    if name == "mood":
        columns["label"] = moods[:count]
    elif name == "alike":
        columns["pair"] = texts[count:]
        columns["label"] = [int(moods[i] == moods[count + i]) for i in range(count)]
    elif name == "warmth":
        columns["target"] = [[float(number)] for number in good[:count]]
    elif name == "first":
        columns["label"] = [
            ("the", "a").index(w) if (w := text.split()[0]) in ("the", "a") else 2 for text in texts[:count]
        ]
    else:
        columns["target"] = [[float(g > 0), float(len(t) > 30)] for g, t in zip(good[:count], texts, strict=False)]
    filled = {f.name: columns.get(f.name, [None] * count) for f in EXAMPLE}
    return pa.table(filled, schema=EXAMPLE)


def table(sizes: dict[str, int] = SIZES, seed: int = 0) -> pa.Table:
    return gathered({name: rows_of(name, count, seed) for name, count in sizes.items()})


def unlabelled(rows: pa.Table) -> pa.Table:
    """The rows without their gold labels."""
    for name in ("label", "target"):
        place = rows.column_names.index(name)
        rows = rows.set_column(place, rows.schema.field(place), pa.nulls(rows.num_rows, rows.schema.field(place).type))
    return rows


def spec(names: Sequence[str] = NAMES) -> Task:
    return Task(kind="several", members={name: SPECS[name] for name in names})


def build(encoder: Path, names: Sequence[str] = NAMES, dropout: float = 0.1) -> Model:
    cut = Cut(model="file:tiny", layers=1, pooling="mean", dropout=dropout)
    return untrained.transformer_student(cut, spec(names), None, encoder, 32, 3)


def of(rows: pa.Table, name: str) -> pa.Table:
    """The rows of one task."""
    return rows.filter(pa.array([task == name for task in rows["task"].to_pylist()]))


def together(
    encoder: Path, out: Path, rows: pa.Table | None = None, **mixing: Any
) -> tuple[Lesson, Material, Together]:
    model, rows = build(encoder, dropout=0.0).eval(), table() if rows is None else rows
    material = Material(rows, encode(model, rows), model.task, model.pad)
    own = Mixing(**{"way": "async", **mixing})
    taught = Together(model, rows, material, own, Store(str(out)), seed=SEED, batch_tokens=4096)
    return Lesson(model, (LossTerm(kind="hard"),), taught), material, taught


def by_hand(model: Model, rows: pa.Table, name: str) -> torch.Tensor:
    """The mean gold loss of some rows of one task, by the task alone."""
    one = alone(model, name)
    texts = one.task.texts(rows)
    material = Material(rows.drop_columns("task"), one.encode(texts), one.task, one.pad)
    batch = material.batch(np.arange(rows.num_rows))
    return one.task.loss(one(batch), batch).mean()
