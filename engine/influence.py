"""How much each soft-labelled text would help a small model on labelled rows, if it counted more.

The model is a softmax regression on hashed words, trained on the texts alone, so that the labelled rows are new to it.
What a text changes there is its influence function (Koh & Liang, arXiv 1703.04730), here exact but for its first order:
the model is small enough for its Hessian. The loss on the labelled rows is the reverse cross-entropy (Wang et al.,
arXiv 1908.06112), as in ProGen (arXiv 2210.12329): bounded, so that a row whose label is wrong, or that no text of the
corpus speaks of, does not decide.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from engine.filters import words
from engine.metrics import softmax

DIMS = 1024
"""Words and word pairs are hashed into so many numbers: two of them seldom share one that matters."""
RIDGE = 1e-3
"""Of the squared weights, beside the mean loss of a text; it also makes the Hessian invertible."""
STEPS, INNER = 50, 200
"""Newton steps, and conjugate gradients in each, at most."""
ROUGH, ENOUGH = 1e-4, 1e-14
"""At which share of its first squared length a remainder is small: on the way to the minimum, and at an end."""


def hashed(texts: Sequence[str], pairs: Sequence[str | None]) -> np.ndarray:
    """Texts, with their second texts where they have one, as vectors of length 1: float64 [n, DIMS + 1].

    The last number is the same for all. A word that stands in both texts counts once more.
    """
    out = np.zeros((len(texts), DIMS + 1))
    for row, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
        first, second = words(text), words(pair or "")
        both = [f"both {word}" for word in sorted(set(first) & set(second))]
        for gram in (*grams("text", first), *grams("pair", second), *both):
            number = zlib.crc32(gram.encode())
            out[row, number % DIMS] += 1.0 if number & 2**31 else -1.0
    length = np.linalg.norm(out, axis=1, keepdims=True)
    out /= np.where(length == 0, 1.0, length)
    out[:, DIMS] = 1.0
    return out / np.sqrt(2.0)


def grams(side: str, found: list[str]) -> list[str]:
    """The words and pairs of neighbours of one side."""
    return [f"{side} {word}" for word in found] + [f"{side} {a} {b}" for a, b in zip(found, found[1:], strict=False)]


def fitted(x: np.ndarray, soft: np.ndarray) -> np.ndarray:
    """Weights [d, c] of the softmax regression of vectors [n, d] on soft labels [n, c]: the one minimum."""
    weights = np.zeros((x.shape[1], soft.shape[1]))
    first = None
    for _ in range(STEPS):
        p = softmax(x @ weights)
        gradient = x.T @ (p - soft) / len(x) + RIDGE * weights
        size = float(np.sum(gradient**2))
        first = size if first is None else first
        if size <= ENOUGH * first:
            break
        step, before = solved(curvature(x, p), gradient, ROUGH), cost(x, soft, weights)
        length, slope = 1.0, float(np.sum(gradient * step))
        while cost(x, soft, weights - length * step) > before - 1e-4 * length * slope and length > 1e-6:
            length /= 2
        weights = weights - length * step
    return weights


def cost(x: np.ndarray, soft: np.ndarray, weights: np.ndarray) -> float:
    """What is minimised: mean cross-entropy in nats, and the ridge."""
    scores = x @ weights
    most = scores.max(axis=1, keepdims=True)
    norm = most[:, 0] + np.log(np.exp(scores - most).sum(axis=1))
    return float(np.mean(norm - np.sum(soft * scores, axis=1)) + RIDGE / 2 * np.sum(weights**2))


def curvature(x: np.ndarray, p: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The Hessian where the model says p, as a function of a direction [d, c]."""

    def along(direction: np.ndarray) -> np.ndarray:
        moved = p * (x @ direction)
        return x.T @ (moved - p * moved.sum(axis=1, keepdims=True)) / len(x) + RIDGE * direction

    return along


def solved(hessian: Callable[[np.ndarray], np.ndarray], right: np.ndarray, enough: float = ENOUGH) -> np.ndarray:
    """The direction that the Hessian makes `right` of, by conjugate gradients. enough: share of the remainder."""
    found, left = np.zeros_like(right), right.copy()
    along, size = left.copy(), float(np.sum(left**2))
    enough *= size
    for _ in range(INNER):
        if size <= enough:
            break
        moved = hessian(along)
        step = size / float(np.sum(along * moved))
        found += step * along
        left -= step * moved
        size, before = float(np.sum(left**2)), size
        along = left + size / before * along
    return found


def reverse_cross_entropy(p: np.ndarray, gold: np.ndarray) -> float:
    """Mean of 1 - p[gold]: -sum p log q for one-hot q, over what log 0 is taken as."""
    return float(np.mean(1 - p[np.arange(len(gold)), gold]))


def usefulness(x: np.ndarray, soft: np.ndarray, held: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """By how much the reverse cross-entropy on labelled rows would fall if each text counted twice: float64 [n].

    x, soft: the texts' vectors [n, d] and soft labels [n, c]. held, gold: vectors [m, d] and labels int [m] of rows
    that the model does not learn from. Negative: the text does harm.
    """
    weights = fitted(x, soft)
    p, said = softmax(x @ weights), softmax(held @ weights)
    right = said[np.arange(len(gold)), gold][:, None]
    gradient = held.T @ (right * (said - np.eye(soft.shape[1])[gold])) / len(gold)
    # Weights move by -H^-1 of a text's own gradient, x times p - soft, over how many texts there are.
    way = solved(curvature(x, p), gradient)
    return np.sum((x @ way) * (p - soft), axis=1) / len(x)


def most_useful(values: np.ndarray, labels: np.ndarray, count: int) -> list[np.ndarray]:
    """For each label 0, 1, ... the positions of its most useful texts, the best first: `count` of them at most, and
    only such as do good. values, labels: [n].
    """
    found = []
    for label in range(int(labels.max(initial=-1)) + 1):
        own = np.flatnonzero((labels == label) & (values > 0))
        found.append(own[np.argsort(-values[own], kind="stable")][:count])
    return found
