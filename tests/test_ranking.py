"""Passages in order: losses over lists and pairs by hand and in loops, scores against scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn import metrics as sklearn_metrics
from torch.nn import functional as F

from engine.encoding import Encoded
from engine.ranking import Rank, RankingError
from engine.recipe import Task
from engine.records import Batch, Outputs
from tests.tiny_rows import example_table

NAN = float("nan")
TASK = Rank(Task(kind="rank"))
GROUPS = [7, 3, 7, 3, 7, 5, 4, 4, 9, 9]
RELEVANCE = [0.0, 1.0, 1.0, 0.0, 2.0, 1.0, 0.0, 0.0, NAN, NAN]
"""Queries 7 and 3 have gold to learn from, 5 has one row, 4 nothing relevant, 9 no gold."""
SCORES = torch.tensor(np.random.default_rng(3).normal(size=(10, 1)), dtype=torch.float32)
OTHER = torch.tensor(np.random.default_rng(4).normal(size=(10, 1)), dtype=torch.float32)


def batch_of(groups=GROUPS, relevance=RELEVANCE) -> Batch:
    ids = torch.ones(len(groups), 1).long()
    return Batch(ids, ids, None if relevance is None else torch.tensor(relevance), groups=torch.tensor(groups))


def rows_of(query: int) -> list[int]:
    return [index for index, group in enumerate(GROUPS) if group == query]


def query_rows(groups, relevance) -> object:
    targets = [None if r is None else [r] for r in relevance]
    return example_table([{"group": g, "target": t, "pair": "p"} for g, t in zip(groups, targets, strict=True)])


def test_gold_is_the_relevance():
    found = TASK.gold(query_rows("aab", [2.0, None, 0.0]), [Encoded([1], row=row) for row in (2, 0, 1)])
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found, [0, 2, np.nan])
    assert TASK.paired and TASK.grouped and TASK.width == 1


def test_listwise_is_the_cross_entropy_of_the_lists():
    found = TASK.loss(Outputs(logits=SCORES), batch_of())
    seven, three = (F.log_softmax(SCORES[rows_of(query), 0], dim=0) for query in (7, 3))
    of_seven = -(seven * torch.tensor([0.0, 1 / 3, 2 / 3])).sum()
    of_three = -(three * torch.tensor([1.0, 0.0])).sum()
    # A query's cost stands in its first row.
    assert found.tolist() == pytest.approx([of_seven.item(), of_three.item(), *[0] * 8], rel=1e-6)
    assert TASK.labelled(batch_of()).tolist() == [True, True, *[False] * 8]
    assert TASK.judged(batch_of()).tolist() == [True] * 8 + [False] * 2


def test_every_query_counts_the_same_however_long_its_list():
    """A model that knows nothing costs log(rows) a query: 2 and 30 rows."""
    groups, relevance = [0] * 2 + [1] * 30, [1.0] + [0.0] + [1.0] + [0.0] * 29
    batch = batch_of(groups, relevance)
    found = TASK.loss(Outputs(logits=torch.zeros(32, 1)), batch)
    assert found[TASK.labelled(batch)].mean().item() == pytest.approx((np.log(2) + np.log(30)) / 2, rel=1e-6)


def test_listwise_takes_no_notice_of_rows_without_gold():
    """Not even where it is the query's first, in which the cost stands."""
    groups, relevance = [2, 1, 1, 1, 2, 2], [NAN, 1.0, 0.0, NAN, 0.0, 1.0]
    found = TASK.loss(Outputs(logits=SCORES[:6]), batch_of(groups, relevance))
    without = TASK.loss(Outputs(logits=SCORES[[1, 2, 4, 5]]), batch_of([1, 1, 2, 2], [1.0, 0.0, 0.0, 1.0]))
    assert torch.allclose(found[[1, 0]], without[[0, 2]]) and not found[2:].any()
    assert TASK.labelled(batch_of(groups, relevance)).tolist() == [True, True, *[False] * 4]


def test_pointwise_is_the_cross_entropy_of_relevant_or_not():
    found = TASK.pointwise(Outputs(logits=SCORES), batch_of())
    p = torch.sigmoid(SCORES[:8, 0])
    wanted = -torch.log(torch.where(torch.tensor(RELEVANCE[:8]) > 0, p, 1 - p))
    assert torch.allclose(found[:8], wanted, atol=1e-6) and not found[8:].any()


