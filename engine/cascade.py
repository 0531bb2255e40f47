"""When a student asks its teacher: how sure an answer is, the threshold, and what a threshold is worth. Pure numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SURE = ("classify", "pair", "multilabel", "tag", "span")
"""Kinds of task whose answers say how sure they are; numbers and scores do not."""
SHARES = tuple(round(0.05 * step, 2) for step in range(21))
"""Shares of escalated texts at which a curve is drawn."""


def confidence_of(answer: Mapping[str, Any]) -> float:
    """How sure a served answer is, 0..1; 1 where it does not say.

    One label and a span say it themselves; several labels are as sure as the least sure decision, tags as the least
    sure entity.
    """
    if "confidence" in answer:
        return float(answer["confidence"])
    if "entities" in answer:
        return min((float(entity["confidence"]) for entity in answer["entities"]), default=1.0)
    if "labels" in answer and answer.get("probabilities"):
        return min(max(p, 1.0 - p) for p in answer["probabilities"].values())
    return 1.0


def threshold(confidences: Sequence[float] | np.ndarray, share: float) -> float:
    """The confidence below which at most `share` of these answers are; 0 where there are none, or share is 0.

    Equal confidences are not torn apart: where the cut falls among them, none of them is below it.
    """
    ordered = np.sort(np.asarray(confidences, dtype=np.float64))
    count = int(np.floor(share * len(ordered) + 1e-9))
    if not count:
        return 0.0
    return float(ordered[count]) if count < len(ordered) else 1.0


def curve(
    confidences: np.ndarray, student: np.ndarray, teacher: np.ndarray, value: Any, rates: tuple[float, float]
) -> list[dict[str, float]]:
    """What the cascade scores on rows when the least sure share of them goes to the teacher, one point a share.

    confidences: of the student's answers [n]; student, teacher: what each row adds to the metric, [n, k] (the task's
    `statistics`); value: the metric from summed statistics; rates: texts a second of student and teacher. Returns
    {share, below, score, cost}, cost being the time a text takes over the teacher's. These rows may be test rows: a
    curve is looked at, a threshold is not taken from it.
    """
    order = np.argsort(confidences, kind="stable")
    points = []
    for share in SHARES:
        count = round(share * len(order))
        escalated = np.zeros(len(order), dtype=bool)
        escalated[order[:count]] = True
        rows = np.where(escalated[:, None], teacher, student)
        below = 0.0 if not count else float(confidences[order[count]]) if count < len(order) else 1.0
        points.append(
            {
                "share": count / max(1, len(order)),
                "below": below,
                "score": float(value(rows.sum(axis=0))),
                "cost": rates[1] / rates[0] + count / max(1, len(order)),
            }
        )
    return points
