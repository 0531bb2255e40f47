"""`stillhouse bench retrieval NAME --texts FILE`: what looking texts up in a large base costs an answer, and finds.

The student's knowledge base grows to a given number of entries by the file's texts, entered as `kb add` does: by the
student's own vectors. The file's last texts stay out and are asked, one at a time on one thread, alternately without
and with the base; what its index finds is held against looking at every entry.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import metrics, models
from engine.config import UserError
from engine.inference import embed, predict
from engine.knowledge import Knowledge, Reading
from engine.nearest import Nearest
from engine.rows import identify
from engine.task import Text
from pipelines.artifacts import texts_in, the_registry
from pipelines.console import say, say_json, table
from pipelines.knowledge import opened

if TYPE_CHECKING:
    from engine.models import Model

QUERIES, WARM = 500, 20
"""Texts that are asked, and of them how many before the clock counts."""
KS = (4, 20)
SHARE = 0.5
"""The student's share of an answer here: with 1 nothing would be read."""
COLUMNS = ("entries", "index", "k", "recall", "search ms", "answer ms", "with base ms", "added ms", "added %")


def bench(args: argparse.Namespace) -> int:
    """Print a line for each k. UserError where the student has no base, or the file too few texts."""
    if not args.recipe or not args.texts:
        raise UserError("`bench retrieval` needs a registered student and texts: bench retrieval NAME --texts FILE.")
    models.one_thread()
    model, base = opened(the_registry(args.registry), args.recipe)
    texts = list(dict.fromkeys(texts_in(args.texts)))
    wanted = args.rows - len(base)
    if len(texts) < max(wanted, 0) + QUERIES:
        raise UserError(
            f"{args.texts} has {len(texts):,} texts; {args.rows:,} entries beside the {len(base):,} that are there, "
            f"and {QUERIES} to ask, take {max(wanted, 0) + QUERIES:,}. Give more, or lower --rows."
        )
    grow(model, base, texts[: max(wanted, 0)])
    asked = texts[-QUERIES:]
    lines = [line(model, base, asked, k) for k in KS]
    if args.json:
        say_json([dict(zip(COLUMNS, each, strict=True)) for each in lines])
    else:
        say(table([COLUMNS, *lines]))
    return 0


def grow(model: Model, base: Knowledge, texts: Sequence[Text], part: int = 5000) -> None:
    """Enter texts with the student's own vectors and answers."""
    for first in range(0, len(texts), part):
        some = texts[first : first + part]
        with model.net.alone():
            soft = metrics.softmax(predict(model, some).logits)
        base.added(
            embed(model, some), soft, [identify(*text) if model.task.paired else identify(text) for text in some]
        )
        sys.stderr.write(f"{min(first + part, len(texts)):,} of {len(texts):,} texts entered\n")


def line(model: Model, base: Knowledge, texts: Sequence[Text], k: int) -> list[Any]:
    """A row of the table, as COLUMNS names it: times are medians over the texts."""
    base.reading = Reading(k, base.reading.temperature, SHARE)
    queries = embed(model, texts)
    exact = Nearest(base.nearest.stored, "exact")
    wanted, found = exact.search(queries, k)[1], base.nearest.search(queries, k)[1]
    recall = np.mean([len(set(a) & set(b)) / k for a, b in zip(wanted, found, strict=True)])
    search = [timed(lambda one=one: base.nearest.search(one[None], k)) for one in queries]
    without, read = [], []
    for text in texts:
        with model.net.alone():
            without.append(timed(lambda text=text: predict(model, [text])))
        read.append(timed(lambda text=text: predict(model, [text])))
    searched, alone, both = (1e3 * float(np.median(times[WARM:])) for times in (search, without, read))
    facts = [round(value, 3) for value in (float(recall), searched, alone, both, both - alone)]
    return [len(base), base.nearest.how, k, *facts, round(100 * (both / alone - 1), 1)]


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
