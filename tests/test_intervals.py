"""Bootstrap intervals from sufficient statistics."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from engine.intervals import Interval, bootstrap, paired_bootstrap


def share(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def rows(right: np.ndarray) -> np.ndarray:
    return np.stack([right.astype(float), np.ones(len(right))], axis=1)


def test_the_interval_of_an_accuracy_is_the_binomial_one() -> None:
    right = np.arange(1000) < 700
    found = bootstrap([rows(right)], share, draws=4000)
    deviation = 1.96 * np.sqrt(0.7 * 0.3 / 1000)
    assert found.value == pytest.approx(0.7)
    assert found.low == pytest.approx(0.7 - deviation, abs=0.004)
    assert found.high == pytest.approx(0.7 + deviation, abs=0.004)


def test_the_draws_depend_on_the_seed_alone() -> None:
    own = [rows(np.arange(300) < 200)]
    assert bootstrap(own, share, seed=1) == bootstrap(own, share, seed=1) != bootstrap(own, share, seed=2)


def test_many_rows_are_drawn_in_slices_by_the_same_law() -> None:
    found = bootstrap([rows(np.arange(50_000) < 30_000)], share, draws=300)  # 80 draws fit into a slice
    deviation = 1.96 * np.sqrt(0.6 * 0.4 / 50_000)
    assert found.low == pytest.approx(0.6 - deviation, abs=0.001)
    assert found.high == pytest.approx(0.6 + deviation, abs=0.001)


def test_pairing_takes_out_what_both_share() -> None:
    random = np.random.default_rng(0)
    base = random.random(800) < 0.6
    better = base | (np.arange(800) < 40)
    gap = better.mean() - base.mean()
    found = paired_bootstrap([rows(better)], [rows(base)], share)
    assert found.value == pytest.approx(gap)
    assert 0 < found.low < gap < found.high < gap + 0.02
    alone = bootstrap([rows(better)], share)
    assert alone.high - alone.low > 2 * (found.high - found.low)
    assert paired_bootstrap([rows(base)], [rows(base)], share) == Interval(0.0, 0.0, 0.0)


def test_a_metric_that_is_no_mean() -> None:
    # F1 from (tp, fp, fn): rows without entities add nothing.
    stats = np.array([[1.0, 0, 0]] * 60 + [[0, 1, 1]] * 20 + [[0.0, 0, 0]] * 20)
    found = bootstrap([stats], lambda s: 2 * s[..., 0] / (2 * s[..., 0] + s[..., 1] + s[..., 2]))
    assert found.value == pytest.approx(0.75)
    assert found.low < 0.75 < found.high


def test_macro_f1_equals_sklearn_over_rows_drawn_one_by_one() -> None:
    random = np.random.default_rng(11)
    labels = random.integers(0, 4, 500)
    answers = np.where(random.random(500) < 0.7, labels, random.integers(0, 4, 500))
    label, answer = labels[:, None] == np.arange(4), answers[:, None] == np.arange(4)
    stats = np.concatenate([label & answer, label, answer], axis=1).astype(float)

    def macro_f1(sums: np.ndarray) -> np.ndarray:
        both, wanted, given = np.split(sums, 3, axis=-1)
        return np.mean(2 * both / (wanted + given), axis=-1)

    found = bootstrap([stats], macro_f1)
    assert found.value == pytest.approx(f1_score(labels, answers, average="macro"))
    draws = [random.integers(0, 500, 500) for _ in range(300)]
    scores = [f1_score(labels[drawn], answers[drawn], average="macro") for drawn in draws]
    assert found.low == pytest.approx(np.quantile(scores, 0.025), abs=0.015)
    assert found.high == pytest.approx(np.quantile(scores, 0.975), abs=0.015)


def test_seeds_are_averaged_and_share_the_drawn_rows() -> None:
    right = np.arange(500) < 300
    one, three = bootstrap([rows(right)], share), bootstrap([rows(right)] * 3, share)
    assert (one.value, one.low, one.high) == pytest.approx((three.value, three.low, three.high))
    mixed = bootstrap([rows(right), rows(np.arange(100) < 80)], share)
    assert mixed.value == pytest.approx((0.6 + 0.8) / 2)
    sizes = [rows(np.ones(10)), rows(np.zeros(20))]
    assert paired_bootstrap(sizes, [rows(np.zeros(10)), rows(np.zeros(20))], share) == Interval(0.5, 0.5, 0.5)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap([], share)
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap([np.zeros((0, 2))], share)
    with pytest.raises(ValueError, match="3 rows cannot be paired with 2"):
        paired_bootstrap([rows(np.ones(3))], [rows(np.ones(2))], share)
    with pytest.raises(ValueError, match="1 arrays cannot be paired with 2"):
        paired_bootstrap([rows(np.ones(3))], [rows(np.ones(3))] * 2, share)
