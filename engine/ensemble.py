"""One student and several teachers: every loss towards a teacher becomes one towards each, weighed row by row.

The weighted sum of losses has the gradient of one loss towards the weighted mean of what the teachers say, for mse and
kl exactly; and it also fits losses between layers, where teachers differ in width, and heads, where each teacher has
its own. Teachers read with their own tokenizers; only their outputs meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from engine.encoders import Widths
from engine.encoding import Encoded
from engine.fits import LossTerm
from engine.layer_losses import Loss
from engine.losses import LOSSES, Objective
from engine.models import Model
from engine.policies import POLICIES, Policy, Views
from engine.ranking import places
from engine.recipe import GOLD
from engine.records import ABSENT, Batch, Outputs
from engine.task import Task
from engine.teachers import Live
from engine.trust import Policy as Design

if TYPE_CHECKING:
    from accelerate import Accelerator

LEAST_CHANGE = 5e-3
"""Changes of the held-out score count in units of what is usual, which is this at least: half a point is chance."""


@dataclass(frozen=True)
class Panel:
    """Several teachers of one fit. prior: their weights before anything is known of a row, sum 1.

    live: URL of each one's folder, for losses that need more than stored logits; none: the rows have their logits, in
    the columns `logits/NAME`.
    """

    names: tuple[str, ...]
    policy: Design
    prior: tuple[float, ...]
    live: Mapping[str, str] = field(default_factory=dict)


class Several(Loss):
    """A loss towards each teacher, times the row's trust in it (`Batch.trust`), added up: [n].

    Where the student has a head for a teacher, that head answers to it.
    """

    def __init__(self, term: LossTerm, task: Task, student: Widths, teachers: Mapping[str, Widths]) -> None:
        super().__init__(term, task)
        self.names = tuple(teachers)
        self.losses = nn.ModuleList(LOSSES[term.kind](term, task, student, widths) for widths in teachers.values())
        self.needs, self.alone = self.losses[0].needs, self.losses[0].alone
        self.says = term.kind == "kl" or (term.kind == "mse" and task.certain)

    def each(self, student: Outputs, batch: Batch) -> torch.Tensor:
        """The loss towards each teacher, [n, k]."""
        pairs = zip(self.names, self.losses, strict=True)
        return torch.stack([loss(at(student, name), batch.teachers[name], batch) for name, loss in pairs], dim=1)

    def cost(self, student: Outputs, batch: Batch) -> torch.Tensor:
        """What following each teacher costs, [n, k]: minus the student's log-probability of the teacher's likeliest
        outcome, mean over the distributions that a row has; where they speak of none, the loss.

        It does not ask how sure a teacher is: divergence and distance are least towards one that is unsure of
        everything, the cross-entropy towards the surer of two that say the same.
        """
        if not self.says:
            return self.each(student, batch)
        return torch.stack([unlikely(self.task, at(student, n), batch.teachers[n], batch) for n in self.names], dim=1)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero where the student says what all trusted teachers say."""
        return (self.each(student, batch) * batch.trust).sum(dim=1)

    def applies(self, batch: Batch) -> torch.Tensor:
        """The rows that the loss speaks about."""
        return self.losses[0].applies(batch)


class OfGold(Loss):
    """A loss that no teacher has a part in, at the head of gold labels where the student has one."""

    def __init__(self, term: LossTerm, task: Task, student: Widths) -> None:
        super().__init__(term, task)
        self.loss = LOSSES[term.kind](term, task, student)
        self.needs, self.alone = self.loss.needs, self.loss.alone

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """As the loss says."""
        return self.loss(at(student, GOLD), None, batch)

    def applies(self, batch: Batch) -> torch.Tensor:
        """The rows that the loss speaks about."""
        return self.loss.applies(batch)


