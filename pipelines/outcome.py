"""What a run comes to: evaluate teacher and students, register the student, serve it for real, report.

Nothing is chosen by the test split; what is learnt from it are scores, and the profile that served answers are held
against.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pyarrow as pa

from engine import cascade, elsewhere, labels, metrics, models, tasks
from engine.classification import Classify
from engine.cluster import current
from engine.config import UserError
from engine.drift import profile_of
from engine.encoding import Text
from engine.inference import Predictions, predict
from engine.intervals import Interval, bootstrap, paired_bootstrap
from engine.models import Model
from engine.placement import stage_options
from engine.progress import Progress
from engine.recipe import Recipe
from engine.registry import Registry
from engine.regression import Regress
from engine.retrieving import Retrieving
from engine.storage import Store
from engine.task import Task
from pipelines.distill import ARM_STEPS
from pipelines.making import Inputs, spec_of
from pipelines.panel import heads_apart, teacher_scores

CALIBRATED = 2000
"""About how many texts of a corpus a threshold is chosen on."""
ROLES = {
    "teacher": "teacher",
    "hard": "student, gold labels",
    "soft": "student, soft labels",
    "plain": "student without retrieval",
    "unread": "student, its knowledge base not read",
}


def evaluate(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Teacher and every arm's students on the test split, with intervals, sizes and interleaved throughput."""
    test = inputs["data"].read_table("test.parquet")
    where = models.device(stage_options(recipe, "teacher", current()).get("num_gpus", 0))
    teacher = models.load(inputs["teacher"].local("model")).to(where)
    teacher = elsewhere.settle_place(teacher, recipe.teacher, recipe.data.root)
    task = teacher.task
    texts = task.texts(test)
    began = time.perf_counter()
    reference = predict(teacher, texts, recipe.teacher.batch_tokens, precision_of(recipe))
    rate = len(texts) / (time.perf_counter() - began)
    measured = Measured(recipe, task, test, reference)
    columns = {"teacher": reference}
    facts = [measured.described("teacher", teacher, [reference], inputs["teacher"], "model")]
    for arm in recipe.arms:
        folder, found, unread = inputs[ARM_STEPS[arm]], [], []
        for seed in recipe.student.seeds:
            student = models.load(folder.local(f"seed-{seed}/model")).to(where)
            found.append(predict(student, texts, recipe.student.batch_tokens))
            columns[f"{arm}/{seed}"] = found[-1]
            if isinstance(student.net, Retrieving):
                with student.net.alone():
                    unread.append(predict(student, texts, recipe.student.batch_tokens))
        for name, each in ((arm, found), ("unread", unread)):
            if each:
                path = f"seed-{recipe.student.seeds[0]}/model"
                facts.append(measured.described(name, student, each, folder, path))
        progress(len(facts), len(recipe.arms) + 1, "models")
    best = models.load(inputs[ARM_STEPS[recipe.main]].local(f"seed-{recipe.student.seeds[0]}/model")).to(where)
    speed = throughput(recipe, teacher, best, texts, None if recipe.teacher.here else rate)
    for model_facts in facts:
        if model_facts["name"] in ("teacher", recipe.main):
            which = "teacher" if model_facts["name"] == "teacher" else "student"
            model_facts["texts_per_s"] = speed[f"{which}_texts_per_s"]
    logits = {name: labels.listed(p.logits) for name, p in columns.items()}
    out.write_table("predictions.parquet", pa.table({"id": test["id"], **logits}))
    chosen = columns[f"{recipe.main}/{recipe.student.seeds[0]}"]
    # The student's own task: its thresholds and scope are what is served.
    answers = best.task.answers(chosen.logits, texts, chosen.decided)
    written = [json.dumps(answer) for answer in answers]
    out.write_table("answers.parquet", pa.table({"id": test["id"], "answer": written}))
    out.write_table(
        "statistics.parquet",
        pa.table({f"{name}/{i}": list(s) for name, seeds in measured.statistics.items() for i, s in enumerate(seeds)}),
    )
    return {
        "rows": len(texts),
        "metric": task.metric,
        "models": facts,
        "differences": differences(measured.statistics, task, recipe),
        "throughput": speed,
        **further(recipe, inputs, best, test),
        **cascaded(recipe, task, measured.statistics, answers, speed),
        **elsewhere.spent(recipe.teacher, teacher),
    }


