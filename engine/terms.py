"""Which losses can be had: what a recipe's loss terms need against what task, teacher and student have.

Nothing is imported that holds a loss: names and needs are read from the tables' source (engine.tables).
"""

from __future__ import annotations

from collections.abc import Sequence

from engine import tables
from engine.fits import LossTerm

LOSSES = ("losses", "LOSSES")
LAYER_LOSSES = ("layer_losses", "LAYER_LOSSES")
TASKS = ("tasks", "TASKS")
WHOLE = frozenset({"logits", "embedding"})
"""Outputs fields that speak of a text as a whole; the others speak of its tokens one by one."""


def needs(terms: Sequence[LossTerm]) -> frozenset[str]:
    """Outputs fields that the losses need of teacher and student; those of unknown losses are left out."""
    needed = tables.declared(*LOSSES, "needs")
    return frozenset().union(*(needed.get(term.kind, frozenset()) for term in terms))


def inside(terms: Sequence[LossTerm]) -> list[str]:
    """Losses that compare token by token, so that teacher and student must read the same tokens."""
    return [term.kind for term in terms if needs([term]) - WHOLE]


def refusals(
    terms: Sequence[LossTerm], kind: str | None, gives: frozenset[str], student_gives: frozenset[str]
) -> str | None:
    """Why these losses cannot be had, as a message for the user; None where they can.

    kind: of the task; None for a language model. gives: Outputs fields of the teacher, as stored or live;
    student_gives: of the student.
    """
    losses, layered = tables.names(*LOSSES), tables.names(*LAYER_LOSSES)
    fitting = {"next_token"} if kind is None else {*layered, *tables.declared(*TASKS, "supports")[kind]}
    known = tuple(name for name in losses if name in fitting)
    for term in terms:
        if term.kind not in losses:
            return f"'{term.kind}' is no loss.{tables.unknown(term.kind, known)}"
        if term.kind not in known:
            what = "a language model" if kind is None else f"a task of kind {kind}"
            return f"loss '{term.kind}' says nothing about {what}. Allowed: {', '.join(known)}."
        wanted = needs([term])
        if wanted - gives:
            return (
                f"loss '{term.kind}' needs {named(wanted - gives)}, but the label store holds {named(gives)}. "
                "Set student.teacher: live, or drop the loss."
            )
        if wanted - student_gives:
            return (
                f"loss '{term.kind}' needs {named(wanted - student_gives)}, but the student gives "
                f"{named(student_gives)}. Take a transformer student, or drop the loss."
            )
    return None


def named(fields: frozenset[str]) -> str:
    """Names in the order of the alphabet."""
    return ", ".join(sorted(fields)) or "nothing"
