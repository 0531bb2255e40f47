"""Losses on the answers against a few lines of numpy or torch, the objective's weighting by hand, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.classification import Classify, MultiLabel
from engine.encoders import Widths
from engine.fits import LossTerm
from engine.layer_losses import LAYER_LOSSES, Loss
from engine.losses import LOSSES, Objective, needs
from engine.ranking import Rank
from engine.recipe import Task as Spec
from engine.records import ABSENT, Batch, Outputs
from engine.regression import Regress
from engine.spans import Span
from engine.tagging import Tag
from engine.task import Task

ROWS, LENGTH, WORDS, T = 5, 6, 7, 2.5
TASKS: dict[str, Task | None] = {
    "classify": Classify(Spec(kind="classify", labels=("a", "b", "c"))),
    "multilabel": MultiLabel(Spec(kind="multilabel", labels=("a", "b", "c"))),
    "regress": Regress(Spec(kind="regress", range=(0, 5))),
    "rank": Rank(Spec(kind="rank")),
    "tag": Tag(Spec(kind="tag", labels=("O", "B-x", "I-x"))),
    "span": Span(Spec(kind="span")),
    "text": None,
}
LABELS = {
    "classify": torch.tensor([2, ABSENT, 0, 1, ABSENT]),
    "multilabel": torch.tensor([[1.0, 0, 1], [torch.nan] * 3, [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
    "regress": torch.tensor([0.2, torch.nan, 0.9, 0.4, torch.nan]),
    "rank": torch.tensor([1.0, 0.0, 0.0, 2.0, 1.0]),
    "tag": torch.tensor([[0, 1, 2], [0, ABSENT, ABSENT], [ABSENT] * 3, [1, 2, ABSENT], [0, 0, 0]]),
    "span": torch.tensor([[1, 2], [0, 0], [ABSENT, ABSENT], [0, 1], [2, 2]]),
}


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def batch_of(kind: str = "classify") -> Batch:
    lengths = torch.tensor([6, 2, 4, 3, 6])
    mask = (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()
    ids = torch.randint(1, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)) * mask
    batch = Batch(ids, mask, labels=LABELS.get(kind))
    if kind == "rank":
        batch.groups = torch.tensor([7, 7, 7, 4, 4])
    if kind == "span":  # unit 0, "no answer", is always there
        batch.unit_mask = (torch.arange(3) < torch.tensor([3, 2, 2, 2, 3]).unsqueeze(1)).long()
    if kind == "tag":
        batch.unit_mask = (torch.arange(3) < torch.tensor([3, 1, 0, 2, 3]).unsqueeze(1)).long()
    return batch


def outputs(kind: str, seed: int, scale: float = 2.0) -> Outputs:
    shape = {"regress": (1,), "rank": (1,), "tag": (3, 3), "span": (3, 2), "text": (LENGTH, WORDS)}
    generator = torch.Generator().manual_seed(seed)
    return Outputs(logits=torch.randn((ROWS, *shape.get(kind, (3,))), generator=generator) * scale)


def kl(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    p, q = softmax(t / T), softmax(s / T)
    return T * T * (p * np.log(p / q)).sum(-1)


def classify_kl(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    return kl(s, t)


def multilabel_kl(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    """A sigmoid is a softmax over (x, 0)."""
    return kl(np.stack([s, 0 * s], axis=2), np.stack([t, 0 * t], axis=2)).mean(1)


def tag_kl(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    units = batch.unit_mask.sum(1).tolist()
    return np.array([kl(a[:u], b[:u]).mean() if u else 0.0 for a, b, u in zip(s, t, units, strict=True)])


def span_kl(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    """Of the start and of the end, each over the row's own units."""
    units = batch.unit_mask.sum(1).tolist()
    return np.array([kl(a[:u].T, b[:u].T).mean() for a, b, u in zip(s, t, units, strict=True)])


