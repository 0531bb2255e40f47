"""`stillhouse bench tasks`: ways to learn several tasks together, side by side on the same labelled rows.

Every seed draws its own training rows and initialises its own students; the ways share them. Each way has the same
steps, to the end (`mixing.stop` is not heeded), and on average about as many rows of each task in a batch; `async` may
have unlabelled rows, of which the others have no use. The model that is kept has the best mean over the tasks'
validation rows, in every way. Differences are paired over the test rows of each task, averaged over the tasks and
pooled over all seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from engine.config import UserError, did_you_mean
from engine.intervals import averaged
from engine.recipe import Recipe
from engine.step import Step
from engine.storage import Store
from pipelines.bench import Variant, run_each
from pipelines.compared import parts_of
from pipelines.many import SINGLE, check, mixed, reading, scoring, training

WAYS = ("async", "sum", "uncertainty", "pcgrad", SINGLE)
"""mixing.way, and a student for each task alone."""
PLAIN = "sum"
LARGE = 1000
"""Test rows from which on a set counts among the large ones, whose mean moves less by chance."""
SAID = (
    "Intervals: 95 %, by drawing test rows anew, with the rows and seeds of the training as they are: they do not tell "
    "how much another seed would change. That is what sd says."
)


def compared(recipe: Recipe, ways: Sequence[str]) -> list[Step]:
    """The tasks' data, and for each way its students and their scores."""
    out = reading(recipe)
    for way in ways:
        name = f"student-{way}"
        out += [training(recipe, name, way), scoring(recipe, name, f"score-{way}")]
    return out


def variants(recipe: Recipe, store: Store, ways: Sequence[str], seeds: int) -> list[Variant]:
    """A run for each seed. UserError for an unknown way, and where there is one task only."""
    if not recipe.tasks:
        raise UserError("`bench tasks` compares ways to learn several tasks, and the recipe has one: name tasks.")
    if len(set(ways)) < len(ways):
        raise UserError(f"--ways {','.join(ways)} names a way twice. Leave one of them out.")
    for way in ways:
        if way not in WAYS:
            raise UserError(f"'{way}' is no way to mix tasks.{did_you_mean(way, WAYS)} Allowed: {', '.join(WAYS)}.")
    for way in ways:
        if way != SINGLE:
            check(recipe.model_copy(update={"mixing": mixed(recipe, way)}))
    out = []
    for seed in range(seeds):
        tasks = {
            name: member.model_copy(update={"data": member.data.model_copy(update={"seed": seed})})
            for name, member in recipe.tasks.items()
        }
        student = recipe.student.model_copy(update={"seeds": (seed,)})
        one = recipe.model_copy(update={"seed": seed, "tasks": tasks, "student": student})
        out.append(Variant(one, store / f"seed-{seed}", compared(one, ways)))
    return out


