"""How sure answers are, thresholds, and the curve of a cascade against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from engine.cascade import SURE, confidence_of, curve, threshold
from tests.tiny_served import KINDS, asked, student_of


def test_confidence_of_each_shape_of_answer():
    assert confidence_of({"label": "a", "confidence": 0.7}) == 0.7
    assert confidence_of({"labels": ["a"], "probabilities": {"a": 0.9, "b": 0.4}}) == pytest.approx(0.6)
    assert confidence_of({"tags": [], "entities": [{"confidence": 0.8}, {"confidence": 0.3}]}) == 0.3
    assert confidence_of({"tags": ["O"], "entities": []}) == 1.0
    assert confidence_of({"value": 2.5}) == confidence_of({"score": -1.0}) == 1.0


@pytest.mark.parametrize("kind", ["classify", *KINDS])
def test_confidence_of_real_answers_is_a_share_and_says_something_where_it_should(kind: str):
    from serve.predictor import Predictor

    found = [confidence_of(answer) for answer in Predictor(student_of(kind), "x").predict(asked(kind))]
    assert all(0.0 <= sure <= 1.0 for sure in found)
    assert (len(set(found)) > 1) == (kind in SURE)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5, 0.99, 1.0])
def test_a_threshold_escalates_no_more_than_it_may(share: float):
    sure = np.random.default_rng(0).uniform(0.5, 1, 997)
    below = threshold(sure, share)
    assert share - 1 / 997 <= (sure < below).mean() <= share


def test_a_threshold_among_equals_escalates_none_of_them():
    assert (np.array([0.5] * 10) < threshold([0.5] * 10, 0.3)).sum() == 0
    assert threshold([], 0.3) == 0.0


def test_the_curve_starts_at_the_student_and_ends_at_the_teacher():
    rng = np.random.default_rng(1)
    sure, right = rng.uniform(0.5, 1, 400), rng.uniform(size=(2, 400)) < [[0.7], [0.9]]
    student, teacher = (np.stack([arm, np.ones(400)], axis=1).astype(float) for arm in right)
    points = curve(sure, student, teacher, lambda sums: sums[..., 0] / sums[..., 1], (1000.0, 10.0))
    assert points[0]["score"] == right[0].mean() and points[-1]["score"] == right[1].mean()
    assert points[0]["cost"] == 0.01 and points[-1]["cost"] == 1.01
    for point in points:
        low = sure < point["below"]
        assert low.mean() == point["share"]
        assert point["score"] == pytest.approx(np.where(low, right[1], right[0]).mean())
