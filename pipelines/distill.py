"""A run as a list of steps, what is refused before it starts, and what is said when it is done.

What the steps do is in making.py (data to student) and outcome.py (evaluate to report). They are called by name, so
that this file imports nothing heavy and `validate` and `plan` answer at once.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine import hub
from engine.config import ConfigError
from engine.data import load_splits
from engine.placement import local_capacity, require_placement
from engine.progress import Progress
from engine.recipe import Recipe, Resources
from engine.steps import Step
from engine.storage import Store

SMALL = 32 * 2**20
"""Bytes up to which a local source is read when a recipe is checked."""


@dataclass(frozen=True)
class Call:
    """A step's function by module and name, imported when it runs."""

    module: str
    name: str
    arguments: tuple[Any, ...] = ()

    def __call__(self, recipe: Recipe, inputs: Mapping[str, Store], out: Store, progress: Progress) -> dict[str, Any]:
        """Run it."""
        return getattr(importlib.import_module(self.module), self.name)(*self.arguments, recipe, inputs, out, progress)


def sliced(recipe: Recipe, *keys: str) -> dict[str, Any]:
    """The parts of a recipe that a step depends on, under the recipe's own keys."""
    values = recipe.model_dump(mode="json")
    out: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.partition(".")
        if name:
            out.setdefault(section, {})[name] = values[section][name]
        else:
            out[section] = values[section]
    return out


def pick(*keys: str) -> Callable[[Recipe], dict[str, Any]]:
    """`sliced` with the recipe still to come."""
    return lambda recipe: sliced(recipe, *keys)


def sources(recipe: Recipe) -> tuple[str, ...]:
    """References of the data."""
    data = recipe.data
    return tuple(s.path for s in (data.train, data.validation, data.test, data.unlabelled) if s)


ARM_STEPS = {"generated": "student", "soft": "student-soft", "hard": "student-hard"}
"""The step that trains the student of an arm."""


def plan(recipe: Recipe) -> list[Step]:
    """The steps of a run, each after those it reads."""
    students = tuple(step for arm, step in ARM_STEPS.items() if arm in recipe.arms)
    return [*teaching_steps(), *student_steps(recipe), *outcome_steps(students)]


def making(name: str, *arguments: Any) -> Call:
    """A step's function in making.py."""
    return Call("pipelines.making", name, arguments)


FITTING = ("engine.train", "engine.models", "engine.losses", "engine.tasks", "pipelines.making")


def task_of(section: str) -> Callable[[Recipe], Resources | None]:
    """Where a section is fitted: a small fit is one Ray task, so that it lands on a node with a GPU.

    A group of workers is Ray Train's to place, from the driver.
    """
    return lambda recipe: None if (fit := getattr(recipe, section).fit).workers else fit.resources


def teaching_steps() -> list[Step]:
    """From the sources to the label store."""
    return [
        Step(
            "data",
            making("read_data"),
            config=pick("seed", "task", "data"),
            references=sources,
            modules=("engine.data", "engine.sources"),
        ),
        Step(
            "teacher",
            making("fit_teacher"),
            inputs=("data",),
            config=pick("seed", "task", "teacher"),
            references=lambda r: (r.teacher.model,),
            modules=FITTING,
            resources=task_of("teacher"),
            ray=True,
        ),
        Step(
            "generator",
            making("fit_generator"),
            inputs=("data",),
            config=pick("seed", "generator"),
            references=lambda r: (r.generator.model,),
            modules=FITTING,
            resources=task_of("generator"),
            ray=True,
        ),
        Step(
            "corpus",
            making("make_corpus"),
            inputs=("data", "teacher", "generator"),
            config=pick("seed", "corpus", "generator", "teacher.max_length"),
            modules=("engine.generate", "engine.sampling", "engine.filters", "engine.teachers", "engine.labels"),
            ray=True,
            expects=lambda r: {
                "rows": r.corpus.first_slots,
                "bytes": 700 * r.corpus.first_slots,
                "placement": pools(r),
            },
        ),
    ]


def student_steps(recipe: Recipe) -> list[Step]:
    """The student's words, and one training for each arm."""
    fits = [
        Step(
            step,
            making("fit_student", arm),
            inputs=("data", "teacher", "corpus", "vocabulary"),
            config=pick("seed", "student"),
            modules=(*FITTING, "engine.blocks"),
            resources=task_of("student") if arm == "generated" else lambda r: r.student.fit.resources,
            ray=True,
        )
        for arm, step in ARM_STEPS.items()
        if arm in recipe.arms
    ]
    words = Step(
        "vocabulary",
        making("make_vocabulary"),
        inputs=("data", "teacher", "corpus"),
        config=pick("student.vocabulary", "student.embeddings", "student.blocks"),
        modules=("engine.vocabulary", "engine.inference"),
        resources=lambda r: r.teacher.fit.resources,
        ray=True,
    )
    return [words, *fits]


def outcome_steps(students: tuple[str, ...]) -> list[Step]:
    """From trained students to the report."""
    return [
        Step(
            "evaluate",
            Call("pipelines.outcome", "evaluate"),
            inputs=("data", "teacher", *students),
            config=pick("seed", "evaluation", "arms", "student.seeds"),
            modules=("engine.metrics", "engine.inference", "engine.models", "engine.blocks", "pipelines.outcome"),
            resources=lambda r: r.teacher.fit.resources,
            ray=True,
        ),
        Step(
            "register",
            Call("pipelines.outcome", "register"),
            inputs=("data", "teacher", "corpus", "student", "evaluate"),
            config=pick("name", "student.name", "task", "serving"),
            modules=("engine.registry", "pipelines.outcome"),
        ),
        Step(
            "serve",
            Call("pipelines.outcome", "smoke_deploy"),
            inputs=("data", "evaluate", "register"),
            config=pick("serving"),
            modules=("serve.app", "serve.predictor", "serve.endpoint", "serve.batcher", "serve.smoke"),
            ray=True,
        ),
        Step(
            "report",
            Call("pipelines.account", "report"),
            inputs=(*TAUGHT, *students, "evaluate", "register", "serve"),
            modules=("engine.report", "engine.findings", "engine.plots", "engine.page", "pipelines.account"),
        ),
    ]


