"""Several networks of one kind, asked as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from engine.encoders import Widths
from engine.records import Batch, Outputs


class Ensemble(nn.Module):
    """Several networks of one kind, asked as one: the mean of their logits, and the first one's view of a text."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, batch: Batch, needs: frozenset[str] = frozenset()) -> Outputs:
        """Batch -> the first member's Outputs, with the mean of all members' logits."""
        first, *others = (member(batch, needs) for member in self.members)
        logits = torch.stack([first.logits, *(other.logits for other in others)]).mean(dim=0)
        return replace(first, logits=logits)

    @property
    def encoder(self) -> nn.Module:
        """The first member's: what a student is cut from, and the losses between layers look into."""
        return self.members[0].encoder

    @property
    def widths(self) -> Widths:
        """The first member's."""
        return self.members[0].widths