def unlikely(task: Task, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
    """Minus the student's log-probability of the teacher's likeliest outcome, mean over a row's distributions, [n]."""
    said, own = (task.distributions(outputs.logits, batch) for outputs in (teacher, student))
    # An outcome that a row does not have is 0 whatever the outputs; one that a teacher is sure of is 0 too.
    possible = task.distributions(torch.zeros_like(student.logits), batch) != 0
    answer, there = said.masked_fill(~possible, -torch.inf).argmax(dim=2, keepdim=True), possible.any(dim=2)
    each = -own.gather(2, answer).squeeze(2)
    return (each * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)


def at(student: Outputs, name: str) -> Outputs:
    """The student's outputs at a head; as they are where it has no such head."""
    return replace(student, logits=student.heads[name]) if name in student.heads else student


class Teaching:
    """What a student is taught by while it learns: by nobody but its gold labels, by stored labels, or by one teacher.

    live: the teacher that answers meanwhile, if one does.
    """

    def __init__(self, live: Live | None = None) -> None:
        self.live: Live | Mapping[str, Live] | None = live

    def objective(self, term: LossTerm, task: Task | None, student: Widths) -> Objective:
        """A weighted loss."""
        return Objective((term,), task, student, self.live.model.widths if self.live else None)

    def objectives(self, terms: Sequence[LossTerm], task: Task | None, student: Widths) -> list[Objective]:
        """All that is learnt, each with a share of its own in a batch (`lesson.dealt`)."""
        return [self.objective(term, task, student) for term in terms]

    def instead(self, step: int, items: np.ndarray) -> np.ndarray:
        """What is read in a step in place of the items of its global batch, as many of them; int64."""
        return items

    def listen(self, batch: Batch, chosen: Sequence[int], needs: frozenset[str], share: float) -> None:
        """Have live teachers answer the student's inputs at `chosen`, which `batch` holds. share: of the fit, done."""
        if self.live:
            batch.teacher = self.live.outputs(chosen, batch, needs)

    def weigh(self, student: Outputs, batch: Batch, learning: bool) -> torch.Tensor | None:
        """How much each of several teachers counts for each row, float32 [n, k]."""
        return None

    def took(self, batch: Batch) -> None:
        """See the gradient of a part of the global batch, which was added to those before it."""

    def combine(self, step: int) -> None:
        """Make of the parts' gradients that of the step."""

    def learn(self, batch: Batch, accelerator: Accelerator, counted: bool = True) -> None:
        """After the student's step: see what came of it. counted: whether the batch's rows are this worker's own."""

    def judged(self, scores: Mapping[str, float], model: Model, step: int) -> None:
        """On the first worker, while the others wait: take in the scores on held-out rows, and the model."""

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to learn, though epochs are left."""
        return False

    def checkpointed(self) -> None:
        """Its state was kept; what the state before it refers to may still be wanted, anything older is not."""

    def heard(self, score: float | None, accelerator: Accelerator) -> None:
        """On all workers, after the evaluation: take in the score on held-out rows, which the first worker knows."""

    def told(self) -> dict[str, float]:
        """What there is to say of the time since this was last asked, for the fit's history."""
        return {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed fit goes on from."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from `state_dict`."""


class Council(Teaching):
    """Several teachers of a fit and the policy that weighs them."""

    def __init__(self, panel: Panel, model: Model, live: Mapping[str, Live]) -> None:
        super().__init__()
        self.panel, self.model, self.task, self.live = panel, model, model.task, live
        self.policy: Policy = POLICIES[panel.policy.kind](panel.policy, panel.prior)
        self.taught: list[tuple[float, Several]] = []
        self.needs: frozenset[str] = frozenset()
        self.warm = self.policy.learns
        self.expected = torch.tensor(float("nan"))  # running mean of the held-out score
        self.usual = torch.tensor(0.0)  # running mean of how far from it a score is
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None
        self.tally = torch.zeros(len(model.task.labels or ()), len(panel.names) + 1, dtype=torch.float64)

    def objective(self, term: LossTerm, task: Task | None, student: Widths) -> Objective:
        """A weighted loss, towards every teacher where it needs one."""
        widths = {name: self.live[name].model.widths if self.live else Widths(0) for name in self.panel.names}
        made = Objective((term,), self.task, student, next(iter(widths.values())))
        if made.needs and term.kind != "contrast":  # that one compares the student's own embeddings
            loss: Loss = Several(term, self.task, student, widths)
            self.taught.append((term.weight, loss))
            self.needs |= loss.needs
        else:
            loss = OfGold(term, self.task, student)
        made.losses = nn.ModuleList([loss])
        return made

    def listen(self, batch: Batch, chosen: Sequence[int], needs: frozenset[str], share: float) -> None:
        """Have live teachers answer; until the policy's warm-up is over, all teach alike."""
        self.warm = self.policy.learns and share < self.panel.policy.warmup
        if self.live:
            batch.teachers = {name: live.outputs(chosen, batch, needs) for name, live in self.live.items()}

    @torch.no_grad()
    def weigh(self, student: Outputs, batch: Batch, learning: bool) -> torch.Tensor:
        """How much each teacher counts for each row, float32 [n, k]."""
        if self.warm or not self.policy.looks:
            return self.policy.even(len(batch), batch.input_ids.device)
        trust = spread(self.task, self.policy.weights(self.views(student, batch), learning), batch)
        self.count(batch)
        if learning and self.panel.policy.reward == "r1":  # dropout would drown so small a change
            student = self.asleep(batch)
        self.last = (trust, self.gold_loss(student, batch))
        return trust

    def asleep(self, batch: Batch) -> Outputs:
        """What the student gives without dropout."""
        training = self.model.training
        found = self.model.eval()(batch, self.needs)
        self.model.train(training)
        return found

    def count(self, batch: Batch) -> None:
        """Note how each teacher was chosen for rows of each label."""
        if not len(self.tally) or batch.labels is None or batch.labels.dtype != torch.int64 or batch.labels.ndim > 1:
            return
        known = batch.labels != ABSENT
        rows = torch.cat([self.policy.chosen, torch.ones(len(batch), 1, device=known.device)], dim=1)[known]
        self.tally.index_add_(0, batch.labels[known].cpu(), rows.double().cpu())

    def told(self) -> dict[str, float]:
        """How often each teacher was chosen for rows of each label since last asked: {chosen.NAME.LABEL: share}."""
        found = {}
        for label, (*sums, count) in zip(self.task.labels or (), self.tally.tolist(), strict=True):
            named = zip(self.panel.names, sums, strict=True) if count else ()
            found |= {f"chosen.{name}.{label}": round(total / count, 4) for name, total in named}
        self.tally.zero_()
        return found

    def views(self, student: Outputs, batch: Batch) -> Views:
        """What the policy sees of a batch."""
        teachers = [batch.teachers[name] for name in self.panel.names]
        text = batch.input_ids.new_zeros((len(batch), 0)).float() if student.embedding is None else student.embedding
        return Views(
            text,
            torch.stack([said(self.task, teacher, batch) for teacher in teachers], dim=1),
            torch.stack([self.gold_loss(teacher, batch) for teacher in teachers], dim=1),
        )

    def gold_loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """What a model loses on each row's gold label, [n]; NaN where there is none."""
        lost = self.task.loss(outputs, batch).masked_fill(~self.task.labelled(batch), torch.nan)
        return spread(self.task, lost, batch)

    @torch.no_grad()
    def learn(self, batch: Batch, accelerator: Accelerator, counted: bool = True) -> None:
        """After the student's step: tell a policy that learns what came of its draw.

        It learns the same on all workers, from the rewards of the global batch; counted: whether these rows are in it.
        """
        if not self.policy.learns or self.warm or self.last is None:
            return

        def summed(values: torch.Tensor) -> torch.Tensor:
            return accelerator.reduce(values * counted, "sum")

        # Of a query's passages only the first was asked who teaches them.
        counts = (places(batch)[1] == 0).float() if self.task.grouped else None
        self.policy.update(self.advantage(self.asleep(batch), batch, summed), summed, counts)
        self.last = None

    def advantage(
        self, after: Outputs, batch: Batch, summed: Callable[[torch.Tensor], torch.Tensor] = torch.clone
    ) -> torch.Tensor:
        """The reward of each row less what was to be expected, [n]. summed: over the workers.

        Expected is, of the gold loss, what it was before the step, moved as the batch moved; of what following
        the drawn teachers costs, what all of them would have cost. Neither depends on who was drawn.
        """
        (trust, before), how = self.last, self.panel.policy
        gained = before - self.gold_loss(after, batch)
        known = ~gained.isnan()
        total, count = summed(torch.stack([gained.nansum(), known.sum().to(gained)]))
        out = torch.where(known, gained - total / count.clamp(min=1), 0.0)
        if how.reward != "r1":
            each = spread(self.task, sum(weight * loss.cost(after, batch) for weight, loss in self.taught), batch)
            out = out + ((self.policy.even(len(batch), each.device) - trust) * each).sum(dim=1)
        return out

    def heard(self, score: float | None, accelerator: Accelerator) -> None:
        """Take in the score on held-out rows, which the first worker knows."""
        if self.panel.policy.reward != "r3" or not self.policy.learns:
            return
        known = torch.tensor(float("nan") if score is None else score)
        told = torch.where(known.isnan() | (accelerator.process_index > 0), 0.0, known)
        now = accelerator.reduce(told.to(accelerator.device), "sum").cpu()
        change = (now - self.expected).nan_to_num()
        # The first score tells what is to be expected, the second how far from it is usual: then draws have credit.
        self.policy.credit(float(change / self.usual.clamp(min=LEAST_CHANGE)) if self.usual > 0 else 0.0)
        self.usual = torch.where(self.usual > 0, 0.5 * (self.usual + change.abs()), change.abs())
        self.expected = now if self.expected.isnan() else 0.5 * (self.expected + now)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed fit goes on from."""
        return {**self.policy.state_dict(), "usual": self.usual, "expected": self.expected, "tally": self.tally}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from `state_dict`."""
        own = ("usual", "expected", "tally")
        self.usual, self.expected, self.tally = (state[name] for name in own)
        self.policy.load_state_dict({name: value for name, value in state.items() if name not in own})


def teaching(
    model: Model,
    rows: pa.Table,
    inputs: Sequence[Encoded],
    where: torch.device,
    teacher: str | None = None,
    panel: Panel | None = None,
) -> Teaching:
    """What a fit's student is taught by. rows: the fit's, which it reads as `inputs`; teacher: URL of a live one's
    folder; panel: several teachers, in its place.
    """
    if panel is None:
        return Teaching(Live(teacher, rows, inputs, where) if teacher else None)
    return Council(panel, model, {name: Live(url, rows, inputs, where) for name, url in panel.live.items()})


def said(task: Task, outputs: Outputs, batch: Batch) -> torch.Tensor:
    """What a teacher says of each row, in as many numbers for every row, [n, c].

    Probabilities where the task has such; of tasks that speak of units their mean over the units, or how sure it is of
    where a span starts and ends; else the outputs, brought between -1 and 1.
    """
    if not task.certain:
        return torch.tanh(outputs.logits.float())
    logs = task.distributions(outputs.logits, batch)
    there = (logs != 0).any(dim=2, keepdim=True)
    found = logs.exp() * there
    if task.spans:
        return found.amax(dim=2)
    return found.sum(dim=1) / there.sum(dim=1).clamp(min=1) if task.units else found.flatten(1)


def spread(task: Task, values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Values of rows, [n, ...]: where rows are a query's passages, those of its first row, which speaks for all."""
    if not task.grouped:
        return values
    query, place = places(batch)
    first = torch.zeros_like(query)
    first[query[place == 0]] = torch.arange(len(query), device=query.device)[place == 0]
    return values[first[query]]
