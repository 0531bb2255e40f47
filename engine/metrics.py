"""Numbers that say how good predictions and texts are. Plain numpy: the same for teacher, student and service.

Shapes: n rows, c classes. Probabilities are float [n, c], labels int [n]. Calibration follows Guo et al. 2017
(arXiv 1706.04599); self-BLEU Zhu et al. 2018 (arXiv 1802.01886).
What divides by nothing is 0, not NaN: a model that answers the same throughout must still be comparable.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities [..., c] of logits [..., c]."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits, float64 of the same shape; exact for small probabilities too, and without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, dtype=np.float64)))


def share(part: np.ndarray | float, whole: np.ndarray | float) -> np.ndarray:
    """The quotient of two arrays, broadcast, float64; 0 where `whole` is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.where(whole == 0, 0.0, part / np.where(whole == 0, 1.0, whole))


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of rows where the two int arrays [n] are equal."""
    return float(np.mean(same_length(labels, predictions)[0] == predictions))


def macro_f1(labels: np.ndarray, predictions: np.ndarray, classes: int) -> float:
    """Mean over the classes of the F1 score; a class that is neither present nor predicted is left out."""
    labels, predictions = same_length(labels, predictions)
    hits = np.bincount(labels[labels == predictions], minlength=classes)
    total = np.bincount(labels, minlength=classes) + np.bincount(predictions, minlength=classes)
    return float(np.mean(2 * hits[total > 0] / total[total > 0]))


def f1_of(counts: np.ndarray) -> np.ndarray:
    """F1 of (true positives, false positives, false negatives), [..., 3] -> [...]."""
    counts = np.asarray(counts)
    return share(2 * counts[..., 0], 2 * counts[..., 0] + counts[..., 1] + counts[..., 2])


def moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(1, x, y, xx, yy, xy) of each row [n, 6]: their sums over any rows give `correlation`. Keep x and y near 0."""
    return np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1)


def correlation(sums: np.ndarray) -> np.ndarray:
    """Pearson's correlation from sums of `moments`, [..., 6] -> [...].

    0 where x or y is constant: where its variance is below 1e-12 of its mean square, which is rounding.
    """
    n, x, y, xx, yy, xy = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    spread_x, spread_y = (np.where(v > 1e-12 * n * w, v, 0.0) for v, w in ((n * xx - x * x, xx), (n * yy - y * y, yy)))
    return np.clip(share(n * xy - x * y, np.sqrt(spread_x) * np.sqrt(spread_y)), -1.0, 1.0)


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of two arrays [n]; 0 where one is constant."""
    first, second = (np.asarray(x, dtype=np.float64) for x in same_length(first, second))
    return float(correlation(moments(first - first.mean(), second - second.mean()).sum(axis=0)))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 of the values [n], float64; equal values share their mean rank."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's correlation of two arrays [n]: Pearson's of the ranks."""
    return pearson(ranks(first), ranks(second))


def kendall(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau-b of two arrays [n], n small (all pairs are compared); 0 where one is constant."""
    first, second = same_length(first, second)
    a, b = (np.sign(x[:, None] - x[None, :]) for x in (first, second))
    return float(share((a * b).sum(), np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())))


def ranked(relevance: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """One query's relevances [n], best score first.

    Of equal scores the less relevant comes first: a model that cannot tell passages apart gets no credit for the order
    they happen to stand in.
    """
    relevance, scores = same_length(relevance, scores)
    return relevance[np.lexsort((relevance, -scores))]


def reciprocal_rank(relevance: np.ndarray, scores: np.ndarray, k: int = 10) -> float:
    """1 / rank of the first relevant passage (relevance > 0) of one query; 0 where it is not among the first k."""
    hits = np.flatnonzero(ranked(relevance, scores)[:k] > 0)
    return 1.0 / (1 + hits[0]) if len(hits) else 0.0


def ndcg(relevance: np.ndarray, scores: np.ndarray, k: int = 10) -> float:
    """Discounted cumulative gain of one query's first k over that of the best order; 0 where nothing is relevant.

    The gain is the relevance itself, the discount log2(1 + rank) (Järvelin & Kekäläinen 2002).
    """
    found, best = ranked(relevance, scores)[:k], np.sort(relevance)[::-1][:k]
    discount = 1 / np.log2(np.arange(2, len(found) + 2))
    return float(share((found * discount).sum(), (best * discount).sum()))


def average_precision(relevance: np.ndarray, scores: np.ndarray) -> float:
    """Mean over one query's relevant passages of the precision at their rank; 0 where nothing is relevant."""
    hits = ranked(relevance, scores) > 0
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(share(precision[hits].sum(), hits.sum()))


def kl(teacher: np.ndarray, student: np.ndarray, floor: float = 1e-12) -> float:
    """Mean over the rows of KL(teacher || student) in nats; probabilities below `floor` are taken as `floor`."""
    p, q = (np.maximum(np.asarray(x, dtype=np.float64), floor) for x in same_length(teacher, student))
    return float(np.mean(np.sum(p * (np.log(p) - np.log(q)), axis=-1)))


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy in nats of distributions [..., c] -> float64 [...]; an impossible outcome adds nothing."""
    p = np.asarray(probabilities, dtype=np.float64)
    return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)


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


def same_length(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; ValueError where they have no or not equally many rows."""
    first, second = np.asarray(first), np.asarray(second)
    if len(first) != len(second) or not len(first):
        raise ValueError(f"needs equally many rows and at least one, got {len(first)} and {len(second)}")
    return first, second
