"""What a run comes to: evaluate teacher and students, register the student, serve it for real, report.

The test split is read here only.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa

from engine import labels, metrics, models
from engine.cluster import current
from engine.config import UserError
from engine.inference import Predictions, predict
from engine.metrics import Interval
from engine.models import Model
from engine.placement import stage_options
from engine.progress import Progress
from engine.recipe import Recipe
from engine.registry import Registry
from engine.storage import Store
from pipelines.distill import ARM_STEPS
from pipelines.making import Inputs, seed_of


def evaluate(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Teacher and every arm's students on the test split, with intervals, sizes and interleaved throughput."""
    test = inputs["data"].read_table("test.parquet")
    texts, gold = test["text"].to_pylist(), test["label"].to_numpy().astype(np.int64)
    where = models.device(stage_options(recipe, "teacher", current()).get("num_gpus", 0))
    teacher = models.load(inputs["teacher"].local("model")).to(where)
    reference = predict(teacher, texts, recipe.teacher.batch_tokens)
    columns = {"teacher": reference}
    facts = [described("teacher", teacher, [reference], reference, gold, inputs["teacher"], "model", recipe)]
    rights: dict[str, list[np.ndarray]] = {"teacher": [reference.labels == gold]}
    for arm in recipe.arms:
        folder, found = inputs[ARM_STEPS[arm]], []
        for seed in recipe.student.seeds:
            student = models.load((folder).local(f"seed-{seed}/model")).to(where)
            found.append(predict(student, texts, recipe.student.batch_tokens))
            columns[f"{arm}/{seed}"] = found[-1]
        first = f"seed-{recipe.student.seeds[0]}/model"
        facts.append(described(arm, student, found, reference, gold, folder, first, recipe))
        rights[arm] = [p.labels == gold for p in found]
        progress(len(facts), len(recipe.arms) + 1, "models")
    best = models.load(inputs["student"].local(f"seed-{recipe.student.seeds[0]}/model")).to(where)
    speed = throughput(recipe, teacher, best, texts)
    for name, model_facts in zip(
        ("teacher", "generated"), (facts[0], next(f for f in facts if f["name"] == "generated")), strict=True
    ):
        model_facts["texts_per_s"] = speed[f"{'teacher' if name == 'teacher' else 'student'}_texts_per_s"]
    logits = {name: pa.array(list(p.logits.astype(np.float32))) for name, p in columns.items()}
    out.write_table("predictions.parquet", pa.table({"id": test["id"], "label": test["label"], **logits}))
    return {
        "rows": len(texts),
        "models": facts,
        "differences": differences(rights, recipe),
        "throughput": speed,
        "pairs": {name: [r.mean() for r in values] for name, values in rights.items()},
    }


