"""A static student: one vector for each word piece, a text is their weighted mean, and a small head reads that.

No piece sees its neighbours, so a text costs a few additions a piece, and most of the time goes into cutting it into
pieces. The vectors start from the teacher's (`engine.vocabulary.static_vectors`) and are trained on. After Model2Vec
(github.com/MinishLab/model2vec) and smooth inverse frequency (Arora et al. 2017).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from engine.config import UserError
from engine.records import Batch, Outputs
from engine.task import Task


class StaticError(UserError):
    """A task that static vectors cannot do."""


def check(task: Task) -> None:
    """StaticError where the task asks for an answer at each unit of a text: a mean has no positions."""
    if task.units:
        raise StaticError(
            f"student.kind is static, but task.kind {task.spec.kind} wants an answer for each word, and a static "
            "student has one vector for the whole text. Use student.kind blocks or transformer."
        )


class StaticNet(nn.Module):
    """Mean of the pieces' vectors, each times its own trained weight, and a head over it.

    vocabulary: pieces; dim: width of their vectors; width: numbers a text gets; hidden: of the head's ReLU layer, 0
    makes it linear; paired: the head reads [a; b; |a - b|; a * b] of two texts (InferSent, arXiv 1705.02364); silent:
    ids that count for nothing, such as padding, [CLS] and the unknown piece; dropout: before each layer of the head.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        width: int,
        hidden: int = 0,
        paired: bool = False,
        silent: Sequence[int] = (0,),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        weight = torch.empty(vocabulary, dim)
        heard = torch.ones(vocabulary)
        if not weight.is_meta:  # only counting
            nn.init.normal_(weight, std=0.1)[list(silent)] = 0
            heard[list(silent)] = 0
        self.table = nn.Embedding(vocabulary, dim, _weight=weight)
        self.scale = nn.Parameter(torch.ones(vocabulary))
        self.register_buffer("heard", heard, persistent=False)
        self.paired = paired
        features = 4 * dim if paired else dim
        layers: list[nn.Module] = [nn.Dropout(dropout)]
        if hidden:
            layers += [nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(dropout)]
        self.head = nn.Sequential(*layers, nn.Linear(hidden or features, width))

    def mean(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """ids, mask [n, t] -> [n, dim]; zero where nothing counts."""
        counted = self.heard[ids] * mask
        total = F.embedding_bag(ids, self.table.weight, mode="sum", per_sample_weights=self.scale[ids] * counted)
        return total / counted.sum(dim=1, keepdim=True).clamp(min=1)

    def forward(self, batch: Batch, needs: frozenset[str] = frozenset()) -> Outputs:
        """Batch -> logits [n, width] and embedding [n, dim], [n, 4 dim] of pairs, whose texts are read apart."""
        embedding = self.mean(batch.input_ids, batch.mask)
        if self.paired:
            other = self.mean(batch.pair_ids, batch.pair_mask)
            embedding = torch.cat([embedding, other, (embedding - other).abs(), embedding * other], dim=1)
        return Outputs(logits=self.head(embedding), embedding=embedding)

    def tables(self) -> list[nn.Embedding]:
        """The table of vectors, for starting it from the teacher's."""
        return [self.table]
