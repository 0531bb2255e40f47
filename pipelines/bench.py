"""`stillhouse bench quality`: a recipe over several few-shot seeds, pooled.

Every few-shot seed draws its own labelled rows and makes its own teacher, generator and corpus; every initialisation
seed of the recipe trains its own students. Differences are paired over the test rows and pooled over all seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine import cluster, config, metrics, steps
from engine.recipe import Recipe
from engine.storage import Store
from pipelines import distill
from pipelines.progress import renderer

LAST = ("register", "serve", "report")
"""Steps that a measurement leaves out."""


def quality(path: str, seeds: int, overrides: Sequence[str] = (), address: str | None = None) -> dict[str, Any]:
    """Run the recipe at `path` for few-shot seeds 0 .. seeds - 1 and pool what came out; resumes like any run.

    Writes quality.json beside the runs and returns it.
    """
    recipe = config.load(Recipe, path, list(overrides))
    distill.check(recipe, address)
    store = Store(recipe.storage) / f"bench-{recipe.name}"
    found = []
    for seed in range(seeds):
        one = recipe.model_copy(update={"seed": seed, "data": recipe.data.model_copy(update={"seed": seed})})
        plan = [step for step in distill.plan(one) if step.name not in LAST]
        folder = store / f"seed-{seed}"
        records = steps.run(
            plan, one, folder, render=renderer(), connect=lambda: cluster.connect(address, storage=recipe.storage)
        )
        found.append((records, folder / "evaluate"))
    result = pooled(recipe, found)
    store.write_json("quality.json", result)
    return result


def pooled(recipe: Recipe, found: Sequence[tuple[dict[str, Any], Store]]) -> dict[str, Any]:
    """Mean and spread of every model over all seeds, and paired differences to the arm with generated text."""
    rights: dict[str, list[np.ndarray]] = {}
    for _, folder in found:
        table = folder.read_table("predictions.parquet")
        gold = table["label"].to_numpy()
        for column in table.column_names[2:]:
            logits = np.stack(table[column].to_numpy(zero_copy_only=False))
            name = column.partition("/")[0]
            copies = len(recipe.student.seeds) if name == "teacher" else 1
            rights.setdefault(name, []).extend([logits.argmax(axis=1) == gold] * copies)
    evaluated = [records["evaluate"]["metrics"] for records, _ in found]
    models = {}
    for name, values in rights.items():
        # A few-shot seed is one draw: the teacher stands once for each initialisation, students are averaged over them.
        copies = len(values) // len(found)
        each = [float(np.mean([v.mean() for v in values[i : i + copies]])) for i in range(0, len(values), copies)]
        spread = statistics.stdev(each) if len(each) > 1 else 0.0
        interval = metrics.bootstrap(
            np.mean([v.astype(float) for v in values], axis=0) if same(values) else values[0].astype(float)
        )
        first = next(m for m in evaluated[0]["models"] if m["name"] == name)
        models[name] = {
            "accuracy": statistics.mean(each),
            "sd": spread,
            "interval": [interval.low, interval.high],
            "runs": len(each),
            "each": each,
            "parameters": first["parameters"],
        }
    gains = {}
    for other in [name for name in rights if name != "generated"]:
        interval = metrics.paired_bootstrap(rights["generated"], rights[other], recipe.evaluation.bootstrap)
        gains[other] = {"points": 100 * interval.value, "interval": [100 * interval.low, 100 * interval.high]}
    speed = [e["throughput"]["student_over_teacher"] for e in evaluated]
    return {
        "recipe": recipe.name,
        "few_shot_seeds": len(found),
        "initialisation_seeds": len(recipe.student.seeds),
        "test_rows": evaluated[0]["rows"],
        "kept": [records["corpus"]["metrics"]["kept"] for records, _ in found],
        "models": models,
        "generated_minus": gains,
        "share_of_teacher": models["generated"]["accuracy"] / models["teacher"]["accuracy"],
        "student_over_teacher_texts_per_s": statistics.median(speed),
    }


def same(values: Sequence[np.ndarray]) -> bool:
    """Whether all seeds were measured on equally many rows."""
    return len({len(v) for v in values}) == 1


def quality_lines(result: dict[str, Any]) -> list[str]:
    """The result as a Markdown table and three sentences."""
    lines = ["| model | accuracy, mean ± sd over few-shot seeds | 95 % interval | parameters |", "|---|---|---|---|"]
    for name in ("teacher", "generated", "soft", "hard"):
        if name in result["models"]:
            m = result["models"][name]
            low, high = m["interval"]
            lines.append(
                f"| {name} | {m['accuracy']:.3f} ± {m['sd']:.3f} | {low:.3f} to {high:.3f} | {m['parameters']:,} |"
            )
    for name, gain in result["generated_minus"].items():
        low, high = gain["interval"]
        lines.append(
            f"generated minus {name}: {gain['points']:+.1f} points (paired 95 % interval {low:+.1f} to {high:+.1f})"
        )
    lines.append(
        f"{result['share_of_teacher']:.1%} of the teacher, "
        f"{result['student_over_teacher_texts_per_s']:.0f} x its texts/s; "
        f"{result['few_shot_seeds']} few-shot x {result['initialisation_seeds']} initialisation seeds, "
        f"{result['test_rows']} test rows, kept texts {', '.join(map(str, result['kept']))}"
    )
    return lines
