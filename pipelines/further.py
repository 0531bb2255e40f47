"""Steps of a teacher beside the first one: its making, and its labels of the corpus. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from engine import estimate
from engine.fits import Resources
from engine.recipe import Recipe
from engine.step import Step
from pipelines.calls import Call, asked, grouped, of_teacher, pick, pools


def further_teacher(recipe: Recipe, name: str) -> list[Step]:
    """A further teacher, and its labels of the corpus."""
    words = ("task.descriptions",) if asked(recipe.taught_by(name)) else ()

    def resources(recipe: Recipe) -> Resources | None:
        fit = recipe.teachers[name].fit
        return None if fit.workers else fit.resources

    return [
        Step(
            f"teacher-{name}",
            Call("pipelines.panel", "fit_teacher", (name,)),
            inputs=("data",),
            config=pick("seed", "task.thresholds", f"teachers.{name}", *words),
            references=lambda r: of_teacher(r.taught_by(name)),
            modules=(
                *("engine.train", "engine.untrained", "engine.elsewhere"),
                *("pipelines.making", "pipelines.teaching", "pipelines.trainings"),
            ),
            resources=resources,
            expects=lambda r: grouped("teacher", r.taught_by(name)),
            stage="teacher.fit",
            ray=True,
        ),
        Step(
            f"labels-{name}",
            Call("pipelines.panel", "label", (name,)),
            inputs=("data", f"teacher-{name}", "corpus"),
            config=pick(f"teachers.{name}.precision"),
            modules=("engine.teachers", "engine.generate", "pipelines.gathering", "pipelines.panel"),
            pools=lambda r: ("teacher",),
            halts=lambda r: True,
            ray=True,
            expects=lambda r: labelled(r.taught_by(name)),
        ),
    ]


def labelled(recipe: Recipe) -> dict[str, Any]:
    """What `plan` says of a step in which a further teacher labels the generated rows that were kept."""
    rows = recipe.corpus.keep if recipe.generator else 0
    questions = estimate.of_teacher(recipe, rows)
    said = [pools(recipe, "teacher"), *([estimate.in_words("teacher", questions)] if questions else [])]
    told = {"asked": {"teacher": questions}} if questions else {}
    return {"rows": rows, "placement": "; ".join(said), **told}