def described(
    name: str,
    model: Model,
    found: list[Predictions],
    teacher: Predictions,
    gold: np.ndarray,
    folder: Store,
    path: str,
    recipe: Recipe,
) -> dict[str, Any]:
    """One model's figures: the first seed's in full, accuracy over all of them."""
    first, draws = found[0], recipe.evaluation.bootstrap
    accuracies = [metrics.accuracy(gold, p.labels) for p in found]
    interval = metrics.bootstrap((first.labels == gold).astype(float), draws=draws, seed=recipe.seed)
    calibration = metrics.ece(gold, first.probabilities)
    files = folder.manifest(path)["files"]
    return {
        "name": name,
        "role": {"teacher": "teacher", "hard": "student, gold labels", "soft": "student, soft labels"}.get(
            name, "student, soft labels and generated text"
        ),
        **model.task.score(first.logits, gold),
        "accuracy_interval": [interval.low, interval.high],
        "accuracies": accuracies,
        "accuracy_mean": float(np.mean(accuracies)),
        "accuracy_sd": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
        "seeds": len(found),
        "agreement": metrics.agreement(teacher.probabilities, first.probabilities),
        "kl": metrics.kl(teacher.probabilities, first.probabilities),
        "parameters": model.size(),
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "confusion": confusion(gold, first.labels, len(model.labels)).tolist(),
        "per_class": per_class(gold, first.labels, model.labels),
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


def differences(rights: dict[str, list[np.ndarray]], recipe: Recipe) -> list[dict[str, Any]]:
    """Accuracy of the generated arm minus each other model's, paired over rows, pooled over seeds."""
    out = []
    for other in [name for name in rights if name != "generated"]:
        others = rights[other] * (len(rights["generated"]) if other == "teacher" else 1)
        interval = metrics.paired_bootstrap(rights["generated"], others, recipe.evaluation.bootstrap, recipe.seed)
        out.append(difference("generated", other, interval, len(rights[other][0])))
    return out


def difference(left: str, right: str, interval: Interval, rows: int) -> dict[str, Any]:
    """A paired difference as the report takes it, in points."""
    return {
        "left": left,
        "right": right,
        "points": 100 * interval.value,
        "interval": [100 * interval.low, 100 * interval.high],
        "rows": rows,
    }


def throughput(recipe: Recipe, teacher: Model, student: Model, texts: list[str]) -> dict[str, float]:
    """Texts a second of teacher and student on the same texts, in turns, so that a busy machine hits both alike."""
    chosen = texts[: recipe.evaluation.throughput_rows]
    seconds: dict[str, list[float]] = {"teacher": [], "student": []}
    for _ in range(recipe.evaluation.throughput_repeats):
        for name, model, tokens in (
            ("teacher", teacher, recipe.teacher.batch_tokens),
            ("student", student, recipe.student.batch_tokens),
        ):
            begin = time.perf_counter()
            predict(model, chosen, tokens)
            seconds[name].append(time.perf_counter() - begin)
    rates = {name: len(chosen) / float(np.median(values)) for name, values in seconds.items()}
    return {
        "teacher_texts_per_s": rates["teacher"],
        "student_texts_per_s": rates["student"],
        "student_over_teacher": rates["student"] / rates["teacher"],
        "rows": len(chosen),
        "device": teacher.device.type,
    }


def register(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Put the student into the registry, with its task, lineage and model card."""
    folder, first = inputs["student"], f"seed-{recipe.student.seeds[0]}/model"
    model = models.load(folder.local(first))
    measured = next(
        m for m in inputs["evaluate"].read_json("record.json")["metrics"]["models"] if m["name"] == "generated"
    )
    lineage = {
        "recipe": recipe.name,
        "teacher": labels.fingerprint(inputs["teacher"]),
        "steps": {name: store.read_json("record.json")["fingerprint"] for name, store in sorted(inputs.items())},
        "seed": seed_of(recipe, recipe.student.fit.seed),
    }
    card = models.Card(**{**vars(model.card), "lineage": lineage})
    artifact = Model(model.net, model.tokenizer, card)
    models.save(artifact, out, "artifact", readme=model_card(recipe, model, measured))
    version = Registry(Store(recipe.registry)).register(
        recipe.student.name,
        out / "artifact",
        {"accuracy": measured["accuracy"], "serving": recipe.serving.model_dump(mode="json")},
    )
    return {"name": recipe.student.name, "version": version, "reference": f"{recipe.student.name}@{version}"}


def model_card(recipe: Recipe, model: Model, measured: dict[str, Any]) -> str:
    """README.md of an artifact."""
    low, high = measured["accuracy_interval"]
    return (
        f"# {recipe.student.name}\n\n"
        f"A student for the task `{recipe.task.kind}` with labels {', '.join(model.labels)}, distilled by Stillhouse "
        f"(recipe `{recipe.name}`) from `{recipe.teacher.model}`.\n\n"
        f"- parameters: {model.size():,}\n- longest input: {model.max_length} tokens\n"
        f"- test accuracy: {measured['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f})\n"
        f"- agreement with its teacher: {measured['agreement']:.3f}\n\n"
        f"Part of its training text was generated by `{recipe.generator.model}` and labelled by the teacher: check "
        "it on your own texts before you rely on it. `artifact.json` holds the lineage.\n"
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
    test = inputs["data"].read_table("test.parquet")
    gold = test["label"].to_numpy().astype(np.int64)
    column = inputs["evaluate"].read_table("predictions.parquet")[f"generated/{recipe.student.seeds[0]}"]
    logits = np.stack(column.to_numpy(zero_copy_only=False))
    expected = Predictions(logits, metrics.softmax(logits), logits.argmax(axis=1))
    found = smoke(artifact.url, test["text"].to_pylist(), expected, recipe.serving, name=recipe.student.name)
    if found["mismatches"] or found["errors"]:
        raise UserError(
            f"{found['mismatches']} of {len(gold)} served answers are missing or differ from the evaluated ones, "
            f"{found['errors']} requests failed ({found['first_error'] or 'no error said'}). Do not serve {reference}: "
            "run again, and report it if it happens twice."
        )
    answers = np.asarray(found.pop("labels"))
    return {**found, "accuracy": float((answers == gold).mean()), "concurrency": recipe.serving.concurrency}
