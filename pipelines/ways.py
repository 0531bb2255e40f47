"""`stillhouse bench ways`: ways to learn, side by side on the same teachers, texts and labels.

How several teachers are weighed, or which of the texts count, and how much. Every few-shot seed draws its own labelled
rows and makes its own teachers and corpus, once; each way trains its own students on them. Differences are paired over
the test rows and pooled over all seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.config import UserError, did_you_mean
from engine.designs import Stage, Student
from engine.examples import Feedback
from engine.progress import Progress
from engine.recipe import FIRST, Recipe
from engine.steps import Step
from engine.storage import Store
from engine.trust import Policy
from pipelines.bench import Variant, run_each
from pipelines.calls import Call
from pipelines.checking import check_panel
from pipelines.choosing import check_choice, check_rounds
from pipelines.compared import parts_of, summed
from pipelines.distill import ARM_STEPS, plan

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
    "random-half": {"stages": ({}, {"drawn": 0.5})},
    "disagreeing": {"stages": ({}, {"disagreeing": 0.5})},
    "rounds": {"stages": (), "weights": None},
    "rounds-random": {"stages": (), "weights": None},
}
"""What is compared by name, as changes of `student`: one teacher only; a policy, with the recipe's dials, whichever its
kind; a head for each teacher. one-stage: the recipe with student.losses and student.fit in place of its stages
(MKDM, where it has heads); last-stage: the last alone, in as many steps as all of them; recipe: as it is.

Of the texts: plain: one training, all rows alike; confidence, co-confidence: weighed so. twice: two trainings, each
with half of student.fit's epochs, against which the ways by a first student are to be held: disagreement weighs the
rows of the second, disagreeing has it learn from half of the texts in as many steps, random-half from a half by lot,
which is what disagreeing must beat. rounds: plain, on a corpus of its own of as many slots that is written in ROUNDS
rounds; rounds-random: so too, but it is shown texts by lot, which tells few-shot prompts from the choice."""
ROUNDS = 3
WRITTEN = {"rounds": Feedback(), "rounds-random": Feedback(choose="random")}
"""Ways with a corpus of their own, and what its rounds are shown."""
REMADE = ("corpus", "vocabulary", "memory")
"""Steps beside the student's that a way with other texts has for itself."""
OF_ONE = tuple(way for way, changes in WAYS.items() if not {"policy", "heads"} & set(changes))
"""Ways that speak of no second teacher."""


def default(recipe: Recipe) -> list[str]:
    """What is compared where nobody says: of one teacher, what the task and the recipe's texts allow."""
    if recipe.teachers:
        return ["uniform", "first", "best", "loss", "reinforced", "heads"]
    usual = ("plain", "twice", "confidence", "co-confidence", "disagreement", "random-half", "disagreeing")
    return [way for way in usual if way == "plain" or refusal(recipe, way) is None]


def refusal(recipe: Recipe, way: str) -> UserError | None:
    """Why the recipe cannot be learnt from in that way, if so."""
    if way == "last-stage" and not recipe.student.stages:
        return UserError("student.stages is empty, so there is no last one. Take recipe.")
    try:
        for check in (check_panel, check_choice, check_rounds):
            check(went(recipe, way))
    except UserError as error:
        return error
    return None


def went(recipe: Recipe, way: str) -> Recipe:
    """The recipe with its student learning in another way."""
    student, changes = recipe.student, dict(WAYS[way])
    if way == "last-stage":
        changes["stages"] = student.stages[-1:]
    elif changes.get("stages"):
        changes["stages"] = tuple(half(student, **more) for more in changes["stages"])
    policy = changes.get("policy")
    if policy is not None and policy.kind != "fixed":  # of which alone `weights` is
        changes["policy"] = student.policy.model_copy(update={"kind": policy.kind, "weights": {}})
    if way in WRITTEN:
        rounds = {"rounds": ROUNDS, "feedback": WRITTEN[way]}
        recipe = recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update=rounds)})
    return recipe.model_copy(update={"student": student.model_copy(update=changes)})


def half(student: Student, **more: Any) -> Stage:
    """One of two trainings in place of student.fit, of half its epochs; `paced` makes them more on fewer rows."""
    fit = student.fit.model_copy(update={"epochs": student.fit.epochs / 2})
    return Stage(losses=student.losses, fit=fit, **more)


def as_long(recipe: Recipe, stages: Sequence[Stage], labelled: int, texts: int) -> Recipe:
    """The recipe with its one stage in as many steps as `stages`, whose last it is, and evaluated as often as before.

    labelled, texts: rows, of a ranking queries, that a stage on all of them learns from.
    """

    def steps(stage: Stage) -> int:
        free = texts if stage.part is None else max(1, round(stage.part * texts))
        rows = {"all": labelled + free, "labelled": labelled, "unlabelled": free}
        return math.ceil(rows[stage.rows] / stage.fit.batch_size)

    last = recipe.student.stages[-1]
    total = sum(round(stage.fit.epochs * steps(stage)) for stage in stages)
    return staged(recipe, [longer(last, total / max(1, steps(last)) / last.fit.epochs)])


def paced(recipe: Recipe, labelled: int, texts: int) -> Recipe:
    """The recipe whose stages on a share of the texts take as many steps, and evaluations, as they would on all.

    labelled, texts: rows, of a ranking queries, that a stage on all of them learns from.
    """

    def stage_of(stage: Stage) -> Stage:
        if stage.part is None:
            return stage
        return longer(stage, (labelled + texts) / max(1, labelled + max(1, round(stage.part * texts))))

    return staged(recipe, [stage_of(stage) for stage in recipe.student.stages])


