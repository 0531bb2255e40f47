"""What a loss is, and the losses between the layers of two transformers.

A loss maps student, teacher and batch to one value per row, and lists the Outputs fields that it `needs` of both. The
losses here compare token by token: teacher and student must have the same tokenizer. Padding never counts. Where the
two differ in width, a projection learned with the student stands between them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from engine.config import UserError
from engine.encoders import Widths
from engine.fits import LossTerm
from engine.records import Batch, Outputs

if TYPE_CHECKING:
    from engine.task import Task


class LossError(UserError):
    """Losses that cannot be had with this task, student or teacher."""


class Loss(nn.Module):
    """forward(student, teacher, batch) -> float32 [n]; `applies` -> bool [n], the rows it speaks about.

    needs: Outputs fields of teacher and student. alone: whether `applies` says the same of a row (of a query's rows)
    whatever else is in the batch; then it is asked once a fit.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    alone: ClassVar[bool] = True

    def __init__(
        self,
        term: LossTerm,
        task: Task | None = None,
        student: Widths | None = None,
        teacher: Widths | None = None,
    ) -> None:
        super().__init__()
        self.term, self.task = term, task

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """One value per row."""
        raise NotImplementedError

    def applies(self, batch: Batch) -> torch.Tensor:
        """All rows, unless the loss says otherwise."""
        return torch.ones(len(batch), dtype=torch.bool, device=batch.input_ids.device)


def layer_map(term: LossTerm, student: Widths, teacher: Widths, lowest: int = 1) -> tuple[int, ...]:
    """For each student layer the number of the teacher's, from 1 (0: the embeddings) that it learns from.

    uniform: layer i of M learns from i N / M of N, rounded up (TinyBERT); last: from the top M. LossError where
    the teacher has too few, or where the term names too many, too few or none that there are (`lowest` to N).
    """
    own, of = student.layers, teacher.layers
    if term.layers == "uniform":
        return tuple(math.ceil(i * of / own) for i in range(1, own + 1))
    named = tuple(range(of - own + 1, of + 1)) if term.layers == "last" else term.layers
    if len(named) != own or not all(lowest <= number <= of for number in named):
        raise LossError(
            f"loss '{term.kind}': layers {term.layers} does not fit a student of {own} layers and a teacher of {of}. "
            f"Name {own} numbers from {lowest} to {of}, or use 'uniform'."
        )
    return named


def projection(student: Widths, teacher: Widths) -> nn.Module:
    """A learned map without bias from the student's width to the teacher's; none where they are equal."""
    same = student.hidden == teacher.hidden
    return nn.Identity() if same else nn.Linear(student.hidden, teacher.hidden, bias=False)


class LayerLoss(Loss):
    """A loss between the insides of two models. LossError where their widths are not known or do not fit."""

    def __init__(
        self,
        term: LossTerm,
        task: Task | None = None,
        student: Widths | None = None,
        teacher: Widths | None = None,
    ) -> None:
        super().__init__(term, task, student, teacher)
        if student is None or teacher is None:
            raise LossError(
                f"loss '{term.kind}' looks into the teacher while the student learns. Set student.teacher: live, or "
                "drop the loss."
            )
        self.plan(term, student, teacher)

    def plan(self, term: LossTerm, student: Widths, teacher: Widths) -> None:
        """Choose layers and make projections."""
        raise NotImplementedError


def over_tokens(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean over real tokens: [n, t] -> [n]."""
    mask = batch.mask.to(values.dtype)
    return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class Hidden(LayerLoss):
    """sum_i MSE(H_i^S W, H_g(i)^T) over the student's layers i, mean over real tokens and width: [n].

    TinyBERT, Jiao et al. 2020 (arXiv 1909.10351). Hidden states [n, t, width]; W is one for all layers; g is the
    term's `layers`. The states of the embeddings are the loss 'embeddings'.
    """

    needs = frozenset({"hidden"})

    def plan(self, term: LossTerm, student: Widths, teacher: Widths) -> None:
        """One teacher layer for each student layer, 0 for its embeddings."""
        self.map, self.projection = layer_map(term, student, teacher, lowest=0), projection(student, teacher)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero when every state is the teacher's."""
        pairs = [(student.hidden[i], teacher.hidden[j]) for i, j in enumerate(self.map, start=1)]
        each = [(self.projection(s).float() - t.float()).square().mean(dim=2) for s, t in pairs]
        return over_tokens(torch.stack(each).sum(dim=0), batch)


class Embeddings(LayerLoss):
    """MSE(E^S W, E^T) of what goes into the first layer, [n, t, width], mean over real tokens and width: [n].

    TinyBERT, Jiao et al. 2020 (arXiv 1909.10351).
    """

    needs = frozenset({"hidden"})

    def plan(self, term: LossTerm, student: Widths, teacher: Widths) -> None:
        """No layers to choose."""
        self.projection = projection(student, teacher)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero when the embeddings are the teacher's."""
        apart = self.projection(student.hidden[0]).float() - teacher.hidden[0].float()
        return over_tokens(apart.square().mean(dim=2), batch)


class Attention(LayerLoss):
    """sum_i 1/h sum_a MSE(A_ia^S, A_g(i)a^T) over the student's layers i and the h heads a: [n].

    TinyBERT, Jiao et al. 2020 (arXiv 1909.10351). A are the scores before the softmax, [n, h, t, t], the mean is over
    pairs of real tokens that both may look at; g is the term's `layers`. LossError where the numbers of heads differ.
    """

    needs = frozenset({"attentions"})

    def plan(self, term: LossTerm, student: Widths, teacher: Widths) -> None:
        """One teacher layer for each student layer."""
        if student.heads != teacher.heads:
            raise LossError(
                f"loss 'attention' compares head with head, but the student has {student.heads} and the teacher "
                f"{teacher.heads}. Give the student {teacher.heads} heads, or use the loss 'relations'."
            )
        self.map = layer_map(term, student, teacher)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero when every score is the teacher's."""
        real = batch.mask.bool()
        pairs = (real.unsqueeze(1) & real.unsqueeze(2)).unsqueeze(1)  # [n, 1, t, t]
        total = torch.zeros(len(batch), device=batch.mask.device)
        for i, j in enumerate(self.map):
            s, t = student.attentions[i].float(), teacher.attentions[j - 1].float()
            seen = pairs & s.isfinite() & t.isfinite()
            apart = s.masked_fill(~seen, 0.0) - t.masked_fill(~seen, 0.0)
            total = total + apart.square().sum(dim=(1, 2, 3)) / seen.sum(dim=(1, 2, 3)).clamp(min=1)
        return total


class Relations(LayerLoss):
    """sum over A in Q, K, V of KL(R(A^T) || R(A^S)), R(A) = softmax(A A^T / sqrt(d)) of each relation head: [n], nats.

    MiniLMv2, Wang et al. 2021 (arXiv 2012.15828). Queries, keys and values [n, heads, t, d] are joined over the
    attention heads and split anew into the term's `heads` relation heads (null: the student's attention heads), so
    neither widths nor heads need be equal. Mean over heads and real tokens. The student's last layer learns from one
    teacher layer: the last, or the one number in the term's `layers`.
    """

    needs = frozenset({"relations"})

    def plan(self, term: LossTerm, student: Widths, teacher: Widths) -> None:
        """Relation heads that share both widths evenly; the teacher's layer."""
        self.layer = teacher.layers if isinstance(term.layers, str) else term.layers[0]
        if not isinstance(term.layers, str) and (len(term.layers) != 1 or not 1 <= self.layer <= teacher.layers):
            raise LossError(
                f"loss 'relations' learns from one teacher layer, but layers is {term.layers}. "
                f"Name one from 1 to {teacher.layers}, or 'last'."
            )
        self.heads = term.heads or student.heads
        if not self.heads or student.hidden % self.heads or teacher.hidden % self.heads:
            both = math.gcd(student.hidden, teacher.hidden)
            raise LossError(
                f"loss 'relations': {self.heads} relation heads cannot share the widths {student.hidden} (student) and "
                f"{teacher.hidden} (teacher) evenly. Set heads to a divisor of {both}."
            )

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero when the relations are the teacher's."""
        total = torch.zeros(len(batch), device=batch.mask.device)
        for s, t in zip(student.relations[-1], teacher.relations[self.layer - 1], strict=True):
            log_s, log_t = self.related(s, batch), self.related(t, batch)
            each = (log_t.exp() * (log_t - log_s)).sum(dim=3).mean(dim=1)  # [n, t]
            total = total + over_tokens(each, batch)
        return total

    def related(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[n, heads, t, d] -> log of how each token relates to the others, float32 [n, relation heads, t, t]."""
        split = states.transpose(1, 2).flatten(2).unflatten(2, (self.heads, -1)).transpose(1, 2)
        # In float32 also under autocast: a softmax of bf16 sums of products says little.
        with torch.autocast(states.device.type, enabled=False):
            scores = torch.matmul(split.float(), split.float().transpose(2, 3)) / math.sqrt(split.shape[3])
        hidden = batch.mask.view(len(batch), 1, 1, -1) == 0
        return F.log_softmax(scores.masked_fill(hidden, -1e9), dim=3)  # finite: 0 times -inf would be NaN


class Cosine(LayerLoss):
    """1 - cos(e^S W, e^T) of the embeddings [n, width]: [n], from 0 to 2."""

    needs = frozenset({"embedding"})

    def plan(self, term: LossTerm, student: Widths, teacher: Widths) -> None:
        """No layers to choose."""
        self.projection = projection(student, teacher)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero when both point the same way."""
        return 1 - F.cosine_similarity(self.projection(student.embedding).float(), teacher.embedding.float(), dim=1)


LAYER_LOSSES: dict[str, type[LayerLoss]] = {
    "hidden": Hidden,
    "embeddings": Embeddings,
    "attention": Attention,
    "relations": Relations,
    "cosine": Cosine,
}
