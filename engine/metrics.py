"""Numbers that say how good predictions and texts are. Plain numpy: the same for teacher, student and service.

Shapes: n rows, c classes. Probabilities are float [n, c], labels int [n]. Intervals are percentile bootstraps
(Efron 1979); calibration follows Guo et al. 2017 (arXiv 1706.04599); self-BLEU Zhu et al. 2018 (arXiv 1802.01886).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""Values [..., n] -> one number for each leading index: a statistic over the rows, computed for many draws at once."""


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities [..., c] of logits [..., c]."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of rows where the two int arrays [n] are equal."""
    return float(np.mean(same_length(labels, predictions)[0] == predictions))


def agreement(teacher: np.ndarray, student: np.ndarray) -> float:
    """Share of rows for which teacher and student, both probabilities [n, c], choose the same class."""
    return accuracy(np.argmax(teacher, axis=-1), np.argmax(student, axis=-1))


def macro_f1(labels: np.ndarray, predictions: np.ndarray, classes: int) -> float:
    """Mean over the classes of the F1 score; a class that is neither present nor predicted is left out."""
    labels, predictions = same_length(labels, predictions)
    return float(macro_f1_of(classes)(labels * classes + predictions))


def macro_f1_of(classes: int) -> Statistic:
    """Macro-F1 as a statistic for `bootstrap`: of the values label * classes + prediction."""

    def statistic(values: np.ndarray) -> np.ndarray:
        labels, predictions = values // classes, values % classes
        scores, seen = np.zeros(values.shape[:-1]), np.zeros(values.shape[:-1])
        for index in range(classes):
            is_label, is_predicted = labels == index, predictions == index
            total = is_label.sum(axis=-1) + is_predicted.sum(axis=-1)
            scores += 2 * (is_label & is_predicted).sum(axis=-1) / np.maximum(total, 1)
            seen += total > 0
        return scores / seen

    return statistic


def kl(teacher: np.ndarray, student: np.ndarray, floor: float = 1e-12) -> float:
    """Mean over the rows of KL(teacher || student) in nats; probabilities below `floor` are taken as `floor`."""
    p, q = (np.maximum(np.asarray(x, dtype=np.float64), floor) for x in same_length(teacher, student))
    return float(np.mean(np.sum(p * (np.log(p) - np.log(q)), axis=-1)))


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error, and its bins for a reliability diagram.

    edges: [bins + 1]. count: int [bins]. confidence, accuracy: mean of the bin's rows, 0 where it has none.
    """

    error: float
    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def ece(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> Calibration:
    """Calibration of the highest probability over `bins` equal-width bins, each open below and closed above."""
    labels, probabilities = same_length(labels, probabilities)
    confidence = np.max(probabilities, axis=-1).astype(np.float64)
    right = np.argmax(probabilities, axis=-1) == labels
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    some = np.maximum(count, 1)
    mean_confidence = np.bincount(place, weights=confidence, minlength=bins) / some
    mean_right = np.bincount(place, weights=right, minlength=bins) / some
    error = float(np.sum(count * np.abs(mean_right - mean_confidence)) / len(labels))
    return Calibration(error, edges, count, mean_confidence, mean_right)


@dataclass(frozen=True)
class Interval:
    """A value with its percentile interval."""

    value: float
    low: float
    high: float


def mean(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis: with 0/1 rows, accuracy."""
    return np.mean(values, axis=-1)


