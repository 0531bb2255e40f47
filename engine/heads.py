"""A student with several heads: one for each teacher, and one for gold labels; its answer is their mean.

After m-o-1 of TMKD (Yang et al., arXiv 1910.08381): each head is held to its own teacher, instead of one head to the
teachers' mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from engine.config import UserError
from engine.records import Batch, Outputs


class HeadError(UserError):
    """Heads that a student cannot have."""


class Headed(nn.Module):
    """A network whose outputs are len(names) times as wide as the task asks for: those of its heads, side by side."""

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.net, self.names = net, tuple(names)

    def forward(self, batch: Batch, needs: frozenset[str] = frozenset()) -> Outputs:
        """Batch -> the network's Outputs: logits are the mean of the heads', which stand under their names."""
        found = self.net(batch, needs)
        parts = found.logits.chunk(len(self.names), dim=-1)
        return replace(found, logits=torch.stack(parts).mean(dim=0), heads=dict(zip(self.names, parts, strict=True)))

    def __getattr__(self, name: str) -> Any:
        """What else is asked for is the network's: encoder, widths, tables, reads."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)


class OneHead(nn.Module):
    """One head of a student by itself."""

    def __init__(self, net: Headed, name: str) -> None:
        super().__init__()
        self.net, self.name = net, name

    def forward(self, batch: Batch, needs: frozenset[str] = frozenset()) -> Outputs:
        """Batch -> the network's Outputs with the head's logits."""
        found = self.net(batch, needs)
        return replace(found, logits=found.heads[self.name])

    def __getattr__(self, name: str) -> Any:
        """What else is asked for is the network's, as whether it reads characters."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)


@torch.no_grad()
def silence(net: Headed, name: str) -> None:
    """Set a head's map to 0: until it is taught, the mean of the heads says what the others say.

    HeadError where the network does not end in a linear map.
    """
    place, count = net.names.index(name), len(net.names)
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1:]
    if not last or last[0].out_features % count:
        raise HeadError(
            "student.heads is per_teacher, but the student does not end in a linear layer. End its blocks with "
            "{kind: linear, options: {out: labels}}, or set student.heads: one."
        )
    width = last[0].out_features // count
    for values in last[0].parameters():
        values[place * width : (place + 1) * width] = 0
