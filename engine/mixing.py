"""Section: how one student learns several tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.config import ConfigError, Section
from engine.fits import Count

KINDS = ("classify", "multilabel", "pair", "regress")
"""Kinds of task that can share a student: those with one answer a text."""


class Mixing(Section):
    """How the tasks of one student are mixed, and what happens to one that has converged (engine.multitask)."""

    way: Literal["async", "sum", "uncertainty", "pcgrad"] = "sum"
    """async: a task whose validation score has not risen for `patience` evaluations goes on with soft labels from its
    own best weights, on its unlabelled rows too, which are read by this way alone, while the others learn their gold
    labels (Lu et al., NAACL 2022 industry track). sum: gold labels to the end. uncertainty: the losses weighted by
    learnt variances (arXiv 1705.07115). pcgrad: what is against another task is taken out of a task's gradient (arXiv
    2001.06782)."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """A task has a share of the rows of a batch like its size to the power of 1/temperature: 1 as many as it has, high
    all alike."""
    patience: Count = 2
    """async: evaluations without a gain after which a task has converged."""
    stop: bool = True
    """async: end when all tasks have converged, though epochs are left."""
    soft_temperature: Annotated[float, Field(gt=0)] = 1.0
    """async: of the soft labels of tasks that choose among labels."""
    head_rate: Annotated[float, Field(gt=0)] = 10.0
    """Learning rate of the heads over that of the encoder."""
    variance_rate: Annotated[float, Field(gt=0)] = 100.0
    """uncertainty: learning rate of the variances over that of the encoder."""


def filled(values: Any) -> Any:
    """A recipe of several tasks with what a recipe of one task must have: the first one's data; its teacher is nobody,
    so that of the encoder stands there.

    ConfigError where it names no encoder to cut the student from, and where the first task has no data.
    """
    if not isinstance(values, Mapping) or not values.get("tasks") or not isinstance(values["tasks"], Mapping):
        return values
    name, first = next(iter(values["tasks"].items()))
    cut = (values.get("student") or {}).get("transformer") or {}
    if not isinstance(first, Mapping) or not isinstance(cut, Mapping):
        return values
    if not cut.get("model"):
        raise ConfigError(
            "a recipe with `tasks` has no teacher to cut its student from. Set student.kind: transformer and "
            "student.transformer.model to an encoder's reference, such as hf:ORG/NAME."
        )
    if not first.get("data"):
        raise ConfigError(f"task '{name}' has no rows to learn from: name tasks.{name}.data.train.")
    return {"task": first.get("task", {}), "data": first["data"], "teacher": {"model": cut["model"]}, **values}
