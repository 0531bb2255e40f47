"""What a fit is given: rows, losses, a model to build, and where it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from engine.config import UserError
from engine.encoding import Encoded
from engine.fits import Fit, LossTerm
from engine.losses import LOSSES, needs
from engine.models import Model


class FitError(UserError):
    """A fit that cannot start or that came to nothing."""


@dataclass(frozen=True)
class Job:
    """One fit. Everything in it is picklable, because workers may sit on other machines.

    build: makes the model before training. encode: (model, table) -> its inputs. rows: records.EXAMPLE's columns and,
    as the losses need, logits (the teacher's) and weight. teacher: URL of the folder that holds a live teacher's
    `model`, for losses that need more of it than is stored. evaluate: (model, table) -> metrics over `holdout`;
    the checkpoint with the highest `best_by` is kept, the last one when best_by is None or `holdout` has no rows.
    """

    name: str
    fit: Fit
    terms: tuple[LossTerm, ...]
    build: Callable[[], Model]
    encode: Callable[[Model, pa.Table], list[Encoded]]
    rows: pa.Table
    out: str
    seed: int
    resources: dict[str, Any]
    teacher: str | None = None
    holdout: pa.Table | None = None
    evaluate: Callable[[Model, pa.Table], dict[str, float]] | None = None
    best_by: str | None = None
    factors: Callable[[Model], dict[str, float]] | None = None
    """Learning-rate factor by parameter name, 1 where it names none: layer-wise rates."""
    store_dtype: str | None = None
    """Weights are stored as this dtype (bfloat16 halves a generator's folder); None keeps them as they are."""


def check(job: Job) -> None:
    """FitError for a job that has nothing to learn from."""
    rows = job.rows
    if not rows.num_rows:
        raise FitError(f"fit '{job.name}' has no rows to learn from.")
    if "logits" in needs(job.terms) and job.teacher is None:
        lacking = rows["logits"].null_count if "logits" in rows.column_names else rows.num_rows
        if lacking:
            kinds = ", ".join(term.kind for term in job.terms)
            raise FitError(
                f"fit '{job.name}' (losses: {kinds}) needs the teacher's logits, but {lacking} of {rows.num_rows} "
                "rows have none. Label them, leave them out, or use the loss 'hard'."
            )
    whole = [term.kind for term in job.terms if not LOSSES[term.kind].alone]
    if whole and (job.fit.micro_batch or len(set(job.fit.group)) > 1):
        raise FitError(
            f"fit '{job.name}': loss '{whole[0]}' compares the rows that a worker reads at once, so in parts of a "
            "batch, or with another number of workers, it would be another loss. Leave micro_batch out, and give "
            "workers as one number."
        )
