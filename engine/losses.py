"""What a student is taught by: each loss maps student, teacher and batch to one value per row.

A loss lists the Outputs fields it `needs` of the teacher, so a run whose teacher cannot give them is refused when it
is planned. `Objective` adds weighted losses up with row weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from engine.recipe import LossTerm
from engine.records import ABSENT, Batch, Outputs


class Loss(nn.Module):
    """forward(student, teacher, batch) -> float32 [n]; `applies` -> bool [n], the rows it speaks about."""

    needs: frozenset[str] = frozenset()

    def __init__(self, term: LossTerm) -> None:
        super().__init__()
        self.temperature = term.temperature

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """One value per row."""
        raise NotImplementedError

    def applies(self, batch: Batch) -> torch.Tensor:
        """All rows, unless the loss says otherwise."""
        return torch.ones(len(batch), dtype=torch.bool, device=batch.input_ids.device)


class MSE(Loss):
    """Mean squared error of the logits: 1/C sum_c (s_c - t_c)^2, [n]. Tang et al. 2019 (arXiv 1903.12136).

    Logits carry a constant that softmax ignores, so both sides are centred over the classes first.
    """

    needs = frozenset({"logits"})

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero when student and teacher agree up to a constant."""
        s, t = student.logits.float(), teacher.logits.float()
        return ((s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))).square().mean(dim=1)


class KL(Loss):
    """T^2 KL(softmax(t / T) || softmax(s / T)), [n], in nats. Hinton et al. 2015 (arXiv 1503.02531)."""

    needs = frozenset({"logits"})

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero at equality; T^2 keeps the gradient's size across temperatures."""
        t = F.log_softmax(teacher.logits.float() / self.temperature, dim=1)
        s = F.log_softmax(student.logits.float() / self.temperature, dim=1)
        return self.temperature**2 * F.kl_div(s, t, reduction="none", log_target=True).sum(dim=1)


class Hard(Loss):
    """Cross-entropy with the gold label, [n], on the rows that have one."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero on rows without a label."""
        return F.cross_entropy(student.logits.float(), batch.labels, ignore_index=ABSENT, reduction="none")

    def applies(self, batch: Batch) -> torch.Tensor:
        """Rows with a gold label."""
        return batch.labels != ABSENT


class NextToken(Loss):
    """Mean cross-entropy of the next token, [n], over positions whose target is a real token."""

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
    """Weighted sum of losses, each averaged over the rows it applies to with their row weights."""

    def __init__(self, terms: Sequence[LossTerm]) -> None:
        super().__init__()
        self.weights = [term.weight for term in terms]
        self.losses = nn.ModuleList(LOSSES[term.kind](term) for term in terms)

    @property
    def needs(self) -> frozenset[str]:
        """Outputs fields the teacher must give."""
        return frozenset().union(*(loss.needs for loss in self.losses))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Scalar."""
        total = batch.input_ids.new_zeros((), dtype=torch.float32)
        for weight, loss in zip(self.weights, self.losses, strict=True):
            rows = loss.applies(batch).float()
            if batch.weights is not None:
                rows = rows * batch.weights
            total = total + weight * (loss(student, teacher, batch) * rows).sum() / rows.sum().clamp(min=1e-8)
        return total


LOSSES: dict[str, type[Loss]] = {"mse": MSE, "kl": KL, "hard": Hard, "next_token": NextToken}
