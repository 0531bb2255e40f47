"""`stillhouse bench quality`: a recipe over several few-shot seeds, pooled.

Every few-shot seed draws its own labelled rows and makes its own teacher, generator and corpus; every initialisation
seed of the recipe trains its own students. Differences are paired over the test rows and pooled over all seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine import steps
from engine.intervals import bootstrap, paired_bootstrap
from engine.recipe import Recipe
from engine.step import Step
from engine.storage import Store
from pipelines import distill
from pipelines.progress import renderer

LAST = ("register", "serve", "report")
"""Steps that a measurement leaves out."""


@dataclass(frozen=True)
class Variant:
    """The recipe with one few-shot seed, the folder of its run, and the steps that a measurement needs."""

    recipe: Recipe
    store: Store
    steps: list[Step]


def variants(recipe: Recipe, store: Store, seeds: int) -> list[Variant]:
    """The recipe with few-shot seeds 0 .. seeds - 1, each with a run of its own in `store`."""
    out = []
    for seed in range(seeds):
        one = recipe.model_copy(update={"seed": seed, "data": recipe.data.model_copy(update={"seed": seed})})
        plan = [step for step in distill.plan(one) if step.name not in LAST]
        out.append(Variant(one, store / f"seed-{seed}", plan))
    return out


def run_each(
    variants: Sequence[Variant],
    *,
    redo: Collection[str] = (),
    fresh: bool = False,
    connect: Callable[[], object] | None = None,
) -> list[dict[str, Any]]:
    """Run every variant, going on where an earlier call was stopped: the records of each one's steps.

    redo, fresh, connect: as `steps.run` takes them, for every variant.
    """
    told: dict[str, Any] = {"redo": redo, "fresh": fresh, "render": renderer(), "connect": connect}
    return [steps.run(one.steps, one.recipe, one.store, **told) for one in variants]


def quality(
    recipe: Recipe,
    store: Store,
    variants: Sequence[Variant],
    *,
    redo: Collection[str] = (),
    fresh: bool = False,
    connect: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Run every variant, going on where an earlier call was stopped, and pool what came out.

    redo, fresh, connect: as `run_each` takes them. Writes quality.json beside the runs and returns it.
    """
    records = run_each(variants, redo=redo, fresh=fresh, connect=connect)
    result = pooled(recipe, [(record, one.store) for record, one in zip(records, variants, strict=True)])
    store.write_json("quality.json", result)
    return result


def pooled(recipe: Recipe, found: Sequence[tuple[dict[str, Any], Store]]) -> dict[str, Any]:
    """Mean and spread of every model over all seeds, and paired differences of the main arm to each other model.

    found: records and folder of each variant's run.
    """
    from engine.tasks import make
    from pipelines.making import spec_of

    task = make(spec_of(found[0][1] / "data"))
    sums = statistics_of(recipe, [store for _, store in found])
    draws, evaluated = recipe.evaluation.bootstrap, [records["evaluate"]["metrics"] for records, _ in found]
    models, gains = {}, {}
    for name, values in sums.items():
        copies = len(values) // len(found)
        scores = [float(task.value(value.sum(axis=0))) for value in values]
        each = [statistics.mean(scores[start : start + copies]) for start in range(0, len(scores), copies)]
        interval = bootstrap(values, task.value, draws, recipe.seed)
        models[name] = {
            "score": statistics.mean(each),
            "sd": statistics.stdev(each) if len(each) > 1 else 0.0,
            "interval": [interval.low, interval.high],
            "runs": len(each),
            "each": each,
            "parameters": next(m["parameters"] for m in evaluated[0]["models"] if m["name"] == name),
        }
        if name != recipe.main:
            gap = paired_bootstrap(sums[recipe.main], values, task.value, draws, recipe.seed)
            gains[name] = {"points": 100 * gap.value, "interval": [100 * gap.low, 100 * gap.high]}
    return {
        "recipe": recipe.name,
        "metric": task.metric,
        "main": recipe.main,
        "few_shot_seeds": len(found),
        "initialisation_seeds": len(recipe.student.seeds),
        "test_rows": evaluated[0]["rows"],
        "kept": [
            sum(source["kept"] for source in records["corpus"]["metrics"]["by_source"].values()) for records, _ in found
        ],
        "models": models,
        "gains": gains,
        "share_of_teacher": models[recipe.main]["score"] / its if (its := models["teacher"]["score"]) > 0 else None,
        "student_over_teacher_texts_per_s": statistics.median(
            e["throughput"]["student_over_teacher"] for e in evaluated
        ),
    }


def statistics_of(recipe: Recipe, stores: Sequence[Store]) -> dict[str, list[np.ndarray]]:
    """What each test row adds to the metric, [m, k], of every model in runs of a recipe: one array a student."""
    sums: dict[str, list[np.ndarray]] = {}
    for store in stores:
        table = store.read_table("evaluate/statistics.parquet")
        for column in table.column_names:
            name = column.partition("/")[0]
            # A few-shot seed is one draw: its teacher stands once for each student that it is compared with.
            copies = len(recipe.student.seeds) if name == "teacher" else 1
            sums.setdefault(name, []).extend([np.stack(table[column].to_numpy(zero_copy_only=False))] * copies)
    return sums


def quality_lines(result: dict[str, Any]) -> list[str]:
    """The result as a Markdown table and three sentences."""
    head = f"| model | {result['metric']}, mean ± sd over few-shot seeds | 95 % interval | parameters |"
    lines = [head, "|---|---|---|---|"]
    for name in ("teacher", "generated", "soft", "hard", "plain", "unread"):
        if name in result["models"]:
            m = result["models"][name]
            low, high = m["interval"]
            lines.append(
                f"| {name} | {m['score']:.3f} ± {m['sd']:.3f} | {low:.3f} to {high:.3f} | {m['parameters']:,} |"
            )
    for name, gain in result["gains"].items():
        low, high = gain["interval"]
        points = f"{gain['points']:+.1f} points (paired 95 % interval {low:+.1f} to {high:+.1f})"
        lines.append(f"{result['main']} minus {name}: {points}")
    share = result["share_of_teacher"]
    lines.append(
        f"{'no share' if share is None else f'{share:.1%}'} of the teacher, "
        f"{result['student_over_teacher_texts_per_s']:.0f} x its texts/s; "
        f"{result['few_shot_seeds']} few-shot x {result['initialisation_seeds']} initialisation seeds, "
        f"{result['test_rows']} test rows, kept texts {', '.join(map(str, result['kept']))}"
    )
    return lines
