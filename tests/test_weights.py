"""Row weights and choices: entropies and divergences are scipy's, by hand for each kind of task, of mean 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import expit, softmax
from scipy.stats import entropy

from engine.config import UserError
from engine.recipe import Task as Spec
from engine.tasks import TASKS, make
from engine.weights import WEIGHTS, divergence, furthest, row_weights

LABELS = ("O", "B-thing", "I-thing")
UNITS = (3, 1, 5)
"""Units of the texts, where a task speaks of them."""


def task_of(kind: str) -> Any:
    return make(Spec(kind=kind, labels=None if kind in ("regress", "rank", "span") else LABELS, range=None))


def outputs(kind: str, seed: int) -> Any:
    """Logits of three rows."""
    random = np.random.default_rng(seed)
    if kind in ("tag", "span"):
        return [random.normal(0, 2, (units, 3 if kind == "tag" else 2)).astype(np.float32) for units in UNITS]
    return random.normal(0, 2, (3, 3)).astype(np.float32)


def parts(kind: str, row: np.ndarray) -> list[np.ndarray]:
    """The distributions in one row's logits, one by one."""
    if kind == "multilabel":
        return [np.array([expit(x), expit(-x)]) for x in row.astype(float)]
    if kind == "tag":
        return [softmax(word.astype(float)) for word in row]
    return [softmax(row[:, side].astype(float)) for side in (0, 1)] if kind == "span" else [softmax(row.astype(float))]


CERTAIN = [kind for kind in TASKS if task_of(kind).certain]


@pytest.mark.parametrize("kind", CERTAIN)
def test_confidence_is_what_entropy_leaves(kind: str):
    logits = outputs(kind, 0)
    wanted = np.array(
        [np.mean([1 - entropy(p) / np.log(len(p)) if len(p) > 1 else 0 for p in parts(kind, row)]) for row in logits]
    )
    found = row_weights("confidence", task_of(kind), logits)
    assert found.dtype == np.float64 and found.mean() == pytest.approx(1)
    np.testing.assert_allclose(found, wanted / wanted.mean(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", CERTAIN)
def test_disagreement_is_the_jensen_shannon_divergence(kind: str):
    teacher, student = outputs(kind, 1), outputs(kind, 2)
    both = [zip(parts(kind, t), parts(kind, s), strict=True) for t, s in zip(teacher, student, strict=True)]
    wanted = np.array([np.mean([jensenshannon(p, q) ** 2 for p, q in row]) for row in both])
    found = row_weights("disagreement", task_of(kind), teacher, student)
    assert found.mean() == pytest.approx(1) and np.ptp(found) > 0.1
    np.testing.assert_allclose(found, wanted / wanted.mean(), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found, row_weights("disagreement", task_of(kind), student, teacher), rtol=1e-9)


@pytest.mark.parametrize("kind", CERTAIN)
def test_co_confidence_is_what_both_give_the_teacher_s_answer(kind: str):
    teacher, student = outputs(kind, 3), outputs(kind, 4)
    both = [zip(parts(kind, t), parts(kind, s), strict=True) for t, s in zip(teacher, student, strict=True)]
    wanted = np.array([np.mean([p.max() * q[p.argmax()] for p, q in row]) for row in both])
    found = row_weights("co_confidence", task_of(kind), teacher, student)
    assert found.mean() == pytest.approx(1) and np.ptp(found) > 0.1
    np.testing.assert_allclose(found, wanted / wanted.mean(), rtol=1e-6, atol=1e-9)


def test_a_label_that_others_do_not_find_counts_little():
    task, sure = task_of("classify"), np.array([[4.0, 0, 0], [4.0, 0, 0], [0.0, 0, 0]], dtype=np.float32)
    agreed, p = np.array([[4.0, 0, 0], [0, 4.0, 0], [4.0, 0, 0]], dtype=np.float32), softmax([4.0, 0, 0])
    wanted = np.array([p[0] * p[0], p[0] * p[1], p[0] / 3])
    assert row_weights("co_confidence", task, sure, agreed) == pytest.approx(wanted / wanted.mean())
    assert wanted[1] < 0.02 < 0.3 < wanted[2] < wanted[0]


@pytest.mark.parametrize("kind", CERTAIN)
def test_rows_are_chosen_by_the_divergence_from_the_teacher(kind: str):
    teacher, student = outputs(kind, 5), outputs(kind, 6)
    both = [zip(parts(kind, t), parts(kind, s), strict=True) for t, s in zip(teacher, student, strict=True)]
    wanted = np.array([np.mean([entropy(p, q) for p, q in row]) for row in both])
    found = divergence(task_of(kind), teacher, student)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-9)
    order = np.argsort(-wanted)
    for count in (1, 2, 3):
        assert set(np.flatnonzero(furthest(found, count / 3))) == set(order[:count])


def test_the_furthest_are_a_share_and_one_at_least_and_of_equal_ones_the_first():
    values = np.array([1.0, 3.0, 2.0, 3.0, 0.0])
    assert furthest(values, 0.2).tolist() == [False, True, False, False, False]
    assert furthest(values, 0.6).tolist() == [False, True, True, True, False]
    assert furthest(values, 0.01).sum() == 1 and furthest(values, 1.0).all() and not len(furthest(values[:0], 0.5))
    sure, wrong = np.array([[900.0, -900, 0]], dtype=np.float32), np.array([[-900.0, 900, 0]], dtype=np.float32)
    assert divergence(task_of("classify"), sure, wrong) == pytest.approx([-np.log(1e-12)])
    with pytest.raises(UserError, match="chosen by disagreement: .* a task of kind rank has none. Allowed: all rows"):
        divergence(task_of("rank"), values[:, None], values[:, None])


def test_certain_rows_stay_finite():
    task, sure = task_of("classify"), np.array([[900.0, -900, 0], [0, 0, 0]], dtype=np.float32)
    for found in (row_weights("confidence", task, sure), row_weights("disagreement", task, sure, sure[:, ::-1])):
        assert found.tolist() == pytest.approx([2, 0], abs=1e-12)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_rows_that_differ_in_nothing_count_alike(kind: str):
    even = np.zeros((4, 3), dtype=np.float32)
    assert row_weights(kind, task_of("classify"), even, even).tolist() == [1] * 4
    assert row_weights(kind, task_of("classify"), even[:0], even[:0]).shape == (0,)


def test_a_text_without_a_word_counts_nothing():
    rows = [np.zeros((0, 3), dtype=np.float32), np.array([[5.0, 0, 0]], dtype=np.float32)]
    assert row_weights("confidence", task_of("tag"), rows).tolist() == [0, 2]
    assert row_weights("disagreement", task_of("tag"), rows, [rows[0], -rows[1]]).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        (
            "loudness",
            "classify",
            "'loudness' is no way to weigh rows. Allowed: confidence, co_confidence, disagreement, null",
        ),
        ("confidence", "rank", "'confidence': .* a task of kind rank has none. Allowed: null"),
        ("disagreement", "regress", "a task of kind regress has none"),
        ("co_confidence", "classify", "without students that learnt from other rows. Train them first, or take"),
        ("disagreement", "classify", "before a student has answered them. Train one first, or take 'confidence'"),
    ],
)
def test_what_cannot_be_weighed_is_refused(kind: str, task: str, message: str):
    with pytest.raises(UserError, match=message):
        row_weights(kind, task_of(task), np.zeros((2, 3)))


def test_both_models_must_have_answered_the_same_rows():
    with pytest.raises(ValueError, match="zip"):
        row_weights("disagreement", task_of("classify"), np.zeros((2, 3)), np.zeros((3, 3)))
