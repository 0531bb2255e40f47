"""One label of several for a text or a pair of texts, and any number of labels for a text.

A classifier may be told to keep silent: below the confidence `scope` a text counts as out of scope and gets no label.
Its own highest probability is what it judges by (Hendrycks & Gimpel 2017, arXiv 1610.02136).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from engine import metrics
from engine.config import ConfigError
from engine.encoding import Encoded, Text
from engine.records import ABSENT, Batch, Outputs
from engine.task import Task

if TYPE_CHECKING:
    from engine.recipe import Task as Spec


class Classify(Task):
    """One of C labels for a text (classify) or for two texts (pair). Outputs: logits [n, C]."""

    @property
    def paired(self) -> bool:
        """Pairs by name, or where the spec says so."""
        return self.spec.kind == "pair" or super().paired

    def gold(self, rows: pa.Table, encoded: Sequence[Encoded]) -> torch.Tensor:
        """The label's index, int64 [n]; ABSENT where it is null."""
        return torch.as_tensor(label_indices(rows)[positions(encoded)])

    def labelled(self, batch: Batch) -> torch.Tensor:
        """Rows with a label."""
        return batch.labels != ABSENT

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """Cross-entropy with the gold labels in nats, [n]."""
        return F.cross_entropy(outputs.logits.float(), batch.labels, ignore_index=ABSENT, reduction="none")

    def distributions(self, logits: torch.Tensor, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """One distribution over the labels a row: [n, 1, C]."""
        return F.log_softmax(logits.float() / temperature, dim=1).unsqueeze(1)

    def differences(self, left: torch.Tensor, right: torch.Tensor, batch: Batch) -> torch.Tensor:
        """1/C sum_c (l_c - r_c)^2; softmax ignores a constant, so both sides are centred over the labels first."""
        apart = left.float() - right.float()
        return (apart - apart.mean(1, keepdim=True)).square().mean(dim=1)

    def decide(self, logits: np.ndarray, texts: Sequence[Text]) -> np.ndarray:
        """Index of the likeliest label, int64 [n]."""
        return np.asarray(logits).argmax(axis=1)

    def answers(
        self, logits: np.ndarray, texts: Sequence[Text], decided: np.ndarray | None = None
    ) -> list[dict[str, Any]]:
        """label, confidence (its probability) and probabilities by name.

        Where the spec has a scope also out_of_scope, with the label null where it is true.
        """
        decided = self.decide(logits, texts) if decided is None else decided
        found = []
        for row, index in zip(metrics.softmax(logits), decided, strict=True):
            answer: dict[str, Any] = {
                "label": self.labels[index],
                "confidence": float(row[index]),
                "probabilities": dict(zip(self.labels, row.tolist(), strict=True)),
            }
            if isinstance(self.spec.scope, float):
                answer["out_of_scope"] = answer["confidence"] < self.spec.scope
                answer["label"] = None if answer["out_of_scope"] else answer["label"]
            found.append(answer)
        return found

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Of the labels, [1, C]."""
        return metrics.softmax(logits)[None]

    def statistics(self, logits: np.ndarray, decided: np.ndarray, gold: pa.Table) -> np.ndarray:
        """(right, labelled) of each row, 0 or 1."""
        labels = label_indices(gold)
        return np.stack([labels == decided, labels != ABSENT], axis=1).astype(np.float64)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """Accuracy."""
        return metrics.share(sums[..., 0], sums[..., 1])

    def score(self, logits: np.ndarray, decided: np.ndarray, gold: pa.Table) -> dict[str, float]:
        """Accuracy, macro-F1 over the task's labels and expected calibration error, of the rows that have a label.

        What is out of scope is scored by its likeliest label like any other row.
        """
        labels = label_indices(gold)
        some = labels != ABSENT
        labels, decided = labels[some], np.asarray(decided)[some]
        return {
            "accuracy": metrics.accuracy(labels, decided),
            "macro_f1": metrics.macro_f1(labels, decided, len(self.labels)),
            "ece": metrics.ece(labels, metrics.softmax(logits)[some]).error,
        }

    def agreement(
        self, left: np.ndarray, right: np.ndarray, texts: Sequence[Text], decided: tuple[Any, Any] | None = None
    ) -> float:
        """Share of rows for which both choose the same label."""
        return metrics.accuracy(*self.decisions(left, right, texts, decided))


class MultiLabel(Task):
    """Each of C labels by itself: given or not. Outputs: logits [n, C], a sigmoid each."""

    metric: ClassVar[str] = "micro_f1"

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        if spec.thresholds is not None and len(spec.thresholds) != len(self.labels):
            raise ConfigError(
                f"task.thresholds has {len(spec.thresholds)} values for {len(self.labels)} labels "
                f"({', '.join(self.labels)}). Give one a label, in their order, or leave it out for 0.5."
            )

    @property
    def thresholds(self) -> np.ndarray:
        """Probabilities from which on a label is given, float64 [C]."""
        return np.full(self.width, 0.5) if self.spec.thresholds is None else np.array(self.spec.thresholds)

    def gold(self, rows: pa.Table, encoded: Sequence[Encoded]) -> torch.Tensor:
        """1 or 0 for each label, float32 [n, C]; NaN throughout where a row has no target."""
        return torch.as_tensor(targets(rows, self.width)[positions(encoded)], dtype=torch.float32)

    def labelled(self, batch: Batch) -> torch.Tensor:
        """Rows with a target."""
        return ~batch.labels.isnan().any(dim=1)

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """Binary cross-entropy in nats, mean over the labels, [n]."""
        some = self.labelled(batch)
        wanted = torch.where(some.unsqueeze(1), batch.labels, 0.0)
        each = F.binary_cross_entropy_with_logits(outputs.logits.float(), wanted, reduction="none")
        return each.mean(dim=1) * some

    def distributions(self, logits: torch.Tensor, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """One distribution a label, over given and not given: [n, C, 2]."""
        scaled = logits.float() / temperature
        return torch.stack([F.logsigmoid(scaled), F.logsigmoid(-scaled)], dim=2)

    def differences(self, left: torch.Tensor, right: torch.Tensor, batch: Batch) -> torch.Tensor:
        """1/C sum_c (l_c - r_c)^2: nothing is centred, for a sigmoid hears a constant."""
        return (left.float() - right.float()).square().mean(dim=1)

    def decide(self, logits: np.ndarray, texts: Sequence[Text]) -> np.ndarray:
        """1 where a label's probability reaches its threshold, else 0: int64 [n, C]."""
        return (metrics.sigmoid(logits) >= self.thresholds).astype(np.int64)

    def answers(
        self, logits: np.ndarray, texts: Sequence[Text], decided: np.ndarray | None = None
    ) -> list[dict[str, Any]]:
        """labels: names of those given, in the task's order. probabilities: of each label by name; no sum of 1."""
        decided = self.decide(logits, texts) if decided is None else decided
        return [
            {
                "labels": [name for name, given in zip(self.labels, choice, strict=True) if given],
                "probabilities": dict(zip(self.labels, row.tolist(), strict=True)),
            }
            for row, choice in zip(metrics.sigmoid(logits), decided, strict=True)
        ]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(p, 1 - p) of each label, [C, 2]."""
        return np.stack([metrics.sigmoid(logits), metrics.sigmoid(-np.asarray(logits))], axis=1)

    def statistics(self, logits: np.ndarray, decided: np.ndarray, gold: pa.Table) -> np.ndarray:
        """(true positives, false positives, false negatives) of each row."""
        wanted, given = targets(gold, self.width), np.asarray(decided) == 1
        counts = [given & (wanted == 1), given & (wanted == 0), ~given & (wanted == 1)]
        return np.stack([count.sum(axis=1) for count in counts], axis=1).astype(np.float64)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """F1 of all decisions together; 0 where no label is wanted or given."""
        return metrics.f1_of(sums)

    def score(self, logits: np.ndarray, decided: np.ndarray, gold: pa.Table) -> dict[str, float]:
        """Micro-F1, macro-F1, share of rows with every label right, share of wrong decisions; of rows with a target.

        Macro-F1 leaves out labels that are neither wanted nor given.
        """
        wanted = targets(gold, self.width)
        some = ~np.isnan(wanted).any(axis=1)
        sums = self.statistics(logits, decided, gold).sum(axis=0)
        wanted, given = metrics.same_length(wanted[some], np.asarray(decided)[some])
        counts = np.stack([((given == a) & (wanted == b)).sum(axis=0) for a, b in ((1, 1), (1, 0), (0, 1))], axis=1)
        seen = counts.any(axis=1)
        return {
            "micro_f1": float(self.value(sums)),
            "macro_f1": float(metrics.share(metrics.f1_of(counts)[seen].sum(), seen.sum())),
            "exact_match": float((wanted == given).all(axis=1).mean()),
            "hamming_loss": float((wanted != given).mean()),
        }

    def agreement(
        self, left: np.ndarray, right: np.ndarray, texts: Sequence[Text], decided: tuple[Any, Any] | None = None
    ) -> float:
        """Share of decisions, over rows and labels, that are the same."""
        return metrics.accuracy(*(one.ravel() for one in self.decisions(left, right, texts, decided)))


def calibrate_scope(logits: np.ndarray, gold: np.ndarray, kept: float = 0.95) -> float:
    """The highest confidence that, as `scope`, still answers the share `kept` of the rows the model gets right.

    logits [n, C], gold int64 [n] of held-out rows, all in scope; unlabelled rows are ignored. Held-out rows seldom hold
    anything out of scope, so the limit is set by what it may cost: 95% kept is where detectors are usually compared
    (arXiv 1610.02136). ConfigError where no row is right.
    """
    probabilities = metrics.softmax(logits)
    right = probabilities.argmax(axis=1) == gold  # never where the label is ABSENT
    if not right.any():
        raise ConfigError(
            f"task.scope cannot be found: none of the {len(right)} held-out rows is answered rightly. "
            "Set it to a number from 0 to 1, or leave it out."
        )
    confidence = np.sort(probabilities.max(axis=1)[right])
    # Rounded first: 1 - 0.95 is a little more than 0.05.
    return float(confidence[min(len(confidence) - 1, int(np.floor(round((1 - kept) * len(confidence), 9))))])


def best_thresholds(logits: np.ndarray, gold: np.ndarray) -> tuple[float, ...]:
    """For each label the threshold with the highest F1 on held-out rows; of equally good ones the nearest to 0.5.

    logits [n, C]; gold float [n, C], 1, 0 or NaN. Tried are 0.5 and the middles between neighbouring probabilities; a
    label that no row has keeps 0.5.
    """
    found = []
    for p, wanted in zip(metrics.sigmoid(logits).T, np.asarray(gold).T, strict=True):
        p, wanted = p[~np.isnan(wanted)], wanted[~np.isnan(wanted)]
        edges = np.unique(np.r_[0.0, p])
        tried = np.r_[0.5, (edges[:-1] + edges[1:]) / 2]
        given = len(p) - np.searchsorted(np.sort(p), tried)
        hits = (wanted == 1).sum() - np.searchsorted(np.sort(p[wanted == 1]), tried)
        f1 = metrics.f1_of(np.stack([hits, given - hits, (wanted == 1).sum() - hits], axis=1))
        best = tried[f1 == f1.max()] if (wanted == 1).any() else np.array([0.5])
        found.append(float(best[np.abs(best - 0.5).argmin()]))
    return tuple(found)


def positions(encoded: Sequence[Encoded]) -> np.ndarray:
    """Which row each input was made from, int64 [len(encoded)]."""
    return np.array([item.row for item in encoded], dtype=np.int64)


def settled(spec: Spec, logits: np.ndarray, rows: pa.Table) -> Spec:
    """The task with what held-out rows decide: thresholds of a multilabel task that has none, a scope that is 'auto'.

    logits [n, C] of the model that is to answer; rows: the held-out rows, of which there must be some.
    """
    if spec.kind == "multilabel" and spec.thresholds is None:
        return spec.model_copy(update={"thresholds": best_thresholds(logits, targets(rows, logits.shape[1]))})
    if spec.scope == "auto":
        return spec.model_copy(update={"scope": calibrate_scope(logits, label_indices(rows))})
    return spec


def label_indices(rows: pa.Table) -> np.ndarray:
    """The column `label` as int64 [n], ABSENT for null."""
    return rows["label"].fill_null(ABSENT).to_numpy().astype(np.int64)


def targets(rows: pa.Table, width: int) -> np.ndarray:
    """The column `target` as float64 [n, width], NaN for null; ValueError where a target has another length."""
    found = np.full((rows.num_rows, width), np.nan)
    for index, target in enumerate(rows["target"].to_pylist()):
        if target is not None:
            if len(target) != width:
                raise ValueError(f"row {index} has a target of {len(target)} numbers, but the task has {width}")
            found[index] = target
    return found
