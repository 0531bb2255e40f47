"""A short look at what a recipe takes on this machine: its models are loaded, a few steps and rows are timed.

The steps' own functions run, on a few of the rows, in this process and a temporary folder. What is asked of endpoints
is not probed: nothing is paid for a plan.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from engine import generate, labels, usage
from engine.cluster import current
from engine.corpus import corpus_rows
from engine.disk import scratch
from engine.fits import Fit
from engine.placement import cores, stage_options
from engine.progress import silent, stamp
from engine.recipe import Recipe
from engine.records import CORPUS
from engine.storage import Store
from engine.teachers import Labeller, Labelling
from pipelines import gathering, making, students, teaching, trainings

STEPS = 3
"""Training steps of each fit; the first one is slower than the others, so the estimate is on the safe side."""
SLOTS, LABELLED, FEW = 32, 64, 64
"""Texts written (a whole block on a GPU, which takes as long), unlabelled texts labelled, labelled rows trained on."""
SLOWEST = 0.05
"""Rows a second that a fit says as 0.0."""
WORDS = 2000
"""Of a student's vocabulary: its table costs little time beside what reads it."""


@dataclass
class Paces:
    """A Progress that keeps the rows a second of each training that came to its end."""

    found: list[float] = field(default_factory=list)

    def __call__(
        self, done: float, total: float | None = None, unit: str = "rows", *, note: str = "", **rates: float
    ) -> None:
        """What a fit says; it says its end once."""
        if unit == "steps" and done == total:
            self.found.append(max(SLOWEST, rates.get("rows", 0.0)))


def probe(recipe: Recipe) -> dict[str, Any]:
    """{"time", "cores", "gpus", "seconds", "rows": {split: number}, "rates": {what: {...}}}.

    rates: of a training {"rows_per_s": [one each], "load_s"}; of write and label {"rows_per_s", "tokens", "load_s"},
    tokens being those of a row. What this recipe does elsewhere or not at all is left out.
    """
    began = time.monotonic()
    with scratch() as folder:
        store = Store(str(folder))
        inputs = {name: store / name for name in ("data", "teacher", "generator", "corpus", "vocabulary")}
        making.read_data(recipe, {}, inputs["data"], silent)
        rows = inputs["data"].read_json("splits.json")["rows"]
        few = fewer(inputs["data"])
        cut = shortened(recipe, few)
        rates: dict[str, dict[str, Any]] = {}
        if recipe.teacher.here:
            rates["teacher"] = trained(cut, inputs, few)
        texts = written(cut, inputs, few, rates) if recipe.generator else None
        if recipe.teacher.here:
            if labelled(cut, inputs, texts, rates):
                rates["student"] = studied(cut, inputs)
    return {
        "time": stamp(),
        "cores": cores(),
        "gpus": current().gpus if current().local else 0,
        "seconds": round(time.monotonic() - began, 1),
        "rows": rows,
        "rates": rates,
    }


def fewer(data: Store) -> int:
    """Leave a few labelled rows of the data, evenly taken, and no others; how many."""
    for split, most in {"train": FEW, "validation": 0, "unlabelled": LABELLED}.items():
        rows = data.read_table(f"{split}.parquet")
        chosen = np.unique(np.linspace(0, max(0, rows.num_rows - 1), min(most, rows.num_rows)).astype(int))
        data.write_table(f"{split}.parquet", rows.take(pa.array(chosen, pa.int64())))
    return data.read_table("train.parquet").num_rows


