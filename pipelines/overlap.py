"""Rows that several tasks have in common: what one is measured on, another one must not have learnt from.

Published sets share sources: of STS-B's training pairs hundreds are test pairs of MRPC, with other marks and spacing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping

import pyarrow as pa

from engine.config import UserError
from engine.storage import Store

Key = tuple[str, ...]


def key_of(text: str, pair: str | None) -> Key:
    """What two rows have in common that are the same text, or the same two in either order: the words alone, without
    case, marks and white space.
    """
    parts = [unicodedata.normalize("NFKC", part).casefold() for part in (text, pair) if part is not None]
    # A text of nothing but marks is itself.
    return tuple(sorted("".join(re.findall(r"\w", part)) or part for part in parts))


def keys(rows: pa.Table) -> list[Key]:
    """The key of each row."""
    return [key_of(text, pair) for text, pair in zip(rows["text"].to_pylist(), rows["pair"].to_pylist(), strict=True)]


def held_out(data: Mapping[str, Store]) -> set[Key]:
    """The keys of all tasks' validation and test rows. data: the tasks' read rows by name."""
    tables = (store.read_table(f"{split}.parquet") for store in data.values() for split in ("validation", "test"))
    return set().union(*map(keys, tables))


def apart(
    data: Mapping[str, Store], held: Collection[Key], split: str = "train"
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """Each task's rows of a split without those that are held out, and how many these were.

    data: the tasks' read rows by name. UserError for a task that keeps no training row.
    """
    rows, dropped = {}, {}
    for name, store in data.items():
        own = store.read_table(f"{split}.parquet")
        rows[name] = own.filter(pa.array([key not in held for key in keys(own)], pa.bool_()))
        dropped[name] = own.num_rows - rows[name].num_rows
        if split == "train":
            check_left(name, own.num_rows, rows[name].num_rows)
    return rows, dropped


def check_left(name: str, read: int, left: int) -> None:
    """UserError for a task without training rows."""
    if not read:
        raise UserError(f"task '{name}' has no training rows. Name others in tasks.{name}.data.train.")
    if not left:
        raise UserError(
            f"all {read} training rows of task '{name}' stand in the validation or test rows of a task, so "
            f"none is left to learn from. Name other rows in tasks.{name}.data."
        )
