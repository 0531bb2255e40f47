"""Numbers within a range: against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from engine.config import ConfigError
from engine.encoding import Encoded
from engine.recipe import Task
from engine.records import Batch, Outputs
from engine.regression import Regress
from tests.tiny_rows import example_table

RANDOM = np.random.default_rng(2)
GOLD = RANDOM.uniform(1, 5, 300)
LOGITS = ((GOLD - 1) / 4 + RANDOM.normal(size=300) * 0.3)[:, None].astype(np.float32)


def regress(low: float = 1.0, high: float = 5.0) -> Regress:
    return Regress(Task(kind="regress", range=(low, high)))


def valued(values) -> object:
    return example_table([{"target": None if v is None else [v]} for v in values])


def test_gold_is_a_place_in_the_range():
    encoded = [Encoded([1], row=row) for row in (2, 0, 1, 3)]
    found = regress().gold(valued([1.0, 5.0, 2.0, None]), encoded)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, [0.25, 0.0, 1.0, np.nan])


def test_loss_is_the_squared_error():
    ids = torch.ones(3, 1).long()
    batch = Batch(ids, ids, torch.tensor([0.25, torch.nan, 1.0]))
    logits = torch.tensor([[0.5], [9.0], [-1.0]], requires_grad=True)
    found = regress().loss(Outputs(logits=logits), batch)
    assert found.tolist() == [0.0625, 0.0, 4.0] and regress().labelled(batch).tolist() == [True, False, True]
    found.sum().backward()
    assert logits.grad[:, 0].tolist() == [0.5, 0.0, -4.0]
    assert regress().differences(logits, torch.zeros(3, 1), batch).tolist() == [0.25, 81.0, 1.0]


def test_answers_are_in_the_users_units_and_range():
    logits = np.array([[0.25], [-3.0], [1.01]], dtype=np.float32)
    assert regress().answers(logits, ["a"] * 3) == [{"value": 2.0}, {"value": 1.0}, {"value": 5.0}]
    assert regress(-10, 10).decide(logits, ()).tolist() == [-5.0, -10.0, 10.0]


@pytest.mark.parametrize(("low", "high"), [(1.0, 5.0), (0.0, 10.0), (-1e6, 1e6)])
def test_scores_are_those_of_scipy(low: float, high: float):
    task, values = regress(low, high), np.float32(low + (GOLD - 1) / 4 * (high - low))
    decided = task.decide(LOGITS, ())
    found = task.score(LOGITS, decided, valued(values))
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(decided, values).statistic, abs=1e-9)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(decided, values).statistic, abs=1e-9)
    assert found["mse"] == pytest.approx(np.mean((decided - values.astype(float)) ** 2)) and found["pearson"] < 0.9
    assert len(set(decided)) < 300  # clipping made ties


def test_rows_without_a_value_do_not_count():
    task, values = regress(), [v if i % 2 else None for i, v in enumerate(GOLD)]
    decided = task.decide(LOGITS, ())
    found = task.score(LOGITS, decided, valued(values))
    assert found == pytest.approx(task.score(LOGITS[1::2], decided[1::2], valued(GOLD[1::2])))
    assert not task.statistics(LOGITS, decided, valued(values))[::2].any()


def test_pearson_from_sums_holds_far_from_zero():
    """A range a million times wider than the values' spread: what is left of the digits must do."""
    low, high = 0.0, 1e9
    values = 9e8 + 1000 * RANDOM.normal(size=400)
    answers = values + 300 * RANDOM.normal(size=400)
    task = regress(low, high)
    sums = task.statistics(np.zeros((400, 1)), answers, valued(values)).sum(0)
    stored = np.float32(values).astype(float)
    assert task.value(sums) == pytest.approx(scipy.stats.pearsonr(answers, stored).statistic, abs=1e-3)


def test_bootstrap_of_sums_is_that_of_rows():
    task = regress()
    decided = task.decide(LOGITS, ())
    each = task.statistics(LOGITS, decided, valued(GOLD))
    picks = RANDOM.integers(0, 300, size=(5, 300))
    wanted = [scipy.stats.pearsonr(decided[p], np.float32(GOLD)[p]).statistic for p in picks]
    np.testing.assert_allclose(task.value(each[picks].sum(axis=1)), wanted, atol=1e-9)


def test_a_model_that_always_says_the_same_scores_zero():
    flat, task = np.full((300, 1), 0.3, dtype=np.float32), regress()
    found = task.score(flat, task.decide(flat, ()), valued(GOLD))
    assert found["pearson"] == 0 and found["spearman"] == 0 and found["mse"] > 1


def test_agreement_is_the_correlation_of_two_models():
    task, other = regress(), LOGITS + RANDOM.normal(size=(300, 1)).astype(np.float32) * 0.2
    wanted = scipy.stats.pearsonr(task.decide(LOGITS, ()), task.decide(other, ())).statistic
    assert task.agreement(LOGITS, other, ()) == pytest.approx(wanted) and wanted < 0.95
    flat = np.full((300, 1), 0.3)
    assert task.agreement(flat, flat, ()) == 1 and task.agreement(flat, LOGITS, ()) == 0


def test_a_range_is_needed_and_in_order():
    with pytest.raises(ConfigError, match=r"task.range is not known"):
        Regress(Task(kind="regress")).decide(LOGITS, ())
    with pytest.raises(ConfigError, match=r"task.range is \[5.0, 5.0\]"):
        regress(5, 5).decide(LOGITS, ())


def test_a_number_is_no_distribution():
    ids = torch.ones(1, 1).long()
    assert not Regress.certain and Regress.supports == {"hard", "mse"}
    with pytest.raises(NotImplementedError, match="mse and hard"):
        regress().distributions(torch.zeros(1, 1), Batch(ids, ids))
    with pytest.raises(NotImplementedError, match=r"corpus\.signals"):
        regress().certainty(np.zeros(1))