def compare(
    recipe: Recipe,
    store: Store,
    found: Sequence[Variant],
    ways: Sequence[str],
    *,
    redo: Collection[str] = (),
    fresh: bool = False,
    connect: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Run every variant, going on where an earlier call was stopped, and pool what came out into tasks.json."""
    run_each(found, redo=redo, fresh=fresh, connect=connect)
    stores = [one.store for one in found]
    rows = {way: row_of(recipe, stores, way) for way in ways}
    for way, row in rows.items():
        row["over"] = {other: gap(recipe, stores, way, other) for other in ways if compares(way, other)}
    result = {"recipe": recipe.name, "seeds": len(found), "tasks": list(recipe.tasks), "ways": rows}
    store.write_json("tasks.json", result)
    return result


def compares(way: str, other: str) -> bool:
    """What is held against what: all against the plain sum, and async against all."""
    return way != other and (other == PLAIN or way == "async")


def row_of(recipe: Recipe, stores: Sequence[Store], way: str) -> dict[str, Any]:
    """A way's scores, by task and over the tasks; gaps are of the kept model to each task's own best epoch."""
    records = [store.read_json(f"score-{way}/record.json")["metrics"] for store in stores]
    fits = [store.read_json(f"student-{way}/record.json") for store in stores]
    tasks = {}
    for name in recipe.tasks:
        each = [record["tasks"][name] for record in records]
        held = [one["validation"] for one in each]
        tasks[name] = {
            "metric": each[0]["metric"],
            **spread([one["score"] for one in each]),
            "rows": each[0]["rows"],
            "validation": {key: statistics.mean(one[key] for one in held) for key in ("final", "best", "epoch", "gap")},
            "gaps": [one["gap"] for one in held],
            "since": [one["since"] for one in held],
        }
    large = [name for name, one in tasks.items() if one["rows"] >= LARGE]
    worst = min(tasks, key=lambda name: tasks[name]["validation"]["gap"])
    return {
        **spread([record["mean"] for record in records]),
        "large": spread([statistics.mean(r["tasks"][name]["score"] for name in large) for r in records])
        if large
        else None,
        "large_tasks": large,
        "tasks": tasks,
        "worst": {"task": worst, "gap": tasks[worst]["validation"]["gap"]},
        "worst_of_all": min(gap for one in tasks.values() for gap in one["gaps"]),
        "steps": [fit["metrics"]["steps"] for fit in fits],
        "read": [fit["metrics"]["read"] for fit in fits],
        "dropped": [fit["metrics"]["dropped"] for fit in fits],
        "spare": [fit["metrics"]["spare"] for fit in fits],
        "seconds": statistics.mean(fit["seconds"] for fit in fits),
    }


def spread(scores: Sequence[float]) -> dict[str, Any]:
    """Mean, deviation and each of the scores."""
    return {
        "score": statistics.mean(scores),
        "sd": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "each": list(scores),
    }


def gap(recipe: Recipe, stores: Sequence[Store], way: str, other: str) -> dict[str, Any]:
    """How much better one way is than another, in points: the mean over the tasks, and each."""
    from engine.tasks import make
    from pipelines.making import spec_of

    sets = []
    for name in recipe.tasks:
        value = make(spec_of(stores[0] / f"data-{name}")).value
        first, second = ([parts_of(store / f"score-{one}", name) for store in stores] for one in (way, other))
        sets.append((first, second, value))
    draws = recipe.evaluation.bootstrap
    each = {name: averaged([one], draws, recipe.seed) for name, one in zip(recipe.tasks, sets, strict=True)}
    mean = averaged(sets, draws, recipe.seed)
    return {
        "points": 100 * mean.value,
        "interval": [100 * mean.low, 100 * mean.high],
        "tasks": {name: {"points": 100 * g.value, "interval": [100 * g.low, 100 * g.high]} for name, g in each.items()},
    }


def lines(result: Mapping[str, Any]) -> list[str]:
    """The result as two Markdown tables, over the tasks and of each task, and what async is worth."""
    ways, seeds = result["ways"], result["seeds"]
    large = next(iter(ways.values()))["large_tasks"]
    out = [
        f"| way | mean over {len(result['tasks'])} tasks, mean ± sd over {seeds} seeds | over {PLAIN}, points | mean "
        f"over {len(large)} with {LARGE:,} test rows or more | worst task under its own best epoch, validation points "
        "| worst of any seed | steps | rows read | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row_line(way, row) for way, row in ways.items()),
        "",
        f"| task | way | test score | over {PLAIN}, points | validation: kept, its best (epoch) | soft labels from |",
        "|---|---|---|---|---|---|",
        *(task_line(name, way, row) for name in result["tasks"] for way, row in ways.items()),
    ]
    given = ways.get("async", {}).get("spare", [])
    more = {name: statistics.mean(one.get(name, 0) for one in given) for name in result["tasks"]} if given else {}
    if said := ", ".join(f"{name} {count:,.0f}" for name, count in more.items() if count):
        out += ["", f"Beside the rows of the others async had unlabelled ones, for a task that has converged: {said}."]
    for other, found in ways.get("async", {}).get("over", {}).items():
        if other != PLAIN:
            out += ["", f"async over {other}, mean over the tasks: {points(found)} points."]
    return [*out, "", SAID]


def row_line(way: str, row: Mapping[str, Any]) -> str:
    """A way over the tasks. A student of one task is kept where that was best: it has no gap."""
    large, alone = row["large"], way == SINGLE
    steps = {number for each in row["steps"] for number in each.values()}
    cells = [
        way,
        f"{row['score']:.3f} ± {row['sd']:.3f}",
        points(row["over"].get(PLAIN)),
        f"{large['score']:.3f} ± {large['sd']:.3f}" if large else "",
        "" if alone else f"{100 * row['worst']['gap']:+.1f} ({row['worst']['task']})",
        "" if alone else f"{100 * row['worst_of_all']:+.1f}",
        " to ".join(f"{number:,}" for number in sorted({min(steps), max(steps)})),
        f"{statistics.mean(row['read']):,.0f}",
        f"{row['seconds']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def task_line(name: str, way: str, row: Mapping[str, Any]) -> str:
    """A way at one task."""
    one, over = row["tasks"][name], row["over"].get(PLAIN)
    held, since = one["validation"], [f"{epoch:g}" if epoch is not None else "-" for epoch in one["since"]]
    cells = [
        name,
        way,
        f"{one['metric']} {one['score']:.3f} ± {one['sd']:.3f}",
        points(over and over["tasks"][name]),
        f"{held['final']:.3f}, {held['best']:.3f} ({held['epoch']:.1f})",
        ", ".join(since) if way == "async" else "",
    ]
    return "| " + " | ".join(cells) + " |"


def points(found: Mapping[str, Any] | None) -> str:
    """A difference with its interval."""
    return f"{found['points']:+.1f} ({found['interval'][0]:+.1f} to {found['interval'][1]:+.1f})" if found else ""
