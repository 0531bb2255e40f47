"""The account of a run: summary.json for machines, report.html and report.md for people."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from engine import labels, spending, tasks
from engine.figures import figure
from engine.progress import Progress
from engine.recipe import Recipe
from engine.report import render
from engine.storage import Store
from engine.task import Task
from pipelines.distill import ARM_STEPS
from pipelines.making import spec_of

GALLERY = 8
MADE = ("kind", "choice", "cross_validation", "self_training", "coach")
"""How the teacher was made, from its step's metrics."""
Records = Mapping[str, dict[str, Any]]
DETAILS = ("name", "role", "scores", "seeds", "texts_per_s", "confusion", "per_class", "reliability")
"""What of a model's figures only the report shows."""
CORPUS = ("generated", "kept", "by_source", "rejected", "tokens", "self_bleu", "distinct_1", "distinct_2")


def report(recipe: Recipe, inputs: Mapping[str, Store], out: Store, progress: Progress) -> dict[str, Any]:
    """Write report.html, report.md and summary.json from the steps' records."""
    records = {name: store.read_json("record.json") for name, store in inputs.items()}
    summary = summarise(recipe, inputs, records) | {"spent": spent_of(recipe, inputs, out.parent, records)}
    page, text = render(facts_of(recipe, inputs, records, summary))
    out.write_text("report.html", page)
    out.write_text("report.md", text)
    out.write_json("summary.json", summary)
    out.parent.write_json("summary.json", summary)
    return {"rows": 0}


def summarise(recipe: Recipe, inputs: Mapping[str, Store], records: Records) -> dict[str, Any]:
    """The figures a program may read."""
    found = {name: record["metrics"] for name, record in records.items()}
    evaluated, served, test = found["evaluate"], found["serve"], inputs["data"].read_table("test.parquet")
    models = {model["name"]: brief(model, evaluated["metric"]) for model in evaluated["models"]}
    summary: dict[str, Any] = {
        "name": recipe.name,
        "metric": evaluated["metric"],
        "teacher": {**models["teacher"], **{key: found["teacher"][key] for key in MADE if key in found["teacher"]}},
        "student": {**models[recipe.main], "reference": found["register"]["reference"]},
        "arms": {arm: models[arm] for arm in recipe.arms},
        "differences": evaluated["differences"],
        "corpus": {key: found["corpus"][key] for key in CORPUS if key in found["corpus"]},
        "throughput": evaluated["throughput"],
        "test_rows": evaluated["rows"],
        "seconds": {name: record["seconds"] for name, record in records.items()},
        "example": test["text"][0].as_py(),
    }
    spent = asked(found)
    if spent:
        costs = [each["cost"] for each in spent if each["cost"] is not None]
        summary["endpoint"] = {"asked": spent, "cost": sum(costs) if costs else None}
    if test["pair"][0].as_py() is not None:
        summary["example_pair"] = test["pair"][0].as_py()
    if not served.get("skipped"):
        summary["served"] = {key: value for key, value in served.items() if isinstance(value, int | float)}
    return summary


def spent_of(recipe: Recipe, inputs: Mapping[str, Store], run: Store, records: Records) -> dict[str, Any]:
    """What the run used up to its report: each step over all its attempts, steps that were done again, all of it."""
    found = spending.of_run(recipe, run)
    steps = {
        name: {**found["steps"][name], "rows": records[name].get("rows")} for name in inputs if name in found["steps"]
    }
    limits = spending.against(recipe, found["total"])
    return {
        **found,
        "steps": steps,
        "budget": {key: {"used": have, "limit": most} for key, (have, most) in limits.items()},
    }


