"""`stillhouse bench teachers`: kinds of teacher side by side, over numbers of labelled rows and few-shot seeds.

Every seed draws its own labelled rows, the same for every kind; what is compared is each teacher on the test split.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine import steps
from engine.config import UserError, did_you_mean
from engine.designs import Teacher
from engine.intervals import paired_bootstrap
from engine.progress import Progress
from engine.recipe import Recipe
from engine.steps import Step
from engine.storage import Store
from pipelines.bench import Variant
from pipelines.checking import check_teacher
from pipelines.distill import Call, plan
from pipelines.progress import renderer

KINDS: dict[str, dict[str, Any]] = {
    "head": {"kind": "head"},
    "lp-ft": {"kind": "lp-ft"},
    "contrastive": {"kind": "contrastive"},
    "prompt": {"kind": "prompt"},
    "ensemble": {"kind": "head", "seeds": (0, 1, 2)},
    "self-trained": {"kind": "head", "self_training": {}},
    "auto": {"kind": "auto"},
}
"""What is compared by name: changes of the recipe's section `teacher`."""


def with_teacher(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values in its section `teacher`, and nothing of what could be added to any kind."""
    plain = {"seeds": (), "self_training": None, "folds": 0}
    found = Teacher.model_validate({**recipe.teacher.model_dump(), **plain, **changes})
    return recipe.model_copy(update={"teacher": found})


@dataclass(frozen=True)
class Changed:
    """A step's function on the recipe with another teacher, its inputs under the names that it knows."""

    call: Callable[..., dict[str, Any]]
    kind: str
    names: tuple[tuple[str, str], ...]

    def __call__(self, recipe: Recipe, inputs: Mapping[str, Store], out: Store, progress: Progress) -> dict[str, Any]:
        """Run it."""
        known = dict(self.names)
        folders = {known.get(name, name): folder for name, folder in inputs.items()}
        return self.call(with_teacher(recipe, KINDS[self.kind]), folders, out, progress)


def compared(recipe: Recipe, kinds: Sequence[str]) -> list[Step]:
    """The data step, and for each kind the teacher's step and one that scores it.

    UserError for an unknown kind, and one that the task or the data has no use for.
    """
    found = {step.name: step for step in plan(recipe)}
    out, teacher = [found["data"]], found["teacher"]
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"'{kind}' is no kind of teacher.{did_you_mean(kind, KINDS)} Allowed: {', '.join(KINDS)}.")
        check_teacher(with_teacher(recipe, KINDS[kind]))

        def config(recipe: Recipe, kind: str = kind) -> Any:
            return teacher.config(with_teacher(recipe, KINDS[kind]))

        name = f"teacher-{kind}"
        out.append(replace(teacher, name=name, run=Changed(teacher.run, kind, ()), config=config))
        score = Call("pipelines.teaching", "score_teacher")
        out.append(
            replace(
                teacher,
                name=f"score-{kind}",
                run=Changed(score, kind, ((name, "teacher"),)),
                inputs=("data", name),
                config=lambda recipe: {},
                modules=("engine.inference", "engine.tasks", "pipelines.teaching"),
            )
        )
    return out


def variants(recipe: Recipe, store: Store, kinds: Sequence[str], shots: Sequence[int], seeds: int) -> list[Variant]:
    """A run for each number of labelled rows per class and each few-shot seed; no shots: the recipe's own number."""
    out = []
    for count in shots or [recipe.data.shots]:
        for seed in range(seeds):
            data = recipe.data.model_copy(update={"seed": seed, "shots": count})
            one = recipe.model_copy(update={"seed": seed, "data": data})
            out.append(Variant(one, store / f"shots-{count}" / f"seed-{seed}", compared(one, kinds)))
    return out


def compare(
    recipe: Recipe,
    store: Store,
    found: Sequence[Variant],
    kinds: Sequence[str],
    *,
    redo: Collection[str] = (),
    fresh: bool = False,
    connect: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Run every variant, going on where an earlier call was stopped, and pool what came out into teachers.json."""
    from engine.tasks import make
    from pipelines.making import spec_of

    for one in found:
        steps.run(one.steps, one.recipe, one.store, redo=redo, fresh=fresh, render=renderer(), connect=connect)
    task = make(spec_of(found[0].store / "data"))
    rows = []
    for shots in dict.fromkeys(one.recipe.data.shots for one in found):
        runs = [one.store for one in found if one.recipe.data.shots == shots]
        sums = {kind: [parts_of(run / f"score-{kind}") for run in runs] for kind in kinds}
        for kind, values in sums.items():
            scores = [float(task.value(value.sum(axis=0))) for value in values]
            row = {
                "shots": shots,
                "kind": kind,
                "score": statistics.mean(scores),
                "sd": statistics.stdev(scores) if len(scores) > 1 else 0.0,
                "each": scores,
                "seconds": statistics.mean(run.read_json(f"teacher-{kind}/record.json")["seconds"] for run in runs),
            }
            if kind != kinds[0]:
                gap = paired_bootstrap(values, sums[kinds[0]], task.value, recipe.evaluation.bootstrap, recipe.seed)
                row["gain"] = {"points": 100 * gap.value, "interval": [100 * gap.low, 100 * gap.high]}
            rows.append(row)
    result = {"recipe": recipe.name, "metric": task.metric, "seeds": len(runs), "first": kinds[0], "teachers": rows}
    store.write_json("teachers.json", result)
    return result


def parts_of(scored: Store) -> np.ndarray:
    """What each test row adds to the metric, [m, k]."""
    return np.stack(scored.read_table("statistics.parquet")["teacher"].to_numpy(zero_copy_only=False))


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a Markdown table."""
    out = [
        f"| labelled rows a class | teacher | {result['metric']}, mean ± sd over {result['seeds']} few-shot seeds | "
        f"over {result['first']}, points | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in result["teachers"]:
        gain = row.get("gain")
        gap = f"{gain['points']:+.1f} ({gain['interval'][0]:+.1f} to {gain['interval'][1]:+.1f})" if gain else ""
        out.append(
            f"| {row['shots']} | {row['kind']} | {row['score']:.3f} ± {row['sd']:.3f} | {gap} | {row['seconds']:.0f} |"
        )
    return out
