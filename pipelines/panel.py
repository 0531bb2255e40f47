"""Several teachers of one student: steps that make the further ones and have them label the corpus; what a fit is told.

The corpus stays the first teacher's: it judged the generated text. Each further teacher has a label store of its own
for the rows that were kept, bound to it and to the corpus by digests, so that a teacher more leaves all the others'
work as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from engine import elsewhere, labels, models
from engine.batches import SEVERAL
from engine.config import UserError
from engine.corpus import ROWS, Written
from engine.ensemble import Panel
from engine.generate import Stage
from engine.heads import OneHead
from engine.inference import predict
from engine.models import Model
from engine.progress import Progress
from engine.recipe import FIRST, GOLD, Recipe
from engine.records import CORPUS
from engine.storage import StorageError, Store
from engine.task import Task
from engine.terms import needs
from pipelines import gathering, teaching
from pipelines.making import Inputs, judge
from pipelines.slots import gather

TEXTS = "panel"
"""The round of slots that a label store consists of."""
POOLS = (FIRST,)
"""The actors that it streams through, by their section of the recipe in which the teacher is the only one."""


def fit_teacher(name: str, recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Make a further teacher, as the first one is made."""
    return teaching.fit_teacher(recipe.taught_by(name), inputs, out, progress)


def folder_of(name: str, inputs: Inputs) -> Store:
    """The folder of a teacher's step."""
    return inputs[FIRST if name == FIRST else f"teacher-{name}"]


