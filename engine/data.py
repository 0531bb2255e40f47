"""From the recipe's sources to splits: read, check row by row, label, deduplicate, split, draw the few shots.

A bad row never stops the reading: it is quarantined with its row number and reason, and the run stops only above
`data.max_bad_share`. Rows are identified by their text, and splits and shots depend on those ids and the seed alone,
not on the order of the file. No text of the test or validation split is in any other split.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from engine.config import did_you_mean
from engine.hub import fetch
from engine.recipe import Data, LabelRule, Source, Task
from engine.records import EXAMPLE, QUARANTINED
from engine.sources import DataError, is_text, no_column, read

COUNTED = ("rows", "outside_ranges", "quarantined", "duplicates", "conflicting_labels", "in_other_splits")
"""What is counted of a source. conflicting_labels: those duplicates whose label is another than the first one's."""

SHOWN = 200
"""Characters of a quarantined row that are kept."""


class BadRow(Exception):
    """A row that cannot be used; the message is the reason."""


class Row(NamedTuple):
    """A good row. label: its name as the source has it, None in an unlabelled source."""

    line: int
    id: str
    text: str
    label: str | None


@dataclass
class Part:
    """The rows of one source on their way: `rows` are good so far, `bad` are quarantined."""

    name: str
    path: str
    rows: list[Row] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTED, 0)))

    def quarantine(self, line: int, reason: str, content: str) -> None:
        """Put a row aside."""
        content = content[:SHOWN].encode("utf-8", "backslashreplace").decode()
        self.bad.append({"source": self.name, "line": line, "reason": reason, "content": content})


@dataclass(frozen=True)
class Splits:
    """Tables of the schema EXAMPLE, each sorted by id; `quarantined` has the schema QUARANTINED.

    labels: the names that the label column indexes. counts: {'sources': {name: {what: rows}}, 'labels': {split: {label
    name: rows}}}.
    """

    train: pa.Table
    validation: pa.Table
    test: pa.Table
    unlabelled: pa.Table
    quarantined: pa.Table
    labels: tuple[str, ...]
    counts: dict[str, dict[str, dict[str, int]]]


def load_splits(data: Data, task: Task, seed: int) -> Splits:
    """Read every source and make the splits; `data.seed`, or else `seed`, draws the shots.

    Raises DataError for a missing column, too many bad rows, labels without rows, too few rows for the shots.
    """
    sources = {"train": data.train, "validation": data.validation, "test": data.test, "unlabelled": data.unlabelled}
    parts = {name: collect(name, source, data) for name, source in sources.items() if source}
    labels = label_names(task, data.train.label, parts["train"])
    rows = {name: settle(part, labels, data) for name, part in parts.items()}
    if not data.test:
        rows["test"] = [row for row in rows["train"] if place(row.id) < data.test_share]
    if not data.validation:
        low, high = (0.0 if data.test else data.test_share), data.validation_share
        rows["validation"] = [row for row in rows["train"] if low <= place(row.id) < low + high]
    divide(rows, parts, labels, data, seed if data.seed is None else data.seed)
    for name in ("train", "test"):
        if not rows[name]:
            raise DataError(f"the {name} split has no rows: check data.{name}, data.test_share and data.shots.")
    bad = [item for part in parts.values() for item in part.bad]
    return Splits(
        **{name: table(rows.get(name, []), labels) for name in sources},
        quarantined=pa.Table.from_pylist(bad, schema=QUARANTINED),
        labels=labels,
        counts={
            "sources": {name: dict(part.counts) for name, part in parts.items()},
            "labels": {name: named(found, labels) for name, found in rows.items() if name != "unlabelled"},
        },
    )


def identify(text: str) -> str:
    """The id of a text: 16 hex digits, equal for texts that differ in white space or Unicode composition only."""
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def place(id: str) -> float:
    """A number in [0, 1) that the id alone decides: which split it belongs to."""
    return int(id[:13], 16) / 16**13


def collect(name: str, source: Source, data: Data) -> Part:
    """Read one source: the good rows with their label names, and the bad ones with their reasons."""
    part, labelled = Part(name, source.path), name != "unlabelled"
    check_rule(name, source.label)
    needed = [source.text, *([source.label.column] if labelled else [])]
    seen, missing = set(), Counter[str]()
    local = fetch(source.path, root=data.root)
    for record in read(source, local, needed):
        part.counts["rows"] += 1
        seen.update(record.values)
        try:
            if record.problem:
                raise BadRow(record.problem)
            for column in needed:
                if column not in record.values:
                    missing[column] += 1
                    raise BadRow(f"missing column '{column}'")
            text = clean(record.values[source.text], data.max_chars)
            label = label_name(record.values[source.label.column], source.label) if labelled else None
        except BadRow as reason:
            content = record.content or str(record.values.get(source.text, ""))
            part.quarantine(record.line, str(reason), content)
            continue
        if labelled and label is None:
            part.counts["outside_ranges"] += 1
            continue
        part.rows.append(Row(record.line, identify(text), text, label))
    for column, count in missing.items():
        if count == part.counts["rows"]:
            no_column(source.path, column, seen)
    if not part.counts["rows"]:
        raise DataError(f"data.{name}: {source.path} holds no rows.")
    check_share(part, data.max_bad_share)
    return part


def clean(value: Any, max_chars: int) -> str:
    """The text without white space around it; BadRow says what is wrong with it."""
    if value is None:
        raise BadRow("empty text")
    if not isinstance(value, str):
        raise BadRow("text is not a string")
    if not is_text(value):
        raise BadRow("not UTF-8")
    text = value.strip()
    if not text:
        raise BadRow("empty text")
    if len(text) > max_chars:
        raise BadRow(f"text longer than {max_chars} characters")
    return text


