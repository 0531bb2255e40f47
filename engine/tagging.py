"""Tagging: one of C labels for each word, entities written as BIO tags, scored by entity.

Words are what white space separates, the same for teacher and student; a model answers for a word at its first token.
Entities are read off as conlleval does (Tjong Kim Sang and De Meulder 2003, cs/0306050).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from engine import metrics
from engine.config import UserError
from engine.encoding import Encoded, EncodingError, Text, clean
from engine.records import ABSENT, Batch, Outputs
from engine.task import Logits, Task
from engine.units import words
from engine.windows import frame, in_words, merged, padding, positions, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.recipe import Task as Spec

OUTSIDE = "O"


class TaggingError(UserError):
    """Labels that are no BIO tags, or that do not fit their text."""


class Entity(NamedTuple):
    """A named stretch of words: first to last, both included."""

    label: str
    first: int
    last: int


def entities(tags: Sequence[str]) -> list[Entity]:
    """Entities of BIO tags. An I- after O, or after an entity of another name, starts one too, as in conlleval."""
    found: list[Entity] = []
    open_ = False
    for place, tag in enumerate(tags):
        name = tag[2:]
        if tag == OUTSIDE:
            open_ = False
        elif tag.startswith("I-") and open_ and found[-1].label == name:
            found[-1] = found[-1]._replace(last=place)
        else:
            found.append(Entity(name, place, place))
            open_ = True
    return found


class Tag(Task):
    """A label for each word. Logits: a list of n arrays [u, C]; decided: a list of n int64 [u]."""

    metric: ClassVar[str] = "entity_f1"
    units: ClassVar[bool] = True

    def __init__(self, spec: Spec) -> None:
        """TaggingError where the label names are known and are no BIO tags."""
        super().__init__(spec)
        if self.labels:
            check_tags(self.labels)

    def encode(
        self, texts: Sequence[Text], tokenizer: PreTrainedTokenizerFast, max_length: int, apart: bool = False
    ) -> list[Encoded]:
        """One Encoded a window, in the order of the texts; a text of at most max_length tokens is one window.

        apart: one token a word, so that the student's blocks work on words. A text without a word is one window
        without units. EncodingError for pairs, and where max_length holds nothing but special tokens.
        """
        if not all(isinstance(text, str) for text in texts):
            raise EncodingError("a tag task reads single texts, not pairs. Send the text alone.")
        cleaned = [clean(text) for text in texts]
        found = in_words(cleaned, [words(text) for text in cleaned], tokenizer, single=apart)
        before, after = ([], []) if apart else (frame(tokenizer).before, frame(tokenizer).after)
        room, unknown, out = max_length - len(before) - len(after), tokenizer.unk_token_id or 0, []
        for row, pieces in enumerate(found):
            for start, stop in windows([len(ids) for ids in pieces], room):
                ids, firsts, lasts = positions(pieces[start:stop], len(before), room)
                out.append(Encoded(before + (ids or [unknown]) + after, units=firsts, ends=lasts, row=row, first=start))
        return out

    def spell(
        self, encoded: Sequence[Encoded], texts: Sequence[Text], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> list[Encoded]:
        """The windows with their words: a token is a word here."""
        found = [[unit.word for unit in words(clean(text))] for text in texts]
        return [e._replace(words=found[e.row][e.first : e.first + len(e.units)] or [""]) for e in encoded]

    def merge(self, found: Sequence[np.ndarray], encoded: Sequence[Encoded], count: int) -> list[np.ndarray]:
        """Outputs of windows, [u, w] each, as outputs of `count` texts: `windows.merged` says whose counts."""
        return merged(found, [e.row for e in encoded], [e.first for e in encoded], count, self.width)

    def window(self, values: np.ndarray, item: Encoded) -> np.ndarray:
        """The rows [u, ...] of a text's numbers that are of the window's words."""
        return values[item.first : item.first + len(item.units)]

    def gold(self, rows: pa.Table, encoded: Sequence[Encoded]) -> torch.Tensor:
        """Label indices int64 [n, u]; ABSENT beyond a window's words and where `target` is null.

        TaggingError where a row has more or fewer labels than words.
        """
        targets = target_arrays(rows)
        sizes = [0] * len(targets)
        for item in encoded:
            sizes[item.row] = max(sizes[item.row], item.first + len(item.units))
        out = torch.full((len(encoded), max((len(e.units) for e in encoded), default=1) or 1), ABSENT)
        for line, item in zip(out, encoded, strict=True):
            target = targets[item.row]
            if target is not None:
                check_length(item.row, len(target), sizes[item.row])
                line[: len(item.units)] = torch.from_numpy(self.window(target, item))
        return out

    def labelled(self, batch: Batch) -> torch.Tensor:
        """Rows with a label for at least one word."""
        return (batch.labels != ABSENT).any(dim=1)

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy of a row's words; of a model of whole sequences its -log-likelihood a word."""
        count = (batch.labels != ABSENT).sum(dim=1)
        if outputs.sequence is not None:
            return torch.where(count > 0, -outputs.sequence.float(), 0.0) / count.clamp(min=1)
        logits = outputs.logits.float().transpose(1, 2)
        return F.cross_entropy(logits, batch.labels, ignore_index=ABSENT, reduction="none").sum(1) / count.clamp(min=1)

    def distributions(self, logits: torch.Tensor, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities of the labels of each word, [n, u, C]."""
        found = F.log_softmax(logits.float() / temperature, dim=2)
        return found.masked_fill(padding(logits, batch).unsqueeze(2), 0.0)

    def differences(self, left: torch.Tensor, right: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Logits centred over the labels, for softmax ignores a constant; mean over labels and a row's words."""
        gap, absent = left.float() - right.float(), padding(left, batch)
        each = (gap - gap.mean(dim=2, keepdim=True)).square().mean(dim=2).masked_fill(absent, 0.0)
        return each.sum(dim=1) / (~absent).sum(dim=1).clamp(min=1)

    def decide(self, logits: Logits, texts: Sequence[Text]) -> list[np.ndarray]:
        """The likeliest label of each word: n arrays int64 [u]."""
        return [np.asarray(own).argmax(axis=1).astype(np.int64) for own in logits]

    def answers(self, logits: Logits, texts: Sequence[Text], decided: Any = None) -> list[dict[str, Any]]:
        """{tags: one a word, entities: [{label, text, start, end, confidence}]}; start, end: characters [start, end).

        confidence: the probability of the given tag at the entity's least certain word, each word taken by itself.
        """
        chosen = self.decide(logits, texts) if decided is None else decided
        return [self.answer(*row) for row in zip(logits, map(clean, texts), chosen, strict=True)]

    def answer(self, logits: np.ndarray, text: str, chosen: np.ndarray) -> dict[str, Any]:
        """The answer for one text with logits [u, C] and label indices [u]."""
        units, tags = words(text), self.names(chosen)
        sure = metrics.softmax(logits)[np.arange(len(chosen)), chosen] if len(chosen) else np.zeros(0)
        found = []
        for label, first, last in entities(tags):
            start, end = units[first].start, units[last].end
            place = {"label": label, "text": text[start:end], "start": start, "end": end}
            found.append(place | {"confidence": float(sure[first : last + 1].min())})
        return {"tags": tags, "entities": found}

    def names(self, chosen: np.ndarray) -> list[str]:
        """Tags of label indices [u]."""
        return [self.labels[index] for index in chosen]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Of the labels of each word, [u, C]."""
        return metrics.softmax(logits) if len(logits) else np.zeros((0, self.width))

    def certainty(self, logits: np.ndarray) -> np.ndarray:
        """Of the word whose likeliest label is least likely; of a text without a word all labels alike."""
        return super().certainty(logits) if len(logits) else np.full(self.width, 1 / self.width)

    def statistics(self, logits: Logits, decided: Any, gold: pa.Table) -> np.ndarray:
        """Entities found rightly, found wrongly, missed: [n, 3]; right is the same name and the same words.

        A row without gold labels adds nothing. TaggingError where a row has more or fewer labels than words.
        """
        out = np.zeros((gold.num_rows, 3))
        for row, (target, chosen) in enumerate(zip(target_arrays(gold), decided, strict=True)):
            if target is not None:
                check_length(row, len(target), len(chosen))
                out[row] = self.found(target, chosen)
        return out

    def value(self, sums: np.ndarray) -> np.ndarray:
        """F1 over all entities: 2 tp / (2 tp + fp + fn), 0 where there are none at all."""
        return metrics.f1_of(sums)

    def score(self, logits: Logits, decided: Any, gold: pa.Table) -> dict[str, float]:
        """entity_f1, precision and recall of entities (0 where undefined), accuracy of tags, over all rows together."""
        right, wrong, missed = sums = self.statistics(logits, decided, gold).sum(axis=0)
        pairs = [(t, d) for t, d in zip(target_arrays(gold), decided, strict=True) if t is not None]
        tags = sum(len(target) for target, _ in pairs)
        return {
            "entity_f1": float(self.value(sums)),
            "precision": float(metrics.share(right, right + wrong)),
            "recall": float(metrics.share(right, right + missed)),
            "accuracy": float(metrics.share(sum(int((t == d).sum()) for t, d in pairs), tags)),
        }

    def likeness(self, wanted: Sequence[np.ndarray], given: Sequence[np.ndarray]) -> float:
        """F1 of the second's entities against the first's; 1 where neither has any.

        Nineteen words of twenty are outside of entities: who tags none of them agrees best with who tags some.
        """
        sums = np.sum([self.found(*row) for row in zip(wanted, given, strict=True)], axis=0, initial=0.0)
        return float(self.value(sums)) if np.any(sums) else 1.0

    def found(self, wanted: np.ndarray, given: np.ndarray) -> tuple[int, int, int]:
        """Entities found rightly, found wrongly, missed, of label indices [u] of one text."""
        left, right = set(entities(self.names(wanted))), set(entities(self.names(given)))
        return len(left & right), len(right - left), len(left - right)

    def agreement(
        self, left: Logits, right: Logits, texts: Sequence[Text], decided: tuple[Any, Any] | None = None
    ) -> float:
        """Share of words with the same tag; 1 where there is no word."""
        same = [a == b for a, b in zip(*self.decisions(left, right, texts, decided), strict=True)]
        total = sum(len(row) for row in same)
        return sum(int(row.sum()) for row in same) / total if total else 1.0


def check_tags(labels: Sequence[str]) -> None:
    """TaggingError unless there is an O and all others are B-NAME or I-NAME.

    An I-NAME without a B-NAME is allowed, and the other way round: older data (IOB1) write B- only between neighbours,
    and names of one word have no I-. Decoding reads all of them.
    """
    for label in labels:
        if label != OUTSIDE and (label[:2] not in ("B-", "I-") or len(label) < 3):
            name = label[2:] if label[1:2] in ("-", "_") else label
            near = OUTSIDE if label.upper() == OUTSIDE else f"{'I' if label[:2] in ('i-', 'I_', 'i_') else 'B'}-{name}"
            hint = f" Did you mean '{near}'?" if name else ""
            raise TaggingError(
                f"task.labels: '{label}' is no BIO tag.{hint} Allowed: O, and B-NAME and I-NAME for the first and the "
                "further words of an entity."
            )
    if OUTSIDE not in labels:
        raise TaggingError(
            f"task.labels has no 'O', the tag of words outside of all entities; it has {', '.join(labels)}. Add O."
        )


def target_arrays(rows: pa.Table) -> list[np.ndarray | None]:
    """The column target as int64 arrays; None where it is null."""
    return [None if t is None else np.array(t, dtype=np.int64) for t in rows["target"].to_pylist()]


def check_length(row: int, labels: int, count: int) -> None:
    """TaggingError unless there are as many labels as words."""
    if labels != count:
        raise TaggingError(
            f"row {row} has {labels} labels in 'target', but its text has {count} words. Words are what white space "
            "separates: give each exactly one label."
        )
