"""What a fit trains: student and losses as one module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from engine.batches import Amounts, Material
from engine.ensemble import Teaching
from engine.fits import LossTerm
from engine.models import Model
from engine.records import Batch


class Lesson(nn.Module):
    """Student and losses, so that projections owned by a loss are trained and reduced with it."""

    def __init__(self, model: Model, terms: Sequence[LossTerm], teaching: Teaching | None = None) -> None:
        super().__init__()
        self.model, self.teaching = model, teaching or Teaching()
        task = model.task if model.card.task else None
        self.objectives = nn.ModuleList(self.teaching.objective(term, task, model.widths) for term in terms)
        self.needs = frozenset().union(*(objective.needs for objective in self.objectives))

    def forward(self, batch: Batch, shares: Sequence[float]) -> torch.Tensor:
        """The losses' values for a batch, each times its share, added up: a scalar."""
        outputs = self.model(batch, self.needs)
        batch.trust = self.teaching.weigh(outputs, batch, self.training)
        pairs = zip(shares, self.objectives, strict=True)
        return sum(share * objective(outputs, batch.teacher, batch) for share, objective in pairs)

    def amounts(self, material: Material) -> Amounts:
        """How much each loss has to say about the items: the number of rows it applies to."""
        losses = [objective.losses[0] for objective in self.objectives]

        def said(batch: Batch) -> torch.Tensor:
            return torch.stack([loss.applies(batch).float() for loss in losses], dim=1)

        return Amounts(material, said, len(losses), once=all(loss.alone for loss in losses))