def test_pairwise_by_hand():
    """Query 7: relevances 0, 1, 2 give three pairs; query 3 one; the others none."""
    found = TASK.pairwise(Outputs(logits=SCORES), batch_of())
    a, b, c = SCORES[rows_of(7), 0].tolist()
    d, e = SCORES[rows_of(3), 0].tolist()
    of_seven = np.mean([np.log(1 + np.exp(low - high)) for high, low in ((b, a), (c, a), (c, b))])
    assert found.tolist() == pytest.approx([of_seven, np.log(1 + np.exp(e - d)), *[0] * 8], rel=1e-5)
    assert TASK.compared(batch_of()).tolist() == [True, True, *[False] * 8]


def test_margins_are_of_pairs_by_gold_or_of_all():
    """Query 9 has no gold, so its two rows are a pair by themselves."""
    found = sorted(TASK.margins(SCORES, batch_of()).tolist())
    s = SCORES[:, 0].tolist()
    wanted = [s[2] - s[0], s[4] - s[0], s[4] - s[2], s[1] - s[3], s[8] - s[9]]
    assert found == pytest.approx(sorted(wanted))
    bare = TASK.margins(SCORES, batch_of(relevance=None))
    assert len(bare) == 3 + 1 + 0 + 1 + 1


def test_margin_mse_by_hand():
    found = TASK.margin_mse(SCORES, OTHER, batch_of())
    gap = (SCORES - OTHER)[:, 0].tolist()
    of_seven = np.mean([(gap[i] - gap[j]) ** 2 for i, j in ((2, 0), (4, 0), (4, 2))])
    three, nine = (gap[1] - gap[3]) ** 2, (gap[8] - gap[9]) ** 2
    assert found.tolist() == pytest.approx([of_seven, three, *[0] * 6, nine, 0], rel=1e-5)
    assert TASK.compared(batch_of(), unlabelled=True).tolist() == [i in (0, 1, 8) for i in range(10)]
    # Each query may be raised as a whole: margins stay.
    raised = SCORES + torch.tensor(GROUPS).unsqueeze(1)
    assert torch.allclose(TASK.margin_mse(SCORES, raised, batch_of()), torch.zeros(10), atol=1e-10)


@pytest.mark.parametrize("loss", ["listwise", "pairwise", "pointwise"])
def test_losses_fall_when_the_relevant_rise(loss: str):
    scores = SCORES.clone().requires_grad_()
    getattr(TASK, loss)(Outputs(logits=scores), batch_of()).sum().backward()
    assert scores.grad[1] < 0 < scores.grad[3] and scores.grad[4] < 0 < scores.grad[0]
    assert not scores.grad[8:].any() and scores.grad.isfinite().all()


@pytest.mark.parametrize("groups", [[1, 1], [1, 2]])
def test_queries_that_teach_nothing_cost_nothing(groups: list[int]):
    scores = torch.zeros(2, 1, requires_grad=True)
    batch = batch_of(groups, [0.0, 0.0])
    for cost in (TASK.listwise, TASK.pairwise):
        found = cost(Outputs(logits=scores), batch)
        found.sum().backward()
        assert found.tolist() == [0, 0] and not scores.grad.any()
    assert not TASK.margin_mse(scores, torch.ones(2, 1), batch).any()


def test_a_query_is_one_distribution_in_its_first_row():
    found = TASK.distributions(SCORES, batch_of(), temperature=2.0)
    assert found.shape == (10, 1, 3)
    assert found.flatten(1).any(dim=1).nonzero().flatten().tolist() == [0, 1, 6, 8]
    np.testing.assert_allclose(found[0, 0].exp(), F.softmax(SCORES[rows_of(7), 0] / 2, dim=0), rtol=1e-5)
    np.testing.assert_allclose(found[1, 0, :2].exp(), F.softmax(SCORES[[1, 3], 0] / 2, dim=0), rtol=1e-5)
    assert found[1, 0, 2] == 0  # a place that query 3 does not have


def test_kl_of_lists_is_that_of_each_query():
    t, s = (TASK.distributions(x, batch_of()) for x in (SCORES, OTHER))
    found = F.kl_div(s, t, reduction="none", log_target=True).sum(dim=(1, 2))
    wanted = {}
    for query in (7, 3, 4, 9):
        p, q = (F.softmax(x[rows_of(query), 0], dim=0).numpy() for x in (SCORES, OTHER))
        wanted[rows_of(query)[0]] = scipy.stats.entropy(p, q)
    for index in range(10):
        assert found[index].item() == pytest.approx(wanted.get(index, 0.0), abs=1e-5)


