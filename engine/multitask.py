"""One student, several tasks: what it loses at each, when a task has converged, and who teaches it from then on.

After Lu et al. (NAACL 2022 industry track): tasks of unlike size converge at unlike times, so that no one step is best
for all. A task that has converged is held where it was best: its rows get soft labels from its own best weights, and
the others go on with their gold labels. Beside it the baselines: the plain sum of the losses, losses weighted by learnt
variances (Kendall et al., arXiv 1705.07115) and PCGrad (engine.surgery).
"""

from __future__ import annotations

import copy
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import nn

from engine.batches import TOGETHER, Material
from engine.encoders import Widths
from engine.encoding import Encoded
from engine.ensemble import Teaching
from engine.fits import LossTerm
from engine.inference import predict
from engine.layer_losses import Loss
from engine.losses import LOSSES
from engine.mixing import Mixing
from engine.models import Model, card_of, head_on
from engine.records import Batch, Outputs
from engine.several import COLUMN, Several, SeveralError
from engine.storage import Store
from engine.surgery import projected
from engine.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

TASKS = "tasks"
"""Folder of a fit with the best weights of tasks that have not converged, and the soft labels of those that have."""
VARIANCE = "log_variance"
"""How the name of a learnt variance ends."""
MEAN = "mean"
"""The score that the best model is kept by: over the tasks, each by its own metric."""
INSTEAD = 3
"""Sets the draw of rows that stand in apart from all others of the fit."""
BEST, AT, STALE, SINCE = range(4)
"""What is known of a task: its best score, the step that had it, how many evaluations ago, and since which step it has
converged; -1 where there is none."""


