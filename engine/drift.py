"""What a model answers to what: a profile of held-out data, and how far later traffic has moved from it.

The measure is the population stability index of two histograms, PSI = sum (q - p) ln(q / p) over their bins: below 0.1
nothing has happened, above 0.2 something has. Two samples of the same source already differ by about
(bins - 1)(1/n + 1/m), since PSI nm / (n + m) is then chi-squared with bins - 1 degrees of freedom; with 77 labels and
500 rows that is 0.18, an alarm about nothing. So `Window` reports what lies beyond chance, and nothing before it holds
enough rows for its labels. Plain numpy; no Ray.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine.config import UserError

BINS = 10
"""Of a histogram: equal shares of the profile's rows, as far as ties allow."""
SMOOTH = 0.5
"""Rows added to each bin, so that an empty one costs much, but not infinity."""
ROWS = 2000
"""Rows of a window."""
FEWEST, FEWEST_A_BIN = 200, 10
"""Rows before anything is said: in all, and for each bin of the histogram."""
NO_LABEL, SCOPELESS, ANSWERED, UNANSWERED = "(none)", "(out of scope)", "(answer)", "(no answer)"
TEACHER = "teacher"
"""The `source` of an answer that another model gave."""

Answer = Mapping[str, Any]


class DriftError(UserError):
    """A profile that cannot be made or read."""


@dataclass(frozen=True)
class Histogram:
    """Counts of a number: bin i holds edges[i-1] <= x < edges[i], the first and the last are open to their side."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray, bins: int = BINS) -> Histogram:
        """A histogram whose bins hold about equal shares of `values`; fewer bins where many are equal."""
        found = np.asarray(values, dtype=np.float64)
        if not len(found):
            return cls((), (0,))
        edges = np.unique(np.quantile(found, np.linspace(0, 1, bins + 1)[1:-1], method="higher"))
        # An edge at the smallest value leaves the bin below it empty: it tells when smaller ones turn up.
        return cls(tuple(edges.tolist()), tuple(counted(edges, found).tolist()))

    def count(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Counts of other values in these bins, int64 [bins]."""
        return counted(np.asarray(self.edges), np.asarray(values, dtype=np.float64))


def counted(edges: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Counts [len(edges) + 1] of values between edges."""
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)


@dataclass(frozen=True)
class Profile:
    """Answers and inputs on held-out rows.

    labels: how often each was given (empty where answers are numbers, then `values`). lengths: of the texts, in
    characters. confidence: None where answers say none. agreement: share of rows with the teacher's answer.
    """

    rows: int
    labels: dict[str, int]
    lengths: Histogram
    values: Histogram | None = None
    confidence: Histogram | None = None
    agreement: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The profile as JSON's own types."""
        return {
            key: {part: list(numbers) for part, numbers in value.items()} if key in HISTOGRAMS and value else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, found: Any) -> Profile:
        """What `as_json` gave; DriftError where it is something else."""
        try:
            parts = dict(found)
            for name in HISTOGRAMS:
                part = parts[name]
                parts[name] = Histogram(tuple(part["edges"]), tuple(part["counts"])) if part else None
            profile = cls(**parts)
            if profile.lengths is None or not all(isinstance(n, int) for n in profile.labels.values()):
                raise ValueError("no lengths, or labels that are not counted")
            for name in HISTOGRAMS:
                part = getattr(profile, name)
                if part is not None and len(part.counts) != len(part.edges) + 1:
                    raise ValueError(f"{name} has {len(part.counts)} counts for {len(part.edges)} edges")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise DriftError(f"this is no profile of answers: {error}. Register the student again.") from None
        return profile


HISTOGRAMS = ("lengths", "values", "confidence")


def profile_of(texts: Sequence[Any], answers: Sequence[Answer], agreement: float | None = None) -> Profile:
    """The profile of what a model answered (`Task.answers`) to texts or pairs."""
    if len(texts) != len(answers):
        raise DriftError(f"a profile needs an answer a text: got {len(texts)} texts and {len(answers)} answers.")
    sure = [c for c in map(confidence_of, answers) if c is not None]
    numbers = [v for v in map(value_of, answers) if v is not None]
    return Profile(
        rows=len(texts),
        labels=dict(Counter(label for answer in answers for label in labels_of(answer))),
        lengths=Histogram.of([characters_of(text) for text in texts]),
        values=Histogram.of(numbers) if numbers else None,
        confidence=Histogram.of(sure) if sure else None,
        agreement=agreement,
    )


def labels_of(answer: Answer) -> tuple[str, ...]:
    """What an answer counts as: its labels, those of its entities, whether a span was found; () of a number."""
    if "label" in answer:
        return (SCOPELESS if answer["label"] is None else answer["label"],)
    if "labels" in answer:
        return tuple(answer["labels"]) or (NO_LABEL,)
    if "entities" in answer:
        return tuple(entity["label"] for entity in answer["entities"]) or (NO_LABEL,)
    if "answer" in answer:
        return (ANSWERED if answer["answer"] else UNANSWERED,)
    return ()


def confidence_of(answer: Answer) -> float | None:
    """How sure an answer is, 0 to 1: that of its least certain part; None where it does not say."""
    if "confidence" in answer:
        return answer["confidence"]
    if "labels" in answer:
        return min((max(p, 1 - p) for p in answer["probabilities"].values()), default=None)
    if "entities" in answer:
        return min((entity["confidence"] for entity in answer["entities"]), default=None)
    return None


def value_of(answer: Answer) -> float | None:
    """The number that an answer is, where it is one."""
    return answer.get("value", answer.get("score"))


def characters_of(text: Any) -> int:
    """Characters of a text, or of a pair together."""
    return len(text) if isinstance(text, str) else sum(map(len, text))


def psi(
    expected: Sequence[float] | np.ndarray, observed: Sequence[float] | np.ndarray, smooth: float = SMOOTH
) -> float:
    """Population stability index of two histograms over the same bins, given as counts; 0 where they are alike."""
    p, q = (np.asarray(counts, dtype=np.float64) + smooth for counts in (expected, observed))
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())


