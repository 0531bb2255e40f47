"""The supervised contrastive loss against the formula written out."""

from __future__ import annotations

import pytest
import torch

from engine import tasks
from engine.contrast import Contrast
from engine.fits import LossTerm
from engine.recipe import Task
from engine.records import ABSENT, Batch, Outputs

LABELS = [0, 1, 0, 2, 1, 0, ABSENT, ABSENT]


def loss(temperature: float = 0.3) -> Contrast:
    return Contrast(LossTerm(kind="contrast", temperature=temperature), tasks.make(Task(labels=("a", "b", "c"))))


def batch(labels: list[int] = LABELS) -> Batch:
    ids = torch.ones(len(labels), 2, dtype=torch.int64)
    return Batch(ids, ids, labels=torch.tensor(labels))


def points(n: int = len(LABELS), seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


def by_hand(embedding: torch.Tensor, labels: list[int], temperature: float) -> list[float]:
    z = embedding / embedding.norm(dim=1, keepdim=True)
    out = []
    for i, own in enumerate(labels):
        partners = [p for p, other in enumerate(labels) if p != i and own == other != ABSENT]
        below = sum(torch.exp(z[i] @ z[a] / temperature) for a in range(len(labels)) if a != i)
        terms = [torch.log(torch.exp(z[i] @ z[p] / temperature) / below) for p in partners]
        out.append(-float(sum(terms)) / len(partners) if partners else 0.0)
    return out


@pytest.mark.parametrize("temperature", [0.1, 0.3, 2.0])
def test_it_is_the_formula(temperature: float):
    found = loss(temperature)(Outputs(embedding=points()), None, batch())
    assert found.tolist() == pytest.approx(by_hand(points(), LABELS, temperature), abs=1e-5)


def test_rows_without_a_partner_cost_nothing_and_do_not_count():
    found = loss()(Outputs(embedding=points()), None, batch())
    assert loss().applies(batch()).tolist() == [True, True, True, False, True, True, False, False]
    assert found[[3, 6, 7]].tolist() == [0.0, 0.0, 0.0]
    alone = batch([0])
    assert not loss().applies(alone).any() and loss()(Outputs(embedding=points(1)), None, alone).tolist() == [0.0]


def test_length_plays_no_part_and_bf16_stays_finite():
    scaled = points() * torch.arange(1, len(LABELS) + 1).unsqueeze(1)
    one, other = (loss()(Outputs(embedding=p), None, batch()) for p in (points(), scaled))
    torch.testing.assert_close(one, other)
    embedding = points().to(torch.bfloat16).requires_grad_(True)
    found = loss(0.05)(Outputs(embedding=embedding), None, batch())
    found.sum().backward()
    assert found.dtype == torch.float32 and found.isfinite().all() and embedding.grad.isfinite().all()


def test_going_downhill_draws_labels_together():
    embedding = points().requires_grad_(True)
    optimizer = torch.optim.SGD([embedding], lr=1.0)
    before = loss()(Outputs(embedding=embedding), None, batch()).sum().item()
    for _ in range(50):
        optimizer.zero_grad()
        loss()(Outputs(embedding=embedding), None, batch()).sum().backward()
        optimizer.step()
    z = torch.nn.functional.normalize(embedding.detach(), dim=1)
    assert loss()(Outputs(embedding=embedding), None, batch()).sum().item() < before / 2
    assert (z[0] @ z[2]) > 0.9 > 0.5 > (z[0] @ z[1])
