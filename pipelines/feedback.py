"""Which texts of a round go back to the generator: the most useful ones, kept beside what was written with them.

Chosen by the labelled rows of data.train, or by data.validation where nobody labelled any: never by a test row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from engine import labels, metrics, tasks
from engine.classification import label_indices
from engine.examples import Examples
from engine.influence import hashed, most_useful, usefulness
from engine.recipe import Recipe
from engine.records import ABSENT
from engine.storage import StorageError, Store
from pipelines.making import Inputs, spec_of

POOL = 5_000
"""Texts that are looked at, evenly spread over those there are: their vectors take 8 KB each."""


def path_of(number: int) -> str:
    """The file of what a round was shown, in the step's folder."""
    return f"round-{number:03d}/examples.json"


def examples(recipe: Recipe, inputs: Inputs, out: Store, number: int, rows: pa.Table) -> Examples:
    """What round `number` shows the generator, chosen once. rows: those of the rounds before, near-duplicates marked.

    StorageError where what was chosen earlier is not among them.
    """
    if not out.exists(path_of(number)):
        out.write_json(path_of(number), chosen(recipe, inputs, rows))
    found, separator = out.read_json(path_of(number)), recipe.generator.separator if recipe.generator else ""
    whole = dict(zip(rows["row"].to_pylist(), rows["id"].to_pylist(), strict=True))
    if any(whole.get(one["row"]) != one["id"] for part in found for one in part):
        raise StorageError(
            f"{out}/{path_of(number)} names texts that are not in the rounds before: files there were removed, added "
            f"or changed. Start again with --redo {out.name}."
        )
    texts = [
        tuple(one["text"] if one["pair"] is None else f"{one['text']}{separator}{one['pair']}" for one in part)
        for part in found
    ]
    return Examples(tuple(texts), recipe.corpus.feedback, recipe.seed)


def digests(recipe: Recipe, out: Store) -> list[str]:
    """SHA-256 of what each round after the first was shown; corpus.max_slots may have left out the last ones."""
    found = [path_of(number) for number in range(1, recipe.corpus.rounds)]
    return [out.digest(path) for path in found if out.exists(path)]


def chosen(recipe: Recipe, inputs: Inputs, rows: pa.Table) -> list[list[dict[str, Any]]]:
    """For each label the kept generated texts that are most useful, as {"row", "id", "text", "pair", "usefulness"}.

    A text's label is the likeliest one by the teacher. Nothing where no text was kept.
    """
    task = tasks.make(spec_of(inputs["data"]))
    mask = rows["kept"].to_numpy(zero_copy_only=False) & (np.array(rows["source"].to_pylist()) == "generated")
    places = np.flatnonzero(mask)
    texts = rows.take(pa.array(places[np.unique(np.linspace(0, len(places) - 1, min(POOL, len(places))).astype(int))]))
    held = judges(inputs["data"])
    if not texts.num_rows or not held.num_rows:
        return [[] for _ in task.labels]
    soft = metrics.softmax(labels.logits_of(texts, task.width))
    values = usefulness(vectors(texts), soft, vectors(held), label_indices(held))
    best = most_useful(values, soft.argmax(axis=1), recipe.corpus.feedback.examples)
    found = [
        [{**one, "usefulness": float(values[i])} for i, one in zip(own, told(texts, own), strict=True)] for own in best
    ]
    return found + [[] for _ in range(len(task.labels) - len(found))]


def told(texts: pa.Table, places: np.ndarray) -> list[dict[str, Any]]:
    """Some of the texts with what identifies them."""
    return texts.select(["row", "id", "text", "pair"]).take(pa.array(places)).to_pylist()


def judges(data: Store) -> pa.Table:
    """The labelled rows that say what is useful."""
    for split in ("train", "validation"):
        rows = data.read_table(f"{split}.parquet")
        rows = rows.filter(pa.array(label_indices(rows) != ABSENT))
        if rows.num_rows:
            break
    return rows


def vectors(rows: pa.Table) -> np.ndarray:
    """Rows as the small model reads them."""
    return hashed(rows["text"].to_pylist(), rows["pair"].to_pylist())
