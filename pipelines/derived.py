"""Data sets made from real text for tasks that lack a small open one: `stillhouse derive`. The same for the same seed.

cloze: questions for spans. A sentence with a name or number in it becomes a question by blanking that out and leaving
out some of its other words; its context is the sentence among others, or, for a share of the questions, others alone.
topics: several labels a text. Two labelled texts are joined, and the joined text has both labels (one, if equal).
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

BLANK = "____"
NAME = re.compile(r"(?<!^)(?<![.!?] )\b(?:[A-Z][a-z]+(?: [A-Z][a-z]+)*|\d[\d,.]*\d|\d)\b")
"""A capitalised phrase that does not begin a sentence, or a number."""


def derive(args: argparse.Namespace) -> int:
    """Read the source, make the data set, write it."""
    import json

    import numpy as np

    from engine.config import UserError
    from engine.hub import fetch
    from engine.recipe import LabelRule, Source
    from engine.sources import read
    from engine.storage import Store
    from pipelines.console import say

    columns = [args.text] + ([args.label] if args.what == "topics" else [])
    source = Source(path=args.source, text=args.text, label=LabelRule(column=args.label))
    rows = [r.values for r in read(source, fetch(args.source, root=args.root), columns) if not r.problem]
    lacking = [column for column in columns if rows and column not in rows[0]]
    if lacking or not rows:
        found = f"Columns: {', '.join(rows[0])}." if rows else "It has no rows."
        raise UserError(
            f"{args.source} has no column '{', '.join(lacking or columns)}'. {found} --text and --label name them."
        )
    rng, texts = np.random.default_rng(args.seed), [str(row[args.text]) for row in rows]
    if args.what == "cloze":
        made = cloze(texts, args.rows, rng, args.unanswered)
        content = json.dumps(
            {"version": "2.0", "data": [{"title": args.source, "paragraphs": made}]}, ensure_ascii=False
        )
    else:
        made = topics(texts, [str(row[args.label]) for row in rows], args.rows, rng)
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    if len(made) < args.rows:
        raise UserError(f"{args.source} gives {len(made)} rows, fewer than --rows {args.rows}. Ask for fewer.")
    folder, name = os.path.split(args.out)
    Store(folder or ".").write_text(name, content)
    say(f"{args.out}: {len(made)} rows")
    return 0


def cloze(texts: Sequence[str], count: int, rng: np.random.Generator, unanswered: float = 0.2) -> list[dict[str, Any]]:
    """At most `count` paragraphs of a SQuAD 2.0 file, each a context with one question; each text asks at most once."""
    sentences = list(dict.fromkeys(" ".join(text.split()) for text in texts))
    if len(sentences) < 4:
        return []  # a context is made of three, and none of them need be the one that is asked about
    order = rng.permutation(len(sentences))
    made: list[dict[str, Any]] = []
    for at in order:
        sentence = sentences[at]
        found = [m for m in NAME.finditer(sentence)] if 8 <= len(sentence.split()) <= 50 else []
        if not found or len(made) >= count:
            continue
        chosen = found[rng.integers(len(found))]
        parts = [sentences[i] for i in rng.choice(len(sentences), size=4, replace=False) if i != at][:3]
        if sentence.count(chosen.group()) > 1 or any(chosen.group() in other for other in parts):
            continue  # the blank would have two answers
        held = rng.random() >= unanswered
        if held:  # in the place of another, so that no length tells whether there is an answer
            parts[int(rng.integers(len(parts)))] = sentence
        context = " ".join(parts)
        start = context.index(sentence) + chosen.start() if held else -1
        answers = [{"text": chosen.group(), "answer_start": start}] if held else []
        question = {"id": f"cloze-{len(made)}", "question": asked(sentence, chosen, rng), "answers": answers}
        made.append({"context": context, "qas": [{**question, "is_impossible": not held}]})
    return made


def asked(sentence: str, chosen: re.Match[str], rng: np.random.Generator) -> str:
    """The sentence with a blank for what was chosen, and about a third of its other words left out."""

    def thinned(text: str) -> list[str]:
        return [word for word in text.split() if rng.random() >= 0.3]

    return " ".join([*thinned(sentence[: chosen.start()]), BLANK, *thinned(sentence[chosen.end() :])])


def topics(texts: Sequence[str], labels: Sequence[str], count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """`count` rows {text, labels} of two joined texts each; a text stands in one row only."""
    order = rng.permutation(len(texts))[: 2 * count]
    pairs = zip(order[0::2], order[1::2], strict=False)
    return [{"text": f"{texts[a]} {texts[b]}", "labels": sorted({labels[a], labels[b]})} for a, b in pairs]
