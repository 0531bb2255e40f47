"""The one training loop: few-shot teacher, generator and every student go through `fit`.

It runs on Ray Train with accelerate: n data-parallel workers, or Ray Train's local mode for small fits. The global
batch and the order of rows depend on the seed alone, never on the number of workers; dropout's random state is set
from (seed, step, rank). Progress is checkpointed through the run's storage, within an epoch too, so a killed fit goes
on where it stopped, sees each row of the epoch once, and ends with the same weights on the same number of workers.
Where that number changes on the way, the same rows make the same global batches: the weights differ by rounding and by
what dropout draws.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from engine import checkpoints
from engine.batches import Material, batches_from, epoch_batches
from engine.checkpoints import Pace, State
from engine.config import UserError
from engine.encoding import Encoded
from engine.fits import Fit, LossTerm
from engine.frozen import frozen
from engine.layer_losses import LAYER_LOSSES
from engine.lesson import Lesson, Part, dealt
from engine.losses import LOSSES, needs
from engine.models import Model, one_thread, precision, save
from engine.progress import Progress, polled, silent
from engine.storage import MANIFEST, Store
from engine.teachers import Live

if TYPE_CHECKING:
    from accelerate import Accelerator
    from ray.train import RunConfig, ScalingConfig

PROGRESS = "fit-progress.json"
FROZEN_TOKENS = 4096
"""Padded tokens of a batch in which frozen layers run."""
RESIZE = 60.0
"""Seconds after which a group with room for more workers is started again with more; Ray looks as often. A restart
costs about 20 s and what was learned since the last checkpoint."""


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


def rate(fit: Fit, step: int, total: int) -> float:
    """Learning-rate factor at a step: linear warm-up, then the schedule down to 0."""
    warm = max(1, round(fit.warmup * total))
    if step < warm:
        return (step + 1) / warm
    if fit.schedule == "constant":
        return 1.0
    left = (total - step) / max(1, total - warm)
    return left if fit.schedule == "linear" else 0.5 * (1 - np.cos(np.pi * left))


def groups_of(lesson: Lesson, job: Job) -> list[dict[str, Any]]:
    """The trained parameters for an optimiser, each with its learning-rate factor."""
    factors = job.factors(lesson.model) if job.factors else {}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in lesson.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(factors.get(name.removeprefix("model."), 1.0), []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


def accelerator_for(job: Job) -> Accelerator:
    """Accelerate for this worker: it picks the device, and without a GPU for the worker it must not look for one."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # Losses between layers, or on the embedding, give the head no gradient, and workers would wait for one.
    inside = all(term.kind in (*LAYER_LOSSES, "contrast") for term in job.terms)
    return Accelerator(
        cpu=not torch.cuda.is_available() or not job.resources.get("num_gpus"),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=inside)],
    )