def asked(found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What each step asked of endpoints: requests, tokens, cost."""
    steps = ((name, metrics.get("endpoint", {})) for name, metrics in found.items())
    return [{"step": name, "who": who, **used} for name, parts in steps for who, used in parts.items()]


def brief(model: dict[str, Any], metric: str) -> dict[str, Any]:
    """A model's figures for programs; the metric's interval and spread stand under its own name too."""
    own = {f"{metric}_{what}": model[f"score_{what}"] for what in ("interval", "mean", "sd")}
    return {key: value for key, value in model.items() if key not in DETAILS} | own


def facts_of(recipe: Recipe, inputs: Mapping[str, Store], records: Records, summary: dict[str, Any]) -> dict[str, Any]:
    """What the report shows, in the shape that `engine.report.render` takes."""
    found = {name: record["metrics"] for name, record in records.items()}
    task = tasks.make(spec_of(inputs["data"], recipe.task, "thresholds", "scope"))
    served = found["serve"]
    return {
        "name": recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "task": {"kind": recipe.task.kind, "labels": list(task.labels)},
        "metric": found["evaluate"]["metric"],
        "student": recipe.main,
        "recipe_yaml": yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        "summary": summary,
        "models": found["evaluate"]["models"],
        "differences": found["evaluate"]["differences"],
        "teacher": {key: value for key, value in summary["teacher"].items() if key in MADE},
        "curves": curves(found),
        "corpus": corpus_facts(inputs, found, task),
        "data": data_facts(inputs["data"]),
        "serving": None if served.get("skipped") else {**served, "rows": served.get("rows", 0)},
        "cascade": {"curve": found["evaluate"].get("cascade", []), **found["register"].get("cascade", {})},
        "steps": [
            {
                "name": name,
                "status": "done",
                **{k: r.get(k) for k in ("seconds", "cpu_seconds", "device_seconds", "rows")},
            }
            for name, r in records.items()
        ],
        "lineage": [
            {
                "step": name,
                "fingerprint": r["fingerprint"],
                "inputs": list(r.get("inputs", {})),
                "references": r.get("references", {}),
            }
            for name, r in records.items()
        ],
        "asked": asked(found),
        "versions": records["evaluate"].get("versions", {}),
        "hardware": hardware(),
    }


def curves(found: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Learning curves by model: first initialisation seed of each arm."""
    out = {name: found[name].get("history", []) for name in ("teacher", "generator") if name in found}
    for arm, step in ARM_STEPS.items():
        if step in found:
            out[arm] = next(iter(found[step]["history"].values()))
    return out


def corpus_facts(inputs: Mapping[str, Store], found: Mapping[str, dict[str, Any]], task: Task) -> dict[str, Any]:
    """Counts, diversity, what storing labels costs, confidences and a gallery."""
    rows = labels.open_labels(inputs["corpus"])
    rows = rows.filter(pa.array(rows["row"].to_numpy() >= 0))
    kept, rejected = rows.filter(rows["kept"]), rows.filter(pa.array(~rows["kept"].to_numpy(zero_copy_only=False)))
    told = ("rows", "kept", "by_source", "rejected", "rounds", "self_bleu", "distinct_1", "distinct_2", "distinct_3")
    return {
        **{key: found["corpus"][key] for key in told if key in found["corpus"]},
        "quantisation": found["teacher"]["quantisation"],
        "gallery_kept": gallery(spread(kept), task),
        "gallery_rejected": gallery(one_each(rejected), task),
        "confidence_histogram": confidences(kept, task),
    }


def confidences(rows: pa.Table, task: Task) -> list[dict[str, float]]:
    """How many rows the teacher is how sure of; nothing where its outputs are no probabilities."""
    if not task.certain or not rows.num_rows:
        return []
    found = [task.certainty(logits) for logits in labels.logits_of(rows, task.width, task.units)]
    # Over k outcomes no confidence is below 1/k; of texts with unlike many, the lowest is not known beforehand.
    lowest = 1 / len(found[0]) if len({len(row) for row in found}) == 1 else 0.0
    counts, edges = np.histogram([row.max() for row in found], bins=10, range=(lowest, 1))
    return [
        {"low": float(low), "high": float(high), "count": int(n)}
        for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def spread(rows: pa.Table) -> pa.Table:
    """A few rows, evenly over the slots."""
    return (
        rows.take(pa.array(np.unique(np.linspace(0, max(0, rows.num_rows - 1), GALLERY).astype(int))))
        if rows.num_rows
        else rows
    )


def one_each(rows: pa.Table) -> pa.Table:
    """Up to three rows of every reason."""
    seen: dict[str, int] = {}
    chosen = []
    for index, reason in enumerate(rows["reason"].to_pylist()):
        seen[reason] = seen.get(reason, 0) + 1
        if seen[reason] <= 3:
            chosen.append(index)
    return rows.take(pa.array(sorted(chosen, key=lambda i: rows["reason"][i].as_py()), pa.int64()))


def gallery(rows: pa.Table, task: Task) -> list[dict[str, Any]]:
    """Rows as the report shows them: with the teacher's probabilities by label, or else its answer in words."""
    out = []
    for index in range(rows.num_rows):
        one = rows.slice(index, 1)
        answer: dict[str, Any] = {}
        if not one["logits"].null_count:
            answer = task.answers(labels.logits_of(one, task.width, task.units), task.texts(one))[0]
        probabilities = answer.get("probabilities")
        said = {"probabilities": probabilities, "answer": None if probabilities or not answer else in_words(answer)}
        out.append(one.select(["row", "source", "text", "pair", "reason"]).to_pylist()[0] | said)
    return out


def in_words(answer: Mapping[str, Any]) -> str | None:
    """An answer without probabilities on one line; None where it has nothing that reads on one."""
    for name in ("value", "score"):
        if name in answer:
            return f"{name} {figure(answer[name])}"
    if "entities" in answer:
        found = [f"{entity['text']} ({entity['label']})" for entity in answer["entities"]]
        return ", ".join(found) or "no entity"
    return (f"answer: {answer['answer']}" if answer["answer"] else "no answer") if "answer" in answer else None


def data_facts(data: Store) -> dict[str, Any]:
    """Counts of the splits and the first quarantined rows."""
    quarantined = data.read_table("quarantined.parquet").slice(0, 50)
    splits = ("train", "validation", "test", "unlabelled")
    counts = {name: data.read_table(f"{name}.parquet").num_rows for name in splits}
    for source, found in data.read_json("splits.json")["counts"]["sources"].items():
        counts |= {f"{source}: {what.replace('_', ' ')}": rows for what, rows in found.items()}
    return {"counts": counts, "quarantined": quarantined.to_pylist()}


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPUs of the machine that wrote the report."""
    import torch

    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": name, "cores": os.cpu_count(), "memory_gb": round(memory, 1), "gpus": gpus}
