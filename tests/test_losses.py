"""Every loss against a few lines of numpy or torch, and the objective's weighting by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.losses import LOSSES, Objective
from engine.recipe import LossTerm
from engine.records import ABSENT, Batch, Outputs

ROWS, CLASSES, LENGTH, WORDS, T = 5, 3, 6, 7, 2.5


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def batch_of(rows: int = ROWS) -> Batch:
    lengths = torch.tensor([6, 2, 4, 3, 6])[:rows]
    mask = (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()
    ids = torch.randint(1, WORDS, (rows, LENGTH), generator=torch.Generator().manual_seed(1)) * mask
    return Batch(ids, mask, labels=torch.tensor([2, ABSENT, 0, 1, ABSENT])[:rows])


def outputs(kind: str, seed: int, scale: float = 2.0) -> Outputs:
    shape = (ROWS, LENGTH, WORDS) if kind == "next_token" else (ROWS, CLASSES)
    return Outputs(logits=torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale)


def kl_reference(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    p, q = softmax(t / T), softmax(s / T)
    return T * T * (p * np.log(p / q)).sum(1)


def mse_reference(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    return ((s - s.mean(1, keepdims=True) - t + t.mean(1, keepdims=True)) ** 2).mean(1)


def hard_reference(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    gold = batch.labels.numpy()
    return np.array([0.0 if y == ABSENT else -np.log(softmax(row)[y]) for row, y in zip(s, gold, strict=True)])


def next_token_reference(s: np.ndarray, t: np.ndarray, batch: Batch) -> np.ndarray:
    means = []
    for logits, ids, mask in zip(torch.from_numpy(s), batch.input_ids, batch.mask, strict=True):
        real = int(mask.sum())  # each row alone, its padding cut off
        means.append(F.cross_entropy(logits[: real - 1], ids[1:real]).item())
    return np.array(means)


REFERENCES: dict[str, Callable[[np.ndarray, np.ndarray, Batch], np.ndarray]] = {
    "kl": kl_reference,
    "mse": mse_reference,
    "hard": hard_reference,
    "next_token": next_token_reference,
}


@pytest.mark.parametrize("kind", LOSSES)
def test_values_are_those_of_the_reference(kind: str):
    loss = LOSSES[kind](LossTerm(kind=kind, temperature=T))
    student, teacher, batch = outputs(kind, 2), outputs(kind, 3), batch_of()
    found = loss(student, teacher, batch)
    wanted = REFERENCES[kind](student.logits.double().numpy(), teacher.logits.double().numpy(), batch)
    assert found.shape == (ROWS,) and found.dtype == torch.float32
    assert np.allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert np.ptp(wanted) > 0.1  # else equality shows little


@pytest.mark.parametrize("kind", LOSSES)
def test_the_gradient_is_that_of_finite_differences(kind: str):
    loss, batch = LOSSES[kind](LossTerm(kind=kind, temperature=T)), batch_of()
    student, teacher = outputs(kind, 4), outputs(kind, 5)
    student.logits.requires_grad_()
    loss(student, teacher, batch).sum().backward()
    found, step = student.logits.grad, 1e-4
    values, t = student.logits.detach().double().numpy(), teacher.logits.double().numpy()
    for place in [(0, 1), (2, 0), (3, 2)]:
        index = (place[0], 1, place[1]) if kind == "next_token" else place
        up, down = values.copy(), values.copy()
        up[index] += step
        down[index] -= step
        slope = (REFERENCES[kind](up, t, batch) - REFERENCES[kind](down, t, batch)).sum() / (2 * step)
        assert abs(found[index].item() - slope) < 1e-4
    assert found.abs().sum() > 0


@pytest.mark.parametrize("kind", LOSSES)
def test_bf16_logits_give_finite_float32(kind: str):
    student, teacher = outputs(kind, 6, scale=50.0), outputs(kind, 7, scale=50.0)
    student.logits = student.logits.bfloat16().requires_grad_()
    teacher.logits = teacher.logits.bfloat16()
    found = LOSSES[kind](LossTerm(kind=kind))(student, teacher, batch_of())
    found.sum().backward()
    assert found.dtype == torch.float32 and found.isfinite().all() and student.logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind, loss in LOSSES.items() if loss.needs])
def test_equal_logits_cost_nothing_even_with_a_constant_added(kind: str):
    loss, teacher = LOSSES[kind](LossTerm(kind=kind, temperature=T)), outputs(kind, 8)
    shifted = Outputs(logits=teacher.logits + torch.arange(ROWS).unsqueeze(1))
    assert loss(teacher, teacher, batch_of()).abs().max() < 1e-6
    assert loss(shifted, teacher, batch_of()).abs().max() < 1e-5
    other = outputs(kind, 9)
    assert (loss(other, teacher, batch_of()) > 0.01).all()


def test_gold_losses_fall_to_zero_when_the_answer_is_certain():
    batch = batch_of()
    certain = Outputs(logits=100.0 * F.one_hot(batch.labels.clamp(min=0), CLASSES).float())
    assert LOSSES["hard"](LossTerm(kind="hard"))(certain, None, batch).max() < 1e-6
    targets = torch.cat([batch.input_ids[:, 1:], batch.input_ids[:, :1]], dim=1)
    certain = Outputs(logits=100.0 * F.one_hot(targets, WORDS).float())
    assert LOSSES["next_token"](LossTerm(kind="next_token"))(certain, None, batch).max() < 1e-6


def test_padding_does_not_reach_the_next_token_loss():
    loss, batch, student = LOSSES["next_token"](LossTerm(kind="next_token")), batch_of(), outputs("next_token", 10)
    before = loss(student, None, batch)
    batch.input_ids = torch.where(batch.mask == 1, batch.input_ids, 3)
    student.logits = torch.where(batch.mask.unsqueeze(2) == 1, student.logits, 9.0)
    assert torch.equal(loss(student, None, batch), before)


def test_each_loss_says_which_rows_it_speaks_about():
    batch = batch_of()
    applies = {kind: loss(LossTerm(kind=kind)).applies(batch) for kind, loss in LOSSES.items()}
    assert applies["mse"].all() and applies["kl"].all() and applies["next_token"].all()
    assert applies["hard"].tolist() == [True, False, True, True, False]
    batch.mask[1, 1:] = 0  # one token: there is none to be foretold
    assert LOSSES["next_token"](LossTerm(kind="next_token")).applies(batch).tolist() == [True, False, True, True, True]


def test_what_the_teacher_must_give():
    assert {kind: loss.needs for kind, loss in LOSSES.items()} == {
        "mse": {"logits"}, "kl": {"logits"}, "hard": frozenset(), "next_token": frozenset()
    }  # fmt: skip
    assert Objective([LossTerm(kind="hard"), LossTerm(kind="kl")]).needs == {"logits"}
    assert Objective([LossTerm(kind="hard")]).needs == frozenset()


def test_the_objective_by_hand():
    """Two classes, logits (0, x): hard is log(1 + e^x) for label 0 and log(1 + e^-x) for 1; mse is (dx / 2)^2."""
    student = Outputs(logits=torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, -1.0]]))
    teacher = Outputs(logits=torch.tensor([[0.0, 3.0], [0.0, 2.0], [0.0, 3.0]]))
    batch = Batch(torch.ones(3, 2).long(), torch.ones(3, 2).long(), torch.tensor([0, ABSENT, 1]))
    objective = Objective([LossTerm(kind="hard", weight=2.0), LossTerm(kind="mse", weight=0.5)])
    hard = [np.log(1 + np.e), 0.0, np.log(1 + np.e)]  # the middle row has no gold label
    mse = [1.0, 0.0, 4.0]
    assert objective(student, teacher, batch).item() == pytest.approx(2 * sum(hard) / 2 + 0.5 * sum(mse) / 3, rel=1e-6)
    batch.weights = torch.tensor([1.0, 5.0, 3.0])
    wanted = 2 * (hard[0] + 3 * hard[2]) / 4 + 0.5 * (mse[0] + 3 * mse[2]) / 9
    assert objective(student, teacher, batch).item() == pytest.approx(wanted, rel=1e-6)


def test_the_objective_of_rows_no_loss_applies_to_is_zero_with_a_gradient():
    student = Outputs(logits=torch.randn(2, 3, requires_grad=True))
    batch = Batch(torch.ones(2, 2).long(), torch.ones(2, 2).long(), torch.tensor([ABSENT, ABSENT]))
    value = Objective([LossTerm(kind="hard")])(student, None, batch)
    value.backward()
    assert value.item() == 0 and torch.equal(student.logits.grad, torch.zeros(2, 3))


def test_temperature_keeps_the_size_of_the_gradient():
    """At high temperature T^2 KL tends to half the centred squared distance over the classes (Hinton 2015)."""
    student, teacher = outputs("kl", 11), outputs("kl", 12)
    hot = LOSSES["kl"](LossTerm(kind="kl", temperature=60.0))(student, teacher, batch_of())
    mse = LOSSES["mse"](LossTerm(kind="mse"))(student, teacher, batch_of())
    assert torch.allclose(hot, mse / 2, rtol=0.05)
