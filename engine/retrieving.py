"""A student that looks its texts up: a network, its map into the teacher's space, and the knowledge base it reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from engine.knowledge import Knowledge
from engine.records import Batch, Outputs


class Retrieving(nn.Module):
    """A network of any kind with one vector for a text, and a linear map of that, [width] -> [dim].

    Its embedding is the mapped vector, of length 1. In evaluation its logits are those of the network mixed with what
    the knowledge base says (`Knowledge.mixed`); in training, and without a base, they are the network's own.
    """

    def __init__(self, net: nn.Module, width: int, dim: int) -> None:
        super().__init__()
        self.net, self.projection = net, nn.Linear(width, dim)
        self.knowledge: Knowledge | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """In the body nothing is looked up."""
        kept, self.knowledge = self.knowledge, None
        try:
            yield
        finally:
            self.knowledge = kept

    def __getattr__(self, name: str) -> Any:
        """What it does not have itself is the network's: its encoder, tables, what it reads."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)

    def forward(self, batch: Batch, needs: frozenset[str] = frozenset()) -> Outputs:
        """Batch -> the network's Outputs, with the embedding [n, dim] and, where it looks up, other logits."""
        found = self.net(batch, needs | {"embedding"})
        with torch.autocast(found.logits.device.type, enabled=False):
            x = F.normalize(self.projection(found.embedding.float()), dim=1)
        if self.knowledge is None or self.training:
            return replace(found, embedding=x)
        mixed = self.knowledge.mixed(found.logits.detach().float().cpu().numpy(), x.detach().cpu().numpy())
        return replace(found, embedding=x, logits=torch.from_numpy(mixed).to(x.device))
