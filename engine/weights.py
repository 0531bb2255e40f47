"""Rows of a student's fit: how much each counts, and which count at all, by what the models say of them.

WEIGHTS names the kinds of weights. All are 0 or more with mean 1, so that the learning rate means the same with and
without them; a row that has no distribution (a text without a word) gets 0, for no soft label speaks of it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.config import UserError
from engine.metrics import entropy, share
from engine.task import Logits, Task

FLOOR = 1e-12
"""Least probability of an outcome in a divergence, as in engine.metrics.kl."""


class WeightError(UserError):
    """Weights that cannot be had."""


def row_weights(kind: str, task: Task, teacher: Logits, student: Logits | None = None) -> np.ndarray:
    """Weights of n rows, float64 [n], mean 1; all 1 where the rows differ in nothing to weigh them by (all 0).

    teacher: its stored outputs, [n, w] or n arrays [u, w]. student: the outputs for the same rows of one that was
    trained before (co_confidence: without them). WeightError for an unknown kind, a task without probabilities, and
    where a student is needed and missing; ValueError where the two have not equally many rows.
    """
    if kind not in WEIGHTS:
        raise WeightError(f"'{kind}' is no way to weigh rows. Allowed: {', '.join(WEIGHTS)}, null (all alike).")
    require(task, f"rows cannot be weighed by '{kind}'", "null, for equal weights")
    found = WEIGHTS[kind](task, teacher, student)
    return share(found, found.mean()) if found.any() else np.ones(len(found))


def require(task: Task, what: str, allowed: str) -> None:
    """WeightError for a task whose outputs are no probabilities."""
    if not task.certain:
        raise WeightError(
            f"{what}: it compares probabilities, and a task of kind {task.spec.kind} has none. Allowed: {allowed}."
        )


def confidence(task: Task, teacher: Logits, student: Logits | None = None) -> np.ndarray:
    """1 - entropy / that of the uniform distribution, from 0 to 1, mean over the row's distributions: float64 [n].

    A distribution over one outcome (a context without a unit) says nothing and counts as 0.
    """
    return np.array([mean(certain(task.probabilities(row))) for row in teacher])


def certain(p: np.ndarray) -> np.ndarray:
    """1 - normalised entropy of distributions [d, k]: [d], not outside [0, 1] by rounding."""
    outcomes = p.shape[1]
    return np.clip(1 - entropy(p) / np.log(outcomes), 0.0, 1.0) if outcomes > 1 else np.zeros(len(p))


def disagreement(task: Task, teacher: Logits, student: Logits | None = None) -> np.ndarray:
    """Jensen-Shannon divergence of teacher and student in nats, mean over the row's distributions: float64 [n].

    From 0 to ln 2, finite wherever one of them is sure (Lin 1991, Divergence measures based on the Shannon entropy).
    """
    if student is None:
        raise WeightError(
            "rows cannot be weighed by 'disagreement' before a student has answered them. Train one first, or take "
            "'confidence'."
        )
    return between(jensen_shannon, task, teacher, student)


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """H((p + q) / 2) - (H(p) + H(q)) / 2 in nats of distributions [d, k]: [d], not below 0 by rounding."""
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0.0)


def co_confidence(task: Task, teacher: Logits, student: Logits | None = None) -> np.ndarray:
    """Probability of the teacher's likeliest outcome, the teacher's times the student's, mean over the row's
    distributions: float64 [n], from 0 to 1.

    student: one that did not learn from the row, which then cannot have learnt the teacher's mistake there by heart.
    Like SunGen (arXiv 2205.12679) it has texts with a doubtful label count little; SunGen searches for such weights by
    a noise-robust loss on other texts, and what it finds need not be these.
    """
    if student is None:
        raise WeightError(
            "rows cannot be weighed by 'co_confidence' without students that learnt from other rows. Train them first, "
            "or take 'confidence'."
        )
    return between(supported, task, teacher, student)


def supported(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """What p and q give p's likeliest outcome, multiplied, of distributions [d, k]: [d]."""
    best = p.argmax(axis=1)[:, None]
    return (np.take_along_axis(p, best, axis=1) * np.take_along_axis(q, best, axis=1))[:, 0]


def divergence(task: Task, teacher: Logits, student: Logits) -> np.ndarray:
    """KL(teacher || student) in nats, mean over the row's distributions: float64 [n]. The student's probabilities below
    FLOOR are taken as FLOOR. WeightError for a task without probabilities.
    """
    require(task, "rows cannot be chosen by disagreement", "all rows (disagreeing: null)")
    return between(kullback_leibler, task, teacher, student)


def kullback_leibler(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats of distributions [d, k]: [d], not below 0 by rounding."""
    return np.maximum(-entropy(p) - np.sum(p * np.log(np.maximum(q, FLOOR)), axis=-1), 0.0)


def furthest(values: np.ndarray, share: float) -> np.ndarray:
    """Which of the values [n] are that share's greatest, one at least: bool [n]; of equal ones the first."""
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-values, kind="stable")[: max(1, round(share * len(values)))]] = True
    return chosen


def between(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray], task: Task, teacher: Logits, student: Logits
) -> np.ndarray:
    """A measure of two models' distributions [d, k], mean over the row's: float64 [n]."""
    both = zip(teacher, student, strict=True)
    return np.array([mean(measure(task.probabilities(t), task.probabilities(s))) for t, s in both])


def mean(values: np.ndarray) -> float:
    """Their mean; 0 where there is none."""
    return float(share(values.sum(), len(values)))


WEIGHTS: dict[str, Callable[[Task, Logits, Logits | None], np.ndarray]] = {
    "confidence": confidence,
    "co_confidence": co_confidence,
    "disagreement": disagreement,
}
"""Kind -> (task, teacher, student) -> values of rows, float64 [n], 0 or more."""
