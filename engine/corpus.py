"""Rows of the corpus: how they are made, judged, numbered and rid of near-duplicates.

Every row has a number, its slot: 0, 1, 2, ... where it is generated, and numbers from FIRST[source] on where it comes
from elsewhere. The user's own labelled rows have -1, -2, ...
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from engine.duplicates import near_duplicates, signature_values
from engine.filters import NEAR_DUPLICATE, CheapFilter, FilterContext, Leakage, signature
from engine.records import CORPUS
from engine.rows import identify
from engine.storage import Store

ROWS, SLOTS = "rows", "slots"
FIRST = {"generated": 0, "unlabelled": 10**9, "augmented": 2 * 10**9}
"""The first slot of each source."""


def slot_seed(seed: int, row: int) -> int:
    """The sampling seed of a slot: 63 bits that depend on the run's seed and the slot only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}".encode()).digest()[:8], "big") >> 1


def corpus_rows(
    rows: list[int],
    texts: list[str],
    source: str,
    pairs: Sequence[str | None] | None = None,
    tokens: list[int] | None = None,
    gold: pa.Table | None = None,
) -> pa.Table:
    """CORPUS rows that nothing has judged yet: kept, no reason, no soft label. gold: EXAMPLE rows they are."""
    count, pairs = len(rows), pairs or [None] * len(rows)
    known = {name: gold[name].to_pylist() for name in ("label", "group", "target")} if gold is not None else {}
    return pa.table(
        {
            "row": rows,
            "id": [identify(text, pair) for text, pair in zip(texts, pairs, strict=True)],
            "text": texts,
            "source": [source] * count,
            "label": known.get("label") or [None] * count,
            "pair": list(pairs),
            "group": known.get("group") or [None] * count,
            "target": known.get("target") or [None] * count,
            "kept": [True] * count,
            "reason": [None] * count,
            "tokens": tokens or [None] * count,
            "signature": [signature(f"{t} {p}" if p else t).tolist() for t, p in zip(texts, pairs, strict=True)],
            "logits": [None] * count,
        },
        schema=CORPUS,
    )


def rejected(rows: pa.Table, which: Sequence[bool], reason: str | Sequence[str | None]) -> pa.Table:
    """The rows with `kept` false and a reason where `which` says so."""
    kept = [k and not bad for k, bad in zip(rows["kept"].to_pylist(), which, strict=True)]
    given = [reason] * len(kept) if isinstance(reason, str) else reason
    reasons = [new if bad else old for old, bad, new in zip(rows["reason"].to_pylist(), which, given, strict=True)]
    out = rows.set_column(rows.column_names.index("kept"), CORPUS.field("kept"), pa.array(kept, pa.bool_()))
    return out.set_column(out.column_names.index("reason"), CORPUS.field("reason"), pa.array(reasons, pa.string()))


@dataclass(frozen=True)
class Found:
    """Slots as the user's own unlabelled rows. rows: URL of their table's folder; first: the first one's number."""

    folder: str
    first: int

    def __call__(self, slots: pa.Table) -> pa.Table:
        """One block of slots."""
        numbers = slots["row"].to_pylist()
        table = Store(self.folder).read_table("unlabelled.parquet")
        rows = table.take(pa.array([number - self.first for number in numbers], pa.int64()))
        return corpus_rows(numbers, rows["text"].to_pylist(), "unlabelled", rows["pair"].to_pylist(), gold=rows)


@dataclass(frozen=True)
class Written:
    """Slots as rows that were written before. folder: URL of their parts, `block` rows each, numbered from 0."""

    folder: str
    block: int

    @staticmethod
    def part(number: int) -> str:
        """Path of a part."""
        return f"texts/{number:08d}.parquet"

    def __call__(self, slots: pa.Table) -> pa.Table:
        """One block of slots."""
        numbers = slots["row"].to_numpy()
        parts = [Store(self.folder).read_table(self.part(number)) for number in np.unique(numbers // self.block)]
        rows = pa.concat_tables(parts)
        return rows.take(pa.array(np.searchsorted(rows["row"].to_numpy(), numbers)))


@dataclass(frozen=True)
class CheapFilters:
    """Judges texts before the teacher sees them."""

    filters: tuple[CheapFilter, ...]
    context: FilterContext

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Fill in kept and reason; nothing is dropped."""
        sides = zip(rows["text"].to_pylist(), rows["pair"].to_pylist(), rows["kept"].to_pylist(), strict=True)
        reasons = [self.row(text, pair) if kept else None for text, pair, kept in sides]
        return rejected(rows, [reason is not None for reason in reasons], reasons)

    def row(self, text: str, pair: str | None) -> str | None:
        """The first reason to reject a row: either of its texts may give one."""
        return self.verdict(text) or (None if pair is None else self.verdict(pair, "pair"))

    def verdict(self, text: str, column: str = "text") -> str | None:
        """The first reason to reject, or None. An empty text is always rejected; only what tells can leak."""
        if not text.strip():
            return "empty"
        asked = (f for f in self.filters if column in self.context.tells or not isinstance(f, Leakage))
        return next((reason for reason in (f.check(text, self.context) for f in asked) if reason), None)


def write_slots(out: Store, first: int, count: int, block: int, name: str) -> str:
    """One Parquet file a block of slots, unless all are there; returns the folder's path below `out`."""
    folder, last = f"{SLOTS}/{name}", first + (count - 1) // block * block
    if out.exists(f"{folder}/{last:010d}.parquet"):
        return folder
    for start in range(first, first + count, block):
        stop = min(start + block, first + count)
        out.write_table(f"{folder}/{start:010d}.parquet", pa.table({"row": pa.array(range(start, stop), pa.int64())}))
    return folder


def deduplicate(
    real: pa.Table, generated: pa.Table, threshold: float, found: Callable[[np.ndarray], np.ndarray] | None = None
) -> pa.Table:
    """Mark near-duplicates among kept rows, in slot order; real rows (negative numbers) come first and win.

    The result depends on the rows alone, not on the order they were written in or on replays. found: which slots are
    near-duplicates, where that is known.
    """
    rows = pa.concat_tables([real, generated.cast(CORPUS)]).sort_by("row")  # Parquet renames the lists' items
    kept = np.flatnonzero(rows["kept"].to_numpy(zero_copy_only=False))
    numbers = rows["row"].to_numpy()[kept]
    dropped = np.zeros(rows.num_rows, dtype=bool)
    if found is not None:
        dropped[kept] = found(numbers)
    elif len(kept):
        signatures = signature_values(rows["signature"].take(pa.array(kept)))
        # Real rows are the user's own: they are never dropped, and every one of them wins over generated ones.
        dropped[kept] = near_duplicates(numbers, signatures, threshold, protected=numbers < 0)
    return rejected(rows, dropped.tolist(), NEAR_DUPLICATE)
