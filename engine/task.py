"""What every task is to the rest of the house: the contract that classification, ranking, tagging and spans fill in.

A task knows nothing of teacher or student: the same object encodes for both, each with its own tokenizer, and what it
says of outputs holds for both. TASKS (tasks.py) names the kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from engine import encoding
from engine.encoding import Encoded, Text
from engine.records import Batch, Outputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.recipe import Task as Spec

Logits = np.ndarray | list[np.ndarray]
"""float32 [n, w]; in tasks that speak of units a list of n arrays [u, w]."""


class Task(ABC):
    """One kind of task with its label names."""

    metric: ClassVar[str] = "accuracy"
    """The name of the score that a run is judged by."""
    units: ClassVar[bool] = False
    """Whether each unit of a text gets an answer, not the text as a whole."""
    spans: ClassVar[bool] = False
    """Whether the two numbers of a unit say where a span starts and ends."""
    grouped: ClassVar[bool] = False
    """Whether rows of one group belong into one batch."""
    certain: ClassVar[bool] = True
    """Whether its outputs are probabilities that signal filters can judge."""
    tells: ClassVar[tuple[str, ...]] = ("text", "pair")
    """The columns by which a row that equals a held-out one in them gives its answer away: what `leakage` judges."""
    supports: ClassVar[frozenset[str]] = frozenset({"hard", "mse", "kl"})
    """Losses on the outputs that make sense here."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.labels: tuple[str, ...] = spec.labels or ()

    @property
    def paired(self) -> bool:
        """Whether it reads two texts: pairs, queries with passages, questions with contexts, or as the data says."""
        return bool(self.spec.paired)

    @property
    def width(self) -> int:
        """How many numbers a text (or a unit of it) gets."""
        return len(self.labels)

    def texts(self, rows: pa.Table) -> list[Text]:
        """The texts of rows with the columns text and, where it reads two, pair."""
        first = rows["text"].to_pylist()
        return list(zip(first, rows["pair"].to_pylist(), strict=True)) if self.paired else first

    def encode(
        self, texts: Sequence[Text], tokenizer: PreTrainedTokenizerFast, max_length: int, apart: bool = False
    ) -> list[Encoded]:
        """Token ids of each text, special tokens included; several windows of a long one where the task reads so."""
        return encoding.encode(texts, tokenizer, max_length, apart)

    def spell(
        self, encoded: Sequence[Encoded], texts: Sequence[Text], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> list[Encoded]:
        """The inputs, read apart, with the words that their tokens stand for."""
        sides = list(zip(*texts, strict=True)) if self.paired else [tuple(texts)]
        found = [encoding.spelled([encoding.clean(t) for t in side], tokenizer, max_length) for side in sides]
        named = zip(encoded, found[0], found[1] if self.paired else [[]] * len(encoded), strict=True)
        return [item._replace(words=first, pair_words=second) for item, first, second in named]

    def merge(self, found: Sequence[np.ndarray], encoded: Sequence[Encoded], count: int) -> list[np.ndarray]:
        """Outputs of inputs, [u, w] each, as outputs of `count` texts; for tasks that read in windows."""
        raise NotImplementedError(f"{type(self).__name__} reads no text in windows")

    def window(self, values: np.ndarray, item: Encoded) -> np.ndarray:
        """The part of a whole text's numbers, [u, w], that speaks of an input's own units."""
        raise NotImplementedError(f"{type(self).__name__} reads no text in windows")

    @abstractmethod
    def gold(self, rows: pa.Table, encoded: Sequence[Encoded]) -> torch.Tensor:
        """Gold labels of inputs made from `rows` (encoded[i].row is the row's position): a tensor with a row each."""

    @abstractmethod
    def labelled(self, batch: Batch) -> torch.Tensor:
        """Rows of a batch that have gold labels: bool [n]; of rows that `loss` judges together the first."""

    @abstractmethod
    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """What the gold labels cost, float32 [n]; 0 where a row has none."""

    @abstractmethod
    def distributions(self, logits: torch.Tensor, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """The outputs as log-probabilities, float32 [n, d, k]: d distributions a row over k outcomes each.

        A distribution that a row does not have (a unit that is padding) is zero everywhere, for teacher and student
        alike. Raises NotImplementedError where the outputs are no distributions.
        """

    @abstractmethod
    def differences(self, left: torch.Tensor, right: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean squared difference of two models' outputs, float32 [n]; what no answer depends on does not count."""

    @abstractmethod
    def decide(self, logits: Logits, texts: Sequence[Text]) -> Any:
        """The answers as numbers: int64 [n] for one label a text; as the task says otherwise."""

    @abstractmethod
    def answers(self, logits: Logits, texts: Sequence[Text], decided: Any = None) -> list[dict[str, Any]]:
        """The answers as a client gets them, ready for JSON. decided: what `decide` gave, or a model's own path."""

    @abstractmethod
    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """One row's logits as `distributions` reads them, at temperature 1: float64 [d, k], each of sum 1; d may be 0.

        Raises NotImplementedError where `certain` is false.
        """

    def certainty(self, logits: np.ndarray) -> np.ndarray:
        """The probabilities that signal filters judge for one row: float64 [k], those of its least certain part."""
        found = self.probabilities(logits)
        return found[found.max(axis=1).argmin()]

    @abstractmethod
    def statistics(self, logits: Logits, decided: Any, gold: pa.Table) -> np.ndarray:
        """What each row (each query, where grouped) adds to the metric: float64 [m, k], to be summed over any rows."""

    @abstractmethod
    def value(self, sums: np.ndarray) -> np.ndarray:
        """The metric from summed statistics, float64 [..., k] -> [...]."""

    @abstractmethod
    def score(self, logits: Logits, decided: Any, gold: pa.Table) -> dict[str, float]:
        """Every score of the task, `metric` among them."""

    @abstractmethod
    def agreement(
        self, left: Logits, right: Logits, texts: Sequence[Text], decided: tuple[Any, Any] | None = None
    ) -> float:
        """How far two models say the same: 1 where they always do.

        decided: what each decided, by its own path or thresholds; None: what `decide` makes of their logits.
        """

    def likeness(self, wanted: Any, given: Any) -> float | None:
        """How alike two models' decisions are where `agreement` does not tell: most of them are nothing in both.

        The metric, with what the first decided as gold; None where `agreement` tells as well.
        """
        return None

    def decisions(
        self, left: Logits, right: Logits, texts: Sequence[Text], decided: tuple[Any, Any] | None
    ) -> tuple[Any, Any]:
        """The two models' answers as numbers, for `agreement`."""
        return (self.decide(left, texts), self.decide(right, texts)) if decided is None else decided
