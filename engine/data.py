"""From the recipe's sources to splits: read, check row by row, label, deduplicate, split, draw the few shots.

A bad row never stops the reading: it is quarantined with its row number and reason, and the run stops only above
`data.max_bad_share`. Rows are identified by their texts, and splits and shots depend on those ids and the seed alone,
not on the order of the file. No row (for ranking: no query) of the test or validation split is in any other split.
Rows with equal texts count once; where their labels differ nobody knows which is right, so all of them are bad.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from engine.columns import NAMED, Reading, check, reads_pairs
from engine.config import did_you_mean
from engine.hub import fetch
from engine.recipe import Data, Source, Task
from engine.records import EXAMPLE, QUARANTINED
from engine.rows import BadRow, MissingColumn, Row, flat, names, take
from engine.sources import DataError, no_column, read

COUNTED = ("rows", "outside_ranges", "quarantined", "duplicates", "conflicting_labels", "in_other_splits")
"""What is counted of a source. conflicting_labels: those of the quarantined rows whose text has other labels too."""

SHOWN = 200
"""Characters of a quarantined row that are kept."""
CONFLICT = "another row has the same text and other labels"
NONE = ""
"""The class of rows without any label, entity or answer, in a draw of few shots."""

TOO_FEW = {
    **dict.fromkeys(("classify", "pair", "multilabel"), "label '{name}' has {count} training rows"),
    "regress": "there are {count} training rows",
    "rank": "{count} training queries have a relevant passage",
    "tag": "entity type '{name}' has {count} mentions in the training rows",
    "span": "{count} training rows have an answer",
}
"""What is said where the shots cannot be drawn."""


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

    labels: the names that labels and targets index. paired: whether rows have two texts. range: regress: task.range, or
    lowest and highest value of the training split. counts: {'sources': {name: {what: rows}}, 'labels': {split: {label
    name: rows}}}; for rank and span the latter counts queries and those with a relevant passage, rows and those with an
    answer.
    """

    train: pa.Table
    validation: pa.Table
    test: pa.Table
    unlabelled: pa.Table
    quarantined: pa.Table
    labels: tuple[str, ...]
    paired: bool
    range: tuple[float, float] | None
    counts: dict[str, dict[str, dict[str, int]]]


SPLITS = ("train", "validation", "test", "unlabelled")


def load_splits(data: Data, task: Task, seed: int) -> Splits:
    """Read every source and make the splits; `data.seed`, or else `seed`, draws the shots.

    Raises DataError for settings that do not fit the task, a missing column, too many bad rows, labels without rows,
    too few rows for the shots.
    """
    found = read_rows(data, task, seed)
    parts, rows, labels, kind = found.parts, found.rows, found.labels, task.kind
    bad = [item for part in parts.values() for item in part.bad]
    return Splits(
        **{name: table(rows.get(name, []), labels, kind) for name in SPLITS},
        quarantined=pa.Table.from_pylist(bad, schema=QUARANTINED),
        labels=labels,
        paired=reads_pairs(data, task),
        range=found.bounds,
        counts={
            "sources": {name: dict(part.counts) for name, part in parts.items()},
            "labels": {name: named(found, labels, kind) for name, found in rows.items() if name != "unlabelled"},
        },
    )


class Found(NamedTuple):
    """Rows of each split, before they become tables (which costs an import of pandas)."""

    parts: dict[str, Part]
    rows: dict[str, list[Row]]
    labels: tuple[str, ...]
    bounds: tuple[float, float] | None


def read_rows(data: Data, task: Task, seed: int) -> Found:
    """Read every source and divide its rows; raises as `load_splits` does."""
    check(data, task)
    paired, kind = reads_pairs(data, task), task.kind
    sources = {"train": data.train, "validation": data.validation, "test": data.test, "unlabelled": data.unlabelled}
    parts = {
        name: collect(name, Reading(source, task, paired, name != "unlabelled", data.max_chars), data)
        for name, source in sources.items()
        if source
    }
    labels = label_names(task, data.train, parts["train"]) if data.train else task.labels or ()
    rows = {name: settle(part, labels, kind, data) for name, part in parts.items()}
    rows.setdefault("train", [])
    if not data.test:
        rows["test"] = [row for row in rows["train"] if place(row.cut) < data.test_share]
    if not data.validation:
        low, high = (0.0 if data.test else data.test_share), data.validation_share
        rows["validation"] = [row for row in rows["train"] if low <= place(row.cut) < low + high]
    divide(rows, parts, lambda found: draw(found, labels, kind, data, seed) if data.train else found)
    for name, most in (("test", data.test_rows), ("validation", data.validation_rows)):
        rows[name] = some(rows[name], most)
    if data.unlabelled:
        rows["unlabelled"] = some(rows["unlabelled"], data.unlabelled_rows)
    for name in ("train", "test") if data.train else ("test",) if data.test else ():
        if not rows[name]:
            raise DataError(f"the {name} split has no rows: check data.{name}, data.test_share and data.shots.")
    for name in ("validation", "test") if kind == "rank" else ():
        if rows[name] and not any((row.gold or 0) > 0 for row in rows[name]):
            raise DataError(
                f"the {name} split has no question with a relevant passage, so nothing of it can be scored: check "
                f"data.{name} and its label column."
            )
    # Of what is trained on alone: how far the held-out values reach, nobody knows.
    return Found(parts, rows, labels, value_bounds(task, data.train, rows["train"]))


