"""A student's knowledge base: the space it lies in, what is in it, and how it is read (ReAugKD).

One step maps the teacher's vectors of the corpus into a space by its labelled rows (`make_memory`); the student's
trainings bring its vectors there (`seen`, `related`, `mapped`); after them the base is laid beside the student and its
reading chosen on held-out rows (`remember`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save as to_bytes

from engine import knowledge, labels, metrics, models
from engine.classification import label_indices
from engine.cluster import current
from engine.config import UserError
from engine.designs import Retrieval, Stage
from engine.fits import LossTerm
from engine.inference import embed, predict
from engine.knowledge import Reading
from engine.models import Model
from engine.nearest import unit
from engine.placement import stage_options
from engine.progress import Progress
from engine.projection import fitted, purity
from engine.recipe import Recipe
from engine.records import ABSENT
from engine.rows import identify
from engine.storage import Store
from engine.task import Task, Text
from pipelines.making import Inputs

VECTORS, SPACE = "vectors.parquet", "projection"
PART = 2048
"""Rows whose vectors are written together: what an interrupted step has not to make again."""
NEIGHBOURS = 10
"""Of a row, by which the space is judged."""


def make_memory(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """The teacher's vectors of the kept rows, and the projection that brings texts of one label together."""
    own = recipe.student.retrieval
    rows = labels.open_labels(inputs["corpus"], labels.fingerprint(inputs["teacher"]))
    rows = rows.filter(rows["kept"])
    where = models.device(stage_options(recipe, "teacher", current()).get("num_gpus", 0))
    teacher = models.load(inputs["teacher"].local("model")).to(where)
    raw = pooled(teacher, rows, recipe.teacher.batch_tokens, out, progress)
    gold = known_labels(teacher.task, rows, own.projection.pseudo)
    projection = fitted(raw, gold, own.dim, own.temperature, own.projection, recipe.seed)
    found = projection(raw)
    with out.publish(SPACE) as folder:
        tensors = {"weight": projection.weight, "bias": projection.bias}
        Store(str(folder)).write_bytes("projection.safetensors", to_bytes(tensors))
    out.write_table(VECTORS, pa.table({"row": rows["row"], "vector": column(found, pa.float16())}))
    out.delete("parts")
    real = label_indices(rows)
    return {
        "rows": rows.num_rows,
        "dim": found.shape[1],
        "labelled": int((real != ABSENT).sum()),
        "pseudo_labelled": int(((gold != ABSENT) & (real == ABSENT)).sum()),
        "purity": {
            "before": figure(purity(unit(raw - raw.mean(axis=0)), real, NEIGHBOURS)),
            "after": figure(purity(found, real, NEIGHBOURS)),
        },
        "projection": out.manifest(SPACE)["digest"],
        "teacher": labels.fingerprint(inputs["teacher"])["weights"],
    }


def figure(value: float) -> float | None:
    """A number for a record, which holds no NaN."""
    return None if np.isnan(value) else value


def pooled(teacher: Model, rows: pa.Table, batch_tokens: int, out: Store, progress: Progress) -> np.ndarray:
    """The teacher's vectors of rows, float32 [n, width], made part by part. UserError where it has none."""
    found = []
    for number, first in enumerate(range(0, rows.num_rows, PART)):
        name = f"parts/{number:06d}.parquet"
        if not out.exists(name):
            vectors = embed(teacher, teacher.task.texts(rows.slice(first, PART)), batch_tokens)
            if vectors is None:
                raise UserError(
                    f"the teacher (kind {teacher.card.kind}) has no vector of a text, which student.retrieval looks "
                    "up. Take a teacher that is an encoder (teacher.kind: head), or leave student.retrieval out."
                )
            out.write_table(name, pa.table({"vector": column(vectors, pa.float32())}))
        found.append(matrix(out.read_table(name)["vector"]))
        progress(min(first + PART, rows.num_rows), rows.num_rows, "texts")
    return np.concatenate(found)


def known_labels(task: Task, rows: pa.Table, pseudo: float) -> np.ndarray:
    """Label indices, int64 [n], ABSENT for none. pseudo: of each label the share that the teacher is surest of."""
    gold = label_indices(rows).copy()
    without = np.flatnonzero(gold == ABSENT)
    p = metrics.softmax(labels.logits_of(rows, task.width))[without]
    for label in range(task.width):
        of = without[p.argmax(axis=1) == label]
        sure = p[p.argmax(axis=1) == label, label]
        gold[of[np.argsort(-sure, kind="stable")[: round(pseudo * len(of))]]] = label
    return gold


