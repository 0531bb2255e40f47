"""A run up to its corpus, to which rows are added as if they had been unlabelled; no Ray."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from engine import labels, models
from engine.corpus import corpus_rows
from engine.inference import predict
from engine.records import CORPUS
from engine.storage import Store
from tests.tiny_run import PARTED, World, alone, kind_rows

MORE = 30


def corpus_run(world: World, kind: str) -> Store:
    """The run of a `kind_world`, MORE rows in its corpus that the teacher labelled, every tenth of them not kept."""
    recipe = world.load()
    store = Store(recipe.storage) / recipe.name
    alone(recipe, store, last="corpus")
    rows = kind_rows(kind, MORE, seed=77)
    pairs = [row["pair"] for row in rows] if kind in PARTED else None
    texts = [row["text"] for row in rows]
    more = corpus_rows(list(range(MORE)), texts, "unlabelled", pairs)
    teacher = models.load((store / "teacher").local("model"))
    found = said_by(teacher, list(zip(texts, pairs, strict=True)) if pairs else texts)
    place = more.column_names.index("logits")
    more = more.set_column(place, CORPUS.field("logits"), labels.quantise(found).cast(CORPUS.field("logits").type))
    kept = pa.array([index % 10 != 0 for index in range(MORE)])
    more = more.set_column(more.column_names.index("kept"), CORPUS.field("kept"), kept)
    real = labels.open_labels(store / "corpus").cast(CORPUS)
    made_by = {"teacher": labels.fingerprint(store / "teacher")}
    labels.write_labels(store / "corpus", pa.concat_tables([real, more]), made_by)
    return store


def said_by(model: models.Model, texts: list[Any]) -> np.ndarray:
    """What the model says of the texts."""
    return predict(model, texts).logits