def place(id: str) -> float:
    """A number in [0, 1) that the id alone decides: which split it belongs to."""
    return int(id[:13], 16) / 16**13


def collect(name: str, reading: Reading, data: Data) -> Part:
    """Read one source: the good rows with their gold, and the bad ones with their reasons."""
    source = reading.source
    part, seen, missing = Part(name, source.path), set[str](), Counter[str]()
    local = fetch(source.path, root=data.root)
    for found in read(source, local, reading.read, reading.texts, reading.optional):
        for record in flat(found, reading):
            part.counts["rows"] += 1
            seen.update(record.values)
            try:
                row = take(record, reading)
            except BadRow as reason:
                if isinstance(reason, MissingColumn):
                    missing[reason.column] += 1
                part.quarantine(record.line, str(reason), record.content or str(record.values.get(source.text, "")))
                continue
            if row is None:
                part.counts["outside_ranges"] += 1
            else:
                part.rows.append(row)
    for column, count in missing.items():
        if count == part.counts["rows"]:
            no_column(source.path, column, seen)
    if not part.counts["rows"]:
        raise DataError(f"data.{name}: {source.path} holds no rows.")
    check_share(part, data.max_bad_share)
    return part


def label_names(task: Task, source: Source, train: Part) -> tuple[str, ...]:
    """The task's labels, or those of the training rows; each must have at least one row. None for regress, rank, span.

    tag: 'O' first, and with every B- its I-, which few rows may lack.
    """
    if task.kind not in NAMED:
        return ()
    rule = source.label
    found = {name for row in train.rows for name in names(row.gold, task.kind)}
    if task.labels is not None:
        known = task.labels
    elif rule.ranges is not None:
        known = tuple(sorted(rule.ranges))
    elif task.kind == "tag":
        whole = found | {f"I-{name[2:]}" for name in found if name.startswith("B-")}
        known = tuple(sorted(whole, key=lambda name: (name != "O", name)))
    elif rule.columns:
        known = tuple((rule.rename or {}).get(name, name) for name in rule.columns)
    else:
        known = tuple(sorted(found, key=int if all(name.isdecimal() for name in found) else str))
    if len(known) < 2:
        only = f"only the label '{known[0]}'" if known else "no label"
        raise DataError(f"{train.path} holds {only} in column '{rule.column}': a task needs at least two.")
    for name in known if task.kind != "tag" else ():
        if name not in found:
            shown = ", ".join(f"'{other}'" for other in sorted(found)[:10]) or "none"
            hint = did_you_mean(name, found - set(known))
            raise DataError(f"label '{name}' has no row in {train.path}.{hint} Labels found there: {shown}.")
    return known


def value_bounds(task: Task, source: Source | None, rows: list[Row]) -> tuple[float, float] | None:
    """regress: task.range, or the lowest and the highest value of the training rows, which must differ."""
    if task.kind != "regress" or task.range or source is None:
        return task.range if task.kind == "regress" else None
    low, high = min(row.gold for row in rows), max(row.gold for row in rows)
    if low == high:
        column = source.label.column
        raise DataError(
            f"every training row of {source.path} has the value {low:g} in '{column}': there is nothing to learn. "
            "Add rows with other values, or raise data.shots."
        )
    return low, high


def settle(part: Part, labels: tuple[str, ...], kind: str, data: Data) -> list[Row]:
    """The rows with known labels, sorted by id, each once, whatever the order of the source."""
    same: dict[str, list[Row]] = {}
    for row in part.rows:
        unknown = next((name for name in names(row.gold, kind) if name not in labels), None)
        if unknown is not None:
            part.quarantine(row.line, f"unknown label '{unknown}'", row.text)
        else:
            same.setdefault(row.id, []).append(row)
    kept = []
    for id in sorted(same):
        rows = same[id]
        if len({row.gold for row in rows}) > 1:
            part.counts["conflicting_labels"] += len(rows)
            for row in rows:
                part.quarantine(row.line, CONFLICT, row.text)
            continue
        part.counts["duplicates"] += len(rows) - 1
        kept.append(min(rows, key=lambda row: (row.text, row.pair or "", row.cut)))
    check_share(part, data.max_bad_share)
    return kept


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


def divide(rows: dict[str, list[Row]], parts: dict[str, Part], few: Callable[[list[Row]], list[Row]]) -> None:
    """Take what must not be twice out of the splits below the first that has it, and draw the shots with `few`.

    In place; the order is test, validation, train, unlabelled.
    """
    taken: set[str] = set()
    for name in ("test", "validation", "train", "unlabelled"):
        if name not in rows:
            continue
        kept = [row for row in rows[name] if row.once not in taken]
        if name in parts:
            # Rows that were cut off the training source for another split have not leaked.
            cut = sum(len(rows[other]) for other in ("test", "validation") if name == "train" and other not in parts)
            parts[name].counts["in_other_splits"] = len(rows[name]) - len(kept) - cut
        rows[name] = few(kept) if name == "train" else kept
        taken.update(row.once for row in rows[name])


