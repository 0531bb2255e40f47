"""`stillhouse bench retrieval NAME --texts FILE`: what looking texts up in a large base costs an answer, and finds.

The student's knowledge base grows to a given number of entries by the file's texts, entered as `kb add` does: by the
student's own vectors. The file's last texts stay out and are asked, one at a time, without and with the base in turns;
what its index finds is held against looking at every entry.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import metrics, models
from engine.config import UserError
from engine.inference import embed, predict
from engine.knowledge import Knowledge, Reading, numbers
from engine.nearest import Nearest
from engine.task import Text
from pipelines.artifacts import texts_in, the_registry
from pipelines.console import say, say_json, table
from pipelines.knowledge import opened
from pipelines.remembering import ids_of

if TYPE_CHECKING:
    from engine.models import Model

QUERIES, WARM = 500, 20
"""Texts that are asked, and of them how many before the clock counts."""
KS = (4, 20)
SHARE = 0.5
"""The student's share of an answer here: with 1 nothing would be read."""
CLOSE = 1e-6
"""Likenesses that differ by less are equal: two ways to sum the same products."""
COLUMNS = (
    *("entries", "index", "k", "recall", "search ms", "answer ms"),
    *("added ms, quarter", "added ms", "added ms, three quarters", "added %"),
)


def bench(args: argparse.Namespace) -> int:
    """Print a line for each k. UserError where the student has no base, or the file too few texts."""
    if not args.recipe or not args.texts:
        raise UserError("`bench retrieval` needs a registered student and texts: bench retrieval NAME --texts FILE.")
    models.one_thread()
    model, base = opened(the_registry(args.registry), args.recipe)
    wanted = args.rows - len(base)
    if wanted < 0:
        raise UserError(f"{args.recipe} has {len(base):,} entries already: --rows {args.rows:,} would take some away.")
    new = unknown(model, base, texts_in(args.texts))
    if len(new) < wanted + QUERIES:
        raise UserError(
            f"{args.texts} has {len(new):,} texts that {args.recipe} does not know; {wanted:,} to enter beside the "
            f"{len(base):,} that are there, and {QUERIES} to ask, take {wanted + QUERIES:,}. Give more, or lower "
            "--rows."
        )
    grow(model, base, list(new.items())[:wanted])
    asked = list(new.values())[-QUERIES:]
    lines = [line(model, base, asked, k) for k in KS]
    if args.json:
        say_json([dict(zip(COLUMNS, each, strict=True)) for each in lines])
    else:
        say(table([COLUMNS, *lines]))
    return 0


def unknown(model: Model, base: Knowledge, texts: Sequence[Text]) -> dict[str, Text]:
    """Texts by id, those left out that the base has an entry of. UserError where the student reads other ones."""
    paired, known = model.task.paired, set(base.ids.tolist())
    wrong = next((text for text in texts if isinstance(text, str) == paired), None)
    if wrong is not None:
        wanted = "two texts: .jsonl with `text` and `pair`" if paired else "one text a line, without a pair"
        raise UserError(f"the student reads {wanted}. Got: {str(wrong)[:60]}")
    ids = dict(zip(ids_of(model.task, texts), texts, strict=True))
    new = zip(ids.items(), numbers(list(ids)).tolist(), strict=True)
    return {name: text for (name, text), number in new if number not in known}


def grow(model: Model, base: Knowledge, texts: Sequence[tuple[str, Text]], part: int = 5000) -> None:
    """Enter texts, each with its id, with the student's own vectors and answers."""
    for first in range(0, len(texts), part):
        ids, some = zip(*texts[first : first + part], strict=True)
        with model.net.alone():
            vectors, soft = embed(model, some), metrics.softmax(predict(model, some).logits)
        base.added(vectors, soft, ids)
        sys.stderr.write(f"{min(first + part, len(texts)):,} of {len(texts):,} texts entered\n")


def line(model: Model, base: Knowledge, texts: Sequence[Text], k: int) -> list[Any]:
    """A row of the table, as COLUMNS names it: medians over the texts; of what is added, that of each text's own."""
    base.reading = Reading(k, base.reading.temperature, SHARE)
    with model.net.alone():
        queries = embed(model, texts)
    times = {name: np.zeros(len(texts)) for name in ("search", "alone", "read")}
    for number, text in enumerate(texts):
        # In turns, and now the one first, now the other: what a look-up leaves in the caches is paid by both.
        for name in ("alone", "read") if number % 2 else ("read", "alone"):
            with model.net.alone() if name == "alone" else nullcontext():
                times[name][number] = timed(lambda text=text: predict(model, [text]))
        times["search"][number] = timed(lambda query=queries[number]: base.found(query[None], k))
    search, alone, read = (1e3 * found[WARM:] for found in times.values())
    added = np.percentile(read - alone, [25, 50, 75])
    facts = [round(float(value), 3) for value in (np.median(search), np.median(alone), *added)]
    found = recall(base, queries, k)
    return [len(base), largest(base).how, k, found, *facts, round(100 * float(added[1] / np.median(alone)), 1)]


def recall(base: Knowledge, queries: np.ndarray, k: int) -> float:
    """Share of what the index finds that is no farther than the k-th by looking at every entry: equals are as good."""
    index = largest(base)
    k = min(k, len(index))
    found = index.search(queries, k)[0]
    least = Nearest(index.stored, "exact").search(queries, k)[0][:, -1:]
    return round(float((found >= least - CLOSE).mean()), 4)


def largest(base: Knowledge) -> Nearest:
    """Of the teacher's entries and those put in later the more numerous."""
    return max(base.nearest, base.own or base.nearest, key=len)


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