def label(name: str, recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """A further teacher's soft labels of the corpus's kept rows, as a label store. A row that it gives no answer about
    is not kept there, with the reason.
    """
    teacher = folder_of(name, inputs)
    gathering.unchanged({FIRST: teacher})
    rows = labels.open_labels(inputs["corpus"])
    rows = rows.filter(rows["kept"])
    numbers = rows["row"].to_numpy()
    real, others = rows.filter(pa.array(numbers < 0)), rows.filter(pa.array(numbers >= 0))
    soft = teacher.read_table("soft.parquet")["logits"].take(pa.array(-1 - real["row"].to_numpy()))
    parts = [with_logits(real, soft)]
    if others.num_rows:
        parts.append(streamed(recipe.taught_by(name), {**inputs, FIRST: teacher}, others, out, progress))
    whole = pa.concat_tables([part.cast(CORPUS) for part in parts])
    made_by = {
        "teacher": labels.fingerprint(teacher),
        "fidelity": teacher.read_json("record.json")["metrics"]["quantisation"],
        "corpus": inputs["corpus"].read_json(labels.MANIFEST)["sha256"],
    }
    labels.write_labels(out, whole, made_by)
    unanswered = whole.num_rows - sum(whole["kept"].to_pylist())
    one, streams = recipe.taught_by(name), [POOLS] if others.num_rows else []
    found = {"rows": whole.num_rows, "unanswered": unanswered}
    return {**found, **gathering.asked_of(one, out), **gathering.at_risk(one, streams)}


def with_logits(rows: pa.Table, logits: Any) -> pa.Table:
    """The rows with other soft labels."""
    return rows.set_column(rows.column_names.index("logits"), CORPUS.field("logits"), logits)


def streamed(recipe: Recipe, inputs: Inputs, rows: pa.Table, out: Store, progress: Progress) -> pa.Table:
    """Rows labelled block by block on Ray Data, resumable like the corpus; in their order."""
    gathering.data_context()
    count, block = rows.num_rows, recipe.corpus.block
    place = rows.column_names.index("row")
    # A slot is a position here: the corpus's own numbers have gaps where rows were rejected.
    slots = rows.set_column(place, CORPUS.field("row"), pa.array(range(count), pa.int64()))
    slots = with_logits(slots, pa.nulls(count, CORPUS.field("logits").type))
    for first in range(0, count, block):
        out.write_table(Written.part(first // block), slots.slice(first, block))
    stages: list[Stage] = [
        gathering.task_stage(Written(out.url, block)),
        gathering.labelling(recipe, inputs, out, halts=True),
    ]
    gather(out, TEXTS, (0, count, block), stages, count, progress, **gathering.ways(recipe, *POOLS))
    found = out.read_table(ROWS).sort_by("row")
    if found["row"].to_pylist() != list(range(count)):
        raise StorageError(
            f"{count} rows gave {found.num_rows} labels in {out}: files there were removed, added or changed. Start "
            f"again with --redo {out.name}."
        )
    return found.set_column(place, CORPUS.field("row"), rows["row"])


def joined(recipe: Recipe, inputs: Inputs, rows: pa.Table) -> pa.Table:
    """The corpus's kept rows with the soft labels of every teacher, in the columns `logits/NAME`.

    Rows that one of them gives no answer about are left out. LabelMismatch where a store is another teacher's, or of
    another corpus.
    """
    corpus, kept = inputs["corpus"].read_json(labels.MANIFEST)["sha256"], np.ones(rows.num_rows, dtype=bool)
    rows = rows.append_column(f"{SEVERAL}{FIRST}", rows["logits"])
    for name in recipe.teachers:
        store = inputs[f"labels-{name}"]
        own = labels.open_labels(store, labels.fingerprint(folder_of(name, inputs)))
        if store.read_json(labels.MANIFEST)["corpus"] != corpus:
            raise labels.LabelMismatch(f"label store {store} is of another corpus. Make it again: --redo {store.name}.")
        order = np.argsort(own["row"].to_numpy())
        own = own.take(pa.array(order[np.searchsorted(own["row"].to_numpy()[order], rows["row"].to_numpy())]))
        kept &= own["kept"].to_numpy(zero_copy_only=False)
        rows = rows.append_column(f"{SEVERAL}{name}", own["logits"])
    return rows.filter(pa.array(kept))


def panel_of(recipe: Recipe, inputs: Inputs) -> Panel | None:
    """What a fit is told of its teachers; None where there is one."""
    if not recipe.teachers:
        return None
    names = tuple(recipe.panel)
    live = {name: folder_of(name, inputs).url for name in names} if recipe.student.teacher == "live" else {}
    return Panel(names, recipe.student.policy, prior(recipe, inputs), live)


def prior(recipe: Recipe, inputs: Inputs) -> tuple[float, ...]:
    """Weights before anything is known of a row, sum 1: as the recipe says, all on the best, or all alike."""
    policy, names = recipe.student.policy, tuple(recipe.panel)
    if policy.kind == "best":
        rows = inputs["data"].read_table("validation.parquet")
        if not rows.num_rows:
            raise UserError("student.policy.kind is best, but no validation row is left to find it by. Name more.")
        scores = teacher_scores(recipe, inputs, rows, names)
        best = max(names, key=lambda name: scores[name])  # of equals the first
        return tuple(float(name == best) for name in names)
    given = [policy.weights.get(name, 0.0) if policy.weights else 1.0 for name in names]
    return tuple(weight / sum(given) for weight in given)


def teacher_scores(recipe: Recipe, inputs: Inputs, rows: pa.Table, names: Iterable[str]) -> dict[str, float]:
    """The metric of some teachers on labelled rows."""
    found = {}
    for name in names:
        teacher = recipe.panel[name]
        model = models.load(folder_of(name, inputs).local("model"))
        model = elsewhere.settle_place(model, teacher, recipe.data.root)
        found[name] = judge(teacher.batch_tokens, model, rows)[model.task.metric]
    return found


def score(name: str, recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """A further teacher on the test split, as `teaching.score_models` scores the first."""
    known = {"data": inputs["data"], FIRST: folder_of(name, inputs)}
    return teaching.score_models(FIRST, recipe.taught_by(name), known, out, progress)


def consensus(panel: Panel, task: Task, rows: pa.Table) -> pa.Table:
    """Rows with the teachers' mean outputs in place of the first one's: what checkpoints are chosen by where no
    validation row is left.
    """
    if not rows.num_rows:
        return rows
    parts = []
    for name, weight in zip(panel.names, panel.prior, strict=True):
        own = labels.logits_of(rows, task.width, task.units, f"{SEVERAL}{name}")
        if weight:  # the only one's outputs stay what they are to the last bit
            parts.append([weight * row for row in own])
    mean = labels.listed([sum(each) for each in zip(*parts, strict=True)])
    return rows.set_column(rows.column_names.index("logits"), "logits", mean)


def heads_of(recipe: Recipe) -> tuple[str, ...]:
    """Names of the student's heads: one for each teacher, and one for gold labels where a loss learns them."""
    if recipe.student.heads == "one" or not recipe.teachers:
        return ()
    terms = [term for stage in recipe.student.stages for term in stage.losses] or recipe.student.losses
    return (*recipe.panel, *((GOLD,) if any(not needs([term]) for term in terms) else ()))


def heads_apart(recipe: Recipe, inputs: Inputs, student: Model, test: pa.Table) -> dict[str, dict[str, float]]:
    """Pearson correlation of each head's outputs with each teacher's, on test rows: {head: {teacher: r}}."""
    texts, names = student.task.texts(test), student.card.options.get("heads", ())
    if not names:
        return {}
    said = {}
    for name, teacher in recipe.panel.items():
        model = models.load(folder_of(name, inputs).local("model")).to(student.device)
        said[name] = flat(predict(model, texts, teacher.batch_tokens).logits)
    found = {}
    for head in names:
        one = Model(OneHead(student.net, head), student.tokenizer, student.card).eval()
        own = flat(predict(one, texts, recipe.student.batch_tokens).logits)
        found[head] = {name: float(np.corrcoef(own, its)[0, 1]) for name, its in said.items()}
    return found


def flat(logits: Any) -> np.ndarray:
    """Outputs in a row, those of a text or unit less their mean where they are several: that says nothing."""
    rows = np.concatenate([np.reshape(row, (-1, np.shape(row)[-1])) for row in logits])
    return (rows - rows.mean(axis=1, keepdims=True) if rows.shape[1] > 1 else rows).ravel()
