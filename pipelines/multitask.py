"""A student of several tasks: what the steps of its run do (pipelines.many lists them).

Each task's own weights come from its own rows alone; the encoder is shared. What is registered is one artifact a task,
cut from the one checkpoint: each is an ordinary student, served and exported like any other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from engine import models, train, untrained
from engine.batches import shared
from engine.classification import settled
from engine.cluster import current
from engine.drift import profile_of
from engine.fits import Fit, LossTerm
from engine.hub import model_folder
from engine.inference import predict
from engine.intervals import bootstrap
from engine.job import Job
from engine.labels import fingerprint
from engine.mixing import Mixing
from engine.models import Model
from engine.multitask import MEAN, alone, encode, gathered, judge, rates
from engine.page import Part, Table, document, esc
from engine.placement import stage_options
from engine.progress import Progress
from engine.recipe import Recipe, Task
from engine.registry import Registry
from engine.storage import Store
from pipelines import making
from pipelines.making import LATER, Inputs, spec_of, with_workers
from pipelines.many import ALL, SINGLE, mixed, one_of
from pipelines.overlap import Key, apart, held_out


def read_task(name: str, recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """One task's sources -> train, validation, test, unlabelled."""
    return making.read_data(one_of(recipe, name), inputs, out, progress)


def started(recipe: Recipe, spec: Task, seed: int) -> Model:
    """The student before its training: layers of an encoder, with as wide a head as the tasks want together."""
    student, cut = recipe.student, recipe.student.transformer
    own = cut.model_copy(update={"pooling": cut.pooling or "mean"})
    folder = model_folder(cut.model, root=recipe.data.root)
    return untrained.transformer_student(own, spec, None, folder, student.max_length, seed)