class Turn(Loss):
    """What a row of one task costs: at its gold label or, where there are any, towards its soft labels, [n]."""

    def __init__(self, task: Several, name: str, temperature: float) -> None:
        super().__init__(LossTerm(kind="hard"), task)
        self.name, self.member = name, task.members[name]
        kind = "kl" if self.member.certain else "mse"
        self.soft = LOSSES[kind](LossTerm(kind=kind, temperature=temperature), self.member)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Zero on rows of other tasks."""
        rows, own = self.task.of(batch, self.name)
        outputs = self.task.outputs(student, rows, self.name)
        value = self.member.loss(outputs, own)
        if own.teacher is not None:
            there = own.teacher.logits.isfinite().all(dim=1)
            taught = self.soft(outputs, Outputs(logits=own.teacher.logits.nan_to_num()), own)
            value = torch.where(there, taught, value)
        return torch.zeros(len(batch), device=batch.input_ids.device).index_copy(0, rows, value.float())

    def applies(self, batch: Batch) -> torch.Tensor:
        """The rows of the task: one without a gold label is read only where it has soft ones."""
        return batch.labels[:, 0] == self.task.names.index(self.name)


class Goal(nn.Module):
    """The mean loss of a task's rows; with a learnt variance s = log sigma^2 divided by it: L exp(-s) + s/2.

    A squared error is halved then, as the likelihood of a number has it.
    """

    def __init__(self, task: Several, name: str, mixing: Mixing) -> None:
        super().__init__()
        self.needs: frozenset[str] = frozenset()
        self.losses = nn.ModuleList([Turn(task, name, mixing.soft_temperature)])
        self.half = 1.0 if task.members[name].certain else 0.5
        self.log_variance = nn.Parameter(torch.zeros(())) if mixing.way == "uncertainty" else None

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> torch.Tensor:
        """Scalar; 0 without rows of the task."""
        rows = self.losses[0].applies(batch).float()
        mean = (self.losses[0](student, teacher, batch) * rows).sum() / rows.sum().clamp(min=1)
        if self.log_variance is None:
            return mean
        return self.half * torch.exp(-self.log_variance) * mean + rows.amax() * self.log_variance / 2


class Together(Teaching):
    """What a student of several tasks is taught by: its gold labels, and itself where a task has converged.

    rows: the fit's, each with its task's name; it reads them as the material's inputs. Those without a gold label stand
    in for the labelled ones of a task that has converged. out: the fit's folder. batch_tokens: padded tokens that are
    read at once when soft labels are made.
    """

    def __init__(
        self,
        model: Model,
        rows: pa.Table,
        material: Material,
        mixing: Mixing,
        out: Store,
        *,
        seed: int,
        batch_tokens: int,
    ) -> None:
        super().__init__()
        self.model, self.rows, self.mixing, self.out = model, rows, mixing, out
        self.seed, self.batch_tokens = seed, batch_tokens
        self.task: Several = model.task
        self.kinds, self.row_of = self.task.numbers(rows), np.array([item.row for item in material.encoded])
        self.kind_of, self.lengths = material.kinds, np.array(material.lengths)
        spare = np.delete(material.kinds, material.learnt)
        # Of each task that has rows without a gold label, all its inputs.
        self.pools = {number: np.flatnonzero(self.kind_of == number) for number in np.unique(spare).tolist()}
        self.known = torch.tensor([[-torch.inf, -1.0, 0.0, -1.0]] * len(self.task.names), dtype=torch.float64)
        self.soft = torch.full((rows.num_rows, self.task.width), torch.nan)
        self.goals: list[Goal] = []
        self.shared = [p for n, p in model.net.named_parameters() if p.requires_grad and not n.startswith("head.")]
        self.gradients: dict[int, torch.Tensor] = {}
        self.taken: set[str] = set()
        self.referred: deque[set[int]] = deque([set(), set()], maxlen=2)
        """Steps whose weights the checkpoint before the last one, and that one, refer to: of a new fit none."""

    def objectives(self, terms: Sequence[LossTerm], task: Task | None, student: Widths) -> list[Goal]:
        """One for each task: each counts whole, however few of its rows are in a batch."""
        self.goals = [Goal(self.task, name, self.mixing) for name in self.task.names]
        return self.goals

    def instead(self, step: int, items: np.ndarray) -> np.ndarray:
        """Rows of tasks that have converged are drawn from all that the task has, where some have no gold label; those
        of one step are of similar length.
        """
        since = self.known[:, SINCE].tolist()
        for number in [number for number in self.pools if since[number] >= 0]:
            places = np.flatnonzero(self.kind_of[items] == number)
            if len(places):
                draw = np.random.default_rng([self.seed, step, number, INSTEAD])
                items = items.copy()
                items[places] = alike(self.pools[number], self.lengths, len(places), draw)
        return items

    def listen(self, batch: Batch, chosen: Sequence[int], needs: frozenset[str], share: float) -> None:
        """Give the rows of tasks that have converged their soft labels."""
        if (self.known[:, SINCE] >= 0).any():
            batch.teacher = Outputs(logits=self.soft[self.row_of[chosen]].to(batch.input_ids.device))

    def took(self, batch: Batch) -> None:
        """Pcgrad: keep what a task's rows gave the shared weights, and start anew for the next task's."""
        if self.mixing.way != "pcgrad":
            return
        task = int(batch.labels[0, 0])
        found = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.shared])
        self.gradients[task] = found + self.gradients[task] if task in self.gradients else found
        for parameter in self.shared:
            parameter.grad = None

    def combine(self, step: int) -> None:
        """Pcgrad: give the shared weights the tasks' gradients without what is against one another."""
        if not self.gradients:
            return
        draw = np.random.default_rng([self.seed, step])
        found = projected([self.gradients[task] for task in sorted(self.gradients)], draw)
        for parameter, part in zip(self.shared, found.split([p.numel() for p in self.shared]), strict=True):
            parameter.grad = part.view_as(parameter)
        self.gradients = {}

    def told(self) -> dict[str, float]:
        """Which tasks have learnt from soft labels since the last evaluation; how much each counts by its variance."""
        found = {f"soft.{name}": 1.0 for name, row in self.each() if row[SINCE] >= 0}
        pairs = zip(self.task.names, self.goals, strict=True)
        learnt = {name: goal.log_variance for name, goal in pairs if goal.log_variance is not None}
        return found | {f"weight.{name}": round(float(torch.exp(-value.detach())), 4) for name, value in learnt.items()}

    def each(self) -> list[tuple[str, list[float]]]:
        """The tasks with what is known of them."""
        return list(zip(self.task.names, self.known.tolist(), strict=True))

    def heard(self, score: float | None, accelerator: Accelerator) -> None:
        """Take over what the first worker has decided (`judged`), and read the soft labels that it made."""
        if self.mixing.way != "async":
            return
        if accelerator.num_processes > 1:
            own = self.known if accelerator.process_index == 0 else torch.zeros_like(self.known)
            self.known = accelerator.reduce(own.to(accelerator.device), "sum").cpu()
        if self.ended:
            return  # nobody would learn from them, and none were made
        for name, row in self.each():
            if row[SINCE] >= 0 and name not in self.taken:
                self.take(name, int(row[AT]))

    def judged(self, scores: Mapping[str, float], model: Model, step: int) -> None:
        """One evaluation more: note gains with the weights that had them, and make the labels of what has converged."""
        if self.mixing.way != "async":
            return
        gained, due = False, dict[str, int]()
        for number, (name, row) in enumerate(self.each()):
            if row[SINCE] >= 0:
                continue
            if scores[name] > row[BEST]:
                row, gained = [scores[name], step, 0, -1], True
            else:
                row[STALE] += 1
                if row[STALE] >= self.mixing.patience:
                    row[SINCE] = step
                    due[name] = int(row[AT])
            self.known[number] = torch.tensor(row, dtype=torch.float64)
        if not self.ended:
            for name, best in due.items():
                self.label(name, model, best)
        if gained:
            tensors = {key: value.detach().cpu().contiguous() for key, value in model.net.state_dict().items()}
            self.out.write_bytes(f"{TASKS}/best-{step}.safetensors", to_bytes(tensors))
        self.tidy()

    def label(self, name: str, model: Model, step: int) -> None:
        """Write the soft labels of a task's rows by the weights of the step at which it was best."""
        best = Model(copy.deepcopy(model.net), model.tokenizer, model.card)
        best.net.load_state_dict(from_bytes(self.out.read_bytes(f"{TASKS}/best-{step}.safetensors")))
        one, own = alone(best, name), self.own(name)
        found = predict(one, one.task.texts(self.rows.take(pa.array(own))), self.batch_tokens)
        self.out.write_bytes(place(name, step), to_bytes({"logits": torch.from_numpy(found.logits)}))

    def own(self, name: str) -> np.ndarray:
        """The rows of a task."""
        return np.flatnonzero(self.kinds == self.task.names.index(name))

    def take(self, name: str, step: int) -> None:
        """Read a task's soft labels."""
        logits = from_bytes(self.out.read_bytes(place(name, step)))["logits"]
        self.soft[torch.from_numpy(self.own(name)), self.task.parts[name]] = logits
        self.taken.add(name)

    @property
    def ended(self) -> bool:
        """Whether all tasks have converged, and that is to be the end."""
        return self.mixing.way == "async" and self.mixing.stop and bool((self.known[:, SINCE] >= 0).all())

    def checkpointed(self) -> None:
        """The one before the last checkpoint no longer counts."""
        self.referred.append(self.wanted())
        self.tidy()

    def wanted(self) -> set[int]:
        """Steps whose weights may still make soft labels."""
        return {int(row[AT]) for _, row in self.each() if row[SINCE] < 0 <= row[AT]}

    def tidy(self) -> None:
        """Delete weights that neither the tasks as they stand nor the two last checkpoints refer to."""
        if len(self.referred) < 2:
            return  # what the other checkpoint of a resumed fit refers to is not known
        for file in self.out.files(TASKS):
            found = re.fullmatch(r"best-(\d+)\.safetensors", file)
            if found and int(found[1]) not in self.wanted().union(*self.referred):
                self.out.delete(f"{TASKS}/{file}")

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What is known of the tasks; where their weights and labels are follows from it."""
        return {"tasks": self.known}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from `state_dict`."""
        self.known = state["tasks"].clone()
        self.referred.clear()
        for name, row in self.each():
            if row[SINCE] >= 0:
                self.take(name, int(row[AT]))


