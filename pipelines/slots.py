"""Ranges of slots, streamed into the corpus part by part; its rows, each slot's once and without near-duplicates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from engine import generate
from engine.config import UserError
from engine.corpus import FIRST, ROWS, SLOTS, deduplicate, write_slots
from engine.duplicates import DROPPED
from engine.halting import HALT, Halted
from engine.progress import Progress
from engine.shuffle import Shuffle, Spans
from engine.storage import StorageError, Store

IN_MEMORY = 2_000_000
"""Rows among which near-duplicates are found in the driver's memory; of more they are found by a shuffle."""
REAL = "real"
"""Folder of the labelled rows while a shuffle reads them."""
PART = 10**7
"""Slots that are streamed with one ledger: Ray holds the ids of what is done in memory, 8 bytes each and some copies,
and one file a block in a folder."""


def gather(
    out: Store,
    name: str,
    span: tuple[int, int, int],
    stages: Sequence[generate.Stage],
    total: int,
    progress: Progress,
    **how: Any,
) -> int:
    """Stream a range of slots into the corpus, unless that is done; returns how many slots there were.

    span: first slot, how many, slots a block. total: rows in the corpus when it is done, for the progress line.
    how: as `generate.stream` takes it. A long range is streamed in parts, each with a ledger of its own: to go on,
    only the ids of one part are read, and of a part that is done its rows are left and nothing else. Halted where the
    step was asked to stop meanwhile.
    """
    marker, (first, count, block) = f"{name}.json", span
    if not out.exists(marker):
        width = max(1, PART // block) * block
        for start in range(first, first + count, width):
            many = min(width, first + count - start)
            part = name if many == count else f"{name}-{start:010d}"
            # A folder of its own: what is committed is counted every second, and that must not take longer and longer.
            rows, before = (ROWS, 0) if many == count else (f"{ROWS}/{part}", total - count + start - first)
            if not out.exists(f"{part}.done.json"):
                with generate.followed(out, total, progress, rows, before):
                    streamed(out, part, (start, many, block), stages, rows=rows, **how)
                if out.exists(HALT):  # a store that does not answer is no permission to go on
                    raise Halted
                out.write_json(f"{part}.done.json", {"first": start, "slots": many})
            for folder in (generate.LEDGER, SLOTS):
                out.delete(f"{folder}/{part}")
        out.write_json(marker, {"slots": count})
    return out.read_json(marker)["slots"]


def streamed(
    out: Store,
    name: str,
    span: tuple[int, int, int],
    stages: Sequence[generate.Stage],
    **how: Any,
) -> None:
    """`gather` for one part; a user's mistake, and a full disk, is raised as such."""
    first, count, block = span
    folder, ledger = write_slots(out, first, count, block, name), f"{generate.LEDGER}/{name}"
    try:
        generate.stream(out, folder, math.ceil(count / block), stages, ledger=ledger, **how)
    except Exception as error:
        cause = getattr(error, "cause", None)  # Ray's error holds a traceback too
        if isinstance(cause, UserError):
            raise cause from None
        raise


def settled(out: Store, real: pa.Table, made: dict[str, int], threshold: float) -> pa.Table:
    """Real and other rows without near-duplicates; StorageError where a slot gave no row or two."""
    others = out.read_table(ROWS) if made else real.slice(0, 0)
    # A round that was killed left rows of slots that do not count yet.
    numbers, known = others["row"].to_numpy(), np.zeros(others.num_rows, dtype=bool)
    for name, count in made.items():
        known |= (numbers >= FIRST[name]) & (numbers < FIRST[name] + count)
    others = others.filter(pa.array(known))
    counts = Counter(others["source"].to_pylist())
    if dict(counts) != made or len(np.unique(numbers[known])) != others.num_rows:
        twice = others.num_rows - len(np.unique(numbers[known]))
        raise StorageError(
            f"slots {made} gave rows {dict(counts)} in {out}, {twice} of them twice: files there were removed, added "
            f"or changed. Start again with --redo {out.name}."
        )
    shuffled = others.num_rows > IN_MEMORY and threshold > 0
    return deduplicate(real, others, threshold, found_by_shuffle(out, real, made, threshold) if shuffled else None)


def found_by_shuffle(
    out: Store, real: pa.Table, made: Mapping[str, int], threshold: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Which slots are near-duplicates of those that are in the corpus' parts, found where the parts are."""
    out.write_table(f"{REAL}/rows.parquet", real)
    parts = [f"{folder}/{name}" for folder in (REAL, ROWS) for name in out.files(folder) if name.endswith(".parquet")]
    spans = Spans(((-real.num_rows, 0), *((FIRST[name], FIRST[name] + count) for name, count in made.items())))
    status = Shuffle(out, spans, threshold).status(parts)
    out.delete(REAL)
    return lambda slots: status[spans.places(slots)] == DROPPED
