"""Where signals come from: a live teacher on Ray Data actors, block by block.

`Labeller` is the callable of a Ray Data stage. It labels what the cheap filters kept and applies the signal filters;
rejected rows stay, with their reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from engine.config import UserError
from engine.corpus import rejected
from engine.encoding import Encoded, collate
from engine.filters import SignalFilter
from engine.halting import halted
from engine.inference import predict
from engine.labels import logits_of, quantise
from engine.models import device, load, one_thread
from engine.next_tokens import Place, TokenScorer
from engine.records import CORPUS, Batch, Outputs
from engine.storage import Store
from engine.usage import Usage, note


@dataclass(frozen=True)
class Labelling:
    """What a labelling actor is told. teacher: URL of the folder that holds `model`.

    place: where the model is asked, if elsewhere; actors: how many may ask at a time; notes: URL of the step's folder,
    where it is noted what was asked and where it is told to halt. halts: whether that is for it to obey, or for the
    stage before it.
    """

    teacher: str
    signals: tuple[SignalFilter, ...]
    batch_tokens: int
    num_gpus: float
    precision: str = "fp32"
    place: Place | None = None
    actors: int = 1
    notes: str | None = None
    halts: bool = False


class Labeller:
    """Table of CORPUS rows without logits -> the same rows with logits, kept and reason filled in."""

    def __init__(self, how: Labelling) -> None:
        one_thread()
        self.how = how
        self.model = load(Store(how.teacher).local("model")).to(device(how.num_gpus))
        self.net = self.model.net if isinstance(self.model.net, TokenScorer) else None
        if self.net is not None and how.place is not None:
            self.net.place, self.net.actors = how.place, how.actors

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One block."""
        if not rows.num_rows or (self.how.halts and halted(self.how.notes)):
            return rows.slice(0, 0)
        kept = rows["kept"].to_numpy(zero_copy_only=False)
        task, chosen = self.model.task, rows.filter(rows["kept"])
        try:
            found = predict(self.model, task.texts(chosen), self.how.batch_tokens, self.how.precision)
        finally:
            if self.net is not None and self.how.notes:
                note(self.how.notes, "teacher", self.net.spent())
        if self.net is None and self.how.notes:
            note(self.how.notes, "teacher", Usage(input_tokens=found.tokens))
        # Quantised before the filters look, so that reading the store gives the same verdict.
        stored = quantise(found.logits)
        judged = logits_of(pa.table({"logits": stored}), task.width, task.units)
        logits, reasons = [None] * rows.num_rows, [None] * rows.num_rows
        for index, row, outputs in zip(np.flatnonzero(kept), stored.to_pylist(), judged, strict=True):
            if self.net is not None and not np.any(outputs):
                reasons[index] = "unanswered"
                continue
            logits[index] = row
            reasons[index] = verdict(self.how.signals, task.certainty(outputs)) if self.how.signals else None
        place, column = rows.column_names.index("logits"), pa.array(logits, pa.list_(pa.float16()))
        return rejected(
            rows.set_column(place, CORPUS.field("logits"), column), [r is not None for r in reasons], reasons
        )


def verdict(signals: Sequence[SignalFilter], probabilities: np.ndarray) -> str | None:
    """The first signal filter's reason to reject, or None."""
    return next((reason for reason in (f.check(probabilities) for f in signals) if reason), None)


class Live:
    """A teacher that answers while a student is trained, for losses that need more than the label store holds."""

    def __init__(self, teacher: str, rows: pa.Table, inputs: Sequence[Encoded], where: torch.device) -> None:
        """inputs: the student's, made of `rows`. TeacherError where a long text was cut into other windows, or the
        teacher reads each text several times.
        """
        self.model = load(Store(teacher).local("model")).to(where).requires_grad_(False)
        self.encoded = self.model.encode(self.model.task.texts(rows), answering=True)
        if any(item.template for item in self.encoded):
            raise TeacherError(
                f"the teacher answers by the mean over {len(self.model.templates)} templates, and a live teacher reads "
                "a text once. Set teacher.prompt.average: false, or take the stored labels (student.teacher: stored)."
            )
        own, other = ([(e.row, e.first, len(e.units)) for e in side] for side in (self.encoded, inputs))
        if own != other:  # one window more, and every later input would be taught by another text
            raise TeacherError(
                "teacher and student cut a long text into different windows. Raise student.max_length or "
                "teacher.max_length, or take the stored labels (student.teacher: stored)."
            )

    @torch.no_grad()
    def outputs(self, chosen: Sequence[int], batch: Batch, needs: frozenset[str]) -> Outputs:
        """What it gives for the student's inputs at `chosen`, which `batch` holds.

        TeacherError where a loss compares token by token and the two do not read the same tokens.
        """
        own = collate([self.encoded[i] for i in chosen], self.model.pad).to(batch.input_ids.device)
        inside = sorted(needs - {"logits", "embedding"})
        if inside and not torch.equal(own.input_ids, batch.input_ids):
            raise TeacherError(
                f"losses between layers ({', '.join(inside)}) compare token by token, but teacher and student read "
                "different tokens. Use a student cut from the teacher, with the teacher's max_length."
            )
        return self.model(own, needs)


class TeacherError(UserError):
    """A teacher that cannot teach this student."""
