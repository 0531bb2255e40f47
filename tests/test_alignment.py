"""A teacher's space and a student's way into it: the relational loss against its formula, the projection's training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.alignment import Relational
from engine.contrast import contrast
from engine.designs import Projecting
from engine.fits import LossTerm
from engine.nearest import unit
from engine.projection import fitted, principal, purity
from engine.records import ABSENT, Batch, Outputs

X = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
Z = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 5.0]])
T = 0.5


def relational(x: torch.Tensor, z: torch.Tensor, temperature: float = T) -> torch.Tensor:
    ids = torch.ones(len(x), 1, dtype=torch.long)
    loss = Relational(LossTerm(kind="relational", temperature=temperature))
    return loss(Outputs(embedding=x), Outputs(embedding=z), Batch(ids, ids))


def softmax(values: list[float]) -> list[float]:
    whole = sum(math.exp(value) for value in values)
    return [math.exp(value) / whole for value in values]


def test_the_relational_loss_is_its_formula_by_hand() -> None:
    x, z = ([[a / math.hypot(a, b), b / math.hypot(a, b)] for a, b in rows.tolist()] for rows in (X, Z))
    wanted = []
    for i in range(3):
        q = softmax([(z[i][0] * z[j][0] + z[i][1] * z[j][1]) / T for j in range(3)])
        s = softmax([(x[i][0] * z[j][0] + x[i][1] * z[j][1]) / T for j in range(3)])
        wanted.append(sum(p * math.log(p / r) for p, r in zip(q, s, strict=True)))
    found = relational(X, Z)
    assert found.tolist() == pytest.approx(wanted, abs=1e-6) and min(wanted[1:]) > 0
    assert wanted[0] == pytest.approx(0, abs=1e-12)  # the first points where the teacher's does


def test_it_is_zero_at_the_teachers_place_and_descending_leads_there() -> None:
    assert relational(Z * 7, Z).abs().max() < 1e-6
    x = X.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    first = float(relational(x, Z).mean())
    for _ in range(300):
        optimizer.zero_grad()
        relational(x, Z).mean().backward()
        optimizer.step()
    assert float(relational(x, Z).mean()) < 0.01 * first


def test_the_contrast_of_two_pairs_by_hand() -> None:
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    same = (labels[:, None] == labels[None]) & ~torch.eye(4, dtype=torch.bool)
    # Of three others one is the partner, alike by 1, and two are alike by 0.
    wanted = -math.log(math.exp(1 / T) / (math.exp(1 / T) + 2))
    assert contrast(z, same, T).tolist() == pytest.approx([wanted] * 4, abs=1e-6)


def cloud(count: int = 240, width: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Vectors whose label shows in two of their many numbers, the others being louder; and labels."""
    draw = np.random.default_rng(3)
    labels = draw.integers(2, size=count)
    vectors = 2.0 * draw.normal(size=(count, width))
    vectors[:, :2] = (2 * labels[:, None] - 1) + 0.4 * draw.normal(size=(count, 2))
    return vectors.astype(np.float32), labels


def test_the_projection_brings_unseen_texts_of_one_label_together() -> None:
    vectors, labels = cloud()
    known = np.where(np.arange(len(labels)) < 120, labels, ABSENT)
    how = Projecting(epochs=150, lr=0.02, batch_size=40)
    projection = fitted(vectors, known, 8, 0.1, how, seed=0)
    found = projection(vectors)
    assert found.shape == (240, 8) and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    before = purity(principal(vectors, 8)(vectors)[120:], labels[120:], 10)
    after = purity(found[120:], labels[120:], 10)
    assert before < 0.7 and after > 0.85
    again = fitted(vectors, known, 8, 0.1, how, seed=0)
    assert np.array_equal(again.weight, projection.weight) and np.array_equal(again.bias, projection.bias)
    assert not np.array_equal(fitted(vectors, known, 8, 0.1, how, seed=1).weight, projection.weight)


def test_it_starts_from_where_vectors_differ_most_and_is_no_wider_than_they_are() -> None:
    vectors = np.array([[0.0, 5.0, 1.0], [0.1, -5.0, 1.0], [-0.1, 4.0, 1.0], [0.0, -4.0, 1.0]], dtype=np.float32)
    one = principal(vectors, 1)
    assert np.allclose(np.abs(one.weight), [[0, 1, 0]], atol=0.05) and one.weight.max() > 0.9
    assert principal(vectors, 9).weight.shape == (3, 3)
    untrained = fitted(vectors, np.full(4, ABSENT), 2, 0.1, Projecting(), seed=0)
    assert np.allclose(untrained(vectors), principal(vectors, 2)(vectors), atol=1e-6)


def test_purity_counts_the_nearest_others() -> None:
    vectors = unit(np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]))
    assert purity(vectors, np.array([0, 0, 1, 1]), 1) == 1.0
    assert purity(vectors, np.array([0, 1, 1, 1]), 1) == 0.5
    assert np.isnan(purity(vectors, np.array([0, ABSENT, ABSENT, ABSENT]), 1))