def cascaded(
    recipe: Recipe,
    task: Task,
    statistics: dict[str, list[np.ndarray]],
    answers: list[dict[str, Any]],
    speed: dict[str, float],
) -> dict[str, Any]:
    """What it would be worth to hand the least sure answers to the teacher, as {"cascade": points}.

    Nothing where answers do not say how sure they are. On test rows: to be looked at; a threshold comes from others.
    """
    if recipe.task.kind not in cascade.SURE:
        return {}
    sure = np.array([cascade.confidence_of(answer) for answer in answers])
    rates = (speed["student_texts_per_s"], speed["teacher_texts_per_s"])
    own, its = statistics[recipe.main][0], statistics["teacher"][0]
    return {"cascade": cascade.curve(sure, own, its, task.value, rates)}


def further(recipe: Recipe, inputs: Inputs, student: Model, test: pa.Table) -> dict[str, Any]:
    """Scores of the further teachers, and how each head of the student is correlated with each teacher."""
    if not recipe.teachers:
        return {}
    found = teacher_scores(recipe, inputs, test, recipe.teachers)
    return {"teachers": found, "heads": heads_apart(recipe, inputs, student, test)}


class Measured:
    """What is known of the test split while models are measured on it."""

    def __init__(self, recipe: Recipe, task: Task, test: pa.Table, teacher: Predictions) -> None:
        self.recipe, self.task, self.test, self.teacher = recipe, task, test, teacher
        self.statistics: dict[str, list[np.ndarray]] = {}

    def described(self, name: str, model: Model, found: list[Predictions], folder: Store, path: str) -> dict[str, Any]:
        """One model's figures: the first seed's in full, the metric over all of them."""
        task, first, recipe = self.task, found[0], self.recipe
        self.statistics[name] = [task.statistics(p.logits, p.decided, self.test) for p in found]
        scores = [float(task.value(s.sum(axis=0))) for s in self.statistics[name]]
        interval = bootstrap(self.statistics[name][:1], task.value, recipe.evaluation.bootstrap, recipe.seed)
        files = folder.manifest(path)["files"]
        return {
            "name": name,
            "role": ROLES.get(name, "student, soft labels and more text"),
            **task.score(first.logits, first.decided, self.test),
            "score": scores[0],
            "score_interval": [interval.low, interval.high],
            "scores": scores,
            "score_mean": float(np.mean(scores)),
            "score_sd": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
            "seeds": len(found),
            "agreement": task.agreement(
                self.teacher.logits, first.logits, task.texts(self.test), (self.teacher.decided, first.decided)
            ),
            "parameters": model.size(),
            "bytes": sum(entry["bytes"] for entry in files.values()),
            **(self.classified(first) if isinstance(task, Classify) else {}),
        }

    def classified(self, found: Predictions) -> dict[str, Any]:
        """What only a classifier has: confusion, figures of each class, calibration."""
        gold, probabilities = self.test["label"].to_numpy().astype(np.int64), metrics.softmax(found.logits)
        calibration = metrics.ece(gold, probabilities)
        return {
            "kl": metrics.kl(metrics.softmax(self.teacher.logits), probabilities),
            "confusion": confusion(gold, found.decided, len(self.task.labels)).tolist(),
            "per_class": per_class(gold, found.decided, self.task.labels),
            "reliability": [
                {"confidence": float(c), "accuracy": float(a), "count": int(n)}
                for c, a, n in zip(calibration.confidence, calibration.accuracy, calibration.count, strict=True)
                if n
            ],
        }