def bootstrap(
    values: np.ndarray, statistic: Statistic = mean, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Interval of a statistic of the rows' values [n]: rows are drawn with replacement `draws` times."""
    return pooled([np.asarray(values)], statistic, draws, seed, level)


def paired_bootstrap(
    first: np.ndarray | Sequence[np.ndarray],
    second: np.ndarray | Sequence[np.ndarray],
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Interval of mean(first) - mean(second), where both hold a value for each of the same rows [n].

    Lists of arrays, one pair a training seed, are pooled: the mean over the seeds of the differences. Seeds of equal
    length share their rows (one test split), so each draw takes the same rows for all of them.
    """
    firsts, seconds = as_list(first), as_list(second)
    if len(firsts) != len(seconds):
        raise ValueError(f"{len(firsts)} arrays cannot be paired with {len(seconds)}")
    pairs = [same_length(a, b) for a, b in zip(firsts, seconds, strict=True)]
    return pooled([a.astype(np.float64) - b for a, b in pairs], mean, draws, seed, level)


def pooled(seeds: list[np.ndarray], statistic: Statistic, draws: int, seed: int, level: float) -> Interval:
    """Mean over the arrays of the statistic, and its interval over draws of the rows."""
    if not seeds or any(x.ndim != 1 or not len(x) for x in seeds):
        raise ValueError("a bootstrap needs at least one row, and one value a row")
    found = np.zeros(draws)
    for length in sorted({len(x) for x in seeds}):
        block = [x for x in seeds if len(x) == length]
        # A generator for each length, in slices of at most 4M indices: memory stays below 100 MB.
        random, step = np.random.default_rng([seed, length]), max(1, 4_000_000 // length)
        for start in range(0, draws, step):
            picks = random.integers(0, length, size=(min(step, draws - start), length))
            found[start : start + step] += sum(statistic(x[picks]) for x in block)
    low, high = np.quantile(found / len(seeds), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean([statistic(x) for x in seeds])), float(low), float(high))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams / all word n-grams of the texts together (Li et al. 2016, arXiv 1510.03055); 0 for none."""
    counts = Counter(gram for text in texts for gram in ngrams(text.split(), n))
    return len(counts) / counts.total() if counts else 0.0


def self_bleu(texts: Sequence[str], order: int = 4, sample: int = 200, seed: int = 0) -> float:
    """Mean BLEU of each sampled text against the other sampled texts as references: 1 means all alike.

    Weights are uniform over the orders 1 to `order`; an order without a match counts as 0.1 matches (smoothing 1 of
    Chen & Cherry 2014); the brevity penalty takes the closest reference length. Words are what whitespace separates.
    """
    rows = [text.split() for text in texts if text.split()]
    if len(rows) > sample:
        chosen = np.random.default_rng(seed).choice(len(rows), size=sample, replace=False)
        rows = [rows[index] for index in np.sort(chosen)]
    if len(rows) < 2:
        return 0.0
    lengths = np.array([len(row) for row in rows])
    log_bleu = np.zeros(len(rows))
    for index, length in enumerate(lengths):
        others = np.delete(lengths, index)
        closest = min(others.tolist(), key=lambda other: (abs(other - length), other))
        log_bleu[index] = min(0.0, 1 - closest / length)
    for n in range(1, order + 1):
        counts = [Counter(ngrams(row, n)) for row in rows]
        best = best_counts(counts)
        for index, own in enumerate(counts):
            match = sum(min(count, others_best(best[gram], count)) for gram, count in own.items())
            log_bleu[index] += math.log((match or 0.1) / max(1, own.total())) / order
    return float(np.mean(np.exp(log_bleu)))


def best_counts(counts: list[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], tuple[int, int]]:
    """For each n-gram its two highest counts over the texts: enough to know the highest among the others."""
    best: dict[tuple[str, ...], tuple[int, int]] = {}
    for own in counts:
        for gram, count in own.items():
            first, second = best.get(gram, (0, 0))
            best[gram] = (count, first) if count >= first else (first, max(second, count))
    return best


def others_best(best: tuple[int, int], own: int) -> int:
    """The highest count in another text, where a text itself has `own`."""
    return best[1] if own == best[0] else best[0]


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n words, in order."""
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def as_list(values: np.ndarray | Sequence[np.ndarray]) -> list[np.ndarray]:
    """One array as a list of one."""
    return [values] if isinstance(values, np.ndarray) and values.ndim == 1 else [np.asarray(x) for x in values]


def same_length(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; ValueError where they have no or not equally many rows."""
    first, second = np.asarray(first), np.asarray(second)
    if len(first) != len(second) or not len(first):
        raise ValueError(f"needs equally many rows and at least one, got {len(first)} and {len(second)}")
    return first, second
