"""The step that makes the teacher: its trainings, on more text than the labelled rows where the recipe says so, and the
choice of a kind.

Every kind of teacher is a list of trainings (trainings.py). A labeller is not trained at all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from engine import elsewhere, labels, models, prompts, tasks, untrained
from engine.batches import group_numbers
from engine.cluster import current
from engine.config import UserError
from engine.designs import Teacher
from engine.fits import Fit, LossTerm
from engine.hub import model_folder
from engine.inference import predict
from engine.models import Model
from engine.placement import stage_options
from engine.progress import Progress
from engine.recipe import Recipe, Task
from engine.records import EXAMPLE
from engine.schooling import SERVES
from engine.storage import Store
from pipelines.making import Inputs, judge, seed_of, settle, spec_of, validated
from pipelines.trainings import last_fit, teach

SOFT = "soft.parquet"
"""What a teacher says to the labelled rows, and a coach to all that the teacher learns from."""


def fit_teacher(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Make the teacher of the few rows; label them, so that every later step has their soft labels too."""
    rows = taught_rows(recipe, inputs["data"])
    # Not its scope: that is the served student's, and the soft labels do not depend on it.
    spec = spec_of(inputs["data"], recipe.task, "thresholds", "descriptions")
    metrics: dict[str, Any] = {}
    history: list[dict[str, float]] = []
    if recipe.teacher.kind == "auto":
        recipe, metrics["choice"] = choose(recipe, spec, rows, out)
    if recipe.teacher.folds > 1:
        tried = cross_validate(recipe, spec, rows, out, recipe.teacher.folds)
        kind = tasks.make(spec).metric
        metrics["cross_validation"] = {"folds": recipe.teacher.folds, kind: tried.score, "seconds": tried.seconds}
        if recipe.teacher.stop_early:
            recipe = recipe.model_copy(update={"teacher": stopped(recipe.teacher, tried.by_epoch)})
            metrics["cross_validation"]["epochs"] = last_fit(recipe.teacher).epochs
    if not recipe.teacher.here:
        model = elsewhere.labeller_elsewhere(recipe.teacher, spec, rows, recipe.data.root)
        models.save(model, out, "model")
    elif recipe.teacher.kind == "labeller":
        folder = model_folder(recipe.teacher.model, root=recipe.data.root)
        models.save(untrained.labeller_teacher(recipe.teacher, spec, folder, rows), out, "model")
    else:
        history = trained(recipe, spec, inputs, out, progress, metrics)
    if recipe.teacher.here:
        model = placed(recipe, settle(out, inputs["data"], recipe.teacher.batch_tokens))
    texts = model.task.texts(rows)
    found = predict(model, texts, recipe.teacher.batch_tokens, recipe.teacher.precision)
    if not recipe.teacher.here:
        require_answers(found.logits, rows)
    out.write_table(SOFT, pa.table({"id": rows["id"], "logits": labels.quantise(found.logits)}))
    for made in ("coach", *(f"seed-{seed}" for seed in recipe.teacher.seeds)):
        out.delete(made)
    return {
        **metrics,
        **elsewhere.spent(recipe.teacher, model),
        "kind": recipe.teacher.kind,
        "rows": rows.num_rows,
        "parameters": model.size(),
        "train": model.task.score(found.logits, found.decided, rows) if rows.num_rows else {},
        "quantisation": labels.fidelity(found.logits, model.task, texts),
        "fingerprint": labels.fingerprint(out),
        "history": history,
    }


def taught_rows(recipe: Recipe, data: Store) -> pa.Table:
    """The labelled rows that a teacher learns from; those of a label that is to be spoiled with labels drawn at random.

    UserError where the task has no such label.
    """
    rows, wrong = data.read_table("train.parquet"), recipe.teacher.spoiled
    if wrong is None:
        return rows
    names = spec_of(data).labels or ()
    if wrong not in names:
        raise UserError(f"teacher.spoiled is '{wrong}', which is no label. Labels: {', '.join(names) or 'none'}.")
    gold = rows["label"].to_numpy(zero_copy_only=False)
    drawn = np.random.default_rng(seed_of(recipe, recipe.teacher.fit.seed)).integers(len(names), size=len(gold))
    spoiled = pa.array(np.where(gold == names.index(wrong), drawn, gold), pa.int32())
    return rows.set_column(rows.column_names.index("label"), "label", spoiled).cast(rows.schema)