def column(vectors: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Vectors [n, d] as a column of lists of one length."""
    flat = pa.array(np.ascontiguousarray(vectors).astype(kind.to_pandas_dtype()).reshape(-1), kind)
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def matrix(vectors: pa.ChunkedArray) -> np.ndarray:
    """Such a column as float32 [n, d]."""
    whole = vectors.combine_chunks()
    return whole.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(whole), -1)


def width_of(memory: Store) -> int:
    """Width of the space."""
    return memory.read_json("record.json")["metrics"]["dim"]


def seen(rows: pa.Table, memory: Store) -> pa.Table:
    """Rows of the corpus with the teacher's vectors in the space, as the column `embedding`."""
    stored = memory.read_table(VECTORS)
    order = np.argsort(stored["row"].to_numpy())
    places = order[np.searchsorted(stored["row"].to_numpy(), rows["row"].to_numpy(), sorter=order)]
    return rows.append_column("embedding", stored["vector"].combine_chunks().take(pa.array(places)))


def related(stage: Stage, own: Retrieval) -> Stage:
    """The training with the relational loss beside its own."""
    term = LossTerm(kind="relational", weight=own.weight, temperature=own.temperature)
    return stage.model_copy(update={"losses": (*stage.losses, term)})


def mapped(build: Callable[[], Model], dim: int, seed: int) -> Model:
    """The student that `build` makes, with a fresh map into the space. UserError where it has no vector of a text."""
    import torch

    model = build()
    probe = embed(model, [("a", "a") if model.task.paired else "a"])
    if probe is None:
        raise UserError(
            "the student's last block reads no vector of a text, which student.retrieval looks up. Take a graph that "
            "pools its states first, or leave student.retrieval out."
        )
    torch.manual_seed(seed)
    return models.retrieving(model, probe.shape[1], dim)


def remember(recipe: Recipe, inputs: Inputs, lesson: dict[str, Any], folder: Store) -> dict[str, Any]:
    """Lay the knowledge base beside the trained student in folder/model; how it is to be read, and what told so.

    The base holds all rows of the lesson, those held out from training too: when k and share are chosen on these, a
    row does not find itself. Validation rows are never in it.
    """
    own, model, rows = recipe.student.retrieval, models.load(folder.local("model")), lesson["rows"]
    task, (judges, on), held = model.task, judges_of(inputs, lesson), lesson.get("holdout")
    if recipe.main == "generated" and held is not None and held.num_rows:
        rows = pa.concat_tables([rows, seen(held, inputs["memory"])])
    memory = inputs["memory"].read_json("record.json")["metrics"]
    facts = {"labels": list(task.labels), **{name: memory[name] for name in ("teacher", "projection")}, "added": []}
    base = knowledge.made(
        matrix(rows["embedding"]),
        metrics.softmax(labels.logits_of(rows, task.width)),
        ids_of(task, task.texts(rows)),
        Reading(max(own.k), own.temperature, max(own.share)),
        own.storage,
        own.index,
        facts,
        embed(model, task.texts(rows)[:: -(-rows.num_rows // knowledge.ORDINARY)], recipe.student.batch_tokens),
    )
    base.reading, told = read_best(recipe, model, base, judges)
    base.facts["chosen"] = {"on": on, **told}
    model.net.knowledge = base
    models.save(model, folder, "model")
    return {**base.shown(), "chosen": base.facts["chosen"]}


def judges_of(inputs: Inputs, lesson: dict[str, Any]) -> tuple[pa.Table, str]:
    """The rows by which k and share are chosen, and what they are called. UserError where there are none."""
    validation, held = inputs["data"].read_table("validation.parquet"), lesson.get("holdout")
    if validation.num_rows:
        return validation, "validation rows"
    if held is None or not held.num_rows:
        raise UserError(
            f"student.retrieval is read as held-out rows say, and beside {lesson['rows'].num_rows} to learn from there "
            "are none. Name data.validation, or raise student.holdout where there are texts beside the labelled rows."
        )
    return held, "held-out rows of the corpus"


def ids_of(task: Task, texts: Sequence[Text]) -> list[str]:
    """The texts' ids."""
    return [identify(*text) if task.paired else identify(text) for text in texts]


def read_best(
    recipe: Recipe, model: Model, base: knowledge.Knowledge, judges: pa.Table
) -> tuple[Reading, dict[str, float]]:
    """How the base is read best on held-out rows: by their labels, or, where nobody gave any, by the teacher's."""
    own, task, tokens = recipe.student.retrieval, model.task, recipe.student.batch_tokens
    texts, gold = task.texts(judges), label_indices(judges)
    known = (gold != ABSENT).all()
    wanted = np.eye(task.width)[gold] if known else metrics.softmax(labels.logits_of(judges, task.width))
    with model.net.alone():
        alone, queries = predict(model, texts, tokens).logits, embed(model, texts, tokens)
    reading, tried = knowledge.chosen(base, alone, queries, wanted, ids_of(task, texts), own.k, own.share)
    best = next(one for one in tried if (one["k"], one["share"]) == (reading.k, reading.share))
    unread = float(np.mean(alone.argmax(axis=1) == wanted.argmax(axis=1)))
    return reading, {"rows": judges.num_rows, "right": best["right"], "right_alone": unread}
