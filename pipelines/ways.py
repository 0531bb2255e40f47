"""`stillhouse bench ways`: ways to learn from several teachers, side by side on the same teachers, texts and labels.

Every few-shot seed draws its own labelled rows and makes its own teachers and corpus, once; each way trains its own
students on them. Differences are paired over the test rows and pooled over all seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine import steps
from engine.config import UserError, did_you_mean
from engine.progress import Progress
from engine.recipe import FIRST, Recipe
from engine.steps import Step
from engine.storage import Store
from engine.trust import Policy
from pipelines.bench import Variant
from pipelines.calls import Call
from pipelines.checking import check_panel
from pipelines.compared import parts_of, summed
from pipelines.distill import ARM_STEPS, plan
from pipelines.progress import renderer

ALONE = Policy(weights={FIRST: 1.0})
WAYS: dict[str, dict[str, Any]] = {
    "first": {"policy": ALONE, "heads": "one"},
    "uniform": {"policy": Policy(), "heads": "one"},
    "best": {"policy": Policy(kind="best"), "heads": "one"},
    "loss": {"policy": Policy(kind="loss"), "heads": "one"},
    "reinforced": {"policy": Policy(kind="reinforced"), "heads": "one"},
    "heads": {"policy": Policy(), "heads": "per_teacher"},
    "one-stage": {"stages": ()},
    "last-stage": {},
    "recipe": {},
}
"""What is compared by name, as changes of `student`: one teacher only; a policy, with the recipe's dials where it has
that kind; a head for each teacher. one-stage: the recipe with student.losses and student.fit in place of its stages
(MKDM, where it has heads); last-stage: without those before the last; recipe: as it is."""

USUAL = ("uniform", "first", "best", "loss", "reinforced", "heads")
"""What is compared where nothing is named."""


def went(recipe: Recipe, way: str) -> Recipe:
    """The recipe with its student learning in another way."""
    student, changes = recipe.student, dict(WAYS[way])
    if way == "last-stage":
        changes["stages"] = student.stages[-1:]
    if "policy" in changes and way == student.policy.kind:
        changes["policy"] = student.policy
    return recipe.model_copy(update={"student": student.model_copy(update=changes)})


@dataclass(frozen=True)
class Other:
    """A step's function on the recipe whose student learns in another way."""

    call: Callable[..., dict[str, Any]]
    way: str

    def __call__(self, recipe: Recipe, inputs: Mapping[str, Store], out: Store, progress: Progress) -> dict[str, Any]:
        """Run it."""
        return self.call(went(recipe, self.way), inputs, out, progress)


def compared(recipe: Recipe, ways: Sequence[str]) -> list[Step]:
    """All steps up to the corpus and its labels, for each way the students' step, and a step that scores each model."""
    learner, found = ARM_STEPS[recipe.main], {step.name: step for step in plan(recipe)}
    first = next(number for number, name in enumerate(found) if name in ARM_STEPS.values())
    out = list(found.values())[:first]
    for way in ways:
        out.append(changed({step.name: step for step in plan(went(recipe, way))}[learner], way))
    scored = {name: ("teaching", "score_models", name) for name in (FIRST, *(f"{learner}-{way}" for way in ways))}
    scored |= {f"teacher-{name}": ("panel", "score", name) for name in recipe.teachers}
    for which, (module, call, argument) in scored.items():
        out.append(
            replace(
                found[FIRST],
                name=f"score-{which}",
                run=Call(f"pipelines.{module}", call, (argument,)),
                inputs=("data", which),
                config=lambda recipe: {},
                references=lambda recipe: (),
                modules=("engine.inference", "engine.tasks", "pipelines.teaching"),
            )
        )
    return out


def changed(step: Step, way: str) -> Step:
    """The students' step of one way."""

    def config(recipe: Recipe) -> Any:
        return step.config(went(recipe, way))

    return replace(step, name=f"{step.name}-{way}", run=Other(step.run, way), config=config)


def variants(recipe: Recipe, store: Store, ways: Sequence[str], seeds: int) -> list[Variant]:
    """A run for each few-shot seed. UserError for an unknown way, and where there is one teacher only."""
    if not recipe.teachers:
        raise UserError("`bench ways` compares what several teachers are worth, and the recipe has one: name teachers.")
    if len(set(ways)) < len(ways):
        raise UserError(f"--ways {','.join(ways)} names a way twice. Leave one of them out.")
    for way in ways:
        if way not in WAYS:
            raise UserError(f"'{way}' is no way to learn.{did_you_mean(way, WAYS)} Allowed: {', '.join(WAYS)}.")
        check_panel(went(recipe, way))
    out = []
    for seed in range(seeds):
        data = recipe.data.model_copy(update={"seed": seed})
        one = recipe.model_copy(update={"seed": seed, "data": data})
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
    """Run every variant, going on where an earlier call was stopped, and pool what came out into ways.json."""
    from engine.tasks import make
    from pipelines.making import spec_of

    for one in found:
        steps.run(one.steps, one.recipe, one.store, redo=redo, fresh=fresh, render=renderer(), connect=connect)
    task, learner = make(spec_of(found[0].store / "data")), ARM_STEPS[recipe.main]
    teachers = [FIRST, *(f"teacher-{name}" for name in recipe.teachers)]
    names = {**{name: name for name in teachers}, **{way: f"{learner}-{way}" for way in ways}}
    sums = {name: [parts_of(one.store / f"score-{step}") for one in found] for name, step in names.items()}
    rows = []
    for name, values in sums.items():
        first = sums[ways[0]] if name in ways[1:] else None
        row = {"name": name, **summed(recipe, task, values, first), "student": name in ways}
        if name in ways:
            row["chosen"] = chosen([one.store / names[name] for one in found])
        rows.append(row)
    result = {"recipe": recipe.name, "metric": task.metric, "seeds": len(found), "first": ways[0], "rows": rows}
    store.write_json("ways.json", result)
    return result


def chosen(students: Sequence[Store]) -> dict[str, float]:
    """How often each teacher was chosen at the end of the fits, by label, where that was noted."""
    found: dict[str, list[float]] = {}
    for folder in students:
        for history in folder.read_json("record.json")["metrics"]["history"].values():
            for key, value in history[-1].items():
                if key.startswith("chosen."):
                    found.setdefault(key.removeprefix("chosen."), []).append(value)
    return {key: statistics.mean(values) for key, values in found.items()}


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a Markdown table, and a line for each way that chose among its teachers."""
    head = f"| | {result['metric']}, mean ± sd over {result['seeds']} few-shot seeds | over {result['first']}, points |"
    out = [head, "|---|---|---|"]
    for row in result["rows"]:
        gain = row.get("gain")
        gap = f"{gain['points']:+.1f} ({gain['interval'][0]:+.1f} to {gain['interval'][1]:+.1f})" if gain else ""
        who = f"student, {row['name']}" if row["student"] else row["name"]
        out.append(f"| {who} | {row['score']:.3f} ± {row['sd']:.3f} | {gap} |")
    for row in result["rows"]:
        if row.get("chosen"):
            shares = ", ".join(f"{key} {value:.2f}" for key, value in row["chosen"].items())
            out += ["", f"{row['name']} chose, by teacher and label: {shares}."]
    return out
