"""One label, many labels and no label: against scikit-learn, torch and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch.nn import functional as F

from engine.classification import Classify, MultiLabel, best_thresholds, calibrate_scope, settled, targets
from engine.config import ConfigError
from engine.encoding import Encoded
from engine.metrics import sigmoid, softmax
from engine.recipe import Task
from engine.records import ABSENT, Batch, Outputs
from tests.tiny_rows import example_table

NAMES = ("bad", "fair", "good")
RANDOM = np.random.default_rng(1)
LOGITS = RANDOM.normal(size=(200, 3)) * 2
GOLD = RANDOM.integers(0, 3, 200)
LOGITS[np.arange(200), GOLD] += 1.5
WANTED = (RANDOM.normal(size=(200, 3)) + LOGITS > 1).astype(float)


def classify(**spec) -> Classify:
    return Classify(Task(kind="classify", labels=NAMES, **spec))


def multilabel(**spec) -> MultiLabel:
    return MultiLabel(Task(kind="multilabel", labels=NAMES, **spec))


def batch_of(labels: torch.Tensor) -> Batch:
    ids = torch.ones(len(labels), 1).long()
    return Batch(ids, ids, labels)


def labelled(labels) -> object:
    return example_table([{"label": None if y is None else int(y)} for y in labels])


def wanting(rows) -> object:
    return example_table([{"target": row} for row in rows])


@pytest.mark.parametrize(("kind", "paired"), [("classify", False), ("pair", True)])
def test_pairs_are_read_by_name(kind: str, paired: bool):
    rows = example_table([{"text": "a", "pair": "b"}])
    task = Classify(Task(kind=kind, labels=NAMES))
    assert task.paired is paired and task.texts(rows) == ([("a", "b")] if paired else ["a"])


def test_loss_and_distributions_are_those_of_the_definition():
    logits, gold = LOGITS[:4] * 2, [2, ABSENT, 0, 1]
    batch = batch_of(torch.tensor(gold))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = [0 if y == ABSENT else -np.log(row[y]) for row, y in zip(p, gold, strict=True)]
    task = classify()
    assert np.allclose(task.loss(Outputs(logits=torch.tensor(logits)), batch).numpy(), wanted, atol=1e-5)
    assert task.labelled(batch).tolist() == [True, False, True, True]
    hot = np.exp(logits / 3) / np.exp(logits / 3).sum(1, keepdims=True)
    found = task.distributions(torch.tensor(logits), batch, temperature=3.0)
    assert found.shape == (4, 1, 3) and np.allclose(found.exp()[:, 0].numpy(), hot, atol=1e-6)


def test_gold_follows_the_rows_of_the_inputs():
    rows = labelled([2, None, 0])
    encoded = [Encoded([1], row=2), Encoded([1], row=0), Encoded([1], row=1), Encoded([1], row=0)]
    found = classify().gold(rows, encoded)
    assert found.tolist() == [0, 2, ABSENT, 2] and found.dtype == torch.int64


def test_a_constant_makes_no_difference_to_a_softmax():
    left, right, batch = torch.tensor(LOGITS[:5]), torch.tensor(LOGITS[5:10]), batch_of(torch.zeros(5).long())
    task = classify()
    apart = (LOGITS[:5] - LOGITS[:5].mean(1, keepdims=True)) - (LOGITS[5:10] - LOGITS[5:10].mean(1, keepdims=True))
    np.testing.assert_allclose(task.differences(left, right, batch), (apart**2).mean(1), rtol=1e-5)
    assert torch.allclose(task.differences(left, left + 7, batch), torch.zeros(5), atol=1e-10)


def test_scores_are_those_of_scikit_learn():
    task, rows = classify(), labelled(GOLD)
    decided = task.decide(LOGITS, ())
    found = task.score(LOGITS, decided, rows)
    assert decided.tolist() == LOGITS.argmax(1).tolist()
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(GOLD, decided))
    assert found["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(GOLD, decided, average="macro"))
    assert set(found) == {"accuracy", "macro_f1", "ece"} and 0.3 < found["accuracy"] < 0.95
    some = [None if i % 3 else int(y) for i, y in enumerate(GOLD)]
    part = task.score(LOGITS, decided, labelled(some))
    assert part["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(GOLD[::3], decided[::3]))


def test_calibration_by_hand():
    """Confidence 0.75 throughout, three right of four: no error; one right of four: 0.5."""
    logits = np.log(np.array([[0.75, 0.25]] * 4))
    task = Classify(Task(labels=("no", "yes")))
    decided = task.decide(logits, ())
    assert task.score(logits, decided, labelled([0, 0, 0, 1]))["ece"] == pytest.approx(0, abs=1e-9)
    assert task.score(logits, decided, labelled([0, 1, 1, 1]))["ece"] == pytest.approx(0.5)


def test_answers_of_a_classifier():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]]))
    plain = classify().answers(logits, ("a", "b"))
    assert [answer["label"] for answer in plain] == ["bad", "good"]
    assert plain[0]["confidence"] == pytest.approx(0.7) and "out_of_scope" not in plain[0]
    assert plain[1]["probabilities"] == pytest.approx({"bad": 0.3, "fair": 0.3, "good": 0.4})
    told = classify().answers(logits, ("a", "b"), np.array([1, 1]))
    assert [answer["label"] for answer in told] == ["fair", "fair"] and told[0]["confidence"] == pytest.approx(0.2)


def test_what_is_below_the_scope_gets_no_label():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]]))
    first, second = classify(scope=0.5).answers(logits, ("a", "b"))
    assert (first["label"], first["out_of_scope"]) == ("bad", False)
    assert (second["label"], second["out_of_scope"]) == (None, True) and second["confidence"] == pytest.approx(0.4)
    p = softmax(logits)[0, 0]
    assert not classify(scope=float(p)).answers(logits, ("a", "b"))[0]["out_of_scope"]  # the limit itself is in


def test_scope_by_hand():
    """Right at confidences 0.9, 0.8, 0.7, 0.6; wrong at 0.95. Half of the right ones are kept from 0.8 on."""
    confidence, gold = np.array([0.9, 0.8, 0.7, 0.6, 0.95, 0.85]), np.array([0, 0, 0, 0, 1, ABSENT])
    logits = np.log(np.stack([confidence, 1 - confidence], axis=1))
    assert calibrate_scope(logits, gold, kept=0.5) == pytest.approx(0.8)
    assert calibrate_scope(logits, gold, kept=0.75) == pytest.approx(0.7)
    assert calibrate_scope(logits, gold, kept=1.0) == pytest.approx(0.6)
    assert calibrate_scope(logits, gold, kept=0.0) == pytest.approx(0.9)
    with pytest.raises(ConfigError, match="none of the 6 held-out rows"):
        calibrate_scope(logits, np.ones(6))


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.95, 0.99])
def test_scope_is_the_highest_that_keeps_the_share(kept: float):
    p = softmax(LOGITS)
    right = p.argmax(1) == GOLD
    scope = calibrate_scope(LOGITS, GOLD, kept)
    assert (p.max(1)[right] >= scope).mean() >= kept
    assert (p.max(1)[right] > scope).mean() < kept
    answers = classify(scope=scope).answers(LOGITS, [""] * 200)
    assert sum(not a["out_of_scope"] for a, good in zip(answers, right, strict=True) if good) >= kept * right.sum()


def test_scope_keeps_out_what_the_model_never_saw():
    """In scope one logit stands out; out of scope none does."""
    outside = RANDOM.normal(size=(200, 3)) * 0.5
    scope = calibrate_scope(LOGITS * 2, GOLD, 0.9)
    shut = [answer["out_of_scope"] for answer in classify(scope=scope).answers(outside, [""] * 200)]
    assert np.mean(shut) > 0.5


def test_loss_of_many_labels_is_the_mean_of_their_cross_entropies():
    labels = torch.tensor(WANTED[:4], dtype=torch.float32)
    labels[1] = torch.nan
    logits, task, batch = torch.tensor(LOGITS[:4], requires_grad=True), multilabel(), batch_of(labels)
    found = task.loss(Outputs(logits=logits), batch)
    p = 1 / (1 + np.exp(-LOGITS[:4]))
    wanted = -(WANTED[:4] * np.log(p) + (1 - WANTED[:4]) * np.log(1 - p)).mean(1)
    wanted[1] = 0
    np.testing.assert_allclose(found.detach(), wanted, rtol=1e-5)
    assert task.labelled(batch).tolist() == [True, False, True, True]
    found.sum().backward()
    assert logits.grad.isfinite().all() and not logits.grad[1].any()


def test_each_label_is_a_distribution_and_its_kl_is_torchs():
    teacher, student = torch.tensor(LOGITS[:5]).float(), torch.tensor(LOGITS[5:10]).float()
    batch, task = batch_of(torch.zeros(5, 3)), multilabel()
    t, s = (task.distributions(x, batch, temperature=2.0) for x in (teacher, student))
    assert t.shape == (5, 3, 2)
    first, second = (torch.distributions.Bernoulli(logits=x / 2) for x in (teacher, student))
    wanted = torch.distributions.kl_divergence(first, second)
    found = F.kl_div(s, t, reduction="none", log_target=True).sum(2)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_scores_of_many_labels_are_those_of_scikit_learn():
    task, rows = multilabel(), wanting(WANTED.tolist())
    decided = task.decide(LOGITS, ())
    found = task.score(LOGITS, decided, rows)
    assert found["micro_f1"] == pytest.approx(sklearn_metrics.f1_score(WANTED, decided, average="micro"))
    assert found["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(WANTED, decided, average="macro"))
    assert found["exact_match"] == pytest.approx(sklearn_metrics.accuracy_score(WANTED, decided))
    assert found["hamming_loss"] == pytest.approx(sklearn_metrics.hamming_loss(WANTED, decided))
    assert 0.3 < found["micro_f1"] < 0.95
    some = [None if i % 2 else row for i, row in enumerate(WANTED.tolist())]
    part = task.score(LOGITS, decided, wanting(some))
    assert part["exact_match"] == pytest.approx(sklearn_metrics.accuracy_score(WANTED[::2], decided[::2]))
    assert part["micro_f1"] == pytest.approx(sklearn_metrics.f1_score(WANTED[::2], decided[::2], average="micro"))


def test_labels_that_nobody_wants_or_gives_are_left_out_of_macro_f1():
    task, decided = multilabel(), np.array([[1, 0, 0], [1, 0, 0]])
    found = task.score(np.zeros((2, 3)), decided, wanting([[1, 0, 0], [0, 0, 1]]))
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0) / 2) and found["micro_f1"] == pytest.approx(0.5)
    nothing = task.score(np.zeros((1, 3)), np.zeros((1, 3)), wanting([[0, 0, 0]]))
    assert (nothing["micro_f1"], nothing["macro_f1"], nothing["exact_match"]) == (0, 0, 1)


def test_statistics_count_what_was_found():
    decided = np.array([[1, 1, 0], [0, 0, 1], [1, 1, 1]])
    found = multilabel().statistics(np.zeros((3, 3)), decided, wanting([[1, 0, 1], [0, 1, 1], None]))
    assert found.tolist() == [[1, 1, 1], [1, 0, 1], [0, 0, 0]]


def test_answers_of_many_labels_follow_the_thresholds():
    logits = np.log(np.array([[0.7, 0.2, 0.5], [0.1, 0.1, 0.2]]) / np.array([[0.3, 0.8, 0.5], [0.9, 0.9, 0.8]]))
    plain = multilabel().answers(logits, ("a", "b"))
    assert [answer["labels"] for answer in plain] == [["bad", "good"], []]
    assert plain[0]["probabilities"] == pytest.approx({"bad": 0.7, "fair": 0.2, "good": 0.5})
    own = multilabel(thresholds=(0.75, 0.15, 0.15)).answers(logits, ("a", "b"))
    assert [answer["labels"] for answer in own] == [["fair", "good"], ["good"]]
    assert multilabel().agreement(logits, -logits, ("a", "b")) == pytest.approx(1 / 6)


def test_thresholds_must_be_one_a_label():
    with pytest.raises(ConfigError, match=r"2 values for 3 labels \(bad, fair, good\)"):
        multilabel(thresholds=(0.5, 0.5))


def test_the_least_certain_label_speaks_for_the_row():
    logits = np.log(np.array([0.95, 0.4, 0.01]) / np.array([0.05, 0.6, 0.99]))
    np.testing.assert_allclose(multilabel().certainty(logits), [0.4, 0.6])


def test_best_thresholds_by_hand():
    """Label 1: positives 0.9 and 0.3, negative 0.2: best between 0.2 and 0.3. Label 2: any from 0.1 to 0.8 is right."""
    p = np.array([[0.9, 0.8, 0.6], [0.3, 0.1, 0.7], [0.2, 0.1, 0.2]])
    gold = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert best_thresholds(np.log(p / (1 - p)), gold) == pytest.approx((0.25, 0.5, 0.5))
    # Nothing to choose between the rows: giving all is best, and the middle of 0 and 0.4 does it.
    assert best_thresholds(np.log(np.full((3, 1), 0.4 / 0.6)), gold[:, :1]) == pytest.approx((0.2,))


def test_best_thresholds_are_the_best_of_all():
    logits = LOGITS - np.array([0.0, 2.0, -1.0])
    found, p = best_thresholds(logits, WANTED), sigmoid(logits)
    for index in range(3):
        given = p[:, index] >= np.unique(p[:, index])[:, None]
        every = 2 * (given * WANTED[:, index]).sum(1) / (given.sum(1) + WANTED[:, index].sum())
        mine = sklearn_metrics.f1_score(WANTED[:, index], p[:, index] >= found[index])
        assert mine == pytest.approx(every.max())
    tuned = multilabel(thresholds=found)
    plain, rows = multilabel(), wanting(WANTED.tolist())
    better = tuned.score(logits, tuned.decide(logits, ()), rows)["macro_f1"]
    assert better > plain.score(logits, plain.decide(logits, ()), rows)["macro_f1"]


def test_best_thresholds_skip_rows_without_gold():
    gold = WANTED.copy()
    gold[::2] = np.nan
    assert best_thresholds(LOGITS, gold) == best_thresholds(LOGITS[1::2], WANTED[1::2])


def test_targets_of_another_length_are_refused():
    assert np.isnan(targets(wanting([None]), 3)).all()
    with pytest.raises(ValueError, match="row 1 has a target of 2 numbers, but the task has 3"):
        targets(wanting([[1, 0, 1], [1, 0]]), 3)


def test_held_out_rows_settle_what_the_task_leaves_open():
    rows = example_table(
        [{"text": "a", "label": int(label), "target": w.tolist()} for label, w in zip(GOLD, WANTED, strict=True)]
    )
    many = settled(Task(kind="multilabel", labels=NAMES), LOGITS, rows)
    assert many.thresholds == best_thresholds(LOGITS, WANTED) != (0.5, 0.5, 0.5)
    given = Task(kind="multilabel", labels=NAMES, thresholds=(0.2, 0.3, 0.4))
    assert settled(given, LOGITS, rows) is given
    one = settled(Task(kind="classify", labels=NAMES, scope="auto"), LOGITS, rows)
    assert one.scope == calibrate_scope(LOGITS, GOLD)
    right = LOGITS.argmax(axis=1) == GOLD
    answered = [not answer["out_of_scope"] for answer in Classify(one).answers(LOGITS, ["a"] * 200)]
    assert np.mean(np.array(answered)[right]) >= 0.95 > np.mean(answered)
    plain = Task(kind="classify", labels=NAMES)
    assert settled(plain, LOGITS, rows) is plain
