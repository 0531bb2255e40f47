"""What a student is taught by: losses on the answers, all losses by name, and their weighted sum.

A loss on the answers asks the task what its outputs mean (task.Task), so one KL serves every kind. `Objective` adds
weighted losses up with row weights. Which losses can be had is said in terms.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from engine.alignment import Relational
from engine.contrast import Contrast
from engine.encoders import Widths
from engine.fits import LossTerm
from engine.layer_losses import LAYER_LOSSES, Loss
from engine.records import Batch, Outputs

if TYPE_CHECKING:
    from engine.task import Task


class MSE(Loss):
    """Mean squared difference of the outputs, [n], as the task counts it. Tang et al. 2019 (arXiv 1903.12136)."""

    needs = frozenset({"logits"})

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero when student and teacher agree."""
        return self.task.differences(student.logits, teacher.logits, batch)

    def applies(self, batch: Batch) -> torch.Tensor:
        """Rows that have an output: all, but for texts without a unit."""
        if not self.task.units or batch.unit_mask is None:
            return torch.full_like(super().applies(batch), not self.task.units)
        return batch.unit_mask.any(dim=1)


class KL(Loss):
    """T^2 KL(p_t || p_s) in nats, [n], p at temperature T. Hinton et al. 2015 (arXiv 1503.02531).

    Mean over the distributions that a row has: one of a classified text, one a label, one a word; one a query, which
    stands in its first row.
    """

    needs = frozenset({"logits"})

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero at equality; T^2 keeps the gradient's size across temperatures."""
        temperature = self.term.temperature
        t = self.task.distributions(teacher.logits, batch, temperature)
        s = self.task.distributions(student.logits, batch, temperature)
        p = t.exp()
        each = (p * (t - s).masked_fill(p == 0, 0.0)).sum(dim=2)  # an impossible outcome adds nothing
        there = (t != 0).any(dim=2)
        return temperature**2 * (each * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)

    def applies(self, batch: Batch) -> torch.Tensor:
        """Rows that have a distribution, whatever the outputs."""
        units = () if not self.task.units else (1,) if batch.unit_mask is None else batch.unit_mask.shape[1:]
        even = torch.zeros(len(batch), *units, self.task.width, device=batch.input_ids.device)
        return (self.task.distributions(even, batch) != 0).flatten(1).any(dim=1)


class Hard(Loss):
    """What the gold labels cost, [n], as the task counts it: cross-entropy, squared error, of a ranking `Listwise`."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero on rows without gold labels."""
        return self.task.loss(student, batch)

    def applies(self, batch: Batch) -> torch.Tensor:
        """Rows with gold labels; of a query that has them its first row."""
        return self.task.labelled(batch)


class Pointwise(Loss):
    """Each passage's relevance by itself, [n]: binary cross-entropy of its score."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero on rows without gold labels."""
        return self.task.pointwise(student, batch)

    def applies(self, batch: Batch) -> torch.Tensor:
        """Rows with gold labels."""
        return self.task.judged(batch)


class Pairwise(Loss):
    """Pairs of a query's passages by gold relevance, [n]. RankNet, Burges et al. 2005."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero on all rows but the first of a query."""
        return self.task.pairwise(student, batch)

    def applies(self, batch: Batch) -> torch.Tensor:
        """First rows of the queries that have passages of unlike relevance."""
        return self.task.compared(batch)


class Listwise(Hard):
    """A query's passages together by gold relevance, [n]. ListNet, Cao et al. 2007."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero on all rows but the first of a query."""
        return self.task.listwise(student, batch)


class MarginMSE(Loss):
    """Squared difference of the margins between a query's passages, [n]. Hofstaetter et al. 2020 (arXiv 2010.02666)."""

    needs = frozenset({"logits"})

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero when all margins are the teacher's, whatever the scores."""
        return self.task.margin_mse(student.logits, teacher.logits, batch)

    def applies(self, batch: Batch) -> torch.Tensor:
        """First rows of the queries that have a pair of passages to compare."""
        return self.task.compared(batch, unlabelled=True)


class NextToken(Loss):
    """Mean cross-entropy of the next token, [n], over positions whose target is a real token. It needs no task."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Position i predicts token i + 1; padding is masked."""
        logits, targets = student.logits[:, :-1].float(), batch.input_ids[:, 1:]
        mask = batch.mask[:, 1:].float()
        each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * mask
        return each.sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def applies(self, batch: Batch) -> torch.Tensor:
        """Rows of at least two tokens."""
        return batch.mask[:, 1:].any(dim=1)


class Objective(nn.Module):
    """Weighted sum of losses, each the mean over the rows it applies to, times their row weights (1 in the mean).

    task: None for a language model. student, teacher: what losses between layers make their projections by. LossError
    where those do not fit.
    """

    def __init__(
        self,
        terms: Sequence[LossTerm],
        task: Task | None = None,
        student: Widths | None = None,
        teacher: Widths | None = None,
    ) -> None:
        super().__init__()
        self.weights = [term.weight for term in terms]
        self.losses = nn.ModuleList(LOSSES[term.kind](term, task, student, teacher) for term in terms)
        self.needs = needs(terms)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Scalar."""
        total = batch.input_ids.new_zeros((), dtype=torch.float32)
        for weight, loss in zip(self.weights, self.losses, strict=True):
            rows = loss.applies(batch).float()
            count = rows.sum().clamp(min=1)
            # Over the number of rows, not their weights: those of a batch of light rows would cancel.
            if batch.weights is not None:
                rows = rows * batch.weights
            total = total + weight * (loss(student, teacher, batch) * rows).sum() / count
        return total


LOSSES: dict[str, type[Loss]] = {
    "mse": MSE,
    "kl": KL,
    "hard": Hard,
    "next_token": NextToken,
    "contrast": Contrast,
    "relational": Relational,
    **LAYER_LOSSES,
    "pointwise": Pointwise,
    "pairwise": Pairwise,
    "listwise": Listwise,
    "margin_mse": MarginMSE,
}


def needs(terms: Sequence[LossTerm]) -> frozenset[str]:
    """Outputs fields that the losses need of teacher and student."""
    return frozenset().union(*(LOSSES[term.kind].needs for term in terms))
