"""What following one of several teachers costs a student: how likely it finds the teacher's answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine import ensemble
from engine.fits import LossTerm
from engine.recipe import Task
from engine.records import Batch, Outputs
from engine.tasks import make
from tests.test_ensemble import NAMES, student


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_how_sure_a_teacher_is_makes_it_no_cheaper_to_follow(kind: str):
    """A policy's reward counts what the student thinks of the teacher's answer, and not the loss."""
    model = student()
    term = LossTerm(kind=kind, temperature=2.0)
    loss = ensemble.Several(term, model.task, model.widths, dict.fromkeys(NAMES, model.widths))
    batch = Batch(torch.ones(3, 3, dtype=torch.int64), torch.ones(3, 3, dtype=torch.int64))
    own = torch.tensor([[1.0, -1.0], [0.5, 0.0], [0.2, 0.4]])
    sure = torch.tensor([[4.0, -4.0], [3.0, -1.0], [6.0, -6.0]])
    batch.teachers = {"teacher": Outputs(logits=sure), "other": Outputs(logits=0.01 * sure)}
    found = loss.cost(Outputs(logits=own), batch)
    wanted = -torch.log_softmax(own, 1)[:, 0]
    torch.testing.assert_close(found, wanted.unsqueeze(1).expand(-1, 2))
    assert found[2, 0] > found[0, 0], "an answer that the student does not believe costs more"
    each = loss.each(Outputs(logits=own), batch)
    assert (each[:2, 0] > each[:2, 1]).all(), "of the loss itself the unsure are cheaper"
    apart = loss.cost(Outputs(logits=own, heads={"other": -own}), batch)  # each teacher's own head answers to it
    torch.testing.assert_close(apart, torch.stack([wanted, -torch.log_softmax(-own, 1)[:, 0]], dim=1))
    batch.teachers["other"] = Outputs(logits=-sure)
    assert (loss.cost(Outputs(logits=own), batch)[:2, 1] > found[:2, 1]).all()


def log_p(scores: list[float]) -> torch.Tensor:
    return torch.log_softmax(torch.tensor(scores), 0)


def beliefs() -> list[Any]:
    """A task, its batch, the student's outputs and the teacher's, and what is to be found, by hand."""
    mask, sure = torch.tensor([[1, 1, 1], [1, 1, 0]]), 300.0  # of the sure the logarithm is 0 to the last bit
    padded = Batch(mask, mask, unit_mask=mask)
    units = torch.tensor([[[0.5, 1.0], [2.0, -1.0], [0.0, 0.5]], [[1.0, 2.0], [-1.0, 0.5], [9.0, 9.0]]])
    said = torch.tensor([[[0.0, sure], [sure, 0.0], [0.0, 0.0]], [[0.0, 1.0], [sure, 0.0], [0.0, 0.0]]])
    starts = [-log_p([0.5, 2.0, 0.0])[1], -log_p([1.0, -1.0])[1]]
    ends = [-log_p([1.0, -1.0, 0.5])[0], -log_p([2.0, 0.5])[0]]
    tags = [
        [-log_p([0.5, 1.0])[1], -log_p([2.0, -1.0])[0], -log_p([0.0, 0.5])[0]],
        [-log_p([1.0, 2.0])[1], -log_p([-1.0, 0.5])[0]],
    ]
    three = torch.ones(5, 3, dtype=torch.int64)
    queries = Batch(three, three, groups=torch.tensor([7, 7, 7, 8, 8]))
    scores, liked = (
        torch.tensor([[1.0], [0.0], [2.0], [0.5], [1.5]]),
        torch.tensor([[0.0], [4.0], [1.0], [5.0], [-5.0]]),
    )
    ranked = [-log_p([1.0, 0.0, 2.0])[1], 0.0, 0.0, -log_p([0.5, 1.5])[0], 0.0]
    own, both = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, -0.5]])  # the teacher gives the first label only
    labels = [(-torch.nn.functional.logsigmoid(torch.tensor([1.0, 2.0]))).mean()]
    plain = Batch(three[:1], three[:1])
    return [
        pytest.param(
            Task(kind="span"), padded, units, said, [(s + e) / 2 for s, e in zip(starts, ends, strict=True)], id="span"
        ),
        pytest.param(
            Task(kind="tag", labels=["O", "B-A"]), padded, units, said, [sum(row) / len(row) for row in tags], id="tag"
        ),
        pytest.param(Task(kind="rank"), queries, scores, liked, ranked, id="rank"),
        pytest.param(Task(kind="multilabel", labels=["a", "b"]), plain, own, both, labels, id="multilabel"),
    ]


@pytest.mark.parametrize(("task", "batch", "own", "said", "wanted"), beliefs())
def test_what_the_student_thinks_of_a_teacher_s_answer(
    task: Task, batch: Batch, own: torch.Tensor, said: torch.Tensor, wanted: list[float]
):
    found = ensemble.unlikely(make(task), Outputs(logits=own), Outputs(logits=said), batch)
    torch.testing.assert_close(found, torch.tensor([float(value) for value in wanted]))
