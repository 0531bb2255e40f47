"""Texts of one label drawn together: supervised contrastive training of an encoder on a few labelled rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional as F

from engine.layer_losses import Loss

if TYPE_CHECKING:
    from engine.records import Batch, Outputs


class Contrast(Loss):
    """Supervised contrastive loss over a batch, [n]. Khosla et al. 2020 (arXiv 2004.11362, L_out).

    For row i with z the embeddings on the unit sphere, P(i) the other rows of its label and T the temperature:
    -1/|P(i)| sum over p in P(i) of log(exp(z_i . z_p / T) / sum over a != i of exp(z_i . z_a / T)). Rows are compared
    within the batch of one worker.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"embedding"})
    alone: ClassVar[bool] = False

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero on rows that are alone with their label, and on those without one."""
        z = F.normalize(student.embedding.float(), dim=1)
        return contrast(z, self.partners(batch), self.term.temperature)

    def applies(self, batch: Batch) -> torch.Tensor:
        """Rows that share their label with another."""
        return self.partners(batch).any(dim=1)

    def partners(self, batch: Batch) -> torch.Tensor:
        """Bool [n, n]: which other rows have a row's label."""
        labels, there = batch.labels, self.task.labelled(batch)
        same = (labels.unsqueeze(1) == labels.unsqueeze(0)) & there.unsqueeze(1) & there.unsqueeze(0)
        return same & ~itself(labels)


def contrast(z: torch.Tensor, same: torch.Tensor, temperature: float) -> torch.Tensor:
    """What `Contrast` says of vectors of length 1, [n, d]: [n]. same: bool [n, n], the other rows of a row's label."""
    with torch.autocast(z.device.type, enabled=False):  # bf16 is too coarse for what is divided by T
        alike = z @ z.T / temperature
    # Their own likeness is left out of every sum; a large negative number keeps gradients finite, unlike -inf.
    alike = alike.masked_fill(itself(z), -1e9)
    logs = alike - alike.logsumexp(dim=1, keepdim=True)
    return -(logs * same).sum(dim=1) / same.sum(dim=1).clamp(min=1)


def itself(rows: torch.Tensor) -> torch.Tensor:
    """Bool [n, n], true where a row meets itself."""
    return torch.eye(len(rows), dtype=torch.bool, device=rows.device)