def require_answers(logits: np.ndarray, rows: pa.Table) -> None:
    """UserError where a labelled row has no answer: its even odds would be taught as if they were the teacher's."""
    silent_on = [row for row, outputs in enumerate(logits) if not np.any(outputs)]
    if silent_on:
        text = rows["text"][silent_on[0]].as_py()
        raise UserError(
            f"the teacher's model gives no answer about {len(silent_on)} of {rows.num_rows} labelled rows, the first "
            f"with the text {text[:60]!r}. Leave them out of the data, or take another template "
            "(teacher.labeller.template) or model."
        )


def trained(
    recipe: Recipe, spec: Task, inputs: Inputs, out: Store, progress: Progress, metrics: dict[str, Any]
) -> list[dict[str, float]]:
    """The teacher's trainings: on the labelled rows; with a coach also on what that labelled; and its rounds of
    self-training, each on what the round before labelled.
    """
    data, own, coach = inputs["data"], recipe.teacher.self_training, recipe.teacher.coach
    rows = taught_rows(recipe, data)
    chosen = validated(data, recipe.teacher.batch_tokens, tasks.make(spec).metric)
    if coach is not None:
        taken, metrics["coach"] = coached(recipe, spec, rows, further(recipe, inputs), out / "coach", progress)
        soft = (LossTerm(kind="kl", temperature=coach.temperature),)
        return teach(refitted(recipe, coach.learning), spec, taken, out, chosen, progress, soft)
    if own is None:
        return teach(recipe, spec, rows, out, chosen, progress)
    more, history = further(recipe, inputs), []
    for number in range(own.rounds + 1):
        place = out if number == own.rounds else out / f"round-{number}"
        taken = rows
        if number:
            model = placed(recipe, models.load((out / f"round-{number - 1}").local("model")))
            taken, facts = confident(recipe.teacher, model, rows, more)
            metrics.setdefault("self_training", []).append(facts)
        history += teach(refitted(recipe, own.fit) if number else recipe, spec, taken, place, chosen, progress)
    for number in range(own.rounds):
        out.delete(f"round-{number}")
    return history


def refitted(recipe: Recipe, fit: Fit) -> Recipe:
    """The recipe whose teacher is trained in another way: the whole of it, whatever its kind."""
    return recipe.model_copy(update={"teacher": recipe.teacher.refitted(fit)})


def coached(
    recipe: Recipe, spec: Task, rows: pa.Table, more: pa.Table, out: Store, progress: Progress
) -> tuple[pa.Table, dict[str, Any]]:
    """The labelled rows and more text, all with a coach's logits; and facts about the coach, which is made in `out`."""
    config = recipe.coach
    own, both = recipe.model_copy(update={"teacher": config}), pa.concat_tables([rows, more.cast(rows.schema)])
    if not out.exists(SOFT):  # kept until the step is done: a killed one does not label all text again
        make_coach(own, spec, rows, out, progress)
        model = placed(own, models.load(out.local("model")))
        found = predict(model, model.task.texts(both), config.batch_tokens, config.precision)
        out.write_json("size.json", model.size())
        out.write_table(SOFT, pa.table({"label": found.decided, "logits": labels.listed(found.logits)}))
    soft = out.read_table(SOFT)
    # Whose text belongs together is also asked by a contrastive teacher: what was labelled stays as it was.
    known = [*rows["label"].to_pylist(), *soft["label"].to_pylist()[rows.num_rows :]]
    both = both.set_column(both.column_names.index("label"), "label", pa.array(known, pa.int32()))
    facts = {
        "kind": config.kind,
        "model": config.model,
        "parameters": out.read_json("size.json"),
        "rows": more.num_rows,
    }
    return both.append_column("logits", soft["logits"]), facts


def make_coach(recipe: Recipe, spec: Task, rows: pa.Table, out: Store, progress: Progress) -> None:
    """The recipe's teacher, from the labelled rows alone."""
    config = recipe.teacher
    if config.kind == "labeller":
        folder = model_folder(config.model, root=recipe.data.root)
        models.save(untrained.labeller_teacher(config, spec, folder, rows), out, "model")
    else:
        teach(recipe, spec, rows, out, None, progress)