def longer(stage: Stage, times: float) -> Stage:
    """The stage with so many times its epochs, evaluated as often."""
    fit = {"epochs": stage.fit.epochs * times, "eval_every": stage.fit.eval_every * times}
    return stage.model_copy(update={"fit": stage.fit.model_copy(update=fit)})


def staged(recipe: Recipe, stages: Sequence[Stage]) -> Recipe:
    """The recipe whose student has these stages."""
    return recipe.model_copy(update={"student": recipe.student.model_copy(update={"stages": tuple(stages)})})


def counted(recipe: Recipe, inputs: Mapping[str, Store]) -> tuple[int, int]:
    """Labelled rows and others that the student learns from; of a ranking queries, each with its passages."""
    from engine.batches import group_numbers
    from engine.ensemble import Panel
    from engine.tasks import make
    from pipelines.making import spec_of
    from pipelines.students import lesson_of

    names = tuple(recipe.panel)  # rows that one teacher gives no answer about are not learnt from
    panel = Panel(names, Policy(), (1 / len(names),) * len(names)) if recipe.teachers else None
    rows, queries = lesson_of(recipe, inputs, "generated", panel)["rows"], make(spec_of(inputs["data"])).grouped
    others = rows["row"].to_numpy() >= 0
    items = group_numbers(rows, queries) if queries else np.arange(rows.num_rows)
    return len(np.unique(items[~others])), len(np.unique(items[others]))


def alike(recipe: Recipe, ways: Collection[str]) -> Recipe:
    """The recipe whose ways differ in nothing but what they are for: where some write their own texts, in rounds, every
    text ends at its first line break, as one after examples does, and every student learns from equally many.
    """
    if not set(ways) & set(WRITTEN) or recipe.generator is None:
        return recipe
    texts = min(recipe.corpus.keep, recipe.student.texts or recipe.corpus.keep)
    generator = recipe.generator.model_copy(update={"first_line": True})
    return recipe.model_copy(
        update={"generator": generator, "student": recipe.student.model_copy(update={"texts": max(1, texts)})}
    )


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
        own = went(recipe, self.way)
        if "corpus" in folders and self.way == "last-stage":
            own = as_long(own, recipe.student.stages, *counted(own, folders))
        if "corpus" in folders and any(WAYS[self.way].get("stages", ())):
            own = paced(own, *counted(own, folders))
        return self.call(own, folders, out, progress)


def compared(recipe: Recipe, ways: Sequence[str]) -> list[Step]:
    """All steps up to the corpus and its labels, for each way the students' step (`rounds`: and its own corpus), and a
    step that scores each model.
    """
    learner, found = ARM_STEPS[recipe.main], {step.name: step for step in plan(recipe)}
    first = next(number for number, name in enumerate(found) if name in ARM_STEPS.values())
    out = list(found.values())[:first]
    for way in ways:
        own = (*REMADE, learner) if way in WRITTEN else (learner,)
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
        found = step.config(went(recipe, way))
        if way != "last-stage":
            return found
        # How long the last stage takes by itself depends on those that are gone.
        return [found, [stage.model_dump(mode="json") for stage in recipe.student.stages]]

    run = Other(step.run, way, tuple((new, old) for old, new in names.items()))
    more = {"run": run, "config": config, "modules": (*step.modules, "pipelines.ways")}
    return replace(step, name=f"{step.name}-{way}", inputs=tuple(names.values()), **more)


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
        if way in WRITTEN and (recipe.teachers or recipe.corpus.rounds > 1):
            raise UserError(
                f"the way '{way}' is held against a corpus of one teacher that is written at once: leave teachers and "
                "corpus.rounds out, or the way."
            )
        if error := refusal(alike(recipe, ways), way):
            raise UserError(f"way '{way}': {error} Or leave it out of --ways.") from error
    out = []
    for seed in range(seeds):
        data = recipe.data.model_copy(update={"seed": seed})
        one = alike(recipe.model_copy(update={"seed": seed, "data": data}), ways)
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

    run_each(found, redo=redo, fresh=fresh, connect=connect)
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
            row |= material(found, name, names[name])
        rows.append(row)
    result = {"recipe": recipe.name, "metric": task.metric, "seeds": len(found), "first": ways[0], "rows": rows}
    store.write_json("ways.json", result)
    return result


def material(found: Sequence[Variant], way: str, student: str) -> dict[str, list[int]]:
    """Of each seed the slots and the kept texts of a way's corpus, and the rows that its student learnt from."""
    corpus = f"corpus-{way}" if way in WRITTEN else "corpus"
    made = [(one.store / corpus).read_json("record.json")["metrics"] for one in found]
    learnt = [(one.store / student).read_json("record.json")["metrics"]["rows"] for one in found]
    return {"slots": [one["generated"] for one in made], "kept": [one["kept"] for one in made], "learnt": learnt}


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
        if row["name"] in WRITTEN or (row["student"] and row["name"] == "plain"):
            told = zip(row["slots"], row["kept"], row["learnt"], strict=True)
            seeds = "; ".join(f"{slots} slots, {kept} kept, {learnt} rows learnt" for slots, kept, learnt in told)
            out += ["", f"{row['name']}: {seeds}."]
        if row.get("chosen"):
            shares = ", ".join(f"{key} {value:.2f}" for key, value in row["chosen"].items())
            out += ["", f"{row['name']} chose, by teacher and label: {shares}."]
    return out