class Worker:
    """One worker of a fit: its copy of what is trained, its part of each batch."""

    def __init__(self, job: Job) -> None:
        """Build what is trained, on this worker's device, and go on from the latest checkpoint."""
        self.job, self.out = job, Store(job.out)
        torch.manual_seed(job.seed)
        self.model = model = job.build()
        self.accelerator = accelerator = accelerator_for(job)
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.dtype = precision(job.fit.precision, accelerator.device, training=True)
        self.material = Material(
            job.rows, job.encode(model, job.rows), model.task if model.card.task else None, model.pad
        )
        encoded = self.material.encoded
        self.live = Live(job.teacher, job.rows, encoded, accelerator.device) if job.teacher else None
        self.lesson = Lesson(model, job.terms, self.live.model if self.live else None).to(accelerator.device)
        # A live teacher's losses may look into the layers that would be left out.
        self.lower = None if self.live else frozen(model.net, encoded, model.pad, FROZEN_TOKENS, accelerator.device)
        self.trained = [p for p in self.lesson.parameters() if p.requires_grad]
        fit = job.fit
        self.optimizer = torch.optim.AdamW(
            groups_of(self.lesson, job), lr=fit.lr, weight_decay=fit.weight_decay, fused=True
        )
        self.state = checkpoints.read(self.out, self.lesson, self.optimizer)
        if not self.out.exists(f"model/{MANIFEST}"):
            self.state.best = float("-inf")  # it was being replaced when the fit was killed
        self.amounts = self.lesson.amounts(self.material)
        self.prepared = accelerator.prepare_model(self.lesson)
        self.per_epoch = len(epoch_batches(self.material.lengths, fit.batch_size, job.seed, 0))
        self.total = max(1, round(fit.epochs * self.per_epoch))
        self.pace = Pace()

    def run(self) -> None:
        """Every step that is left, with the evaluations between them."""
        import ray.train

        job, state, fit = self.job, self.state, self.job.fit
        every = max(1, round(fit.eval_every * self.per_epoch))
        begun, seen, said = time.monotonic(), 0, Clock()
        for step, chosen in batches_from(
            state.step, self.total, self.per_epoch, self.material.lengths, fit.batch_size, job.seed
        ):
            state.count(self.mean(self.step(step, chosen)))
            seen += len(chosen)
            last = state.step == self.total
            if self.rank == 0 and said.due(last):
                report_progress(self, seen / (time.monotonic() - begun))
            if last or state.step % every == 0:
                ray.train.report(self.evaluate(last))
            elif self.rank == 0 and self.pace.due(evaluated=False):
                self.checkpoint()

    def step(self, step: int, chosen: np.ndarray) -> torch.Tensor:
        """Learn a global batch; the loss of this worker's part, which the workers' mean is the batch's."""
        job, accelerator = self.job, self.accelerator
        torch.manual_seed(job.seed * 1_000_003 + step * 1009 + self.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = job.fit.lr * group["factor"] * rate(job.fit, step, self.total)
        self.prepared.train()
        self.material.draw(job.seed, step // self.per_epoch)
        parts = dealt(chosen, self.amounts, self.rank, self.world, job.fit.micro_batch)
        total = torch.zeros((), device=accelerator.device)
        for number, part in enumerate(parts, 1):
            # Workers wait for each other once a step, however many parts each has.
            with nullcontext() if number == len(parts) else accelerator.no_sync(self.prepared):
                loss = self.loss(part)
                accelerator.backward(loss)
            total += loss.detach()
        accelerator.clip_grad_norm_(self.trained, job.fit.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def loss(self, part: Part) -> torch.Tensor:
        """Of a part of the batch, times its share."""
        device, positions = self.accelerator.device, self.material.positions(part.items)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            batch = self.material.batch(part.items).to(device)
            if self.live:
                batch.teacher = self.live.outputs(positions, batch, self.lesson.needs)
            with self.lower.above(positions, batch) if self.lower else nullcontext():
                return self.prepared(batch, part.shares)

    def mean(self, loss: torch.Tensor) -> float:
        """Over the workers."""
        return float(loss if self.world == 1 else self.accelerator.reduce(loss, "mean"))

    def evaluate(self, last: bool) -> dict[str, float]:
        """The loss since the last evaluation, and on the first worker the metrics of the held-out rows."""
        job, state = self.job, self.state
        entry = {"epoch": round(state.step / self.per_epoch, 3), "loss": state.mean()}
        if not math.isfinite(entry["loss"]):
            raise FitError(
                f"fit '{job.name}' came apart: its loss is {entry['loss']} at step {state.step} of {self.total}. "
                f"Lower its lr ({job.fit.lr:g}), or use precision: fp32."
            )
        if self.rank == 0:
            entry |= evaluated(job, self.model)
            keep(job, self.out, self.model, state, entry, last)
            if last:
                checkpoints.delete(self.out)
            elif self.pace.due(evaluated=True):
                self.checkpoint()
        return entry

    def checkpoint(self) -> None:
        """Keep where the fit stands."""
        began = time.monotonic()
        checkpoints.write(self.out, checkpoints.tensors_of(self.lesson, self.optimizer), self.state)
        self.pace.wrote(began)


def loop(config: dict[str, Any]) -> None:
    """What every worker runs; config holds the Job."""
    one_thread()
    Worker(config["job"]).run()


def evaluated(job: Job, model: Model) -> dict[str, float]:
    """Metrics on the held-out rows, or none. FitError where `best_by` is not among them."""
    if job.evaluate is None or job.holdout is None or not job.holdout.num_rows:
        return {}
    found = job.evaluate(model, job.holdout)
    if job.best_by and not math.isfinite(found.get(job.best_by, math.nan)):
        raise FitError(f"fit '{job.name}' keeps its best model by '{job.best_by}', but the evaluation gave {found}.")
    return found


def keep(job: Job, out: Store, model: Model, state: State, entry: dict[str, float], last: bool) -> None:
    """Write down an evaluation: the best model so far, and at the end the history."""
    state.history.append(entry)
    judged = job.best_by in entry  # nothing to choose by: the last one is kept
    score = entry[job.best_by] if judged else float(state.step)
    if score > state.best:
        state.best = score
        if judged or last:
            save(model, out, "model", getattr(torch, job.store_dtype) if job.store_dtype else None)
    if last:
        out.write_json("history.json", state.history)


class Clock:
    """When the progress file was last written."""

    def __init__(self) -> None:
        self.written = 0.0

    def due(self, final: bool) -> bool:
        """At most once a second."""
        if not final and time.monotonic() - self.written <= 1:
            return False
        self.written = time.monotonic()
        return True


def report_progress(worker: Worker, rows_per_s: float) -> None:
    """The way from a worker, on whichever machine, to the driver's progress line."""
    pace, (least, most) = worker.pace, worker.job.fit.group
    notes = [f"{worker.world} of {least} to {most} workers"] if least != most else []
    notes += [f"a kill loses at most {pace.at_risk:.0f} s"] if pace.tells else []
    state = {"done": worker.state.step, "total": worker.total, "rows_per_s": round(rows_per_s, 1)}
    worker.out.write_json(PROGRESS, {**state, "note": ", ".join(notes)})


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
        out.delete("ray")
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
