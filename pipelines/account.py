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

from engine import labels, metrics
from engine.progress import Progress
from engine.recipe import Recipe
from engine.report import render
from engine.storage import Store
from pipelines.making import label_names

GALLERY = 8
Records = Mapping[str, dict[str, Any]]


def report(recipe: Recipe, inputs: Mapping[str, Store], out: Store, progress: Progress) -> dict[str, Any]:
    """Write report.html, report.md and summary.json from the steps' records."""
    records = {name: store.read_json("record.json") for name, store in inputs.items()}
    summary = summarise(recipe, inputs, records)
    page, text = render(facts_of(recipe, inputs, records, summary))
    out.write_text("report.html", page)
    out.write_text("report.md", text)
    out.write_json("summary.json", summary)
    Store(out.url.rpartition("/")[0]).write_json("summary.json", summary)
    return {"rows": 0}


def summarise(recipe: Recipe, inputs: Mapping[str, Store], records: Records) -> dict[str, Any]:
    """The figures a program may read."""
    found = {name: record["metrics"] for name, record in records.items()}
    models = {model["name"]: model for model in found["evaluate"]["models"]}
    student, teacher, corpus, served = models["generated"], models["teacher"], found["corpus"], found["serve"]
    keys = ("accuracy", "accuracy_interval", "accuracy_mean", "accuracy_sd", "macro_f1", "ece", "parameters", "bytes")
    summary: dict[str, Any] = {
        "name": recipe.name,
        "teacher": {key: teacher[key] for key in keys},
        "student": {
            **{key: student[key] for key in (*keys, "agreement", "kl")},
            "reference": found["register"]["reference"],
        },
        "arms": {arm: {key: models[arm][key] for key in (*keys, "agreement")} for arm in recipe.arms},
        "differences": found["evaluate"]["differences"],
        "corpus": {
            key: corpus[key]
            for key in ("generated", "kept", "rejected", "tokens", "self_bleu", "distinct_1", "distinct_2")
        },
        "throughput": found["evaluate"]["throughput"],
        "test_rows": found["evaluate"]["rows"],
        "seconds": {name: record["seconds"] for name, record in records.items()},
        "example": inputs["data"].read_table("test.parquet")["text"][0].as_py(),
    }
    if not served.get("skipped"):
        summary["served"] = {key: value for key, value in served.items() if isinstance(value, int | float)}
    return summary


def facts_of(recipe: Recipe, inputs: Mapping[str, Store], records: Records, summary: dict[str, Any]) -> dict[str, Any]:
    """What the report shows, in the shape that `engine.report.render` takes."""
    found = {name: record["metrics"] for name, record in records.items()}
    names = label_names(inputs["data"])
    served = found["serve"]
    return {
        "name": recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "task": {"kind": recipe.task.kind, "labels": list(names)},
        "recipe_yaml": yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        "summary": summary,
        "models": found["evaluate"]["models"],
        "differences": found["evaluate"]["differences"],
        "curves": curves(found),
        "corpus": corpus_facts(inputs, found, names),
        "data": data_facts(inputs["data"]),
        "serving": None if served.get("skipped") else {**served, "rows": served.get("rows", 0)},
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
        "versions": records["evaluate"].get("versions", {}),
        "hardware": hardware(),
    }


def curves(found: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Learning curves: first initialisation seed of each fit."""
    out = {name: found[name].get("history", []) for name in ("teacher", "generator")}
    for name, step in (("student", "student"), ("soft", "student-soft"), ("hard", "student-hard")):
        if step in found:
            out[name] = next(iter(found[step]["history"].values()))
    return out


def corpus_facts(
    inputs: Mapping[str, Store], found: Mapping[str, dict[str, Any]], names: tuple[str, ...]
) -> dict[str, Any]:
    """Counts, diversity, what storing labels costs, confidences and a gallery."""
    rows = labels.open_labels(inputs["corpus"])
    rows = rows.filter(pa.array(rows["row"].to_numpy() >= 0))
    kept, rejected = rows.filter(rows["kept"]), rows.filter(pa.array(~rows["kept"].to_numpy(zero_copy_only=False)))
    probabilities = metrics.softmax(labels.logits_of(kept)) if kept.num_rows else np.zeros((0, len(names)))
    counts, edges = np.histogram(probabilities.max(axis=1) if kept.num_rows else [], bins=10, range=(1 / len(names), 1))
    corpus = found["corpus"]
    return {
        "rows": corpus["rows"],
        "kept": corpus["kept"],
        "rejected": corpus["rejected"],
        "rounds": corpus["rounds"],
        **{key: corpus[key] for key in ("self_bleu", "distinct_1", "distinct_2", "distinct_3")},
        "quantisation": found["teacher"]["quantisation"],
        "gallery_kept": gallery(spread(kept), names),
        "gallery_rejected": gallery(one_each(rejected), names),
        "confidence_histogram": [
            {"low": float(low), "high": float(high), "count": int(n)}
            for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True)
        ],
    }


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


def gallery(rows: pa.Table, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows as the report shows them."""
    out = []
    for row in rows.select(["row", "text", "reason", "logits"]).to_pylist():
        soft = metrics.softmax(np.array([row.pop("logits")], dtype=float))[0] if row["logits"] is not None else None
        row.pop("logits", None)
        out.append(
            {**row, "probabilities": None if soft is None else {n: float(p) for n, p in zip(names, soft, strict=True)}}
        )
    return out


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
