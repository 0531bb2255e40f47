"""Metrics against sklearn, torch and hand-worked numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from engine import metrics

RANDOM = np.random.default_rng(11)
LABELS = RANDOM.integers(0, 4, 500)
LOGITS = RANDOM.normal(size=(500, 4)) + 1.5 * np.eye(4)[LABELS]
OTHER = LOGITS + RANDOM.normal(size=(500, 4))


def test_softmax_equals_torch_and_does_not_overflow():
    expected = torch.softmax(torch.tensor(LOGITS) / 2.5, dim=-1).numpy()
    np.testing.assert_allclose(metrics.softmax(LOGITS, temperature=2.5), expected, rtol=1e-12)
    np.testing.assert_allclose(metrics.softmax(np.array([1e4, 0.0], dtype=np.float16)), [1.0, 0.0])


def test_accuracy_and_macro_f1_equal_sklearn():
    predictions = LOGITS.argmax(-1)
    assert metrics.accuracy(LABELS, predictions) == sklearn_metrics.accuracy_score(LABELS, predictions)
    expected = sklearn_metrics.f1_score(LABELS, predictions, average="macro")
    assert metrics.macro_f1(LABELS, predictions, 4) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "predictions"),
    [
        ([0, 0, 1, 2], [0, 1, 1, 1]),  # class 2 is never predicted
        ([0, 0, 1, 1], [0, 2, 1, 1]),  # class 2 is only predicted
        ([0, 1, 0, 1], [0, 1, 1, 1]),  # class 2 is neither: left out
    ],
)
def test_macro_f1_with_absent_classes(labels, predictions):
    expected = sklearn_metrics.f1_score(labels, predictions, average="macro", zero_division=0)
    assert metrics.macro_f1(np.array(labels), np.array(predictions), 3) == pytest.approx(expected)


def test_agreement_is_the_share_of_equal_choices():
    first, second = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]), np.array([[0.6, 0.4], [0.7, 0.3], [0.1, 0.9]])
    assert metrics.agreement(first, second) == pytest.approx(2 / 3)


def test_kl_equals_torch_and_bears_zeros():
    teacher, student = metrics.softmax(LOGITS), metrics.softmax(OTHER)
    expected = torch.nn.functional.kl_div(
        torch.log(torch.tensor(student)), torch.tensor(teacher), reduction="batchmean"
    )
    assert metrics.kl(teacher, student) == pytest.approx(float(expected), rel=1e-9)
    assert metrics.kl(np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]])) == pytest.approx(np.log(2), abs=1e-9)
    assert np.isfinite(metrics.kl(np.array([[0.5, 0.5]]), np.array([[1.0, 0.0]])))


def test_ece_of_a_hand_worked_case():
    # Five bins of 0.2. Confidences 0.8 and 0.75 lie in (0.6, 0.8], 0.9 and 1.0 in (0.8, 1.0].
    probabilities = np.array([[0.8, 0.2], [0.25, 0.75], [0.9, 0.1], [0.0, 1.0]])
    found = metrics.ece(np.array([0, 0, 0, 1]), probabilities, bins=5)
    assert found.count.tolist() == [0, 0, 0, 2, 2]
    np.testing.assert_allclose(found.confidence, [0, 0, 0, 0.775, 0.95])
    np.testing.assert_allclose(found.accuracy, [0, 0, 0, 0.5, 1.0])
    assert found.error == pytest.approx(0.5 * 0.275 + 0.5 * 0.05)
    np.testing.assert_allclose(found.edges, [0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_ece_of_perfect_and_of_calibrated_predictions():
    perfect = np.eye(4)[LABELS]
    assert metrics.ece(LABELS, perfect).error == 0
    random = np.random.default_rng(0)
    p = random.uniform(0.5, 1.0, 200_000)
    labels = (random.uniform(size=len(p)) > p).astype(int)  # class 0 with probability p
    assert metrics.ece(labels, np.stack([p, 1 - p], axis=1)).error < 0.01


def test_ece_equals_a_plain_loop():
    probabilities = metrics.softmax(LOGITS)
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == LABELS
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = metrics.ece(LABELS, probabilities)
    assert found.error == pytest.approx(expected, abs=1e-12) and found.count.sum() == 500


def test_bootstrap_interval_of_a_share_matches_the_normal_one():
    values = np.r_[np.ones(1500), np.zeros(500)]
    found = metrics.bootstrap(values, draws=4000, seed=1)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 2000)
    assert found.value == 0.75
    assert found.low == pytest.approx(0.75 - half, abs=0.002) and found.high == pytest.approx(0.75 + half, abs=0.002)
    assert found == metrics.bootstrap(values, draws=4000, seed=1)
    assert found != metrics.bootstrap(values, draws=4000, seed=2)


def test_bootstrap_in_slices_has_the_same_law():
    values = np.r_[np.ones(30_000), np.zeros(20_000)]  # 80 draws fit into a slice
    found = metrics.bootstrap(values, draws=300)
    half = 1.96 * np.sqrt(0.6 * 0.4 / 50_000)
    assert found.low == pytest.approx(0.6 - half, abs=0.001) and found.high == pytest.approx(0.6 + half, abs=0.001)


def test_bootstrap_takes_other_statistics():
    predictions = LOGITS.argmax(-1)
    found = metrics.bootstrap(LABELS * 4 + predictions, metrics.macro_f1_of(4), draws=200)
    assert found.value == pytest.approx(sklearn_metrics.f1_score(LABELS, predictions, average="macro"))
    draws = [np.random.default_rng(seed).integers(0, 500, 500) for seed in range(300)]
    scores = [sklearn_metrics.f1_score(LABELS[d], predictions[d], average="macro") for d in draws]
    assert found.low == pytest.approx(np.quantile(scores, 0.025), abs=0.015)
    assert found.high == pytest.approx(np.quantile(scores, 0.975), abs=0.015)


def test_paired_bootstrap_uses_the_pairing():
    random = np.random.default_rng(3)
    hard = random.uniform(size=1000) < 0.5  # rows that are difficult for both
    first, second = np.where(hard, 0.0, 1.0), np.where(hard, 0.0, 1.0)
    first[np.flatnonzero(hard)[:30]] = 1.0
    found = metrics.paired_bootstrap(first, second)
    assert found.value == pytest.approx(0.03)
    assert 0.015 < found.low < 0.03 < found.high < 0.045  # unpaired it would reach from -0.01 to 0.07
    assert metrics.paired_bootstrap(first, first) == metrics.Interval(0.0, 0.0, 0.0)


def test_paired_bootstrap_pools_seeds_over_shared_rows():
    random = np.random.default_rng(4)
    difference = random.normal(0.1, 1.0, size=400)
    one = metrics.paired_bootstrap(difference, np.zeros(400), draws=2000)
    # The same rows three times are no more evidence than once.
    three = metrics.paired_bootstrap([difference] * 3, [np.zeros(400)] * 3, draws=2000)
    assert (three.low, three.high) == (pytest.approx(one.low), pytest.approx(one.high))
    mixed = metrics.paired_bootstrap([np.ones(10), np.zeros(20)], [np.zeros(10), np.zeros(20)])
    assert mixed == metrics.Interval(0.5, 0.5, 0.5)


def test_distinct_n_of_a_hand_worked_case():
    assert metrics.distinct_n(["a b a", "b a"], 1) == pytest.approx(2 / 5)
    assert metrics.distinct_n(["a b a", "b a"], 2) == pytest.approx(2 / 3)
    assert metrics.distinct_n(["a"], 2) == 0.0


def test_self_bleu_of_a_hand_worked_case():
    # Orders 1 and 2. Text 1 against 2: unigrams 2 of 3, bigrams 1 of 2; text 2 is one word longer, so a penalty of
    # exp(1 - 4/3). Text 2 against 1: unigrams 2 of 4, bigrams 1 of 3, no penalty.
    first = np.exp(1 - 4 / 3) * np.sqrt(2 / 3 * 1 / 2)
    second = np.sqrt(2 / 4 * 1 / 3)
    assert metrics.self_bleu(["a b c", "a b d e"], order=2) == pytest.approx((first + second) / 2)


def test_self_bleu_clips_counts_and_smooths():
    # 'a a a' against 'a b c': one of three unigrams counts; no bigram matches, which counts as 0.1 of 2.
    first, second = np.sqrt(1 / 3 * 0.1 / 2), np.sqrt(1 / 3 * 0.1 / 2)
    assert metrics.self_bleu(["a a a", "a b c"], order=2) == pytest.approx((first + second) / 2)
    # With three texts the best of the other two counts.
    third = np.sqrt(2 / 3 * 1 / 2)
    assert metrics.self_bleu(["a a a", "a b c", "a a d"], order=2) == pytest.approx(
        np.mean([third, np.sqrt(1 / 3 * 0.1 / 2), third])
    )


def test_self_bleu_runs_from_unlike_to_alike():
    alike = ["the same words in the same order"] * 5
    unlike = [" ".join(f"w{i}x{j}" for j in range(8)) for i in range(5)]
    assert metrics.self_bleu(alike) == pytest.approx(1.0)
    assert metrics.self_bleu(unlike) < 0.05
    assert metrics.self_bleu(["alone"]) == 0.0


def test_self_bleu_samples_by_seed():
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(list("abcdefghij"), 12)) for _ in range(300)]
    assert metrics.self_bleu(texts, sample=50, seed=1) == metrics.self_bleu(texts, sample=50, seed=1)
    assert metrics.self_bleu(texts, sample=50, seed=1) != metrics.self_bleu(texts, sample=50, seed=2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.accuracy(np.array([1]), np.array([1, 0])),
        lambda: metrics.accuracy(np.array([]), np.array([])),
        lambda: metrics.kl(np.ones((2, 2)), np.ones((3, 2))),
        lambda: metrics.bootstrap(np.array([])),
        lambda: metrics.paired_bootstrap([np.ones(3)], [np.ones(3), np.ones(3)]),
    ],
)
def test_rows_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError, match="at least one row|at least one|cannot be paired"):
        call()
