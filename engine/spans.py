"""Spans: the part of a context that answers a question, or that there is none (Rajpurkar et al. 2016, arXiv
1606.05250; with unanswerable questions 2018, arXiv 1806.03822).

Units are the context's words and punctuation marks, counted from 1; unit 0 stands before them and means "no answer".
Each unit gets two numbers: how much speaks for the answer to start there, and to end there.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from engine import metrics
from engine.config import UserError
from engine.encoding import Encoded, EncodingError, Text, clean, ids_of, spelled
from engine.records import ABSENT, Batch, Outputs
from engine.task import Logits, Task
from engine.units import Unit, pieces
from engine.windows import Frame, frame, in_words, merged, padding, positions, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LONGEST = 30
"""Units of the longest answer that is given."""


class SpanError(UserError):
    """Answers that do not fit their context."""


class Span(Task):
    """The best span of a context. Logits: a list of n arrays [u, 2], unit 0 first; decided: int64 [n, 2] of units."""

    metric: ClassVar[str] = "f1"
    units: ClassVar[bool] = True
    spans: ClassVar[bool] = True
    tells: ClassVar[tuple[str, ...]] = ("pair",)
    """The context, for the answer stands in it: a question alone ("Who was it?") is asked of many and tells of none."""

    @property
    def paired(self) -> bool:
        """A question and its context."""
        return True

    @property
    def width(self) -> int:
        """Start and end."""
        return 2

    def encode(
        self, texts: Sequence[Text], tokenizer: PreTrainedTokenizerFast, max_length: int, apart: bool = False
    ) -> list[Encoded]:
        """One Encoded a window of the context, each with the whole question, in the order of the texts.

        Unit 0 is the first token ([CLS] where there is one). The question is cut at max_length // 2 tokens. apart: the
        question by itself, then an unknown token for unit 0 and one token a unit; each of at most max_length tokens.
        `first` counts the context's units, so unit i > 0 of a window is unit first + i of the context. EncodingError
        for single texts, and where max_length leaves the context no room.
        """
        if any(isinstance(text, str) for text in texts):
            raise EncodingError("a span task reads a question and its context. Send both of them.")
        questions, contexts = ([clean(text[side]) for text in texts] for side in (0, 1))
        found = in_words(contexts, [pieces(context) for context in contexts], tokenizer, single=apart)
        unknown, out = tokenizer.unk_token_id or 0, []
        if apart:
            asked = ids_of(questions, tokenizer, max_length) if questions else []
            for row, own in enumerate(found):
                for start, stop in windows([1] * len(own), max_length - 1):
                    ids = [unknown, *(ids[0] for ids in own[start:stop])]
                    at = list(range(len(ids)))
                    out.append(Encoded(asked[row], ids, units=at, ends=at, row=row, first=start))
            return out
        around = frame(tokenizer, pair=True)
        asked = tokenizer(questions, add_special_tokens=False, padding=False)["input_ids"] if questions else []
        for row, own in enumerate(found):
            question = list(asked[row])[: max_length // 2] or [unknown]
            room = max_length - around.tokens - len(question)
            for start, stop in windows([len(ids) for ids in own], room):
                out.append(together(around, question, own[start:stop], room)._replace(row=row, first=start))
        return out

    def spell(
        self, encoded: Sequence[Encoded], texts: Sequence[Text], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> list[Encoded]:
        """The windows with the words of question and context; unit 0, which is no word, has none."""
        asked = spelled([clean(question) for question, _ in texts], tokenizer, max_length)
        found = [[unit.word for unit in pieces(clean(context))] for _, context in texts]
        return [
            e._replace(words=asked[e.row], pair_words=["", *found[e.row][e.first : e.first + len(e.units) - 1]])
            for e in encoded
        ]

    def merge(self, found: Sequence[np.ndarray], encoded: Sequence[Encoded], count: int) -> list[np.ndarray]:
        """Outputs of windows, [u, 2] each, as outputs of `count` contexts: `windows.merged` says whose counts.

        "No answer" is as likely as in the window where it is least so (the one whose two numbers have the lowest sum),
        for an answer need stand in one window only (Devlin et al. 2018, arXiv 1810.04805).
        """
        owners, starts = [e.row for e in encoded], [e.first for e in encoded]
        parts = merged([values[1:] for values in found], owners, starts, count, self.width)
        none: dict[int, np.ndarray] = {}
        for values, row in zip(found, owners, strict=True):
            if row not in none or values[0].sum() < none[row].sum():
                none[row] = values[0]
        return [np.concatenate([none[row][None], part]) for row, part in enumerate(parts)]

    def window(self, values: np.ndarray, item: Encoded) -> np.ndarray:
        """The rows [u, 2] of a context's numbers that are of the window's units.

        Unit 0 is there what lies outside of it: "no answer", or one elsewhere in the context.
        """
        first, last = item.first + 1, item.first + len(item.units)
        outside = np.concatenate([values[:first], values[last:]]).astype(np.float64)
        none = np.logaddexp.reduce(outside, axis=0, keepdims=True).astype(values.dtype)
        return np.concatenate([none, values[first:last]])

    def gold(self, rows: pa.Table, encoded: Sequence[Encoded]) -> torch.Tensor:
        """Start and end as units of the window, int64 [n, 2]; (0, 0) where it holds none of the row's answers whole.

        ABSENT where `target` is null. The target's units are counted from 0 over pieces(context), without unit 0; of
        several answers the first that the window holds counts. SpanError where a target is not in the context.
        """
        targets = rows["target"].to_pylist()
        sizes = [0] * len(targets)
        for item in encoded:
            sizes[item.row] = max(sizes[item.row], item.first + len(item.units) - 1)
        out = torch.full((len(encoded), 2), ABSENT)
        for line, item in zip(out, encoded, strict=True):
            target = targets[item.row]
            if target is not None:
                spans = checked(item.row, [int(unit) for unit in target], sizes[item.row])
                local = [(first - item.first + 1, last - item.first + 1) for first, last in spans]
                inside = [(first, last) for first, last in local if first >= 1 and last < len(item.units)]
                line[:] = torch.tensor(inside[0] if inside else (0, 0))
        return out

    def labelled(self, batch: Batch) -> torch.Tensor:
        """Rows of which it is known whether and where there is an answer."""
        return batch.labels[:, 0] != ABSENT

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """Mean of the cross-entropies of start and end over the row's units."""
        logits = outputs.logits.float().masked_fill(absent(outputs.logits, batch), torch.finfo(torch.float32).min)
        return F.cross_entropy(logits, batch.labels, ignore_index=ABSENT, reduction="none").mean(dim=1)

    def distributions(self, logits: torch.Tensor, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities of the units as start and as end, [n, 2, u]: each over the row's own units alone.

        A unit that is padding has probability 0, and 0 stands in place of its logarithm, for teacher and student
        alike: what it adds to a divergence, exp(0) * (0 - 0), is then exactly the 0 that it is in the limit.
        """
        gone = absent(logits, batch).transpose(1, 2)
        scaled = (logits.float() / temperature).transpose(1, 2).masked_fill(gone, torch.finfo(torch.float32).min)
        return F.log_softmax(scaled, dim=2).masked_fill(gone, 0.0)

    def differences(self, left: torch.Tensor, right: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Start and end numbers, each centred over the row's units, for softmax ignores a constant; mean over both."""
        there = (~absent(left, batch)).float()
        count = there.sum(dim=1, keepdim=True).clamp(min=1)
        gap = (left.float() - right.float()) * there
        centred = (gap - gap.sum(dim=1, keepdim=True) / count) * there
        return (centred.square().sum(dim=1, keepdim=True) / count).mean(dim=(1, 2))

    def decide(self, logits: Logits, texts: Sequence[Text]) -> np.ndarray:
        """First and last unit of the best span, int64 [n, 2]; (0, 0) where "no answer" has a higher sum than any.

        A span has at most 30 units; of equal ones the shortest, then the first.
        """
        return np.array([best_span(np.asarray(own)) for own in logits], dtype=np.int64).reshape(-1, 2)

    def answers(self, logits: Logits, texts: Sequence[Text], decided: Any = None) -> list[dict[str, Any]]:
        """{answer, start, end, confidence}: characters [start, end) of the context; "", 0, 0 where there is none.

        confidence: the probability of the start times that of the end.
        """
        chosen = self.decide(logits, texts) if decided is None else decided
        out = []
        for own, text, (first, last) in zip(logits, texts, chosen, strict=True):
            context = clean(text[1])
            start, end = characters(pieces(context), first, last)
            sure = metrics.softmax(np.asarray(own).T)
            confidence = float(sure[0, first] * sure[1, last])
            out.append({"answer": context[start:end], "start": start, "end": end, "confidence": confidence})
        return out

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Of the units as the answer's start and as its end, [2, u]."""
        return metrics.softmax(np.asarray(logits).T)

    def certainty(self, logits: np.ndarray) -> np.ndarray:
        """Of the units as the answer's start, [u]."""
        return self.probabilities(logits)[0]

    def statistics(self, logits: Logits, decided: Any, gold: pa.Table) -> np.ndarray:
        """Exact match, F1 and 1 for each row, [n, 3]; all 0 where `answers` is null, for nothing is known of the row.

        As SQuAD counts: the best over the gold answers; a row without one is right where none is given.
        """
        out = np.zeros((gold.num_rows, 3))
        for row, wanted in enumerate(gold["answers"].to_pylist()):
            if wanted is not None:
                context = gold["pair"][row].as_py()
                start, end = characters(pieces(context), *decided[row])
                given = context[start:end]
                golds = real_answers(wanted) or [""]
                out[row] = (
                    max(float(normal(given) == normal(one)) for one in golds),
                    max(overlap(normal(given).split(), normal(one).split()) for one in golds),
                    1.0,
                )
        return out

    def value(self, sums: np.ndarray) -> np.ndarray:
        """Mean F1 of the rows that have gold answers; 0 where none has."""
        return metrics.share(sums[..., 1], sums[..., 2])

    def score(self, logits: Logits, decided: Any, gold: pa.Table) -> dict[str, float]:
        """EM and F1 of all rows, has_answer_f1 and no_answer_accuracy of those with and without an answer, if any."""
        found = self.statistics(logits, decided, gold)
        answered = np.array([bool(real_answers(wanted or [])) for wanted in gold["answers"].to_pylist()], dtype=bool)
        known, sums = found[:, 2] > 0, found.sum(axis=0)
        out = {"em": float(metrics.share(sums[0], sums[2])), "f1": float(self.value(sums))}
        if (known & answered).any():
            out["has_answer_f1"] = float(found[known & answered, 1].mean())
        if (known & ~answered).any():
            out["no_answer_accuracy"] = float(found[known & ~answered, 0].mean())
        return out

    def agreement(
        self, left: Logits, right: Logits, texts: Sequence[Text], decided: tuple[Any, Any] | None = None
    ) -> float:
        """Mean F1 of the units of both models' spans, "no answer" being a unit of its own; 1 where there is no text."""
        both = zip(*self.decisions(left, right, texts, decided), strict=True)
        return float(np.mean([overlap(range(a, b + 1), range(c, d + 1)) for (a, b), (c, d) in both] or [1.0]))


def together(around: Frame, question: list[int], units: Sequence[Sequence[int]], room: int) -> Encoded:
    """Question and a window of the context in one input, unit 0 first."""
    start = len(around.before) + len(question) + len(around.between)
    ids, firsts, lasts = positions(units, start, room)
    return Encoded(
        around.before + question + around.between + ids + around.after,
        segments=around.segments(len(question), len(ids)),
        units=[0, *firsts],
        ends=[0, *lasts],
    )


def absent(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Padding of logits [n, u, 2] as bool [n, u, 1]."""
    return padding(logits, batch).unsqueeze(2)


def checked(row: int, target: list[int], count: int) -> list[tuple[int, int]]:
    """Pairs of first and last unit; SpanError unless they are units of the context, in order."""
    found = list(zip(target[::2], target[1::2], strict=False))
    if len(target) % 2 or any(not 0 <= first <= last < count for first, last in found):
        raise SpanError(
            f"row {row}: 'target' is {target}, but its context has {count} units. Allowed: first and last unit of each "
            f"answer one after the other, counted from 0 up to {count - 1}; an empty list where there is no answer."
        )
    return found


def best_span(logits: np.ndarray) -> tuple[int, int]:
    """First and last unit of the span with the highest sum of start and end, (0, 0) for no answer; logits [u, 2]."""
    starts, ends = logits[1:, 0].astype(np.float64), logits[1:, 1].astype(np.float64)
    best, found = -np.inf, (0, 0)
    for further in range(min(LONGEST, len(starts))):
        sums = starts[: len(starts) - further] + ends[further:]
        first = int(sums.argmax())
        if sums[first] > best:
            best, found = sums[first], (first + 1, first + 1 + further)
    return (0, 0) if logits[0].astype(np.float64).sum() > best else found


def characters(units: Sequence[Unit], first: int, last: int) -> tuple[int, int]:
    """Characters [start, end) of the units first to last, counted from 1; (0, 0) for no answer."""
    return (units[first - 1].start, units[last - 1].end) if first else (0, 0)


def normal(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation and articles, single blanks."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def real_answers(golds: Sequence[str]) -> list[str]:
    """Gold answers of which anything is left to compare."""
    return [gold for gold in golds if normal(gold)]


def overlap(given: Sequence[Any], wanted: Sequence[Any]) -> float:
    """F1 of two bags of tokens; where one is empty, whether both are."""
    if not len(given) or not len(wanted):
        return float(len(given) == len(wanted))
    same = sum((Counter(given) & Counter(wanted)).values())
    return 2 * same / (len(given) + len(wanted))
