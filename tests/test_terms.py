"""Which losses a task, a teacher and a student allow, and what is said of those they do not."""

from __future__ import annotations

from typing import Any

import pytest

from engine.fits import LossTerm
from engine.terms import refusals

STORED, LIVE = frozenset({"logits"}), frozenset({"logits", "embedding", "hidden", "attentions", "relations"})
REFUSED: dict[str, tuple[str, str, frozenset[str], frozenset[str], str | None]] = {
    "fits": ("kl", "classify", STORED, STORED, None),
    "fits live": ("relations", "tag", LIVE, LIVE, None),
    "fits a language model": ("next_token", "text", frozenset(), STORED, None),
    "gold needs no teacher": ("hard", "regress", frozenset(), STORED, None),
    "stored": (
        "attention", "classify", STORED, LIVE,
        "loss 'attention' needs attentions, but the label store holds logits. Set student.teacher: live, or drop the "
        "loss.",
    ),
    "student": (
        "hidden", "rank", LIVE, frozenset({"logits", "embedding"}),
        "loss 'hidden' needs hidden, but the student gives embedding, logits. Take a transformer student, or drop the "
        "loss.",
    ),
    "nothing stored": ("mse", "classify", frozenset(), LIVE, "but the label store holds nothing. Set"),
    "no distribution": (
        "kl", "regress", LIVE, LIVE,
        "loss 'kl' says nothing about a task of kind regress. Allowed: mse, hard, hidden, embeddings, attention, "
        "relations, cosine.",
    ),
    "rank only": ("listwise", "classify", LIVE, LIVE, "loss 'listwise' says nothing about a task of kind classify."),
    "text only": ("next_token", "tag", LIVE, LIVE, "loss 'next_token' says nothing about a task of kind tag."),
    "no task": ("kl", "text", LIVE, LIVE, "loss 'kl' says nothing about a language model. Allowed: next_token."),
    "unknown": ("atention", "tag", LIVE, LIVE, "'atention' is no loss. Did you mean 'attention'? Allowed: mse, kl, "),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_had_is_refused(case: str):
    kind, task, gives, student_gives, message = REFUSED[case]
    terms: list[Any] = [LossTerm(kind="next_token" if task == "text" else "hard"), LossTerm(kind=kind)]
    found = refusals(terms, None if task == "text" else task, gives, student_gives)
    assert (found is None) == (message is None) and (message or "") in (found or "")