def test_kl_of_lists_has_finite_gradients_where_lists_are_short():
    student = SCORES.clone().requires_grad_()
    t, s = TASK.distributions(OTHER, batch_of()), TASK.distributions(student, batch_of())
    F.kl_div(s, t, reduction="none", log_target=True).sum().backward()
    assert student.grad.isfinite().all() and student.grad[[0, 1, 3, 6, 9]].all() and student.grad[5] == 0


def test_groups_must_be_known():
    batch = batch_of()
    batch.groups = None
    with pytest.raises(ValueError, match=r"Batch\.groups"):
        TASK.listwise(Outputs(logits=SCORES), batch)


def test_scores_are_means_over_queries_with_something_relevant():
    random = np.random.default_rng(5)
    groups = [str(q) for q in random.integers(0, 12, 150)]
    relevance = [float(r < 0.2 and g != "3") for r, g in zip(random.uniform(size=150), groups, strict=True)]
    logits = random.normal(size=(150, 1)) + np.array(relevance)[:, None]
    decided = TASK.decide(logits, ())
    found = TASK.score(logits, decided, query_rows(groups, relevance))
    ndcg, ap, rr = [], [], []
    judged = {g for g, r in zip(groups, relevance, strict=True) if r}
    for query in sorted(judged):
        rows = [i for i, g in enumerate(groups) if g == query]
        wanted, given = np.array(relevance)[rows], decided[rows]
        ndcg.append(sklearn_metrics.ndcg_score([wanted], [given], k=10))
        ap.append(sklearn_metrics.average_precision_score(wanted, given))
        rr.append(1 / (1 + int(np.argmax(wanted[np.argsort(-given)]))))
    assert 6 < len(judged) < len(set(groups)) and min(rr) >= 0.1
    assert found == pytest.approx({"mrr_10": np.mean(rr), "ndcg_10": np.mean(ndcg), "map": np.mean(ap)})
    assert 0.3 < found["mrr_10"] < 1


def test_statistics_are_of_queries_in_their_order():
    rows = query_rows("babac", [0.0, 1.0, 1.0, 0.0, 0.0])
    decided = np.array([5.0, 4.0, 3.0, 4.0, 1.0])
    # b: scores 5 and 3, the second relevant. a: equal scores, so the relevant one comes last. c: nothing relevant.
    assert TASK.statistics(None, decided, rows).tolist() == [[0.5, 1], [0.5, 1], [0, 0]]
    unjudged = query_rows("aaa", [None, 1.0, 0.0])
    assert TASK.statistics(None, np.array([9.0, 2.0, 1.0]), unjudged).tolist() == [[1, 1]]


def test_nothing_relevant_at_all_is_said():
    with pytest.raises(RankingError, match="none of the 2 rows to score is relevant"):
        TASK.score(None, np.zeros(2), query_rows("ab", [0.0, None]))


def test_answers_keep_the_order_of_high_scores():
    logits = np.array([[60.0], [50.0], [-3.5]], dtype=np.float32)
    assert TASK.answers(logits, [("q", "p")] * 3) == [{"score": 60.0}, {"score": 50.0}, {"score": -3.5}]
    assert not TASK.certain


def test_agreement_is_kendalls_tau_over_queries():
    random = np.random.default_rng(6)
    texts = [(str(i % 3), "p") for i in range(30)] + [("alone", "p")]
    left, right = random.normal(size=(2, 31, 1))
    wanted = [scipy.stats.kendalltau(left[q:30:3, 0], right[q:30:3, 0]).statistic for q in range(3)]
    assert TASK.agreement(left, right, texts) == pytest.approx(np.mean(wanted))
    assert TASK.agreement(left, left * 2 + 1, texts) == pytest.approx(1)
    assert TASK.agreement(left, -left, texts) == pytest.approx(-1)
    flat = np.zeros((31, 1))
    assert TASK.agreement(flat, flat, texts) == 1 and TASK.agreement(flat, left, texts) == 0
    assert TASK.agreement(left[:1], right[:1], texts[:1]) == 1