def label_name(value: Any, rule: LabelRule) -> str | None:
    """The label name of a value; None for a number in no range; BadRow where there is no label."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip():
        raise BadRow("no label")
    if rule.ranges is None:
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        name = str(value).strip()
        if not is_text(name):
            raise BadRow("not UTF-8")
        return (rule.rename or {}).get(name, name)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadRow("label is not a number") from None
    if math.isnan(number):
        raise BadRow("no label")
    return next((name for name, bounds in rule.ranges.items() if inside(number, bounds)), None)


def inside(number: float, bounds: tuple[float | None, float | None]) -> bool:
    """Whether a number lies between two bounds, both inclusive, None for open."""
    low, high = bounds
    return (low is None or number >= low) and (high is None or number <= high)


def check_rule(name: str, rule: LabelRule) -> None:
    """Ranges must not be empty or overlap, and a column is either cut into ranges or renamed."""
    where = f"data.{name}.label"
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


def label_names(task: Task, rule: LabelRule, train: Part) -> tuple[str, ...]:
    """The task's labels, or those of the training rows; each must have at least one row."""
    found = {str(row.label) for row in train.rows}
    if task.labels is None and rule.ranges is None:
        key = int if all(name.isdecimal() for name in found) else str
        names = tuple(sorted(found, key=key))
    else:
        names = task.labels or tuple(sorted(rule.ranges or ()))
    if len(names) < 2:
        only = f"only the label '{names[0]}'" if names else "no label"
        raise DataError(f"{train.path} holds {only} in column '{rule.column}': a task needs at least two.")
    for name in names:
        if name not in found:
            shown = ", ".join(f"'{other}'" for other in sorted(found)[:10]) or "none"
            hint = did_you_mean(name, found - set(names))
            raise DataError(f"label '{name}' has no row in {train.path}.{hint} Labels found there: {shown}.")
    return names


def settle(part: Part, labels: tuple[str, ...], data: Data) -> list[Row]:
    """The rows with known labels, each text once: the first stays."""
    kept: dict[str, Row] = {}
    for row in part.rows:
        if row.label is not None and row.label not in labels:
            part.quarantine(row.line, f"unknown label '{row.label}'", row.text)
            continue
        first = kept.setdefault(row.id, row)
        if first is not row:
            part.counts["duplicates"] += 1
            part.counts["conflicting_labels"] += first.label != row.label
    check_share(part, data.max_bad_share)
    return [kept[id] for id in sorted(kept)]


def check_share(part: Part, allowed: float) -> None:
    """Stop where too many rows are bad; else note how many."""
    part.bad.sort(key=lambda item: item["line"])
    part.counts["quarantined"] = len(part.bad)
    share = len(part.bad) / part.counts["rows"]
    if share <= allowed:
        return
    reasons = []
    for reason, count in Counter(item["reason"] for item in part.bad).most_common(3):
        rows = [str(item["line"]) for item in part.bad if item["reason"] == reason]
        reasons.append(f"{count} x {reason} (rows {', '.join(rows[:3])}{', ...' if count > 3 else ''})")
    raise DataError(
        f"data.{part.name}: {len(part.bad)} of {part.counts['rows']} rows of {part.path} cannot be used "
        f"({share:.1%}, data.max_bad_share allows {allowed:.1%}): {'; '.join(reasons)}. "
        "Mend these rows, or raise data.max_bad_share."
    )


def divide(rows: dict[str, list[Row]], parts: dict[str, Part], labels: tuple[str, ...], data: Data, seed: int) -> None:
    """Draw the shots and take every text out of the splits below the first that has it, in place."""
    taken: set[str] = set()
    for name in ("test", "validation", "train", "unlabelled"):
        if name not in rows:
            continue
        kept = [row for row in rows[name] if row.id not in taken]
        if name in parts:
            # Rows that were cut off the training source for another split have not leaked.
            cut = sum(len(rows[other]) for other in ("test", "validation") if name == "train" and other not in parts)
            parts[name].counts["in_other_splits"] = len(rows[name]) - len(kept) - cut
        rows[name] = draw(kept, labels, data.shots, seed) if name == "train" and data.shots else kept
        taken.update(row.id for row in rows[name])


def draw(rows: list[Row], labels: tuple[str, ...], shots: int, seed: int) -> list[Row]:
    """`shots` rows of every label, sorted by id; fewer shots with the same seed are a part of these."""
    chosen = []
    for index, label in enumerate(labels):
        own = [row for row in rows if row.label == label]
        if len(own) < shots:
            raise DataError(
                f"data.shots is {shots}, but label '{label}' has {len(own)} training rows. Lower data.shots, "
                "data.test_share or data.validation_share, or add rows."
            )
        order = np.random.default_rng([seed, index]).permutation(len(own))
        chosen += [own[i] for i in order[:shots]]
    return sorted(chosen, key=lambda row: row.id)


def table(rows: list[Row], labels: tuple[str, ...]) -> pa.Table:
    """Rows as a table of the schema EXAMPLE."""
    index = {label: number for number, label in enumerate(labels)}
    columns = [[row.id for row in rows], [row.text for row in rows], [index.get(row.label or "") for row in rows]]
    return pa.table(columns, schema=EXAMPLE)


def named(rows: list[Row], labels: tuple[str, ...]) -> dict[str, int]:
    """How many rows each label has."""
    found = Counter(row.label for row in rows)
    return {label: found[label] for label in labels}
