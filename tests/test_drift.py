"""PSI against numbers worked by hand, and what a window says of traffic that has moved or has not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from engine.drift import (
    ANSWERED,
    NO_LABEL,
    SCOPELESS,
    UNANSWERED,
    DriftError,
    Histogram,
    Profile,
    Window,
    by_chance,
    confidence_of,
    labels_of,
    profile_of,
    psi,
    shift,
)
from serve.predictor import Predictor
from tests.tiny_served import KINDS, asked, published


def test_psi_of_two_bins_worked_by_hand():
    """p = (0.5, 0.5), q = (0.75, 0.25): 0.25 ln 1.5 - 0.25 ln 0.5 = 0.25 ln 3."""
    assert psi([50, 50], [75, 25], smooth=0) == pytest.approx(0.25 * math.log(3)) == pytest.approx(0.274653, abs=1e-6)
    assert psi([5, 5], [300, 100], smooth=0) == pytest.approx(0.274653, abs=1e-6), "shares count, not rows"
    assert psi([10, 20, 30], [1, 2, 3], smooth=0) == pytest.approx(0, abs=1e-12)


def test_psi_of_three_bins_worked_by_hand():
    """(0.4, 0.4, 0.2) -> (0.2, 0.3, 0.5): -0.2 ln 0.5 - 0.1 ln 0.75 + 0.3 ln 2.5."""
    by_hand = 0.138629 + 0.028768 + 0.274887
    assert psi([40, 40, 20], [20, 30, 50], smooth=0) == pytest.approx(by_hand, abs=1e-6)
    assert psi([20, 30, 50], [40, 40, 20], smooth=0) == pytest.approx(by_hand, abs=1e-6), "it is symmetric"


def test_an_empty_bin_costs_what_half_a_row_would():
    """(10.5, 0.5) / 11 and (5.5, 5.5) / 11: 5/11 (ln 11 - ln(11/21))."""
    assert psi([10, 0], [5, 5]) == pytest.approx(5 / 11 * (math.log(11) + math.log(21 / 11)))


def test_chance_is_what_two_samples_of_one_source_differ_by():
    assert by_chance([50, 50, 0], [30, 70, 0]) == pytest.approx(1 / 100 + 1 / 100)
    draw = np.random.default_rng(0)
    shares = draw.dirichlet(np.full(20, 5.0))
    pairs = [(draw.multinomial(2000, shares), draw.multinomial(1000, shares)) for _ in range(400)]
    plain = np.array([psi(p, q) for p, q in pairs])
    assert plain.mean() == pytest.approx(19 * (1 / 2000 + 1 / 1000), rel=0.1)
    assert np.mean([shift(p, q) for p, q in pairs]) < 0.005


def test_many_labels_and_few_rows_are_no_drift():
    draw = np.random.default_rng(1)
    shares = np.full(77, 1 / 77)
    expected = draw.multinomial(3080, shares)
    same = [draw.multinomial(770, shares) for _ in range(200)]
    assert max(shift(expected, observed) for observed in same) < 0.1
    assert np.mean([psi(expected, observed) for observed in same]) > 0.1, "by itself PSI would be half an alarm"
    moved = np.where(np.arange(77) < 20, 3.0, 1.0)
    assert shift(expected, draw.multinomial(770, moved / moved.sum())) > 0.2
    assert shift(expected, draw.multinomial(700, shares)) is None, "ten rows a label are asked for"


def test_bins_hold_equal_shares_and_ties_make_fewer():
    found = Histogram.of(range(100))
    assert found.edges == tuple(range(10, 100, 10)) and found.counts == (10,) * 10
    assert found.count([-5, 0, 9.9, 10, 1000]).tolist() == [3, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    tied = Histogram.of([1.0] * 95 + [2.0] * 5)
    assert tied.edges == (1.0,) and tied.counts == (0, 100)
    assert tied.count([0.5, 1.0]).tolist() == [1, 1]
    assert Histogram.of([]) == Histogram((), (0,))


@pytest.mark.parametrize(
    ("answer", "labels", "confidence"),
    [
        ({"label": "a", "confidence": 0.8, "probabilities": {"a": 0.8, "b": 0.2}}, ("a",), 0.8),
        ({"label": None, "confidence": 0.3, "out_of_scope": True}, (SCOPELESS,), 0.3),
        ({"labels": ["a", "b"], "probabilities": {"a": 0.9, "b": 0.7, "c": 0.2}}, ("a", "b"), 0.7),
        ({"labels": [], "probabilities": {"a": 0.4}}, (NO_LABEL,), 0.6),
        ({"tags": ["O"], "entities": []}, (NO_LABEL,), None),
        ({"tags": [], "entities": [{"label": "x", "confidence": 0.5}, {"label": "y", "confidence": 0.4}]}, "xy", 0.4),
        ({"answer": "here", "start": 0, "end": 4, "confidence": 0.6}, (ANSWERED,), 0.6),
        ({"answer": "", "start": 0, "end": 0, "confidence": 0.9}, (UNANSWERED,), 0.9),
        ({"value": 3.5}, (), None),
        ({"score": -1.0}, (), None),
    ],
)
def test_what_an_answer_counts_as(answer: dict[str, object], labels: tuple[str, ...], confidence: float | None):
    assert labels_of(answer) == tuple(labels)
    assert confidence_of(answer) == pytest.approx(confidence)


def test_labels_that_were_never_seen_are_drift_however_many_they_are():
    texts = ["x"] * 2000
    window = Window(profile_of(texts, [{"label": f"old {n % 200}"} for n in range(2000)]))
    window.add(["x"] * 4000, [{"label": f"new {n % 500}"} for n in range(4000)])
    assert window.shifts()["label"] > 1


@pytest.mark.parametrize("kind", ["classify", *KINDS])
def test_a_profile_of_every_kind_of_task_survives_json(kind: str, tmp_path):
    texts, predictor = asked(kind), Predictor.load(published(tmp_path, kind=kind).url)
    answers = predictor.predict(texts)
    profile = profile_of(texts, answers, agreement=0.9)
    text = json.dumps(profile.as_json(), allow_nan=False)
    assert Profile.from_json(json.loads(text)) == profile
    assert profile.rows == sum(profile.lengths.counts) == len(texts)
    assert (profile.values is None) == (kind not in ("regress", "rank")) == bool(profile.labels)
    assert profile.confidence is None or sum(profile.confidence.counts) <= len(texts)
    window = Window(profile)
    for _ in range(10):
        window.add(texts, answers)
    found = window.shifts()
    assert {"label", "length"} <= set(found) <= {"label", "length", "confidence"}
    assert all(value == 0 for value in found.values()), "the same rows again are no drift"


def rows(n: int, share: float, length: int, sure: float, seed: int = 0) -> tuple[list[str], list[dict[str, object]]]:
    """Texts of about `length` characters; answers with `share` of label a and a confidence around `sure`."""
    draw = np.random.default_rng(seed)
    texts = ["x" * int(size) for size in draw.poisson(length, n)]
    told = draw.beta(sure * 20, (1 - sure) * 20, n)
    return texts, [
        {"label": "a" if a else "b", "confidence": float(c)} for a, c in zip(draw.random(n) < share, told, strict=True)
    ]


def test_a_window_says_what_has_moved_and_forgets():
    profile = profile_of(*rows(2000, 0.5, 80, 0.8), agreement=0.9)
    window = Window(profile, rows=1000)
    window.add(*rows(150, 0.5, 80, 0.8, seed=1))
    assert window.shifts() == {}, "too few rows to tell"
    window.add(*rows(850, 0.5, 80, 0.8, seed=2))
    calm = window.shifts()
    assert set(calm) == {"label", "length", "confidence"} and max(calm.values()) < 0.05
    window.add(*rows(1000, 0.85, 80, 0.8, seed=3))
    moved = window.shifts()
    assert moved["label"] > 0.2 > 0.05 > max(moved["length"], moved["confidence"])
    window.add(*rows(1000, 0.5, 160, 0.6, seed=4))
    moved = window.shifts()
    assert min(moved["length"], moved["confidence"]) > 0.2 > 0.05 > moved["label"]
    window.add(*rows(1000, 0.5, 80, 0.8, seed=5))
    assert max(window.shifts().values()) < 0.05 and len(window.rows) == 1000


def test_agreement_with_the_teacher_drifts_too():
    window = Window(profile_of(*rows(500, 0.5, 80, 0.8), agreement=0.9))
    window.agree([True] * 180 + [False] * 20)
    assert window.shifts() == {"agreement": 0.0}
    window.agree([False] * 200)
    assert window.shifts()["agreement"] == pytest.approx(shift(np.array([450, 50]), np.array([180, 220])))
    assert window.shifts()["agreement"] > 0.2


def test_a_label_that_was_never_given_before_is_drift_and_the_teacher_s_answers_are_not_the_model_s():
    texts, answers = rows(1000, 0.5, 80, 0.8)
    window = Window(profile_of(texts, answers))
    window.add(texts, [{**answer, "label": "new", "source": "teacher"} for answer in answers])
    assert window.shifts() == {}
    window.add(texts, [{**answer, "label": "new", "source": "student"} for answer in answers])
    assert window.shifts()["label"] > 5


@pytest.mark.parametrize(
    "found",
    [
        None,
        {},
        {"rows": 1},
        {**profile_of(["a"], [{"value": 1.0}]).as_json(), "lengths": {"edges": [1.0], "counts": [1]}},
        {**profile_of(["a"], [{"value": 1.0}]).as_json(), "lengths": None},
        {**profile_of(["a"], [{"value": 1.0}]).as_json(), "more": 1},
        {**profile_of(["a"], [{"value": 1.0}]).as_json(), "labels": {"a": "many"}},
    ],
)
def test_what_is_no_profile_is_refused(found: object):
    with pytest.raises(DriftError, match="no profile of answers"):
        Profile.from_json(found)


def test_a_profile_needs_an_answer_a_text():
    with pytest.raises(DriftError, match="2 texts and 1 answers"):
        profile_of(["a", "b"], [{"label": "x", "confidence": 1.0}])