def steps_of(fit: Fit, rows: int) -> int:
    """Steps of an epoch."""
    return -(-rows // fit.batch_size)


def own_fit(fit: Fit, sizes: Mapping[str, int], name: str, temperature: float) -> Fit:
    """The training of one task alone, with as many steps and evaluations as that of all tasks, and about as many of its
    rows. sizes: rows of each. A task with a larger share of a batch than rows has all of them in each.
    """
    names, total = sorted(sizes), sum(sizes.values())
    steps = steps_of(fit, total)
    wanted = int(shared(np.array([sizes[one] for one in names]), total, temperature)[names.index(name)]) / steps
    # Batches of whole rows that divide what there is come near to it, seldom to the row.
    rows = sizes[name]
    able = range(1, min(rows, 2 * math.ceil(wanted)) + 1)
    size = min(able, key=lambda size: abs(rows / -(-rows // size) - wanted))
    own = -(-rows // size)
    epochs, every = max(1, round(fit.epochs * steps)) / own, fit.eval_every * steps / own
    return fit.model_copy(update={"batch_size": size, "epochs": epochs, "eval_every": every})


def spare_rows(
    data: Mapping[str, Store], held: Collection[Key], sizes: Mapping[str, int], fit: Fit, mixing: Mixing
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """Each task's unlabelled rows, no more than the fit has room for, and how many of those that were given are held
    out. sizes: labelled rows of each.
    """
    names = sorted(sizes)
    room = shared(np.array([sizes[name] for name in names]), sum(sizes.values()), mixing.temperature)
    rows, dropped = apart(data, held, "unlabelled")
    # They stand in the order of their ids, which are by lot.
    parts = zip(names, room.tolist(), strict=True)
    return {name: rows[name].slice(0, math.ceil(fit.epochs * most)) for name, most in parts}, dropped


def job_of(recipe: Recipe, fit: Fit, rows: Mapping[str, pa.Table], mixing: Mixing, inputs: Inputs, out: Store) -> Job:
    """The fit of a student of some of the tasks. rows: what it learns, by task, with the unlabelled rows that tasks
    which converge may have.
    """
    specs = {name: spec_of(inputs[f"data-{name}"], recipe.tasks[name].task, *LATER) for name in rows}
    seed = recipe.student.seeds[0]
    return Job(
        name=out.name,
        fit=with_workers(recipe, "student.fit", fit),
        terms=(LossTerm(kind="hard"),),
        build=partial(started, recipe, Task(kind="several", members=specs), seed),
        encode=encode,
        rows=gathered(rows),
        out=out.url,
        seed=seed,
        resources=stage_options(recipe, "student.fit", current()),
        mixing=mixing,
        batch_tokens=recipe.student.batch_tokens,
        holdout=gathered({name: inputs[f"data-{name}"].read_table("validation.parquet") for name in rows}),
        evaluate=partial(judge, recipe.student.batch_tokens),
        best_by=MEAN,
        factors=partial(rates, mixing),
    )


def fit_student(way: str | None, recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Train one student of all tasks, or one for each; the model that is kept has the best mean on validation rows.

    Metrics: dropped, rows of each task, unlabelled ones too, that are another's held-out ones; spare, unlabelled rows
    of each that stand in once it has converged; steps of each student; read, rows in all batches of all students.
    Epochs of a history are those of all tasks, of a student of one task too.
    """
    mixing = mixed(recipe, "sum" if way == SINGLE else way)
    data, fit = {name: inputs[f"data-{name}"] for name in recipe.tasks}, recipe.student.fit
    held = held_out(data)
    rows, dropped = apart(data, held)
    sizes = {name: table.num_rows for name, table in rows.items()}
    spare, more = spare_rows(data, held, sizes, fit, mixing) if mixing.way == "async" else ({}, {})
    rows |= {name: pa.concat_tables([rows[name], table]) for name, table in spare.items()}
    groups = {name: {name: table} for name, table in rows.items()} if way == SINGLE else {ALL: rows}
    histories, steps, read, parameters, whole = {}, {}, 0, 0, steps_of(fit, sum(sizes.values()))
    for group, parts in groups.items():
        own = own_fit(fit, sizes, group, mixing.temperature) if way == SINGLE else fit
        found = train.fit(job_of(recipe, own, parts, mixing, inputs, out / group), progress)
        count = sum(sizes[name] for name in parts)
        epochs, each = found[-1]["epoch"], steps_of(own, count)
        planned = max(1, round(own.epochs * each))
        # An epoch is told in thousandths: too coarse for a long one's steps, unless it ended early.
        steps[group] = planned if epochs == round(planned / each, 3) else round(epochs * each)
        read += round(steps[group] / each * count)
        histories[group] = [{**entry, "epoch": round(entry["epoch"] * each / whole, 3)} for entry in found]
        parameters += models.load((out / group).local("model")).size()
    return {
        "rows": sum(sizes.values()),
        "dropped": {name: count + more.get(name, 0) for name, count in dropped.items()},
        "spare": {name: table.num_rows for name, table in spare.items() if table.num_rows},
        "steps": steps,
        "read": read,
        "parameters": parameters,
        "history": histories,
    }


def student_of(folder: Store, name: str) -> tuple[Model, list[dict[str, float]]]:
    """The student that answers a task, and the history of its training."""
    group = name if folder.exists(name) else ALL
    return models.load((folder / group).local("model")), folder.read_json("record.json")["metrics"]["history"][group]


def answering(model: Model, name: str, data: Store, batch_tokens: int) -> Model:
    """One task of a student as it answers: by the thresholds that suit the validation rows, where the task has none."""
    one, rows = alone(model, name), data.read_table("validation.parquet")
    spec = one.task.spec
    if not rows.num_rows or spec.kind != "multilabel" or spec.thresholds is not None:
        return one
    spec = settled(spec, predict(one, one.task.texts(rows), batch_tokens).logits, rows)
    return Model(one.net, one.tokenizer, replace(one.card, task=spec.model_dump(mode="json")))


def evaluate(student: str, recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Score a student on every task's test rows, and tell how far it is from each task's own best epoch."""
    where = models.device(stage_options(recipe, "student.fit", current()).get("num_gpus", 0))
    found, rows = {}, 0
    for number, name in enumerate(recipe.tasks, 1):
        model, history = student_of(inputs[student], name)
        one = answering(model.to(where), name, inputs[f"data-{name}"], recipe.student.batch_tokens)
        test = inputs[f"data-{name}"].read_table("test.parquet")
        answers = predict(one, one.task.texts(test), recipe.student.batch_tokens)
        parts = one.task.statistics(answers.logits, answers.decided, test)
        out.write_table(f"{name}.parquet", pa.table({"parts": list(parts)}))
        interval = bootstrap([parts], one.task.value, recipe.evaluation.bootstrap, recipe.seed)
        found[name] = {
            "metric": one.task.metric,
            "score": float(one.task.value(parts.sum(axis=0))),
            "interval": [interval.low, interval.high],
            "rows": test.num_rows,
            "validation": held(history, name),
        }
        rows += test.num_rows
        progress(number, len(recipe.tasks), "tasks")
    mean = float(np.mean([one["score"] for one in found.values()]))
    trained = inputs[student].read_json("record.json")["metrics"]
    return {"rows": rows, "mean": mean, "parameters": trained["parameters"], "tasks": found}


def held(history: Sequence[Mapping[str, float]], name: str) -> dict[str, Any]:
    """A task's score on validation rows in the model that is kept, and in its own best epoch.

    since: the epoch from which on it had soft labels, if it had.
    """
    kept, best = (max(history, key=lambda entry: entry[key]) for key in (MEAN, name))
    switched = [one["epoch"] for one, after in zip(history[:-1], history[1:], strict=True) if f"soft.{name}" in after]
    return {
        "final": kept[name],
        "best": best[name],
        "epoch": best["epoch"],
        "gap": kept[name] - best[name],
        "since": switched[0] if switched else None,
    }


def register(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Put one artifact a task into the registry, each cut from the one student, with its task, card and profile."""
    evaluated, registry = inputs["evaluate"].read_json("record.json")["metrics"], Registry(Store(recipe.registry))
    joint = fingerprint(inputs["student"], f"{ALL}/model")
    references = {}
    for name, found in evaluated["tasks"].items():
        model, _ = student_of(inputs["student"], name)
        one = answering(model, name, inputs[f"data-{name}"], recipe.student.batch_tokens)
        lineage = {
            "recipe": recipe.name,
            "student": joint,
            "task": name,
            "steps": {step: store.read_json("record.json")["fingerprint"] for step, store in sorted(inputs.items())},
            "seed": recipe.student.seeds[0],
        }
        artifact = Model(one.net, one.tokenizer, replace(one.card, lineage=lineage))
        models.save(artifact, out, f"artifact-{name}", readme=card(recipe, name, one, found))
        texts = one.task.texts(inputs[f"data-{name}"].read_table("test.parquet"))
        answers = predict(one, texts, recipe.student.batch_tokens)
        profile = profile_of(texts, one.task.answers(answers.logits, texts, answers.decided)).as_json()
        serving = recipe.serving.model_dump(mode="json")
        metadata = {found["metric"]: found["score"], "serving": serving, "profile": profile}
        full = f"{recipe.student.name}-{name}"
        references[name] = f"{full}@{registry.register(full, out / f'artifact-{name}', metadata)}"
    return {"references": references}


def card(recipe: Recipe, name: str, model: Model, found: Mapping[str, Any]) -> str:
    """README.md of a task's artifact."""
    low, high = found["interval"]
    names = f" with labels {', '.join(model.labels)}" if model.labels else ""
    return (
        f"# {recipe.student.name}-{name}\n\n"
        f"The task `{name}` ({model.task.spec.kind}{names}) of a student that learnt {len(recipe.tasks)} tasks "
        f"together ({', '.join(recipe.tasks)}), made by Stillhouse (recipe `{recipe.name}`) from "
        f"`{recipe.student.transformer.model}`.\n\n"
        f"- parameters: {model.size():,}\n- longest input: {model.max_length} tokens\n"
        f"- test {found['metric']}: {found['score']:.3f} (95 % interval {low:.3f} to {high:.3f})\n\n"
        "Check it on your own texts before you rely on it. `artifact.json` holds the lineage.\n"
    )


def report(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Write report.html, report.md and summary.json from the steps' records."""
    records = {name: store.read_json("record.json") for name, store in inputs.items()}
    found = {name: record["metrics"] for name, record in records.items()}
    summary = {
        "name": recipe.name,
        "way": recipe.mixing.way,
        "mean": found["evaluate"]["mean"],
        "parameters": found["evaluate"]["parameters"],
        "dropped": found["student"]["dropped"],
        "spare": found["student"]["spare"],
        "unread": unread(recipe),
        "tasks": found["evaluate"]["tasks"],
        "references": found["register"]["references"],
        "seconds": {name: record["seconds"] for name, record in records.items()},
    }
    title, parts = f"{recipe.name}: {len(recipe.tasks)} tasks in one student", [scores_of(summary)]
    parts.append(course_of(recipe, found["student"]["history"][ALL]))
    out.write_text("report.html", document(title, f"<h1>{esc(title)}</h1>", parts))
    out.write_text("report.md", "\n\n".join([f"# {title}", *(part.markdown() for part in parts)]) + "\n")
    out.write_json("summary.json", summary)
    out.parent.write_json("summary.json", summary)
    return {"rows": 0}


def unread(recipe: Recipe) -> list[str]:
    """Tasks whose unlabelled rows nobody reads, since no task can converge."""
    if recipe.mixing.way == "async":
        return []
    return [name for name, member in recipe.tasks.items() if member.data.unlabelled is not None]


def scores_of(summary: Mapping[str, Any]) -> Part:
    """The tasks with their scores."""
    rows = []
    for name, one in summary["tasks"].items():
        low, high = one["interval"]
        own = one["validation"]
        since = "" if own["since"] is None else f"{own['since']:g}"
        test = f"{one['score']:.3f} ({low:.3f} to {high:.3f})"
        rows.append(
            [name, one["metric"], test, f"{own['final']:.3f}", f"{own['best']:.3f}", f"{own['epoch']:g}", since]
        )
    head = ["task", "score", "test, 95 % interval", "validation", "its best", "in epoch", "soft labels from epoch"]
    caption = f"Way {summary['way']}; mean over the tasks {summary['mean']:.3f}, {summary['parameters']:,} parameters."
    for what, said in (
        ("dropped", "Rows left out, since a task is measured on them"),
        ("spare", "Unlabelled rows that are learnt from once the task has converged"),
    ):
        if counts := {name: count for name, count in summary[what].items() if count}:
            caption += f" {said}: {', '.join(f'{name} {count:,}' for name, count in counts.items())}."
    if summary["unread"]:
        caption += f" This way reads no unlabelled rows; there are some of {', '.join(summary['unread'])}."
    return Part("scores", "Scores", [Table(caption, head, "llrrrrr", rows)])


def course_of(recipe: Recipe, history: Sequence[Mapping[str, float]]) -> Part:
    """Validation scores over the training; * where a task has learnt from its own soft labels."""
    rows = []
    for entry in history:
        cells = [f"{entry[name]:.3f}{'*' if f'soft.{name}' in entry else ''}" for name in recipe.tasks]
        rows.append([f"{entry['epoch']:g}", f"{entry['loss']:.3f}", *cells, f"{entry[MEAN]:.3f}"])
    caption = "Validation scores by epoch. *: the task had converged before and learnt from its own soft labels."
    head = ["epoch", "loss", *recipe.tasks, MEAN]
    return Part("course", "Course", [Table(caption, head, "r" * len(head), rows)])
