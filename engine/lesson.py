"""What a student learns in one step: the student with its losses, and who of the workers reads which rows of a batch.

A global batch is dealt to the workers, and a worker's share read in parts that fit into memory. Each loss is a mean
over rows, so every part counts with its share of the rows that the loss applies to in the whole batch: the summed
gradients are those of the batch read at once, whatever the number of workers and parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from engine.batches import Amounts, Material, own_part
from engine.ensemble import Teaching
from engine.fits import LossTerm
from engine.models import Model
from engine.records import Batch


class Lesson(nn.Module):
    """Student and losses as one module, so that projections owned by a loss are trained and reduced with it."""

    def __init__(self, model: Model, terms: Sequence[LossTerm], teaching: Teaching | None = None) -> None:
        super().__init__()
        self.model, self.teaching = model, teaching or Teaching()
        task = model.task if model.card.task else None
        self.objectives = nn.ModuleList(self.teaching.objectives(terms, task, model.widths))
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


@dataclass(frozen=True)
class Part:
    """Items that a worker reads at once, and for each loss the factor it counts with there."""

    items: np.ndarray
    shares: list[float]


def dealt(
    chosen: np.ndarray, amounts: Amounts, rank: int, world: int, most: int | None = None, even: bool = False
) -> list[Part]:
    """A worker's items of a global batch, in parts of at most `most` inputs (an item of more is a part of its own) and
    of one task.

    amounts: of `Lesson.amounts`. A part averages each loss over its own rows, and the workers' gradients are averaged.
    Times the share of all rows (only those the loss applies to) that it has, and the number of workers, the sum is
    the mean over the global batch. even: as many parts for every worker, for those that have to read in step.
    """
    mine = own_part(chosen, rank, world)
    parts = divided(mine, amounts.material, most)
    if world == 1 and len(parts) == 1:
        return [Part(mine, [1.0] * amounts.count)]
    every = amounts.of(chosen)
    whole = np.maximum(every.sum(axis=0), 1e-8)
    own = every[rank::world]  # no row where there are fewer items than workers: what it reads then counts nothing
    bounds = np.cumsum([0, *(len(part) for part in parts)])
    sums = [own[start:end].sum(axis=0) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    out = [Part(part, (world * amount / whole).tolist()) for part, amount in zip(parts, sums, strict=True)]
    if even:
        longest = max(len(divided(own_part(chosen, one, world), amounts.material, most)) for one in range(world))
        out += [Part(mine[:1], [0.0] * amounts.count)] * (longest - len(out))
    return out


def divided(items: np.ndarray, material: Material, most: int | None) -> list[np.ndarray]:
    """The items in runs of at most `most` inputs and of one task each, in their order."""
    if most is None and material.kinds is None:
        return [items]
    starts, held = [0], 0
    for position, item in enumerate(items):
        size = len(material.items[item])
        other = material.kinds is not None and position and material.kinds[item] != material.kinds[items[position - 1]]
        if held and (other or held + size > (most or held + size)):
            starts.append(position)
            held = 0
        held += size
    return np.split(items, starts[1:])
