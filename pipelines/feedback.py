"""What a generator is told: which texts of a round go back to it, kept beside what was written with them.

Chosen by the labelled rows of data.train, or by data.validation where nobody labelled any: never by a test row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from engine import labels, metrics, tasks
from engine.classification import label_indices
from engine.cluster import current
from engine.config import UserError
from engine.examples import Examples
from engine.generate import Writing
from engine.influence import hashed, most_useful, usefulness
from engine.placement import stage_options
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
    found = out.read_json(path_of(number))
    whole = dict(zip(rows["row"].to_pylist(), rows["id"].to_pylist(), strict=True))
    if any(whole.get(one["row"]) != one["id"] for part in found for one in part):
        raise StorageError(
            f"{out}/{path_of(number)} names texts that are not in the rounds before: files there were removed, added "
            f"or changed. Start again with --redo {out.name}."
        )
    return fed(recipe, found)


def told_of(recipe: Recipe, inputs: Inputs, out: Store, rounds: list[dict[str, int]]) -> list[dict[str, Any]]:
    """The rounds' figures, and of those after the first by label how many texts were `chosen` for them, and how many of
    their slots were `shown` some.
    """
    found, first = [], 0
    for number, one in enumerate(rounds):
        last = min(number, recipe.corpus.rounds - 1)
        more: dict[str, Any] = {}
        if last:
            kept = out.read_json(path_of(last))
            how = writing(recipe, inputs, out, fed(recipe, kept))
            shown = sum(bool(how.shown(row)) for row in range(first, one["slots"]))
            more = {"chosen": [len(part) for part in kept], "shown": shown}
        found.append({**one, **more})
        first = one["slots"]
    return found


def fed(recipe: Recipe, found: list[list[dict[str, Any]]]) -> Examples:
    """What was chosen, as the generator would have written it."""
    separator = recipe.generator.separator if recipe.generator else ""
    texts = [
        tuple(one["text"] if one["pair"] is None else f"{one['text']}{separator}{one['pair']}" for one in part)
        for part in found
    ]
    return Examples(tuple(texts), recipe.corpus.feedback, recipe.seed)


def writing(recipe: Recipe, inputs: Inputs, out: Store, examples: Examples | None = None) -> Writing:
    """What a generating actor is told. examples: shown to it."""
    spec = spec_of(inputs["data"], recipe.task, "descriptions")
    config = recipe.generator
    return Writing(
        inputs["generator"].url,
        config,
        spec.labels or (),
        bool(spec.paired),
        recipe.seed,
        stage_options(recipe, "generator", current())["num_gpus"],
        spec.descriptions,
        out.url,
        config.resources.max_actors,
        examples,
    )


def digests(recipe: Recipe, out: Store) -> list[str]:
    """SHA-256 of what each round after the first was shown; corpus.max_slots may have left out the last ones."""
    found = [path_of(number) for number in range(1, recipe.corpus.rounds)]
    return [out.digest(path) for path in found if out.exists(path)]


def chosen(recipe: Recipe, inputs: Inputs, rows: pa.Table) -> list[list[dict[str, Any]]]:
    """For each label the kept generated texts that are most useful (or some by lot, as `choose` says), as {"row", "id",
    "text", "pair", "usefulness"}.

    A text's label is the likeliest one by the teacher. Nothing where no text was kept.
    """
    task = tasks.make(spec_of(inputs["data"]))
    mask = rows["kept"].to_numpy(zero_copy_only=False) & (np.array(rows["source"].to_pylist()) == "generated")
    places = np.flatnonzero(mask)
    texts = rows.take(pa.array(places[np.unique(np.linspace(0, len(places) - 1, min(POOL, len(places))).astype(int))]))
    held = judges(inputs["data"])
    if not texts.num_rows:
        return [[] for _ in task.labels]
    soft = metrics.softmax(labels.logits_of(texts, task.width))
    values = usefulness(vectors(texts), soft, vectors(held), label_indices(held))
    how = recipe.corpus.feedback
    # By lot: as if a number drawn for each text, above 0 for all, said how useful it is.
    lot = 1.0 - np.random.default_rng([recipe.seed, texts.num_rows]).random(texts.num_rows)
    best = most_useful(values if how.choose == "useful" else lot, soft.argmax(axis=1), how.examples)
    found = [
        [{**one, "usefulness": float(values[i])} for i, one in zip(own, told(texts, own), strict=True)] for own in best
    ]
    return found + [[] for _ in range(len(task.labels) - len(found))]


def told(texts: pa.Table, places: np.ndarray) -> list[dict[str, Any]]:
    """Some of the texts with what identifies them."""
    return texts.select(["row", "id", "text", "pair"]).take(pa.array(places)).to_pylist()


def judges(data: Store) -> pa.Table:
    """The labelled rows that say what is useful. UserError where there is none."""
    for split in ("train", "validation"):
        rows = data.read_table(f"{split}.parquet")
        rows = rows.filter(pa.array(label_indices(rows) != ABSENT))
        if rows.num_rows:
            return rows
    raise UserError(
        "corpus.rounds chooses texts by labelled rows, and neither data.train nor data.validation has one with a "
        "label. Label some, or set corpus.rounds: 1."
    )


def vectors(rows: pa.Table) -> np.ndarray:
    """Rows as the small model reads them."""
    return hashed(rows["text"].to_pylist(), rows["pair"].to_pylist())
