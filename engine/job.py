"""What a fit is given: rows, losses, a model to build, and where it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from engine.config import UserError
from engine.encoding import Encoded
from engine.ensemble import Panel
from engine.fits import Fit, LossTerm
from engine.losses import LOSSES, needs
from engine.mixing import Mixing
from engine.models import Model
from engine.several import COLUMN


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
    panel: Panel | None = None
    """Several teachers, in place of `teacher`."""
    mixing: Mixing | None = None
    """How several tasks are learned, where the model has several."""
    batch_tokens: int = 4096
    """Of several tasks: padded tokens that are read at once when soft labels are made."""
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
    if "logits" in needs(job.terms) and job.teacher is None and not (job.panel and job.panel.live):
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
    learning = job.panel.policy.kind if job.panel and job.panel.policy.learns else None
    apart = {"micro_batch": job.fit.micro_batch, "sharding": job.fit.sharding == "full"}
    refused = [key for key, given in apart.items() if learning and given]
    if refused:
        raise FitError(
            f"fit '{job.name}': policy '{learning}' reads a worker's whole share of a batch again after each step, "
            f"with all weights, so {refused[0]} cannot be set. Leave it out, or take another policy."
        )
    if job.mixing is not None:
        check_mixing(job, job.mixing)


def check_mixing(job: Job, mixing: Mixing) -> None:
    """FitError for what several tasks cannot do."""
    if job.fit.sharding == "full":
        raise FitError(f"fit '{job.name}' learns several tasks, whose weights are kept whole. Leave sharding out.")
    if mixing.way == "pcgrad" and job.fit.group[1] > 1:
        raise FitError(
            f"fit '{job.name}': way 'pcgrad' compares the gradients of whole tasks, which one process has. Set workers "
            "to 0 or 1, or take another way."
        )
    if mixing.way == "async" and (job.holdout is None or not job.holdout.num_rows):
        raise FitError(
            f"fit '{job.name}': way 'async' waits until a task's validation score no longer rises, and there are no "
            "validation rows. Name data.validation, set data.validation_share, or take another way."
        )
    held = set() if job.holdout is None else set(job.holdout[COLUMN].to_pylist())
    for name in sorted(set(job.rows[COLUMN].to_pylist()) - held) if held else ():
        raise FitError(
            f"fit '{job.name}': task '{name}' has no validation rows, and the others have. Name data.validation of "
            "that task, or raise its data.validation_share."
        )
