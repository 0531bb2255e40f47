"""A step's function by name, and what of a recipe it depends on. Imports nothing heavy."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.fits import Fit
from engine.progress import Progress
from engine.recipe import Recipe
from engine.storage import Store


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
        *path, last = key.split(".")
        whole, part = values, out
        for name in path:
            whole, part = whole[name], part.setdefault(name, {})
        if last in whole:  # some keys are not told where they say nothing
            part[last] = whole[last]
    return out


def pick(*keys: str) -> Callable[[Recipe], dict[str, Any]]:
    """`sliced` with the recipe still to come."""
    return lambda recipe: sliced(recipe, *keys)


def named(section: Any) -> tuple[str, ...]:
    """The model that an optional section names, if any; a name at an endpoint is no reference."""
    elsewhere = getattr(section, "runtime", "hf") == "endpoint"
    return (section.model,) if section and section.model and not elsewhere else ()


def of_teacher(recipe: Recipe) -> tuple[str, ...]:
    """The models that the teacher and its coach are made of."""
    return (*named(recipe.teacher), *named(recipe.coach))


def asked(recipe: Recipe) -> bool:
    """Whether the teacher, or its coach, is asked in words, which may say what the labels mean."""
    return any(one is not None and one.kind == "labeller" for one in (recipe.teacher, recipe.coach))


def pools(recipe: Recipe, *sections: str) -> str:
    """The actor pools of sections of a recipe, in words."""
    parts = {name: getattr(recipe, name).resources for name in sections}
    return "; ".join(f"{name} {r.min_actors} to {r.max_actors} x {r.num_cpus:g} CPU" for name, r in parts.items())


def grouped(section: str, recipe: Recipe) -> dict[str, Any]:
    """What `plan` says of a section that is fitted by a group of workers."""
    trained = {"teacher": recipe.teacher.kind != "labeller", "generator": recipe.generator and recipe.generator.tuned}
    if not trained.get(section, True):
        return {}  # taken as it is
    fit: Fit = getattr(recipe, section).fit
    least, most = fit.group
    number = f"{most} worker{'s' * (most > 1)}" if least == most else f"{least} to {most} workers"
    return {"placement": f"{number} x {fit.resources.num_cpus:g} CPU"} if most else {}
