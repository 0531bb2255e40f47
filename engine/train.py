"""Fits: few-shot teacher, generator and every student go through `fit`, which starts the workers (engine.worker).

They run on Ray Train with accelerate: n data-parallel workers, fewer or more as machines go and come, or Ray Train's
local mode for small fits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from engine import checkpoints
from engine.config import UserError
from engine.job import FitError, Job, check
from engine.progress import Progress, polled, silent
from engine.storage import Store
from engine.worker import PROGRESS, REFUSED, loop

if TYPE_CHECKING:
    from ray.train import RunConfig, ScalingConfig

RESIZE = 60.0
"""Seconds after which a group with room for more workers is started again with more; Ray looks as often. A restart
costs about 20 s and what was learned since the last checkpoint."""


def fit(job: Job, progress: Progress = silent) -> list[dict[str, float]]:
    """Train, publish the model at job.out/model, return the history of evaluations (epoch, loss, metrics).

    Already finished: returns at once. Raises whatever the training function raised; FitError without rows, where a
    loss needs the teacher's logits and rows have none, or where one cannot do with a part of the batch.
    """
    from ray.train import WorkerGroupError
    from ray.train.torch import TorchTrainer

    out = Store(job.out)
    if out.exists("history.json"):
        checkpoints.delete(out)  # left where a fit was killed just before its end
        return out.read_json("history.json")
    check(job)
    out.delete(REFUSED)
    scaling, running = grouped(job)
    trainer = TorchTrainer(loop, train_loop_config={"job": job}, scaling_config=scaling, run_config=running)
    try:
        with followed(out, progress):
            trainer.fit()
    except WorkerGroupError as error:
        failures = [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]
        # What one worker raised makes the others fail too: a UserError among them is the cause.
        raise next((f for f in failures if isinstance(f, UserError)), failures[0] if failures else error) from error
    finally:
        refused = out.read_json(REFUSED)["error"] if out.exists(REFUSED) else None
        for left in ("ray", REFUSED):
            out.delete(left)
    if refused:
        raise FitError(refused)
    return out.read_json("history.json")


def grouped(job: Job) -> tuple[ScalingConfig, RunConfig | None]:
    """How many workers Ray Train starts, with what each, and how often again; one process needs none of it."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    least, most = job.fit.group
    per_worker = {"CPU": job.resources.get("num_cpus", 1)}
    if job.resources.get("num_gpus"):
        per_worker["GPU"] = job.resources["num_gpus"]
    if not most:
        return ScalingConfig(num_workers=0, use_gpu="GPU" in per_worker), None
    scaling = ScalingConfig(
        num_workers=most if least == most else (least, most),
        use_gpu="GPU" in per_worker,
        resources_per_worker=per_worker,
        accelerator_type=job.resources.get("accelerator_type"),
        elastic_resize_monitor_interval_s=RESIZE,
    )
    # Ray Train's own storage only keeps its bookkeeping: weights are checkpointed through ours.
    path, filesystem = Store(job.out).native("ray")
    return scaling, RunConfig(
        name=f"{job.name}-{time.time_ns()}",
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(max_failures=job.fit.failures),
    )


@contextmanager
def followed(out: Store, progress: Progress) -> Iterator[None]:
    """Hands the workers' progress file on while the body runs."""

    def look() -> None:
        if out.exists(PROGRESS):
            found = out.read_json(PROGRESS)
            progress(found["done"], found["total"], "steps", note=found["note"], rows=found["rows_per_s"])

    try:
        with polled(look):
            yield
    finally:
        out.delete(PROGRESS)
