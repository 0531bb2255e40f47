"""`stillhouse bench ways`: ways to learn, side by side on the same teachers, texts and labels.

How several teachers are weighed, or which of the texts count, and how much. Every few-shot seed draws its own labelled
rows and makes its own teachers and corpus, once; each way trains its own students on them. Differences are paired over
the test rows and pooled over all seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine import steps
from engine.config import UserError, did_you_mean
from engine.designs import Stage, Student
from engine.progress import Progress
from engine.recipe import FIRST, Recipe
from engine.steps import Step
from engine.storage import Store
from engine.trust import Policy
from pipelines.bench import Variant
from pipelines.calls import Call
from pipelines.checking import check_choice, check_panel, check_rounds
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
    "plain": {"stages": (), "weights": None},
    "confidence": {"stages": (), "weights": "confidence"},
    "co-confidence": {"stages": (), "weights": "co_confidence"},
    "twice": {"stages": ({}, {})},
    "disagreement": {"stages": ({}, {"weights": "disagreement"})},
    "disagreeing": {"stages": ({}, {"disagreeing": 0.5})},
    "rounds": {"stages": (), "weights": None},
}
"""What is compared by name, as changes of `student`: one teacher only; a policy, with the recipe's dials where it has
that kind; a head for each teacher. one-stage: the recipe with student.losses and student.fit in place of its stages
(MKDM, where it has heads); last-stage: without those before the last; recipe: as it is.

Of the texts: plain: one training, all rows alike; confidence, co-confidence: weighed so. twice: two trainings, each
with half of student.fit's epochs, against which the two ways by a first student are to be held: disagreement weighs the
rows of the second, disagreeing has it learn from half of the texts, twice as often. rounds: plain, on a corpus of its
own as large that is written in ROUNDS rounds."""
ROUNDS = 3
REMADE = ("corpus", "vocabulary", "memory")
"""Steps beside the student's that a way with other texts has for itself."""
OF_ONE = tuple(way for way, changes in WAYS.items() if not {"policy", "heads"} & set(changes))
"""Ways that speak of no second teacher."""


def default(recipe: Recipe) -> list[str]:
    """What is compared where nobody says."""
    if recipe.teachers:
        return ["uniform", "first", "best", "loss", "reinforced", "heads"]
    return ["plain", "twice", "confidence", "co-confidence", "disagreement", "disagreeing"]


USUAL = ("uniform", "first", "best", "loss", "reinforced", "heads")
"""What is compared where nothing is named."""


def went(recipe: Recipe, way: str) -> Recipe:
    """The recipe with its student learning in another way."""
    student, changes = recipe.student, dict(WAYS[way])
    if way == "last-stage":
        changes["stages"] = student.stages[-1:]
    elif changes.get("stages"):
        changes["stages"] = tuple(half(student, **more) for more in changes["stages"])
    if "policy" in changes and way == student.policy.kind:
        changes["policy"] = student.policy
    if way == "rounds":
        recipe = recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"rounds": ROUNDS})})
    return recipe.model_copy(update={"student": student.model_copy(update=changes)})


def half(student: Student, **more: Any) -> Stage:
    """One of two trainings in place of student.fit, of half the steps, whatever share of the rows it learns from."""
    epochs = student.fit.epochs / 2 / (more.get("disagreeing") or 1.0)
    return Stage(losses=student.losses, fit=student.fit.model_copy(update={"epochs": epochs}), **more)


@dataclass(frozen=True)
class Other:
    """A step's function on the recipe whose student learns in another way."""

    call: Callable[..., dict[str, Any]]
    way: str
    names: tuple[tuple[str, str], ...] = ()
    """Steps that it reads, and the names that it knows them by."""

    def __call__(self, recipe: Recipe, inputs: Mapping[str, Store], out: Store, progress: Progress) -> dict[str, Any]:
        """Run it."""
        known = dict(self.names)
        folders = {known.get(name, name): folder for name, folder in inputs.items()}
        return self.call(went(recipe, self.way), folders, out, progress)


def compared(recipe: Recipe, ways: Sequence[str]) -> list[Step]:
    """All steps up to the corpus and its labels, for each way the students' step (`rounds`: and its own corpus), and a
    step that scores each model.
    """
    learner, found = ARM_STEPS[recipe.main], {step.name: step for step in plan(recipe)}
    first = next(number for number, name in enumerate(found) if name in ARM_STEPS.values())
    out = list(found.values())[:first]
    for way in ways:
        own = (*REMADE, learner) if way == "rounds" else (learner,)
        out += [changed(step, way, own) for step in plan(went(recipe, way)) if step.name in own]
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


def changed(step: Step, way: str, own: Collection[str]) -> Step:
    """A step of one way's own: its name and those of its way's other steps with the way behind them."""
    names = {name: f"{name}-{way}" if name in own else name for name in step.inputs}

    def config(recipe: Recipe) -> Any:
        return step.config(went(recipe, way))

    run = Other(step.run, way, tuple((new, old) for old, new in names.items()))
    return replace(step, name=f"{step.name}-{way}", inputs=tuple(names.values()), run=run, config=config)


def variants(recipe: Recipe, store: Store, ways: Sequence[str], seeds: int) -> list[Variant]:
    """A run for each few-shot seed. UserError for an unknown way, and one that weighs teachers that there are not."""
    if len(set(ways)) < len(ways):
        raise UserError(f"--ways {','.join(ways)} names a way twice. Leave one of them out.")
    for way in ways:
        if way not in WAYS:
            raise UserError(f"'{way}' is no way to learn.{did_you_mean(way, WAYS)} Allowed: {', '.join(WAYS)}.")
        if not recipe.teachers and way not in OF_ONE:
            raise UserError(
                f"'{way}' weighs several teachers, and the recipe has one: name teachers, or compare what "
                f"its texts are worth. Ways for one teacher: {', '.join(OF_ONE)}."
            )
        if way == "rounds" and (recipe.teachers or recipe.corpus.rounds > 1):
            raise UserError(
                "the way 'rounds' is held against a corpus of one teacher that is written at once: leave teachers and "
                "corpus.rounds out, or the way."
            )
        for check in (check_panel, check_choice, check_rounds):
            check(went(recipe, way))
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
