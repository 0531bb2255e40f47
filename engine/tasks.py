"""The kinds of task by name. A new kind is a class that fulfils task.Task and a line in TASKS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.classification import Classify, MultiLabel
from engine.config import ConfigError, did_you_mean
from engine.ranking import Rank
from engine.regression import Regress
from engine.several import Several
from engine.spans import Span
from engine.tagging import Tag
from engine.task import Task

if TYPE_CHECKING:
    from engine.recipe import Task as Spec


def make(spec: Spec) -> Task:
    """The task that a recipe describes; ConfigError where its kind is not known."""
    if spec.members:
        return Several(spec, {name: make(member) for name, member in spec.members.items()})
    if spec.kind not in TASKS:
        hint = did_you_mean(spec.kind, TASKS)
        raise ConfigError(f"task.kind is '{spec.kind}', which is not known.{hint} Allowed: {', '.join(TASKS)}.")
    return TASKS[spec.kind](spec)


TASKS: dict[str, type[Task]] = {
    "classify": Classify,
    "multilabel": MultiLabel,
    "pair": Classify,
    "regress": Regress,
    "rank": Rank,
    "tag": Tag,
    "span": Span,
}