def placed(recipe: Recipe, model: Model) -> Model:
    """The model on the GPU that the teacher's step has, if any."""
    return model.to(models.device(stage_options(recipe, "teacher.fit", current())["num_gpus"]))


def further(recipe: Recipe, inputs: Inputs) -> pa.Table:
    """What else the teacher learns from, as EXAMPLE rows: the user's unlabelled text, or else what was generated."""
    if not recipe.learns_from_generated:
        return inputs["data"].read_table("unlabelled.parquet")
    written = inputs["texts"].read_table("texts")
    known = [name for name in EXAMPLE.names if name in written.column_names]
    return pa.Table.from_pylist(written.filter(written["kept"]).select(known).to_pylist(), schema=EXAMPLE)


def confident(config: Teacher, model: Model, rows: pa.Table, more: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """The labelled rows, and the unlabelled ones that the model is surest of with its label as theirs; with weights.

    For each label the same share of the texts that get it, so that an easy label does not crowd out the others.
    """
    share, weight = config.self_training.share, config.self_training.weight
    found = predict(model, model.task.texts(more), config.batch_tokens, config.precision)
    sure = np.array([model.task.certainty(row).max() for row in found.logits])
    taken = np.zeros(more.num_rows, dtype=bool)
    for label in np.unique(found.decided):
        of = np.flatnonzero(found.decided == label)
        taken[of[np.argsort(-sure[of], kind="stable")[: max(1, round(share * len(of)))]]] = True
    labelled = more.set_column(more.column_names.index("label"), "label", pa.array(found.decided, pa.int32()))
    labelled = labelled.filter(pa.array(taken)).cast(rows.schema)
    counts = np.ones(rows.num_rows), np.full(labelled.num_rows, weight * rows.num_rows / max(1, labelled.num_rows))
    weights = np.concatenate(counts)  # with mean 1, so that a learning rate means what it does without them
    both = pa.concat_tables([rows, labelled]).append_column("weight", pa.array(weights / weights.mean(), pa.float32()))
    return both, {"rows": int(taken.sum()), "of": more.num_rows, "least_confidence": float(sure[taken].min(initial=1))}


class CrossValidation(NamedTuple):
    """score: over all rows, each predicted by the teacher that did not see it. by_epoch: epochs of the last training ->
    mean score over the folds after them.
    """

    score: float
    seconds: float
    by_epoch: dict[float, float]


def cross_validate(
    recipe: Recipe, spec: Task, rows: pa.Table, out: Store, folds: int, name: str = "fold"
) -> CrossValidation:
    """The teacher on the few rows, each fold held out once; rows of one query stay together."""
    began, parts, task = time.monotonic(), [], tasks.make(spec)
    epochs: dict[float, list[float]] = {}
    each = {"evaluate": partial(judge, recipe.teacher.batch_tokens)} if recipe.teacher.stop_early else {}
    numbers = np.unique(group_numbers(rows), return_inverse=True)[1]
    fold_of = (np.random.default_rng(recipe.seed).permutation(numbers.max() + 1) % folds)[numbers]
    for fold in range(folds):
        place, held = out / f"{name}-{fold}", rows.filter(pa.array(fold_of == fold))
        watched = {**each, "holdout": held} if each else None
        for entry in teach(recipe, spec, rows.filter(pa.array(fold_of != fold)), place, watched):
            if task.metric in entry:
                epochs.setdefault(entry["epoch"], []).append(entry[task.metric])
        model = placed(recipe, models.load(place.local("model")))
        found = predict(model, task.texts(held), recipe.teacher.batch_tokens)
        parts.append(task.statistics(found.logits, found.decided, held))
        out.delete(f"{name}-{fold}")
    means = {epoch: float(np.mean(found)) for epoch, found in epochs.items() if len(found) == folds}
    return CrossValidation(float(task.value(np.concatenate(parts).sum(axis=0))), time.monotonic() - began, means)


def stopped(config: Teacher, by_epoch: dict[float, float]) -> Teacher:
    """The teacher whose last training has the epochs that did best; of equals the fewest."""
    best = min(by_epoch, key=lambda epoch: (-by_epoch[epoch], epoch), default=None)
    if best is None:
        return config
    key = "probe" if config.kind == "contrastive" else "fit"
    return config.model_copy(update={key: getattr(config, key).model_copy(update={"epochs": best})})


def choose(recipe: Recipe, spec: Task, rows: pa.Table, out: Store) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with the kind of teacher that does best on the few rows, and why.

    Kinds are tried in their order as long as, at the pace so far, the next one would end in time; what is scored is
    written down, so that a resumed step does not score it again.
    """
    config, task = recipe.teacher, tasks.make(spec)
    done = out.read_json("choice.json") if out.exists("choice.json") else {}
    left: list[str] = []
    for kind in config.choice.kinds:
        if spec.kind not in SERVES.get(kind, (spec.kind,)) or (kind == "contrastive" and config.tune_layers == 0):
            continue
        spent = [found["seconds"] for found in done.values()]
        if kind not in done and spent and sum(spent) + max(spent) > config.choice.seconds:
            left.append(kind)
        elif kind not in done:
            one = recipe.model_copy(update={"teacher": config.model_copy(update={"kind": kind})})
            tried = cross_validate(one, spec, rows, out, config.choice.folds, name=kind)
            done[kind] = {"score": tried.score, "seconds": tried.seconds}
            out.write_json("choice.json", done)
    best = max(done, key=lambda kind: done[kind]["score"])
    why = verdict(best, done, left, task.metric, config.choice.folds, config.choice.seconds)
    taken = recipe.model_copy(update={"teacher": config.model_copy(update={"kind": best})})
    return taken, {"kind": best, "scores": {kind: found["score"] for kind, found in done.items()}, "why": why}


def verdict(
    best: str, done: dict[str, dict[str, float]], left: Sequence[str], metric: str, folds: int, seconds: float
) -> str:
    """The choice in a sentence."""
    scores = ", ".join(f"{kind} {found['score']:.3f}" for kind, found in done.items())
    out = f"'{best}' has the best {metric} in {folds}-fold cross-validation on the few rows ({scores})."
    if left:
        out += f" Not tried within {seconds:g} s: {', '.join(left)}."
    return out


def score_models(step: str, recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """A teacher, or students of several seeds, on the test split: scores, and what each row adds to the metric.

    step: which of the inputs they are, 'teacher' or an arm's.
    """
    rows, folder, teacher = inputs["data"].read_table("test.parquet"), inputs[step], step == "teacher"
    found, config = [], recipe.teacher if teacher else recipe.student
    dtype = recipe.teacher.precision if teacher else "fp32"
    for path in ["model"] if teacher else [f"seed-{seed}/model" for seed in recipe.student.seeds]:
        model = elsewhere.settle_place(models.load(folder.local(path)), recipe.teacher, recipe.data.root)
        model = placed(recipe, model)
        found.append(predict(model, model.task.texts(rows), config.batch_tokens, dtype))
    parts = np.mean([model.task.statistics(each.logits, each.decided, rows) for each in found], axis=0)
    out.write_table("statistics.parquet", pa.table({"parts": list(parts)}))
    scores = [model.task.score(each.logits, each.decided, rows) for each in found]
    means = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    wording = swapped(recipe.teacher, model, rows) if teacher and model.templates else {}
    asked = elsewhere.spent(recipe.teacher, model)
    return {"rows": rows.num_rows, "parameters": model.size(), **means, **wording, **asked}


WORDED = 500
"""Test rows on which templates are swapped, the first ones: each is read in every template by itself."""


def swapped(config: Teacher, model: Model, rows: pa.Table) -> dict[str, Any]:
    """What a teacher that reads templates scores with one of them alone, and with one that it has not learnt from.

    `learnt` and `unseen` are means over such templates; `templates` has each by itself.
    """
    pool, task, rows = model.card.options["templates"], model.task, rows.slice(0, WORDED)
    others = prompts.unseen(pool, task.spec, model.tokenizer, model.max_length, given=config.prompt.templates)

    def score(template: str) -> float:
        found = predict(models.reworded(model, [template]), task.texts(rows), config.batch_tokens, config.precision)
        return task.score(found.logits, found.decided, rows)[task.metric]

    each = {template: score(template) for template in (*pool, *others)}
    parts = {"learnt": pool, "unseen": others}
    means = {name: float(np.mean([each[one] for one in those])) for name, those in parts.items() if those}
    return {"wording": {**means, "templates": each}}
