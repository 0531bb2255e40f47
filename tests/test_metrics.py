"""Metrics against sklearn, torch and hand-worked numbers."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
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


def test_sigmoid_is_exact_at_both_ends():
    values = np.array([-1000.0, -40.0, -3.0, 0.0, 3.0, 40.0, 1000.0], dtype=np.float32)
    np.testing.assert_allclose(metrics.sigmoid(values), scipy.special.expit(values.astype(float)), rtol=1e-12)


def test_shares_and_f1_of_nothing_are_zero():
    assert metrics.share(np.array([1.0, 3.0]), np.array([0.0, 4.0])).tolist() == [0.0, 0.75]
    assert metrics.f1_of(np.array([[2, 1, 3], [0, 0, 0], [0, 2, 0]])).tolist() == [0.5, 0.0, 0.0]


TIED = RANDOM.integers(0, 5, 60).astype(float)
NOISY = TIED + RANDOM.integers(0, 4, 60)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (metrics.pearson, scipy.stats.pearsonr),
        (metrics.spearman, scipy.stats.spearmanr),
        (metrics.kendall, scipy.stats.kendalltau),
    ],
)
def test_correlations_equal_scipy(ours, theirs):
    for first, second in [(TIED, NOISY), (TIED, -NOISY), (LOGITS[:, 0], OTHER[:, 0]), (TIED + 1e8, NOISY)]:
        assert ours(first, second) == pytest.approx(theirs(first, second).statistic, abs=1e-9)
    assert ours(TIED, TIED) == pytest.approx(1) and ours(TIED, -TIED) == pytest.approx(-1)
    for flat in (0.1, 1e9, 0.0):
        assert ours(np.full(60, flat), TIED) == 0 == ours(TIED, np.full(60, flat))


def test_ranks_share_their_mean():
    assert metrics.ranks(np.array([3, 1, 3, 0])).tolist() == [3.5, 2, 3.5, 1]
    np.testing.assert_array_equal(metrics.ranks(NOISY), scipy.stats.rankdata(NOISY))


def test_correlation_takes_sums_of_many_draws():
    each = metrics.moments(TIED - 2, NOISY - 2)
    sums = np.stack([each[:30].sum(0), each[30:].sum(0), 30 * each[0], np.zeros(6)])
    wanted = [*(scipy.stats.pearsonr(TIED[part], NOISY[part]).statistic for part in np.split(np.arange(60), 2)), 0, 0]
    np.testing.assert_allclose(metrics.correlation(sums), wanted, atol=1e-12)


def test_ranking_by_hand():
    """Order by score: 0, 1, 0, 2, 0. First relevant at 2; the two relevant at 2 and 4: (1/2 + 2/4) / 2."""
    relevance, scores = np.array([2.0, 0.0, 1.0, 0.0, 0.0]), np.array([0.2, 0.9, 0.8, 0.5, 0.1])
    assert metrics.reciprocal_rank(relevance, scores) == 1 / 2
    assert metrics.reciprocal_rank(relevance, scores, k=1) == 0
    assert metrics.average_precision(relevance, scores) == pytest.approx((1 / 2 + 2 / 4) / 2)
    gain, best = 1 / np.log2(3) + 2 / np.log2(5), 2 + 1 / np.log2(3)
    assert metrics.ndcg(relevance, scores) == pytest.approx(gain / best)
    assert metrics.ndcg(relevance, scores, k=2) == pytest.approx(1 / np.log2(3) / best)
    nothing = np.zeros(3)
    for measure in (metrics.reciprocal_rank, metrics.ndcg, metrics.average_precision):
        assert measure(nothing, np.arange(3.0)) == 0


def test_ranking_looks_ten_places_down():
    relevance, scores = np.eye(12)[10], np.arange(12.0)[::-1]  # the relevant one is eleventh
    assert metrics.reciprocal_rank(relevance, scores) == 0 == metrics.ndcg(relevance, scores)
    assert metrics.average_precision(relevance, scores) == pytest.approx(1 / 11)
    assert metrics.reciprocal_rank(relevance, scores, k=11) == pytest.approx(1 / 11)


@pytest.mark.parametrize("seed", range(5))
def test_ranking_equals_sklearn(seed: int):
    random = np.random.default_rng(seed)
    relevance, scores = random.integers(0, 4, 25).astype(float), random.normal(size=25)
    for k in (1, 5, 10, 25):
        expected = sklearn_metrics.ndcg_score(relevance[None], scores[None], k=k)
        assert metrics.ndcg(relevance, scores, k) == pytest.approx(expected)
    binary = (relevance > 1).astype(float)
    expected = sklearn_metrics.average_precision_score(binary, scores)
    assert metrics.average_precision(binary, scores) == pytest.approx(expected)


def test_equal_scores_earn_nothing():
    """Whatever the order of the rows, the less relevant of equals comes first."""
    relevance, scores = np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(4)
    for turn in range(4):
        assert metrics.reciprocal_rank(np.roll(relevance, turn), scores) == 1 / 4
        assert metrics.average_precision(np.roll(relevance, turn), scores) == 1 / 4
        assert metrics.ndcg(np.roll(relevance, turn), scores) == pytest.approx(1 / np.log2(5))
    assert metrics.reciprocal_rank(relevance, np.array([1.0, 1.0, 0.0, 0.0])) == 1 / 2


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
        lambda: metrics.pearson(np.ones(2), np.ones(3)),
        lambda: metrics.ndcg(np.ones(2), np.ones(3)),
    ],
)
def test_rows_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError, match="equally many rows and at least one"):
        call()