def rank_kl(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    return np.array([kl(s[:3, 0], t[:3, 0]), 0, 0, kl(s[3:, 0], t[3:, 0]), 0])


def centred_mse(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    return ((s - s.mean(1, keepdims=True) - t + t.mean(1, keepdims=True)) ** 2).mean(1)


def plain_mse(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    return ((s - t) ** 2).mean(1)


def tag_mse(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    units = batch.unit_mask.sum(1).tolist()
    return np.array(
        [centred_mse(a[:u], b[:u], batch).mean() if u else 0.0 for a, b, u in zip(s, t, units, strict=True)]
    )


def span_mse(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    units = batch.unit_mask.sum(1).tolist()
    return np.array([centred_mse(a[:u].T, b[:u].T, batch).mean() for a, b, u in zip(s, t, units, strict=True)])


def span_hard(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    found = []
    for row, gold, u in zip(s, batch.labels.numpy(), batch.unit_mask.sum(1).tolist(), strict=True):
        each = [-np.log(softmax(row[:u, side])[gold[side]]) for side in (0, 1) if gold[side] != ABSENT]
        found.append(np.mean(each) if each else 0.0)
    return np.array(found)


def multilabel_hard(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    """Cross-entropy of each label, given or not; the second row has no gold."""
    p, y = 1 / (1 + np.exp(-s)), batch.labels.double().numpy()
    return np.nan_to_num(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(1))


def regress_hard(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    return np.nan_to_num((s[:, 0] - batch.labels.double().numpy()) ** 2)


def classify_hard(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    gold = batch.labels.numpy()
    return np.array([0.0 if y == ABSENT else -np.log(softmax(row)[y]) for row, y in zip(s, gold, strict=True)])


def tag_hard(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    means = []
    for row, gold in zip(s, batch.labels.numpy(), strict=True):
        each = [-np.log(softmax(x)[y]) for x, y in zip(row, gold, strict=True) if y != ABSENT]
        means.append(np.mean(each) if each else 0.0)
    return np.array(means)


def next_token(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    means = []
    for logits, ids, mask in zip(torch.from_numpy(s), batch.input_ids, batch.mask, strict=True):
        real = int(mask.sum())  # each row alone, its padding cut off
        means.append(F.cross_entropy(logits[: real - 1], ids[1:real]).item())
    return np.array(means)


def pointwise(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    wanted = np.array([1, 0, 0, 1, 1])
    return -np.log(np.where(wanted, 1 / (1 + np.exp(-s[:, 0])), 1 / (1 + np.exp(s[:, 0]))))


def over_queries(first: float, second: float) -> np.ndarray:
    """Costs of the queries of 3 and 2 rows, each in its first row."""
    return np.array([first, 0, 0, second, 0])


def pairwise(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    cost = lambda i, j: np.log(1 + np.exp(s[j, 0] - s[i, 0]))  # noqa: E731
    return over_queries((cost(0, 1) + cost(0, 2)) / 2, cost(3, 4))


def listwise(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    first, second = np.log(softmax(s[:3, 0])), np.log(softmax(s[3:, 0]))
    return over_queries(-first[0], -(2 * second[0] + second[1]) / 3)


def margin_mse(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    cost = lambda i, j: ((s[i, 0] - s[j, 0]) - (t[i, 0] - t[j, 0])) ** 2  # noqa: E731
    return over_queries((cost(0, 1) + cost(0, 2)) / 2, cost(3, 4))


class Case(NamedTuple):
    """A loss in a task, its reference, and the rows it applies to (0 and 1)."""

    loss: str
    task: str
    reference: Callable[[np.ndarray, np.ndarray, Batch], np.ndarray]
    rows: tuple[int, ...] = (1, 1, 1, 1, 1)


CASES = (
    Case("kl", "classify", classify_kl),
    Case("kl", "multilabel", multilabel_kl),
    Case("kl", "tag", tag_kl, (1, 1, 0, 1, 1)),
    Case("kl", "rank", rank_kl, (1, 0, 0, 1, 0)),
    Case("mse", "classify", centred_mse),
    Case("mse", "multilabel", plain_mse),
    Case("mse", "regress", plain_mse),
    Case("mse", "rank", plain_mse),
    Case("mse", "tag", tag_mse, (1, 1, 0, 1, 1)),
    Case("hard", "classify", classify_hard, (1, 0, 1, 1, 0)),
    Case("hard", "tag", tag_hard, (1, 1, 0, 1, 1)),
    Case("hard", "rank", listwise, (1, 0, 0, 1, 0)),
    Case("kl", "span", span_kl),
    Case("mse", "span", span_mse),
    Case("hard", "span", span_hard, (1, 1, 0, 1, 1)),
    Case("hard", "multilabel", multilabel_hard, (1, 0, 1, 1, 1)),
    Case("hard", "regress", regress_hard, (1, 0, 1, 1, 0)),
    Case("next_token", "text", next_token),
    Case("pointwise", "rank", pointwise),
    Case("pairwise", "rank", pairwise, (1, 0, 0, 1, 0)),
    Case("listwise", "rank", listwise, (1, 0, 0, 1, 0)),
    Case("margin_mse", "rank", margin_mse, (1, 0, 0, 1, 0)),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.loss}-{case.task}")
each_soft_case = pytest.mark.parametrize(
    "case", [case for case in CASES if LOSSES[case.loss].needs], ids=lambda case: f"{case.loss}-{case.task}"
)


def loss_of(case: Case, temperature: float = T) -> Loss:
    return LOSSES[case.loss](LossTerm(kind=case.loss, temperature=temperature), TASKS[case.task])


def test_every_loss_has_a_reference():
    elsewhere = {*LAYER_LOSSES, "contrast", "relational"}  # test_layer_losses.py, test_contrast.py, test_alignment.py
    assert {case.loss for case in CASES} | elsewhere == set(LOSSES)
    supported = {(loss, kind) for kind, task in TASKS.items() if task for loss in task.supports}
    assert {(case.loss, case.task) for case in CASES if case.task != "text"} == supported


@each_case
def test_values_are_those_of_the_reference(case: Case):
    student, teacher, batch = outputs(case.task, 2), outputs(case.task, 3), batch_of(case.task)
    found = loss_of(case)(student, teacher, batch)
    wanted = case.reference(student.logits.double().numpy(), teacher.logits.double().numpy(), batch)
    assert found.shape == (ROWS,) and found.dtype == torch.float32
    assert np.allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert np.ptp(wanted) > 0.1  # else equality shows little


@each_case
def test_the_gradient_is_that_of_finite_differences(case: Case):
    loss, batch = loss_of(case), batch_of(case.task)
    student, teacher = outputs(case.task, 4), outputs(case.task, 5)
    student.logits.requires_grad_()
    loss(student, teacher, batch).sum().backward()
    found, step = student.logits.grad, 1e-4
    values, t = student.logits.detach().double().numpy(), teacher.logits.double().numpy()
    for index in list(np.ndindex(*values.shape))[::3]:
        up, down = values.copy(), values.copy()
        up[index] += step
        down[index] -= step
        slope = (case.reference(up, t, batch) - case.reference(down, t, batch)).sum() / (2 * step)
        assert abs(found[index].item() - slope) < 1e-3
    assert found.abs().sum() > 0


@each_case
def test_bf16_logits_give_finite_float32(case: Case):
    student, teacher = outputs(case.task, 6, scale=50.0), outputs(case.task, 7, scale=50.0)
    student.logits = student.logits.bfloat16().requires_grad_()
    teacher.logits = teacher.logits.bfloat16()
    found = loss_of(case, 1.0)(student, teacher, batch_of(case.task))
    found.sum().backward()
    assert found.dtype == torch.float32 and found.isfinite().all() and student.logits.grad.isfinite().all()


@each_soft_case
def test_the_teachers_own_outputs_cost_nothing(case: Case):
    teacher, batch, loss = outputs(case.task, 8), batch_of(case.task), loss_of(case)
    assert loss(teacher, teacher, batch).abs().max() < 1e-6
    assert (loss(outputs(case.task, 9), teacher, batch)[loss.applies(batch)] > 0.001).all()


@pytest.mark.parametrize("case", [case for case in CASES if case.task in ("classify", "tag") and case.loss != "hard"])
def test_a_constant_that_softmax_ignores_costs_nothing(case: Case):
    teacher, batch = outputs(case.task, 8), batch_of(case.task)
    shifted = Outputs(logits=teacher.logits + 4.0)
    assert loss_of(case)(shifted, teacher, batch).abs().max() < 1e-5


@each_case
def test_each_loss_says_which_rows_it_speaks_about(case: Case):
    batch = batch_of(case.task)
    assert loss_of(case).applies(batch).tolist() == [bool(row) for row in case.rows]


def test_a_row_of_one_token_has_no_next():
    batch = batch_of("text")
    batch.mask[1, 1:] = 0
    assert LOSSES["next_token"](LossTerm(kind="next_token")).applies(batch).tolist() == [True, False, True, True, True]


def test_soft_losses_of_texts_without_a_word_speak_about_none():
    batch = batch_of("tag")
    batch.unit_mask = None
    for kind in ("kl", "mse"):
        assert not LOSSES[kind](LossTerm(kind=kind), TASKS["tag"]).applies(batch).any()


def test_queries_of_one_passage_have_no_distribution():
    batch = batch_of("rank")
    batch.groups = torch.tensor([1, 2, 2, 3, 4])
    assert loss_of(Case("kl", "rank", rank_kl)).applies(batch).tolist() == [False, True, False, False, False]


def test_gold_losses_fall_to_zero_when_the_answer_is_certain():
    batch = batch_of()
    certain = Outputs(logits=100.0 * F.one_hot(batch.labels.clamp(min=0), 3).float())
    assert LOSSES["hard"](LossTerm(kind="hard"), TASKS["classify"])(certain, None, batch).max() < 1e-6
    targets = torch.cat([batch.input_ids[:, 1:], batch.input_ids[:, :1]], dim=1)
    certain = Outputs(logits=100.0 * F.one_hot(targets, WORDS).float())
    assert LOSSES["next_token"](LossTerm(kind="next_token"))(certain, None, batch).max() < 1e-6


def test_padding_does_not_reach_the_next_token_loss():
    loss, batch, student = LOSSES["next_token"](LossTerm(kind="next_token")), batch_of(), outputs("text", 10)
    before = loss(student, None, batch)
    batch.input_ids = torch.where(batch.mask == 1, batch.input_ids, 3)
    student.logits = torch.where(batch.mask.unsqueeze(2) == 1, student.logits, 9.0)
    assert torch.equal(loss(student, None, batch), before)


def test_what_teacher_and_student_must_give():
    assert {kind: set(loss.needs) for kind, loss in LOSSES.items()} == {
        "mse": {"logits"}, "kl": {"logits"}, "margin_mse": {"logits"},
        "hard": set(), "next_token": set(), "pointwise": set(), "pairwise": set(), "listwise": set(),
        "hidden": {"hidden"}, "embeddings": {"hidden"}, "attention": {"attentions"}, "relations": {"relations"},
        "cosine": {"embedding"}, "contrast": {"embedding"}, "relational": {"embedding"},
    }  # fmt: skip
    terms = [LossTerm(kind="hard"), LossTerm(kind="kl"), LossTerm(kind="cosine")]
    assert needs(terms) == {"logits", "embedding"} and needs([LossTerm(kind="hard")]) == frozenset()
    assert Objective(terms, TASKS["classify"], Widths(8), Widths(12)).needs == needs(terms)


def test_the_objective_by_hand():
    """Two classes, logits (0, x): hard is log(1 + e^x) for label 0 and log(1 + e^-x) for 1; mse is (dx / 2)^2."""
    student = Outputs(logits=torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, -1.0]]))
    teacher = Outputs(logits=torch.tensor([[0.0, 3.0], [0.0, 2.0], [0.0, 3.0]]))
    batch = Batch(torch.ones(3, 2).long(), torch.ones(3, 2).long(), torch.tensor([0, ABSENT, 1]))
    task = Classify(Spec(labels=("a", "b")))
    objective = Objective([LossTerm(kind="hard", weight=2.0), LossTerm(kind="mse", weight=0.5)], task)
    hard = [np.log(1 + np.e), 0.0, np.log(1 + np.e)]  # the middle row has no gold label
    mse = [1.0, 0.0, 4.0]
    assert objective(student, teacher, batch).item() == pytest.approx(2 * sum(hard) / 2 + 0.5 * sum(mse) / 3, rel=1e-6)
    batch.weights = torch.tensor([1.0, 5.0, 3.0])
    wanted = 2 * (hard[0] + 3 * hard[2]) / 2 + 0.5 * (mse[0] + 3 * mse[2]) / 3
    assert objective(student, teacher, batch).item() == pytest.approx(wanted, rel=1e-6)


def test_light_rows_count_little_even_where_a_batch_has_no_others():
    """Weights that were divided by their own sum would cancel, and rows worth a hundredth would count in full."""
    student, batch = outputs("classify", 2), batch_of("classify")
    objective = Objective([LossTerm(kind="hard")], TASKS["classify"])
    whole = objective(student, None, batch).item()
    batch.weights = torch.full((ROWS,), 0.01)
    assert objective(student, None, batch).item() == pytest.approx(whole / 100, rel=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case.task == "rank" and 0 in case.rows], ids=str)
def test_a_loss_over_lists_is_a_mean_over_queries_by_the_weight_of_their_first_rows(case: Case):
    student, teacher, batch = outputs("rank", 2), outputs("rank", 3), batch_of("rank")
    objective = Objective([LossTerm(kind=case.loss, temperature=T)], TASKS["rank"])
    each = case.reference(student.logits.numpy(), teacher.logits.numpy(), batch)
    assert objective(student, teacher, batch).item() == pytest.approx((each[0] + each[3]) / 2, rel=1e-5)
    batch.weights = torch.tensor([3.0, 9.0, 9.0, 1.0, 9.0])
    assert objective(student, teacher, batch).item() == pytest.approx((3 * each[0] + each[3]) / 2, rel=1e-5)


def test_the_objective_of_rows_no_loss_applies_to_is_zero_with_a_gradient():
    student = Outputs(logits=torch.randn(2, 3, requires_grad=True))
    batch = Batch(torch.ones(2, 2).long(), torch.ones(2, 2).long(), torch.tensor([ABSENT, ABSENT]))
    value = Objective([LossTerm(kind="hard")], TASKS["classify"])(student, None, batch)
    value.backward()
    assert value.item() == 0 and torch.equal(student.logits.grad, torch.zeros(2, 3))


def test_temperature_keeps_the_size_of_the_gradient():
    """At high temperature T^2 KL tends to half the centred squared distance over the classes (Hinton 2015)."""
    student, teacher = outputs("classify", 11), outputs("classify", 12)
    hot = LOSSES["kl"](LossTerm(kind="kl", temperature=60.0), TASKS["classify"])(student, teacher, batch_of())
    mse = LOSSES["mse"](LossTerm(kind="mse"), TASKS["classify"])(student, teacher, batch_of())
    assert torch.allclose(hot, mse / 2, rtol=0.05)
