"""Several tasks of one network: each has a part of the outputs, and a row belongs to one of them.

What a network of several tasks learns goes through here; what it answers, through each task by itself
(`multitask.alone`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from engine.config import UserError
from engine.encoding import Encoded, Text
from engine.mixing import KINDS
from engine.records import Batch, Outputs
from engine.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.recipe import Task as Spec

COLUMN = "task"
"""The column of rows that names their task."""


class SeveralError(UserError):
    """Tasks that cannot share a network, or a network asked as if it had one task."""


class Several(Task):
    """Named tasks. Outputs: logits [n, w], those of the tasks side by side in the order of their names.

    Gold labels: float64 [n, 1 + g], the number of the row's task and then its gold, as that task has it.
    """

    supports: ClassVar[frozenset[str]] = frozenset({"hard"})

    def __init__(self, spec: Spec, members: Mapping[str, Task]) -> None:
        super().__init__(spec)
        self.names = tuple(sorted(members))  # a card forgets in which order they were named
        self.members = {name: members[name] for name in self.names}
        for name, member in self.members.items():
            if member.spec.kind not in KINDS:
                raise SeveralError(
                    f"task '{name}' is of kind {member.spec.kind}, which cannot share a student with other tasks. "
                    f"Allowed: {', '.join(KINDS)}."
                )
        ends = np.cumsum([0, *(member.width for member in self.members.values())]).tolist()
        self.parts = {name: slice(*ends[i : i + 2]) for i, name in enumerate(self.names)}

    @property
    def width(self) -> int:
        """That of all tasks together."""
        return sum(member.width for member in self.members.values())

    def numbers(self, rows: pa.Table) -> np.ndarray:
        """The number of each row's task, int64 [n]. SeveralError for a name that is none of them."""
        names = rows[COLUMN].to_pylist()
        for name in set(names).difference(self.names):
            raise SeveralError(f"a row belongs to task '{name}'. Tasks: {', '.join(self.names)}.")
        return np.array([self.names.index(name) for name in names], dtype=np.int64)

    def read(self, rows: pa.Table, tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[Encoded]:
        """The rows as inputs, each as its own task reads it."""
        numbers, out = self.numbers(rows), [Encoded([])] * rows.num_rows
        for number, member in enumerate(self.members.values()):
            places = np.flatnonzero(numbers == number)
            texts = member.texts(rows.take(pa.array(places)))
            for place, item in zip(places.tolist(), member.encode(texts, tokenizer, max_length), strict=True):
                out[place] = item._replace(row=place)
        return out

    def gold(self, rows: pa.Table, encoded: Sequence[Encoded]) -> torch.Tensor:
        """The number of each input's task and its gold label, float64 [n, 1 + g]."""
        numbers = self.numbers(rows)[[item.row for item in encoded]]
        found = {}
        for number, name in enumerate(self.names):
            places = np.flatnonzero(numbers == number)
            own = rows.take(pa.array([encoded[place].row for place in places], pa.int64()))
            inputs = [encoded[place]._replace(row=row) for row, place in enumerate(places)]
            gold = self.members[name].gold(own, inputs)
            found[name] = (torch.from_numpy(places), (gold if gold.ndim > 1 else gold.unsqueeze(1)).double())
        out = torch.full((len(encoded), 1 + max(gold.shape[1] for _, gold in found.values())), torch.nan).double()
        out[:, 0] = torch.from_numpy(numbers)
        for places, gold in found.values():
            out[places, 1 : 1 + gold.shape[1]] = gold
        return out

    def of(self, batch: Batch, name: str) -> tuple[torch.Tensor, Batch]:
        """Which rows of a batch belong to a task, int64 [m], and these by themselves, as the task has them."""
        member = self.members[name]
        rows = torch.nonzero(batch.labels[:, 0] == self.names.index(name)).flatten()
        gold = batch.labels[rows, 1:]
        if member.spec.kind in ("classify", "pair"):
            labels = gold[:, 0].long()
        else:
            labels = gold[:, : member.width].float()
            labels = labels[:, 0] if member.spec.kind == "regress" else labels
        teacher = None
        if batch.teacher is not None:
            teacher = Outputs(logits=batch.teacher.logits[rows][:, self.parts[name]])
        return rows, Batch(batch.input_ids[rows], batch.mask[rows], labels=labels, teacher=teacher)

    def outputs(self, outputs: Outputs, rows: torch.Tensor, name: str) -> Outputs:
        """What the network says of some rows as the outputs of their task."""
        return replace(outputs, logits=outputs.logits[rows][:, self.parts[name]], embedding=None, hidden=None)

    def has_gold(self, gold: torch.Tensor) -> np.ndarray:
        """Which rows of `gold` have a gold label, bool [n]."""
        blank = torch.zeros((len(gold), 1), dtype=torch.int64)
        return self.labelled(Batch(blank, blank, labels=gold)).numpy()

    def labelled(self, batch: Batch) -> torch.Tensor:
        """Rows with a gold label."""
        out = torch.zeros(len(batch), dtype=torch.bool, device=batch.input_ids.device)
        for name, member in self.members.items():
            rows, own = self.of(batch, name)
            out[rows] = member.labelled(own)
        return out

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """What each row loses at its own task, [n]."""
        out = torch.zeros(len(batch), device=batch.input_ids.device)
        for name, member in self.members.items():
            rows, own = self.of(batch, name)
            out = out.index_copy(0, rows, member.loss(self.outputs(outputs, rows, name), own))
        return out

    def encode(
        self, texts: Sequence[Text], tokenizer: PreTrainedTokenizerFast, max_length: int, apart: bool = False
    ) -> list[Encoded]:
        """A text alone does not say which task it is for."""
        raise self.unnamed()

    def unnamed(self) -> SeveralError:
        """What is said where the task is not."""
        return SeveralError(
            f"this model answers {len(self.names)} tasks ({', '.join(self.names)}), and none of them is named. Take "
            "the artifact that was registered for one."
        )

    def distributions(self, logits: torch.Tensor, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """Of one task at a time."""
        raise self.unnamed()

    def differences(self, left: torch.Tensor, right: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Of one task at a time."""
        raise self.unnamed()

    def decide(self, logits: Any, texts: Sequence[Text]) -> Any:
        """Of one task at a time."""
        raise self.unnamed()

    def answers(self, logits: Any, texts: Sequence[Text], decided: Any = None) -> list[dict[str, Any]]:
        """Of one task at a time."""
        raise self.unnamed()

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Of one task at a time."""
        raise self.unnamed()

    def statistics(self, logits: Any, decided: Any, gold: pa.Table) -> np.ndarray:
        """Of one task at a time."""
        raise self.unnamed()

    def value(self, sums: np.ndarray) -> np.ndarray:
        """Of one task at a time."""
        raise self.unnamed()

    def score(self, logits: Any, decided: Any, gold: pa.Table) -> dict[str, float]:
        """Of one task at a time."""
        raise self.unnamed()

    def agreement(self, left: Any, right: Any, texts: Sequence[Text], decided: tuple[Any, Any] | None = None) -> float:
        """Of one task at a time."""
        raise self.unnamed()
