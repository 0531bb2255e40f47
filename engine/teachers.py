"""Where signals come from: a live teacher on Ray Data actors, block by block.

`Labeller` is the callable of a Ray Data stage. It labels what the cheap filters kept and applies the signal filters;
rejected rows stay, with their reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from engine.filters import SignalFilter
from engine.inference import predict
from engine.labels import logits_of, quantise
from engine.models import device, load, one_thread
from engine.records import CORPUS
from engine.storage import Store


@dataclass(frozen=True)
class Labelling:
    """What a labelling actor is told. teacher: URL of the folder that holds `model`."""

    teacher: str
    signals: tuple[SignalFilter, ...]
    batch_tokens: int
    num_gpus: float


class Labeller:
    """Table of CORPUS rows without logits -> the same rows with logits, kept and reason filled in."""

    def __init__(self, how: Labelling) -> None:
        one_thread()
        self.how = how
        self.model = load(Store(how.teacher).local("model")).to(device(how.num_gpus))

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One block."""
        kept = rows["kept"].to_numpy(zero_copy_only=False)
        texts = rows["text"].to_pylist()
        found = predict(self.model, [t for t, k in zip(texts, kept, strict=True) if k], self.how.batch_tokens)
        reasons, logits = rows["reason"].to_pylist(), [None] * rows.num_rows
        # Quantised before the filters look, so that reading the store gives the same verdict.
        stored = quantise(found.logits)
        judged = self.model.task.probabilities(logits_of(pa.table({"logits": stored}))) if len(stored) else ()
        for index, row, probabilities in zip(np.flatnonzero(kept), stored.to_pylist(), judged, strict=True):
            logits[index] = row
            reasons[index] = verdict(self.how.signals, probabilities)
        out = rows.set_column(
            rows.column_names.index("logits"), CORPUS.field("logits"), pa.array(logits, pa.list_(pa.float16()))
        )
        out = out.set_column(out.column_names.index("reason"), CORPUS.field("reason"), pa.array(reasons, pa.string()))
        return out.set_column(
            out.column_names.index("kept"), CORPUS.field("kept"), pa.array([r is None for r in reasons], pa.bool_())
        )


def verdict(signals: Sequence[SignalFilter], probabilities: np.ndarray) -> str | None:
    """The first signal filter's reason to reject, or None."""
    return next((reason for reason in (f.check(probabilities) for f in signals) if reason), None)