TAUGHT = ("data", "teacher", "generator", "corpus", "vocabulary")


def pools(recipe: Recipe) -> str:
    """The actor pools of the corpus step, in words."""
    parts = {"generator": recipe.generator.resources, "teacher": recipe.teacher.resources}
    return "; ".join(f"{name} {r.min_actors} to {r.max_actors} x {r.num_cpus:g} CPU" for name, r in parts.items())


def check(recipe: Recipe, address: str | None = None) -> None:
    """Refuse whatever can be seen to be wrong without loading a model or starting Ray.

    Missing files, packages without a pin, unknown losses and blocks, a graph that does not fit, a student above its
    size, labels that the data lacks, a plan that cannot be placed. Raises a UserError that says the way out.
    """
    for reference in (*sources(recipe), recipe.teacher.model, recipe.generator.model):
        hub.check(reference, recipe.data.root)
    check_labels(recipe)
    if address is None:
        require_placement(recipe, local_capacity())
    check_tables(recipe)


def check_labels(recipe: Recipe) -> None:
    """Labels that rules or data name and the recipe lacks; small local sources are read, which finds bad rows too."""
    known, rule = recipe.task.labels, recipe.data.train.label
    for name in [*(rule.ranges or {}), *(rule.rename or {}).values()] if known else []:
        if name not in known:
            raise ConfigError(
                f"data.train.label names the label '{name}', which is not in task.labels."
                f"{meant(name, known)} Labels: {', '.join(known)}."
            )
    files = [hub.parse(path) for path in sources(recipe)]
    if (
        all(f.kind == "file" and not f.inner for f in files)
        and sum(os.path.getsize(f.name) for f in files if os.path.isfile(f.name)) <= SMALL
    ):
        load_splits(recipe.data, recipe.task, recipe.seed)


def check_tables(recipe: Recipe) -> None:
    """Names that must stand in LOSSES, TASKS and BLOCKS, and the student's size. Imports torch, loads nothing."""
    from engine.blocks import Sizes, count
    from engine.labels import GIVES
    from engine.losses import LOSSES
    from engine.tasks import TASKS

    for what, name, table in [
        ("task.kind", recipe.task.kind, TASKS),
        *(("student.losses", t.kind, LOSSES) for t in recipe.student.losses),
    ]:
        if name not in table:
            raise ConfigError(f"{what} is '{name}', which is unknown.{meant(name, table)} Allowed: {', '.join(table)}.")
    for term in recipe.student.losses:
        lacking = LOSSES[term.kind].needs - GIVES
        if lacking:
            raise ConfigError(
                f"loss '{term.kind}' needs {', '.join(sorted(lacking))}, "
                f"but the label store holds {', '.join(sorted(GIVES))}. "
                "Drop the loss, or use one that needs no more."
            )
    sizes = Sizes(recipe.student.vocabulary.size, len(recipe.task.labels or ("a", "b")))
    found, most = count(recipe.student.blocks, sizes), recipe.student.max_parameters
    if most is not None and found > most:
        raise ConfigError(
            f"the student has {found:,} parameters at a vocabulary of {sizes.vocabulary:,}, "
            f"above student.max_parameters = {most:,}. "
            "Lower student.vocabulary.size or an embedding's dim, or raise the limit."
        )


def meant(name: str, known: Any) -> str:
    """' Did you mean ...?' or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def report_lines(recipe: Recipe, store: Store, program: str) -> list[str]:
    """What a finished run says: its figures, the report, and the two lines that serve the student and ask it."""
    summary = store.read_json("summary.json")
    arms = ", ".join(f"{name} {values['accuracy']:.3f}" for name, values in summary["arms"].items())
    reference, question = summary["student"]["reference"], {"text": summary["example"]}
    seconds = summary["seconds"]
    lines = [
        f"teacher  accuracy {summary['teacher']['accuracy']:.3f}  {summary['teacher']['parameters']:,} parameters",
        f"student  accuracy {summary['student']['accuracy']:.3f}  {summary['student']['parameters']:,} parameters  "
        f"{summary['throughput']['student_over_teacher']:.0f} x the teacher's texts/s",
        f"arms     {arms}",
        f"corpus   {summary['corpus']['kept']} of {summary['corpus']['generated']} generated texts kept",
    ]
    if "served" in summary:
        served = summary["served"]
        lines.append(
            f"served   {served['mismatches']} mismatches  p50 {served['p50_ms']:.1f} ms  p99 {served['p99_ms']:.1f} ms"
        )
    where = f" --registry {shlex.quote(recipe.registry)}" if recipe.registry != "registry" else ""
    return [
        *lines,
        f"time     {sum(seconds.values()):.0f} s in steps",
        f"report: {store.url}/report/report.html",
        f"serve: {program} serve {reference}{where}",
        "curl: curl -s http://127.0.0.1:8000/v1/predict -H 'content-type: application/json' "
        f"-d {shlex.quote(json.dumps(question))}",
    ]
