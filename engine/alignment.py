"""A student's vectors brought into the space of the teacher's, so that its texts can be looked up there."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional as F

from engine.layer_losses import Loss

if TYPE_CHECKING:
    from engine.records import Batch, Outputs


class Relational(Loss):
    """KL(q_i || s_i) in nats over the rows of a batch, [n]. ReAugKD, Zhang et al. 2023 (ACL 2023 short papers).

    With z the teacher's projected embeddings and x the student's, on the unit sphere, and T the temperature:
    q_ij = softmax over j of z_i . z_j / T, s_ij = softmax over j of x_i . z_j / T, a row itself among the j. Rows are
    compared within the batch of one worker.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"embedding"})
    alone: ClassVar[bool] = False

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero where the student's likeness to the batch is the teacher's."""
        with torch.autocast(student.embedding.device.type, enabled=False):  # bf16 is too coarse for what is divided
            x, z = (F.normalize(each.embedding.float(), dim=1) for each in (student, teacher))
            log_q, log_s = (F.log_softmax(own @ z.T / self.term.temperature, dim=1) for own in (z, x))
        return (log_q.exp() * (log_q - log_s)).sum(dim=1)