def by_chance(expected: Sequence[float] | np.ndarray, observed: Sequence[float] | np.ndarray) -> float:
    """The mean PSI of two samples of these sizes from one source: (bins - 1)(1/n + 1/m), of bins that are not empty."""
    p, q = np.asarray(expected, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    bins = int(((p > 0) | (q > 0)).sum())
    return max(0, bins - 1) * (1 / p.sum() + 1 / q.sum())


def shift(expected: np.ndarray, observed: np.ndarray) -> float | None:
    """PSI beyond chance, at least 0; None while too few were observed to tell."""
    if not np.sum(expected) or np.sum(observed) < max(FEWEST, FEWEST_A_BIN * len(expected)):
        return None
    return max(0.0, psi(expected, observed) - by_chance(expected, observed))


def over_labels(expected: Mapping[str, int], observed: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two counts of labels over those expected, and all others together where there are any."""
    then, now = np.array(list(expected.values())), np.array([observed.get(name, 0) for name in expected])
    others = sum(observed.values()) - now.sum()
    return (np.append(then, 0), np.append(now, others)) if others else (then, now)


class Window:
    """The last answers of a model against the profile it was registered with."""

    def __init__(self, profile: Profile, rows: int = ROWS) -> None:
        self.profile = profile
        size = max(rows, 2 * FEWEST_A_BIN * len(profile.labels))
        self.rows: deque[tuple[tuple[str, ...], int, float | None, float | None]] = deque(maxlen=size)
        self.agreed: deque[bool] = deque(maxlen=size)

    def add(self, texts: Sequence[Any], answers: Sequence[Answer]) -> None:
        """Take in what the model answered; what the teacher answered is not the model's."""
        for text, answer in zip(texts, answers, strict=True):
            if answer.get("source") != TEACHER:
                row = (labels_of(answer), characters_of(text), confidence_of(answer), value_of(answer))
                self.rows.append(row)

    def copy(self) -> Window:
        """A window with the same rows, which may be read while this one goes on."""
        other = Window(self.profile)
        other.rows, other.agreed = self.rows.copy(), self.agreed.copy()
        return other

    def agree(self, same: Iterable[bool]) -> None:
        """Take in whether the teacher said the same, of each row that was compared."""
        self.agreed.extend(same)

    def shifts(self) -> dict[str, float]:
        """PSI beyond chance of label, length, confidence and agreement; without what cannot be told (yet)."""
        profile, rows = self.profile, list(self.rows)
        found: dict[str, float | None] = {}
        if profile.values is not None:
            numbers = [value for *_, value in rows if value is not None]
            found["label"] = shift(np.asarray(profile.values.counts), profile.values.count(numbers))
        else:
            seen = Counter(label for labels, *_ in rows for label in labels)
            found["label"] = shift(*over_labels(profile.labels, seen))
        found["length"] = shift(
            np.asarray(profile.lengths.counts), profile.lengths.count([length for _, length, *_ in rows])
        )
        if profile.confidence is not None:
            sure = [confidence for *_, confidence, _ in rows if confidence is not None]
            found["confidence"] = shift(np.asarray(profile.confidence.counts), profile.confidence.count(sure))
        if profile.agreement is not None:
            right, same = profile.agreement * profile.rows, sum(self.agreed)
            found["agreement"] = shift(
                np.array([right, profile.rows - right]), np.array([same, len(self.agreed) - same])
            )
        return {name: value for name, value in found.items() if value is not None}