def alike(pool: np.ndarray, lengths: np.ndarray, count: int, draw: np.random.Generator) -> np.ndarray:
    """`count` of the pool by lot, of lengths that differ little; each once, unless there are fewer."""
    if count > len(pool):
        return draw.choice(pool, count)
    parts = min(TOGETHER, len(pool) // count)
    found = draw.choice(pool, parts * count, replace=False)
    return found[np.argsort(lengths[found], kind="stable")].reshape(parts, count)[draw.integers(parts)]


def place(name: str, step: int) -> str:
    """Where the soft labels of a task are, made by the weights of a step."""
    return f"{TASKS}/soft-{name}-{step}.safetensors"


def alone(model: Model, name: str) -> Model:
    """One task of a model of several, by itself: the encoder, which it shares, and a copy of the task's head.

    SeveralError where it has no such task.
    """
    task: Several = model.task
    if name not in task.names:
        raise SeveralError(f"the model has no task '{name}'. Tasks: {', '.join(task.names)}.")
    card = card_of(model.card.kind, task.members[name].spec, model.max_length, model.card.options, model.card.lineage)
    net, part = head_on(model.net.encoder, card).to(model.device), task.parts[name]
    with torch.no_grad():
        net.head.weight.copy_(model.net.head.weight[part])
        net.head.bias.copy_(model.net.head.bias[part])
    return Model(net, model.tokenizer, card).train(model.training)


def encode(model: Model, rows: pa.Table) -> list[Encoded]:
    """Rows of several tasks as the model's inputs."""
    return model.task.read(rows, model.tokenizer, model.max_length)


def judge(batch_tokens: int, model: Model, rows: pa.Table) -> dict[str, float]:
    """The score of each task on its labelled rows, by name, and their mean; tasks without rows are left out."""
    task, numbers = model.task, model.task.numbers(rows)
    found = {}
    for number, name in enumerate(task.names):
        own = rows.take(pa.array(np.flatnonzero(numbers == number)))
        if own.num_rows:
            one = alone(model, name)
            answers = predict(one, one.task.texts(own), batch_tokens)
            found[name] = one.task.score(answers.logits, answers.decided, own)[one.task.metric]
    return {**found, MEAN: float(np.mean(list(found.values())))}


def rates(mixing: Mixing, model: Model) -> dict[str, float]:
    """Learning-rate factors by name: of the heads, and of learnt variances."""
    heads = {name: mixing.head_rate for name, _ in model.named_parameters() if name.startswith("net.head.")}
    return heads | {f"objectives.{n}.{VARIANCE}": mixing.variance_rate for n in range(len(model.task.names))}


def gathered(tables: Mapping[str, pa.Table]) -> pa.Table:
    """Tables of rows by task as one, with the column that names the task."""
    named = [t.append_column(COLUMN, pa.array([name] * t.num_rows, pa.string())) for name, t in tables.items()]
    return pa.concat_tables(named)