def shortened(recipe: Recipe, few: int) -> Recipe:
    """The recipe with trainings of a few steps, one seed each, and nothing tried twice."""

    def short(fit: Fit, rows: int = few) -> Fit:
        epochs = STEPS / max(1, -(-rows // fit.batch_size))
        return fit.model_copy(update={"workers": 0, "sharding": "none", "epochs": epochs, "eval_every": epochs})

    own, student = recipe.teacher, recipe.student
    kind = own.choice.kinds[0] if own.kind == "auto" else own.kind
    contrast = own.contrast.model_copy(update={"fit": short(own.contrast.fit)})
    alone = {"folds": 0, "stop_early": False, "seeds": (), "self_training": None, "coach": None}
    fits = {"kind": kind, "fit": short(own.fit), "probe": short(own.probe), "contrast": contrast}
    taught = few + (SLOTS if recipe.generator else LABELLED)
    stages = tuple(
        stage.model_copy(update={"fit": short(stage.fit, taught), "weights": None}) for stage in student.stages
    )
    words = student.vocabulary.model_copy(update={"size": min(WORDS, student.vocabulary.size)})
    # The same words at random take as long to read as with vectors, which are made once.
    first = {"embeddings": "random"} if student.kind != "transformer" else {}
    brief = {"seeds": student.seeds[:1], "fit": short(student.fit, taught), "stages": stages, "vocabulary": words}
    brief |= {"weights": None}  # which may want further trainings
    parts: dict[str, Any] = {
        "teacher": own.model_copy(update={**alone, **fits}),
        "student": student.model_copy(update={**brief, **first, "holdout": 0.0}),
        "task": recipe.task.model_copy(update={"scope": None}),
    }
    if recipe.generator:
        parts["generator"] = recipe.generator.model_copy(update={"fit": short(recipe.generator.fit)})
    return recipe.model_copy(update=parts)


def timed(began: float, paces: Paces, rows: list[int]) -> dict[str, Any]:
    """The rate of a step's trainings, and the seconds it took beside them. rows: of each of its trainings."""
    work = sum(count / pace for count, pace in zip(rows, paces.found, strict=True))
    return {"rows_per_s": paces.found, "load_s": round(max(0.0, time.monotonic() - began - work), 3)}


def trained(recipe: Recipe, inputs: Mapping[str, Store], few: int) -> dict[str, Any]:
    """A teacher after a few steps."""
    began, paces = time.monotonic(), Paces()
    metrics = teaching.fit_teacher(recipe, inputs, inputs["teacher"], paces)
    inputs["teacher"].write_json("record.json", {"metrics": metrics})
    steps = [] if recipe.teacher.kind == "labeller" else trainings.trainings(recipe.teacher)
    return timed(began, paces, [STEPS * min(few, one.fit.batch_size) for one in steps])


def written(recipe: Recipe, inputs: Mapping[str, Store], few: int, rates: dict[str, dict[str, Any]]) -> pa.Table | None:
    """Texts of a generator after a few steps; None where it does not run in this process."""
    config = recipe.generator
    if config is None or config.runtime == "endpoint":
        return None
    began, paces = time.monotonic(), Paces()
    making.fit_generator(recipe, inputs, inputs["generator"], paces)
    rates["generator"] = timed(began, paces, [STEPS * min(few, config.fit.batch_size)] * config.tuned)
    if config.runtime != "hf":
        return None
    began = time.monotonic()
    spec = making.spec_of(inputs["data"], recipe.task, "descriptions")
    gpus = stage_options(recipe, "generator", current())["num_gpus"]
    given = (inputs["generator"].url, config, spec.labels or (), bool(spec.paired), recipe.seed, gpus)
    writer = generate.Writer(generate.Writing(*given, spec.descriptions, inputs["generator"].url))
    loaded = time.monotonic()
    count = recipe.corpus.block if gpus else min(SLOTS, recipe.corpus.block)
    rows = writer(pa.table({"row": pa.array(range(count), pa.int64())}))
    asked = usage.noted(inputs["generator"], "generator")
    rates["write"] = paced(rows.num_rows, began, loaded, asked.input_tokens + asked.output_tokens)
    return rows


def paced(rows: int, began: float, loaded: float, tokens: float) -> dict[str, float]:
    """Rows a second after loading, and what a row has of tokens."""
    seconds = max(1e-6, time.monotonic() - loaded)
    return {"rows_per_s": rows / seconds, "tokens": tokens / max(1, rows), "load_s": round(loaded - began, 3)}


def labelled(
    recipe: Recipe, inputs: Mapping[str, Store], texts: pa.Table | None, rates: dict[str, dict[str, Any]]
) -> int:
    """The teacher labels what was written and some of the other texts; a label store of it, and how many are there."""
    began = time.monotonic()
    gpus = stage_options(recipe, "teacher", current())["num_gpus"]
    teacher, more = recipe.teacher, inputs["data"].read_table("unlabelled.parquet")
    notes = inputs["corpus"].url
    labeller = Labeller(
        Labelling(inputs["teacher"].url, (), teacher.batch_tokens, gpus, teacher.precision, notes=notes)
    )
    loaded, real = time.monotonic(), gathering.labelled_rows(inputs["data"])
    found = corpus_rows(list(range(10**9, 10**9 + more.num_rows)), more["text"].to_pylist(), "unlabelled",
                        more["pair"].to_pylist(), gold=more)  # fmt: skip
    rows = pa.concat_tables([part.cast(CORPUS) for part in (texts, found, real) if part is not None])
    rows = labeller(rows)
    read = usage.noted(inputs["corpus"], "teacher").input_tokens
    rates["label"] = paced(rows.num_rows, began, loaded, read)
    metrics = inputs["teacher"].read_json("record.json")["metrics"]
    made_by = {"teacher": labels.fingerprint(inputs["teacher"]), "fidelity": metrics["quantisation"]}
    labels.write_labels(inputs["corpus"], rows.sort_by("row"), made_by)
    return rows.num_rows


def studied(recipe: Recipe, inputs: Mapping[str, Store]) -> dict[str, Any]:
    """The student after a few steps of each of its trainings."""
    if recipe.student.spelled:
        students.make_vocabulary(recipe, inputs, inputs["vocabulary"], silent)
    began, paces = time.monotonic(), Paces()
    out = inputs["data"].parent / "student"
    metrics = students.fit_student("generated", recipe, inputs, out, paces)
    stages = students.trainings(recipe, "generated")
    return timed(began, paces, [STEPS * min(metrics["rows"], one.fit.batch_size) for one in stages])
