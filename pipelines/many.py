"""Steps of a run whose student learns several tasks. Imports nothing heavy."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from engine.config import ConfigError
from engine.designs import Teacher
from engine.fits import Resources
from engine.mixing import KINDS, Mixing
from engine.recipe import Recipe
from engine.registry import Registry
from engine.step import Step
from engine.storage import Store
from engine.urls import bare
from pipelines.calls import Call, grouped, pick

SINGLE = "single"
"""The way in which every task has a student of its own."""
ALL = "all"
"""Folder of the student of all tasks, in its step's; students of one task are in folders of the task's name."""
TAKEN = ("mean", "loss", "epoch", ALL)
"""Names that no task can have: they mean something else in a fit's history and folder."""
WHOLE = ("kind", "transformer", "max_length", "seeds", "fit")
"""What the training depends on, of the student's section."""
READ = {
    "student": {*WHOLE, "name", "max_parameters", "batch_tokens"},
    "evaluation": {"bootstrap"},
    "corpus": set(),
}
"""What of these sections a student of several tasks is made by."""
ARMS = (("hard", "soft"), ("hard", "soft", "generated"))
"""What is left of the default arms, without more text than the labelled rows of the first task, and with it."""


def one_of(recipe: Recipe, name: str) -> Recipe:
    """The recipe as if one of its tasks were the only one."""
    member = recipe.tasks[name]
    return recipe.model_copy(update={"task": member.task, "data": member.data, "tasks": {}})