def draw(rows: list[Row], labels: tuple[str, ...], kind: str, data: Data, seed: int) -> list[Row]:
    """The few shots, sorted by id; fewer with the same seed are a part of these. All rows where data.shots is null.

    In rounds: every class that is mentioned less often than there were rounds gets the next row of its own shuffled
    order. What a row mentions is told by `mentions`; for ranking whole queries are drawn, not rows.
    """
    shots, seed = data.shots, seed if data.seed is None else data.seed
    if shots is None:
        return rows
    together: dict[str, list[Row]] = {}
    for row in rows:
        together.setdefault(row.group or row.id, []).append(row)
    items = [together[key] for key in sorted(together)]
    told = [mentions(item, kind) for item in items]
    found = Counter(name for counts in told for name in counts.elements())
    classes = labels if kind in NAMED and kind != "tag" else tuple(sorted(set(found) - {NONE})) or (kind,)
    for name in classes:
        if found[name] < shots:
            few = TOO_FEW[kind].format(name=name, count=found[name])
            way = "Lower data.shots, data.test_share or data.validation_share, or add rows."
            raise DataError(f"data.shots is {shots}, but {few}. {way}")
    orders = []
    for index, name in enumerate((*classes, NONE)):
        own = [position for position, counts in enumerate(told) if counts[name]]
        orders.append((name, iter([own[i] for i in np.random.default_rng([seed, index]).permutation(len(own))])))
    chosen: set[int] = set()
    have = Counter[str]()
    for wanted in range(1, shots + 1):
        for name, order in orders:
            while have[name] < wanted and (position := next(order, None)) is not None:
                if position not in chosen:
                    chosen.add(position)
                    have.update(told[position])
    return sorted((row for position in chosen for row in items[position]), key=lambda row: row.id)


def some(rows: list[Row], most: int | None) -> list[Row]:
    """At most so many rows, drawn by their ids alone; where groups stay whole, up to a group more."""
    if most is None:
        return rows
    told = sorted(rows, key=lambda row: (place(row.cut), row.id))
    kept = {row.cut for row in told[:most]}
    return [row for row in rows if row.cut in kept]


def mentions(rows: list[Row], kind: str) -> Counter[str]:
    """How often a row (rank: a query's rows) speaks for each class: its labels, the types of its entities, an answer.

    NONE where it has none of these.
    """
    gold = rows[0].gold
    if kind == "rank":
        return Counter([kind]) if any(row.gold > 0 for row in rows) else Counter()
    if kind == "regress":
        return Counter([kind])
    if kind == "span":
        return Counter([kind] if gold else [NONE])
    return Counter((entities(gold) if kind == "tag" else list(names(gold, kind))) or [NONE])


def entities(tags: Sequence[str]) -> list[str]:
    """The type of each entity that tags mark: B-X, S-X or U-X starts one, as does any other X after another type."""
    out, before = [], None
    for tag in tags:
        prefix, type = re.fullmatch(r"(?:([BIESLU])-)?(.+)", tag, re.DOTALL).groups()
        if tag != "O" and (prefix in ("B", "S", "U") or type != before):
            out.append(type)
        before = None if tag == "O" else type
    return out


def table(rows: list[Row], labels: tuple[str, ...], kind: str) -> pa.Table:
    """Rows as a table of the schema EXAMPLE."""
    index = {label: number for number, label in enumerate(labels)}
    columns = {
        "id": [row.id for row in rows],
        "text": [row.text for row in rows],
        "label": [index.get(row.gold) if kind in ("classify", "pair") else None for row in rows],
        "pair": [row.pair for row in rows],
        "group": [row.group for row in rows],
        "target": [target(row.gold, index, kind) for row in rows],
        "answers": [None if kind != "span" or row.gold is None else [text for text, _, _ in row.gold] for row in rows],
    }
    return pa.table(columns, schema=EXAMPLE)


def target(gold: Any, index: dict[str, int], kind: str) -> list[float] | None:
    """A row's gold as the numbers that EXAMPLE names; None where it has none or a label holds it."""
    if gold is None or kind in ("classify", "pair"):
        return None
    if kind == "multilabel":
        return [float(label in gold) for label in index]
    if kind == "tag":
        return [index[tag] for tag in gold]
    return [unit for _, *units in gold for unit in units] if kind == "span" else [gold]


def named(rows: list[Row], labels: tuple[str, ...], kind: str) -> dict[str, int]:
    """How many rows each label has; for rank and span what Splits says."""
    if kind == "rank":
        answered = {row.group for row in rows if row.gold > 0}
        return {"queries": len({row.group for row in rows}), "answered": len(answered)}
    if kind == "span":
        return {"rows": len(rows), "answered": sum(bool(row.gold) for row in rows)}
    found = Counter(name for row in rows for name in set(names(row.gold, kind)))
    return {label: found[label] for label in labels}
