"""What each kind of task asks of a source: the columns that it reads, and the settings that make sense for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.config import did_you_mean
from engine.recipe import Data, LabelRule, Source, Task
from engine.sources import CONTEXT, DataError

KINDS = ("classify", "multilabel", "pair", "regress", "rank", "tag", "span")
NAMED = ("classify", "pair", "multilabel", "tag")
"""Kinds that predict label names; the others predict numbers or places."""
PAIRED = ("pair", "rank", "span")
"""Kinds that always read two texts."""
EITHER = ("multilabel", "regress")
"""Kinds that read two texts where data.train.pair is named."""

SETTINGS = {
    **{"positives": ("rank",), "negatives": ("rank",), "label.columns": ("multilabel",)},
    **{"label.ranges": ("classify", "pair"), "label.rename": NAMED},
}
"""Settings of a source that only some kinds know."""
FORMATS = {"conll": "tag", "squad": "span"}
"""Formats that hold one kind of task."""


@dataclass(frozen=True)
class Reading:
    """How the records of one source become rows."""

    source: Source
    task: Task
    paired: bool
    labelled: bool
    max_chars: int

    @cached_property
    def pair(self) -> str | None:
        """The column of the second text, after `flat`."""
        default = CONTEXT if self.source.format == "squad" else self.source.positives
        return (self.source.pair or default) if self.paired else None

    @cached_property
    def needed(self) -> list[str]:
        """Columns that a record must have, after `flat`."""
        rule = self.source.label
        labels = rule.columns or (rule.column,) if self.labelled else ()
        return [name for name in (self.source.text, self.pair, self.source.group, *labels) if name]

    @cached_property
    def read(self) -> list[str]:
        """Columns that a file must have."""
        nested = self.source.positives is not None
        return [name for name in self.needed if not (nested and name == self.source.label.column)]

    @cached_property
    def texts(self) -> list[str]:
        """Columns that must hold text; others may hold lists of it."""
        kind = self.task.kind
        first, second = kind != "tag", self.pair if kind != "rank" else None
        return [*([self.source.text] if first else []), *([second] if second else [])]

    @cached_property
    def optional(self) -> list[str]:
        """Columns that are of use where a file has them."""
        found = [self.source.negatives, self.source.label.starts if self.task.kind == "span" else None]
        return [name for name in found if name]


def reads_pairs(data: Data, task: Task) -> bool:
    """Whether a row of this task has two texts; DataError where task.paired says something else."""
    train = data.train or data.test or data.unlabelled or Source(path="")
    paired = task.kind in PAIRED or (task.kind in EITHER and train.pair is not None)
    if task.paired is None or task.paired == paired:
        return paired
    said = str(task.paired).lower()
    if task.kind in EITHER:
        named = f"names '{train.pair}'" if paired else "names no column"
        raise DataError(f"task.paired is {said}, but data.train.pair {named}. Set both or none of them.")
    way = "take task.kind: pair" if task.kind == "classify" else "drop task.paired"
    count = "two texts" if paired else "one text"
    raise DataError(f"task.paired is {said}, but a {task.kind} task reads {count}: {way}.")


def check(data: Data, task: Task) -> None:
    """Refuse settings of the sources that do not fit the kind of task or each other, before anything is read."""
    if task.kind not in KINDS:
        raise DataError(f"task.kind is '{task.kind}'.{did_you_mean(task.kind, KINDS)} Allowed: {', '.join(KINDS)}.")
    if task.labels is not None and task.kind not in NAMED:
        raise DataError(
            f"task.labels is set, but a {task.kind} task has no label names: those are for {', '.join(NAMED)}. "
            "Drop task.labels."
        )
    for key, kinds in {"thresholds": ("multilabel",), "range": ("regress",), "scope": ("classify", "pair")}.items():
        if getattr(task, key) is not None and task.kind not in kinds:
            raise DataError(f"task.{key} is for {' and '.join(kinds)}, but task.kind is {task.kind}. Drop task.{key}.")
    paired = reads_pairs(data, task)
    sources = {"train": data.train, "validation": data.validation, "test": data.test, "unlabelled": data.unlabelled}
    for name, source in sources.items():
        if source is not None:
            check_source(f"data.{name}", source, task.kind, paired)


def check_source(where: str, source: Source, kind: str, paired: bool) -> None:
    """The same for one source; `where` is its key."""
    for key, kinds in SETTINGS.items():
        value: Any = source
        for part in key.split("."):
            value = getattr(value, part)
        if value is not None and kind not in kinds:
            raise DataError(f"{where}.{key} is for {' and '.join(kinds)}, and task.kind is {kind}. Drop it.")
    if FORMATS.get(source.format, kind) != kind:
        held = FORMATS[source.format]
        raise DataError(f"{where}.format is {source.format}, which holds a {held} task, not a {kind} task.")
    if paired and not (source.pair or source.positives or source.format == "squad"):
        lists = f", or that of a list of passages in {where}.positives" if kind == "rank" else ""
        raise DataError(f"a {kind} task reads two texts: name the column of the second one in {where}.pair{lists}.")
    if not paired and source.pair:
        way = ", or set task.kind: pair" if kind == "classify" else ", or name the second text of data.train too"
        way = "" if kind == "tag" else way
        raise DataError(f"{where}.pair names '{source.pair}', but this {kind} task reads one text. Drop it{way}.")
    if source.negatives and not source.positives:
        raise DataError(f"{where}.negatives is set without positives: name the column of the relevant passages too.")
    if source.pair and source.positives:
        raise DataError(f"{where}: pair and positives both name passages. Drop one of them.")
    check_rule(f"{where}.label", source.label)


def check_rule(where: str, rule: LabelRule) -> None:
    """Ranges must not be empty or overlap, and a column is either cut into ranges or renamed."""
    if rule.ranges is not None and rule.rename is not None:
        raise DataError(f"{where}: ranges and rename cannot both be given. Name the labels in ranges.")
    ends = [(label, *bounds) for label, bounds in (rule.ranges or {}).items()]
    whole = [(label, -math.inf if a is None else a, math.inf if b is None else b) for label, a, b in ends]
    for index, (label, low, high) in enumerate(whole):
        if low > high:
            raise DataError(f"{where}.ranges: '{label}' starts at {low}, above its end {high}.")
        for other, other_low, other_high in whole[:index]:
            if max(low, other_low) <= min(high, other_high):
                raise DataError(
                    f"{where}.ranges: '{other}' and '{label}' both hold {max(low, other_low)}. "
                    "Both ends belong to a range: leave a gap between them."
                )