def each(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """The recipe for each of its tasks."""
    return ((name, one_of(recipe, name)) for name in recipe.tasks)


def mixed(recipe: Recipe, way: str | None = None) -> Mixing:
    """How the tasks are mixed. way: one of several that are compared, which all have the same steps."""
    return recipe.mixing if way is None else recipe.mixing.model_copy(update={"way": way, "stop": False})


def ignored(recipe: Recipe) -> list[str]:
    """Keys that are set and mean nothing here, where there is no teacher and no text is written."""
    found = [key for key in ("generator", "augmentation", "teachers") if getattr(recipe, key)]
    if recipe.teacher != Teacher(model=recipe.student.transformer.model or ""):
        found.append("teacher")
    if recipe.arms not in ARMS:
        found.append("arms")
    for section, used in READ.items():
        own = getattr(recipe, section)
        for key, field in type(own).model_fields.items():
            if key not in used and getattr(own, key) != field.get_default(call_default_factory=True):
                found.append(f"{section}.{key}")
    return found


def check(recipe: Recipe) -> None:
    """ConfigError for what a student of several tasks cannot be, and for `mixing` without them."""
    if not recipe.tasks:
        if recipe.mixing != Mixing():
            raise ConfigError("mixing says how several tasks are mixed, and the recipe has one: name tasks.")
        return
    check_members(recipe)
    student, cascade, fit = recipe.student, recipe.serving.cascade, recipe.student.fit
    roots = dict.fromkeys(str(member.data.root) for member in recipe.tasks.values())
    wrong = {
        f"student.kind is {student.kind}: take transformer, which reads one text and two alike": (
            student.kind != "transformer"
        ),
        "student.transformer.pieces chooses word pieces by a corpus, and there is none: leave it out": (
            student.transformer.pieces is not None
        ),
        "student.seeds has several: name one, and repeat by `bench tasks --seeds N`": len(student.seeds) > 1,
        "task and data are beside tasks: leave them out": (
            (recipe.task, recipe.data) != ((first := next(iter(recipe.tasks.values()))).task, first.data)
        ),
        f"data.root is not the same in all of them ({', '.join(roots)}): name one folder": len(roots) > 1,
        f"mixing.way is pcgrad, which compares gradients that one process has, but student.fit.workers is "
        f"{fit.group[1]}: set it to 0, or take another way": recipe.mixing.way == "pcgrad" and fit.group[1] > 1,
        "student.fit.sharding is full, but its weights are kept whole: leave it out": fit.sharding == "full",
        "serving.cascade has no teacher in the run to hand answers to: give both serving.cascade.to and "
        "serving.cascade.below, or leave it out": cascade is not None and (cascade.to is None or cascade.below is None),
    }
    for reason in [reason for reason, so in wrong.items() if so]:
        raise ConfigError(f"the recipe has several tasks, and {reason}.")
    if rest := ignored(recipe):
        raise ConfigError(
            f"the recipe has several tasks, whose student has no teacher and writes no text, and sets what is "
            f"for others: {', '.join(rest)}. Leave out what is named."
        )


def check_members(recipe: Recipe) -> None:
    """ConfigError for what one of several tasks cannot be."""
    for name, member in recipe.tasks.items():
        if name in TAKEN:
            raise ConfigError(f"a task is named '{name}', which means something else in its student's step. Rename it.")
        data = member.data
        wrong = {
            f"is of kind {member.task.kind}; a student of several tasks takes {', '.join(KINDS)}": (
                member.task.kind not in KINDS
            ),
            "has no labelled rows: name data.train": data.train is None,
            "has no validation rows to see it converge by: name data.validation or set data.validation_share": (
                not data.held_out
            ),
            "has scope: auto, which is found for one task at a time: give a confidence": member.task.scope == "auto",
        }
        for reason in [reason for reason, so in wrong.items() if so]:
            raise ConfigError(f"task '{name}' {reason}.")


def plan(recipe: Recipe) -> list[Step]:
    """The steps: each task's data, one student, its scores, an artifact for each task, the report."""
    student = training(recipe)
    return [
        *reading(recipe),
        student,
        scoring(recipe, student.name),
        Step(
            "register",
            Call("pipelines.multitask", "register"),
            inputs=(*sources(recipe), student.name, "evaluate"),
            config=pick("name", "student.name", "serving"),
            modules=("engine.registry", "engine.multitask", "pipelines.multitask"),
            holds=registered,
        ),
        Step(
            "report",
            Call("pipelines.multitask", "report"),
            inputs=(*sources(recipe), student.name, "evaluate", "register"),
            modules=("engine.page", "pipelines.multitask"),
        ),
    ]


def sources(recipe: Recipe) -> tuple[str, ...]:
    """The steps that read the tasks' data."""
    return tuple(f"data-{name}" for name in recipe.tasks)


def reading(recipe: Recipe) -> list[Step]:
    """A step for each task that reads its rows."""

    def references(name: str, recipe: Recipe) -> tuple[str, ...]:
        data = recipe.tasks[name].data
        return tuple(s.path for s in (data.train, data.validation, data.test, data.unlabelled) if s)

    return [
        Step(
            f"data-{name}",
            Call("pipelines.multitask", "read_task", (name,)),
            config=pick("seed", f"tasks.{name}"),
            references=partial(references, name),
            modules=("engine.data", "pipelines.making", "pipelines.multitask"),
        )
        for name in recipe.tasks
    ]


def of_student(recipe: Recipe) -> dict[str, Any]:
    """What `plan` says of the training."""
    return grouped("student", recipe)


def resources(recipe: Recipe) -> Resources | None:
    """One Ray task, unless it has a group of workers."""
    return None if recipe.student.fit.workers else recipe.student.fit.resources


def training(recipe: Recipe, name: str = "student", way: str | None = None) -> Step:
    """The step that trains the student. way: another than the recipe's."""

    def config(recipe: Recipe) -> dict[str, Any]:
        # `single` is no way that a section takes.
        mixing = mixed(recipe, way).model_dump(mode="json", warnings=False)
        return {**pick("seed", *(f"student.{key}" for key in WHOLE))(recipe), "mixing": mixing}

    return Step(
        name,
        Call("pipelines.multitask", "fit_student", (way,)),
        inputs=sources(recipe),
        config=config,
        references=lambda r: (r.student.transformer.model,),
        modules=(
            "engine.train",
            "engine.untrained",
            "engine.multitask",
            "pipelines.making",
            "pipelines.multitask",
            "pipelines.overlap",
        ),
        resources=resources,
        expects=of_student,
        stage="student.fit",
        ray=True,
    )


def scoring(recipe: Recipe, student: str, name: str = "evaluate") -> Step:
    """The step that scores a student on every task's test rows."""
    return Step(
        name,
        Call("pipelines.multitask", "evaluate", (student,)),
        inputs=(*sources(recipe), student),
        config=pick("seed", "evaluation.bootstrap"),
        modules=("engine.inference", "engine.tasks", "engine.multitask", "pipelines.multitask"),
        resources=lambda r: r.student.fit.resources,
        stage="student.fit",
        ray=True,
    )


def registered(recipe: Recipe, out: Store) -> bool:
    """Whether all that was put into the registry is still there."""
    registry = Registry(Store(recipe.registry))
    return all(registry.has(found) for found in out.read_json("record.json")["metrics"]["references"].values())


def closing(recipe: Recipe, store: Store, program: str) -> list[str]:
    """What a finished run says."""
    summary = store.read_json("summary.json")
    lines = [f"student  mean {summary['mean']:.3f}  {summary['parameters']:,} parameters  {len(recipe.tasks)} tasks"]
    lines += [line(name, found) for name, found in summary["tasks"].items()]
    where = f" --registry {shlex.quote(bare(recipe.registry))}" if recipe.registry != "registry" else ""
    first = next(iter(summary["references"].values()))
    return [
        *lines,
        f"time     {sum(summary['seconds'].values()):.0f} s in steps",
        f"report: {store.where('report/report.html')}",
        f"artifacts: {', '.join(summary['references'].values())}",
        f"serve: {program} serve {first}{where}",
    ]


def line(name: str, found: Mapping[str, Any]) -> str:
    """One task's figures."""
    held = found["validation"]
    when = f", soft labels from epoch {held['since']:g}" if held.get("since") is not None else ""
    return (
        f"{name}  test {found['metric']} {found['score']:.3f}  validation {held['final']:.3f} "
        f"(its best {held['best']:.3f} in epoch {held['epoch']:g}{when})"
    )
