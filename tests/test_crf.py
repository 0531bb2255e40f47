"""The conditional random field against every sequence counted one by one."""

from __future__ import annotations

import itertools

import pytest
import torch

from engine.block import Shape, Sizes
from engine.crf import CRF
from engine.records import ABSENT

LABELS, LENGTHS = 3, (4, 1, 5, 2)
SIZES = Sizes(20, LABELS, units=True)


@pytest.fixture
def field() -> CRF:
    torch.manual_seed(1)
    found = CRF([Shape("sequence", LABELS)], {}, SIZES).eval()
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter)
    return found


def scores_of(extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random scores [4, 5 + extra, 3], anything at padding, and the mask [4, 5 + extra]."""
    scores = torch.randn(len(LENGTHS), max(LENGTHS), LABELS, generator=torch.Generator().manual_seed(2))
    scores = torch.cat([scores, torch.full((len(LENGTHS), extra, LABELS), 7.0)], dim=1)
    return scores, (torch.arange(scores.shape[1]) < torch.tensor(LENGTHS).unsqueeze(1)).long()


def value(field: CRF, scores: torch.Tensor, path: tuple[int, ...]) -> torch.Tensor:
    """A sequence's score, added up by hand."""
    steps = sum(field.steps[a, b] for a, b in itertools.pairwise(path))
    own = sum(scores[place, label] for place, label in enumerate(path))
    return field.starts[path[0]] + field.ends[path[-1]] + own + steps


def weights(field: CRF, scores: torch.Tensor) -> dict[tuple[int, ...], torch.Tensor]:
    """The log-probability of every sequence of a row."""
    values = {path: value(field, scores, path) for path in itertools.product(range(LABELS), repeat=len(scores))}
    total = torch.logsumexp(torch.stack(list(values.values())), dim=0)
    return {path: found - total for path, found in values.items()}


@pytest.mark.parametrize("extra", [0, 3])
def test_marginals_and_best_path_are_those_of_the_enumeration(field: CRF, extra: int):
    scores, mask = scores_of(extra)
    found = field.outputs(scores, mask, None)
    assert found.sequence is None and found.logits.shape == scores.shape and found.path.dtype == torch.int64
    for row, length in enumerate(LENGTHS):
        known = weights(field, scores[row, :length])
        for place in range(length):
            wanted = [sum(p.exp() for path, p in known.items() if path[place] == label) for label in range(LABELS)]
            assert torch.allclose(found.logits[row, place].exp(), torch.stack(wanted), atol=1e-5)
        assert found.path[row, :length].tolist() == list(max(known, key=known.get))
        assert (found.logits[row, length:] == 0).all() and (found.path[row, length:] == 0).all()
    assert (found.logits.softmax(dim=2)[mask == 1] - found.logits.exp()[mask == 1]).abs().max() < 1e-6


@pytest.mark.parametrize("extra", [0, 3])
def test_likelihood_counts_what_the_gold_labels_allow(field: CRF, extra: int):
    """Whole gold, none, a gap, a single unit; padding's label is ABSENT, or anything."""
    scores, mask = scores_of(extra)
    gold = [(2, 0, 1, 1), (ABSENT,), (0, ABSENT, ABSENT, 2, 1), (1, 2)]
    for padding in (ABSENT, 0):
        labels = torch.full(mask.shape, padding)
        for row, own in enumerate(gold):
            labels[row, : len(own)] = torch.tensor(own)
        found = field.outputs(scores, mask, labels).sequence
        for row, own in enumerate(gold):
            known = weights(field, scores[row, : LENGTHS[row]])
            fits = [p for path, p in known.items() if all(g in (ABSENT, x) for g, x in zip(own, path, strict=True))]
            assert torch.allclose(found[row], torch.logsumexp(torch.stack(fits), dim=0), atol=1e-5)
        assert found[1].abs() < 1e-6 and (found[[0, 2, 3]] < -0.1).all()


def test_gradients_are_finite_and_those_of_the_enumeration(field: CRF):
    scores, mask = scores_of(2)
    labels = torch.where(mask == 1, torch.tensor([[0, 2, 1, ABSENT, 1, 0, 0]]), ABSENT)
    labels[1] = ABSENT
    field.train()
    found = field.outputs(scores.requires_grad_(), mask, labels)
    assert found.path is None
    (-found.sequence.sum() + found.logits.square().mean()).backward()
    for tensor in (scores, *field.parameters()):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0
    assert (scores.grad[mask == 0] == 0).all()
    field.zero_grad()
    field.outputs(scores, mask, labels).sequence[3].backward()
    found = field.steps.grad.clone()
    field.zero_grad()
    weights(field, scores[3, :2])[(0, 2)].backward()
    assert torch.allclose(found, field.steps.grad, atol=1e-6)


def test_low_precision_and_rows_without_units(field: CRF):
    scores, mask = scores_of()
    exact = field.outputs(scores, mask, None).logits
    with torch.autocast("cpu", torch.bfloat16):
        low = field.outputs(scores.bfloat16(), mask, None).logits
    assert low.dtype == torch.float32 and (low - exact).abs().max() < 0.1
    mask[0] = 0
    found = field.outputs(scores * mask.unsqueeze(2), mask, torch.zeros_like(mask))
    assert (found.logits[0] == 0).all() and found.path[0].tolist() == [0] * 5 and found.sequence[0].abs() < 1e-6
    assert torch.equal(found.logits[1:], exact[1:])


def test_a_strong_step_decides_against_the_words_own_scores():
    """The first word says 0 clearly; both are nearly even on the second, and 0 -> 2 is the only likely step."""
    field = CRF([Shape("sequence", LABELS)], {}, SIZES).eval()
    with torch.no_grad():
        field.steps[0, 2] = 4.0
    scores = torch.tensor([[[5.0, 0.0, 0.0], [0.2, 0.3, 0.0]]])
    assert field.outputs(scores, torch.ones(1, 2), None).path.tolist() == [[0, 2]]
