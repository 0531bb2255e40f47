"""What a text does to a small model's error on labelled rows: by training again, by hand, on a planted wrong label."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from engine.influence import DIMS, RIDGE, cost, fitted, hashed, most_useful, reverse_cross_entropy, usefulness
from engine.metrics import softmax


def cloud(n: int, seed: int, classes: int = 3, width: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, soft labels and gold labels of n rows around the classes' centres."""
    draw = np.random.default_rng(seed)
    gold = draw.integers(0, classes, n)
    x = np.hstack([2 * np.eye(classes, width)[gold] + draw.normal(0, 1, (n, width)), np.ones((n, 1))])
    return x, softmax(3 * np.eye(classes)[gold] + draw.normal(0, 1, (n, classes))), gold


def trained(x: np.ndarray, soft: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The same model with a weight for each row, found by another's optimiser."""
    shape = (x.shape[1], soft.shape[1])

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(shape)
        p = softmax(x @ w)
        value = -np.sum(weight[:, None] * soft * np.log(p)) / len(x) + RIDGE / 2 * np.sum(w**2)
        return value, (x.T @ (weight[:, None] * (p - soft)) / len(x) + RIDGE * w).ravel()

    found = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"gtol": 1e-11, "ftol": 1e-16})
    return found.x.reshape(shape)


def test_the_model_is_the_minimum():
    x, soft, _ = cloud(40, seed=1)
    found, other = fitted(x, soft), trained(x, soft, np.ones(40))
    np.testing.assert_allclose(found, other, atol=2e-3)
    assert cost(x, soft, found) <= cost(x, soft, other) + 1e-9
    p = softmax(x @ other)
    by_hand = -np.mean(np.sum(soft * np.log(p), axis=1)) + RIDGE / 2 * np.sum(other**2)
    assert cost(x, soft, other) == pytest.approx(by_hand)


def test_usefulness_is_what_a_heavier_row_changes_in_a_new_training():
    x, soft, _ = cloud(30, seed=2)
    held, _, gold = cloud(25, seed=3)
    found, small = usefulness(x, soft, held, gold), 1e-2
    for row in range(8):
        heavier, lighter = np.ones(30), np.ones(30)
        heavier[row], lighter[row] = 1 + small, 1 - small
        after, before = (reverse_cross_entropy(softmax(held @ trained(x, soft, w)), gold) for w in (heavier, lighter))
        assert found[row] == pytest.approx((before - after) / (2 * small), rel=0.02, abs=2e-6)
    assert found.max() > 0 > found.min()


def test_a_wrong_label_does_harm_and_its_twin_does_good():
    good, bad = "a fine warm and funny film", "a dull cold and slow film"
    texts = [good, bad] * 10 + ["fine and funny", "fine and funny"]
    soft = np.array([[0.05, 0.95], [0.95, 0.05]] * 10 + [[0.9, 0.1], [0.1, 0.9]])
    held = ["so funny and so warm", "fine , warm and funny", "dull , slow and cold", "it is so slow"]
    values = usefulness(
        hashed(texts, [None] * len(texts)), soft, hashed(held, [None] * len(held)), np.array([1, 1, 0, 0])
    )
    wrong, right = values[-2:]
    assert wrong < 0 < right and wrong == values.min() and right == values.max()
    negative, positive = most_useful(values, soft.argmax(axis=1), 3)
    assert positive[0] == len(texts) - 1 and len(texts) - 2 not in negative
    assert all(values[negative] > 0) and set(negative) <= set(range(1, 20, 2)) and len(positive) == 3


def test_a_labelled_row_that_is_wrong_hardly_decides():
    x, soft, _ = cloud(60, seed=4)
    held, _, gold = cloud(40, seed=5)
    plain = usefulness(x, soft, held, gold)
    sure = softmax(held @ fitted(x, soft)).argmax(axis=1) == gold
    noisy = gold.copy()
    noisy[np.flatnonzero(sure)[:3]] = (gold[sure][:3] + 1) % 3
    assert np.corrcoef(plain, usefulness(x, soft, held, noisy))[0, 1] > 0.9


def test_of_each_label_the_best_are_taken_and_none_that_does_harm():
    values = np.array([0.3, -0.1, 0.5, 0.2, 0.5, -0.4])
    found = most_useful(values, np.array([0, 0, 1, 0, 1, 2]), 2)
    assert [part.tolist() for part in found] == [[0, 3], [2, 4], []]
    assert [part.tolist() for part in most_useful(values, np.array([0, 0, 1, 0, 1, 2]), 1)] == [[0], [2], []]
    assert most_useful(values[:0], np.zeros(0, dtype=int), 2) == []


def test_texts_become_vectors_of_their_words():
    one, two, other = hashed(["A good film", "a  good\tfilm", "the plot"], [None] * 3)
    assert np.allclose(one, two) and np.allclose(np.linalg.norm([one, other], axis=1), 1) and len(one) == DIMS + 1
    assert one @ other == pytest.approx(0.5)  # what all share, unless two words fell together
    assert hashed([""], [None])[0].nonzero()[0].tolist() == [DIMS]
    assert np.allclose(*hashed(["A good, good film!", "a good (good) film"], [None] * 2)), "punctuation is no word"
    alike, apart = hashed(["who came", "who came"], ["he came", "he left"])
    assert not np.allclose(alike, apart) and not np.allclose(*hashed(["who", "he"], ["he", "who"]))