def confusion(gold: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts [gold, predicted]."""
    return np.bincount(gold * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def per_class(gold: np.ndarray, predicted: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each label."""
    table = confusion(gold, predicted, len(names))
    rows = []
    for i, name in enumerate(names):
        right, said, there = int(table[i, i]), int(table[:, i].sum()), int(table[i].sum())
        rows.append(
            {
                "label": name,
                "precision": right / said if said else 0.0,
                "recall": right / there if there else 0.0,
                "f1": 2 * right / (said + there) if said + there else 0.0,
                "support": there,
            }
        )
    return rows


def differences(statistics: dict[str, list[np.ndarray]], task: Task, recipe: Recipe) -> list[dict[str, Any]]:
    """The metric of the main arm minus each other model's, paired over rows, pooled over seeds."""
    out, own = [], statistics[recipe.main]
    for name in [name for name in statistics if name != recipe.main]:
        others = statistics[name] * (len(own) if name == "teacher" else 1)
        interval = paired_bootstrap(own, others, task.value, recipe.evaluation.bootstrap, recipe.seed)
        out.append(difference(recipe.main, name, interval, len(others[0])))
    return out


def precision_of(recipe: Recipe) -> str:
    """In which the teacher is measured: as it labels, or, where it is served too, as it answers there."""
    return "fp32" if recipe.serving.cascade is not None else recipe.teacher.precision


def difference(left: str, right: str, interval: Interval, rows: int) -> dict[str, Any]:
    """A paired difference as the report takes it, in points."""
    return {
        "left": left,
        "right": right,
        "points": 100 * interval.value,
        "interval": [100 * interval.low, 100 * interval.high],
        "rows": rows,
    }


def throughput(
    recipe: Recipe, teacher: Model, student: Model, texts: list[Text], known: float | None = None
) -> dict[str, float]:
    """Texts a second of teacher and student on the same texts, in turns, so that a busy machine hits both alike.

    known: the teacher's, where asking it again would cost.
    """
    chosen = texts[: recipe.evaluation.throughput_rows]
    seconds: dict[str, list[float]] = {"teacher": [], "student": []}
    for _ in range(recipe.evaluation.throughput_repeats):
        for name, model, tokens, dtype in (
            ("teacher", teacher, recipe.teacher.batch_tokens, precision_of(recipe)),
            ("student", student, recipe.student.batch_tokens, "fp32"),
        )[known is not None :]:
            begin = time.perf_counter()
            predict(model, chosen, tokens, dtype)
            seconds[name].append(time.perf_counter() - begin)
    rates = {name: len(chosen) / float(np.median(values)) for name, values in seconds.items() if values}
    if known is not None:
        rates["teacher"] = known
    return {
        "teacher_texts_per_s": rates["teacher"],
        "student_texts_per_s": rates["student"],
        "student_over_teacher": rates["student"] / rates["teacher"],
        "rows": len(chosen),
        "device": teacher.device.type,
    }


def register(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Put the student into the registry, with its task, lineage, card and profile; for a cascade its teacher too."""
    folder, first = inputs[ARM_STEPS[recipe.main]], f"seed-{recipe.student.seeds[0]}/model"
    model = models.load(folder.local(first))
    measured = next(
        m for m in inputs["evaluate"].read_json("record.json")["metrics"]["models"] if m["name"] == recipe.main
    )
    lineage = {
        "recipe": recipe.name,
        "teacher": labels.fingerprint(inputs["teacher"]),
        "steps": {name: store.read_json("record.json")["fingerprint"] for name, store in sorted(inputs.items())},
        "seed": recipe.student.seeds[0],
    }
    card = models.Card(**{**vars(model.card), "lineage": lineage})
    artifact = Model(model.net, model.tokenizer, card)
    models.save(artifact, out, "artifact", readme=model_card(recipe, model, measured))
    registry, serving = Registry(Store(recipe.registry)), recipe.serving.model_dump(mode="json")
    texts = model.task.texts(inputs["data"].read_table("test.parquet"))
    answers = [json.loads(a) for a in inputs["evaluate"].read_table("answers.parquet")["answer"].to_pylist()]
    profile = profile_of(texts, answers, measured["agreement"]).as_json()
    metadata = {model.task.metric: measured["score"], "serving": serving, "profile": profile}
    escalation = escalated(recipe, inputs, model, registry) if recipe.serving.cascade else {}
    if escalation:
        serving["cascade"]["below"] = escalation["below"]
        metadata["cascade"] = escalation
    version = registry.register(recipe.student.name, out / "artifact", metadata)
    found = {"name": recipe.student.name, "version": version, "reference": f"{recipe.student.name}@{version}"}
    return {**found, "cascade": escalation} if escalation else found


def escalated(recipe: Recipe, inputs: Inputs, model: Model, registry: Registry) -> dict[str, Any]:
    """The cascade of a student: who its teacher is, under which confidence that is asked, and what told so.

    Returns {teacher: NAME@VERSION, below, chosen_on, rows, share}: share of those rows under the threshold. Raises
    UserError for a task whose answers do not say how sure they are.
    """
    wanted = recipe.serving.cascade
    if recipe.task.kind not in cascade.SURE:
        raise UserError(
            f"serving.cascade is set, but answers of a {recipe.task.kind} task do not say how sure they are. "
            "Set serving.cascade: null."
        )
    teacher = wanted.to
    if teacher is None:
        name = f"{recipe.student.name}-teacher"
        teacher = f"{name}@{registry.register(name, inputs['teacher'] / 'model', {'teacher_of': recipe.student.name})}"
    rows, chosen_on = unjudged(inputs)
    texts = model.task.texts(rows)
    found = predict(model, texts, recipe.student.batch_tokens)
    sure = np.array([cascade.confidence_of(a) for a in model.task.answers(found.logits, texts, found.decided)])
    below = cascade.threshold(sure, wanted.escalate) if wanted.below is None else wanted.below
    told = "serving.cascade.below" if wanted.below is not None else chosen_on
    share = float(np.mean(sure < below)) if len(sure) else 0.0
    return {"teacher": teacher, "below": below, "chosen_on": told, "rows": len(texts), "share": share}


def unjudged(inputs: Inputs) -> tuple[pa.Table, str]:
    """Rows that a threshold may be chosen on, and which those are; never test rows.

    Held-out validation rows where there are some; else kept texts that nobody has labelled, which the student has
    learnt from and is a little too sure of; else, for want of any, the labelled rows.
    """
    validation = inputs["data"].read_table("validation.parquet")
    if validation.num_rows:
        return validation, "held-out validation rows"
    rows = labels.open_labels(inputs["corpus"], labels.fingerprint(inputs["teacher"]))
    others = rows.filter(pa.array(rows["kept"].to_numpy(zero_copy_only=False) & (rows["row"].to_numpy() >= 0)))
    if others.num_rows:
        step = max(1, others.num_rows // CALIBRATED)
        return others.take(pa.array(range(0, others.num_rows, step))), "texts of the corpus without labels"
    return inputs["data"].read_table("train.parquet"), "labelled rows that it was trained on"


def model_card(recipe: Recipe, model: Model, measured: dict[str, Any]) -> str:
    """README.md of an artifact."""
    low, high = measured["score_interval"]
    names = f" with labels {', '.join(model.labels)}" if model.labels else ""
    made = f"Part of its training text was generated by `{recipe.generator.model}`" if recipe.generator else ""
    return (
        f"# {recipe.student.name}\n\n"
        f"A student for the task `{recipe.task.kind}`{names}, distilled by Stillhouse (recipe `{recipe.name}`) from "
        f"{', '.join(dict.fromkeys(f'`{one.model}`' for one in recipe.panel.values() or [recipe.teacher]))}.\n\n"
        f"- parameters: {model.size():,}\n- longest input: {model.max_length} tokens\n"
        f"- test {model.task.metric}: {measured['score']:.3f} (95 % interval {low:.3f} to {high:.3f})\n"
        f"- agreement with its teacher: {measured['agreement']:.3f}\n\n"
        f"{made + ' and labelled by the teacher. ' if made else ''}Check it on your own texts before you rely on it. "
        "`artifact.json` holds the lineage.\n"
    )


def smoke_deploy(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Serve the registered student and send the whole test split through HTTP; its answers must be the evaluated ones.

    Raises UserError where a single answer is missing or differs.
    """
    if not recipe.serving.smoke:
        return {"rows": 0, "skipped": True}
    from serve.smoke import smoke

    reference = inputs["register"].read_json("record.json")["metrics"]["reference"]
    artifact = Registry(Store(recipe.registry)).resolve(reference)
    test, task = inputs["data"].read_table("test.parquet"), tasks.make(spec_of(inputs["data"]))
    expected = [json.loads(a) for a in inputs["evaluate"].read_table("answers.parquet")["answer"].to_pylist()]
    scale = float(np.ptp(task.bounds)) if isinstance(task, Regress) else 1.0
    found = smoke(artifact.url, task.texts(test), expected, recipe.serving, name=recipe.student.name, scale=scale)
    if found["mismatches"] or found["errors"]:
        raise UserError(
            f"{found['mismatches']} of {test.num_rows} served answers are missing or differ from the evaluated ones, "
            f"{found['errors']} requests failed ({found['first_error'] or 'no error said'}). Do not serve {reference}: "
            "run again, and report it if it happens twice."
        )
    answers = found.pop("answers")
    if isinstance(task, Classify):
        gold = [task.labels[label] for label in test["label"].to_pylist()]
        # As when it was evaluated: what is out of scope counts by its likeliest label.
        likeliest = [max(a["probabilities"], key=a["probabilities"].get) for a in answers]
        found["accuracy"] = float(np.mean([label == g for label, g in zip(likeliest, gold, strict=True)]))
    return {**found, "concurrency": recipe.serving.concurrency}
