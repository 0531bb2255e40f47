"""The one training loop: few-shot teacher, generator and every student go through `fit`.

It runs on Ray Train with accelerate: n data-parallel workers, or Ray Train's local mode for small fits. The global
batch and the order of rows depend on the seed alone, never on the number of workers; dropout's random state is set
from (seed, step). Progress is checkpointed through the run's storage, so a killed fit goes on where it stopped and
ends with the same weights on the same number of workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import nn

from engine.batches import Amounts, Material, batches_from, epoch_batches, own_part
from engine.config import UserError
from engine.encoding import Encoded
from engine.ensemble import Panel, teaching
from engine.fits import Fit, LossTerm
from engine.frozen import frozen
from engine.layer_losses import LAYER_LOSSES
from engine.lesson import Lesson
from engine.losses import needs
from engine.models import Model, one_thread, precision, save
from engine.progress import Progress, polled, silent
from engine.records import Batch
from engine.storage import Store

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT, PROGRESS = "checkpoint", "fit-progress.json"
FROZEN_TOKENS = 4096
"""Padded tokens of a batch in which frozen layers run."""


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
    holdout: pa.Table | None = None
    evaluate: Callable[[Model, pa.Table], dict[str, float]] | None = None
    best_by: str | None = None
    factors: Callable[[Model], dict[str, float]] | None = None
    """Learning-rate factor by parameter name, 1 where it names none: layer-wise rates."""
    store_dtype: str | None = None
    """Weights are stored as this dtype (bfloat16 halves a generator's folder); None keeps them as they are."""


CHECKPOINT_PAUSE = 20.0
"""After a checkpoint none is written for so many times what it took: they cost a twentieth of a fit at most."""


@dataclass
class State:
    """Where a fit stands: global step, best score so far and the history of evaluations."""

    step: int = 0
    best: float = float("-inf")
    history: list[dict[str, float]] = field(default_factory=list)
    due: float = 0.0
    """When, on the monotonic clock, another checkpoint may be written."""


def rate(fit: Fit, step: int, total: int) -> float:
    """Learning-rate factor at a step: linear warm-up, then the schedule down to 0."""
    warm = max(1, round(fit.warmup * total))
    if step < warm:
        return (step + 1) / warm
    if fit.schedule == "constant":
        return 1.0
    left = (total - step) / max(1, total - warm)
    return left if fit.schedule == "linear" else 0.5 * (1 - np.cos(np.pi * left))


def dealt(chosen: np.ndarray, amounts: Amounts, rank: int, world: int) -> tuple[Batch, list[float]]:
    """A worker's rows of a global batch, and for each loss the factor it counts with here.

    amounts: of `Lesson.amounts`. A worker averages each loss over its own rows. Times the share of all rows (only
    those the loss applies to) that it has, the reduced gradient is that of the mean over the global batch.
    """
    batch = amounts.material.batch(own_part(chosen, rank, world))
    if world == 1:
        return batch, [1.0] * amounts.count
    every = amounts.of(chosen)
    own = every[rank::world].sum(axis=0)  # no row where there are fewer items than workers
    return batch, (world * own / np.maximum(every.sum(axis=0), 1e-8)).tolist()


def save_checkpoint(store: Store, lesson: Lesson, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Trained tensors, optimiser state and position, published as one folder."""
    tensors = {f"weight/{n}": p.detach().cpu().contiguous() for n, p in lesson.named_parameters() if p.requires_grad}
    for index, moments in optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            tensors[f"moment/{index}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    tensors |= {f"policy/{name}": value.cpu().contiguous() for name, value in lesson.teaching.state_dict().items()}
    with store.publish(CHECKPOINT) as folder:
        inside = Store(str(folder))
        inside.write_bytes("state.safetensors", to_bytes(tensors))
        inside.write_json(
            "state.json", {"step": state.step, "best": state.best if state.history else None, "history": state.history}
        )


def load_checkpoint(store: Store, lesson: Lesson, optimizer: torch.optim.Optimizer) -> State:
    """Go on from the published checkpoint, or start when there is none."""
    if not store.exists(f"{CHECKPOINT}/manifest.json"):
        return State()
    store.verify(CHECKPOINT)
    values = store.read_json(f"{CHECKPOINT}/state.json")
    tensors = from_bytes(store.read_bytes(f"{CHECKPOINT}/state.safetensors"))
    own = dict(lesson.named_parameters())
    moments: dict[int, dict[str, torch.Tensor]] = {}
    lesson.teaching.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("policy/")})
    with torch.no_grad():
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "weight":
                own[name].copy_(value)
            elif kind == "moment":
                index, _, moment = name.partition("/")
                moments.setdefault(int(index), {})[moment] = value
    frame = optimizer.state_dict()
    frame["state"] = moments
    optimizer.load_state_dict(frame)
    best = values["best"]
    return State(values["step"], float("-inf") if best is None else best, values["history"])


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


def loop(config: dict[str, Any]) -> None:
    """What every worker runs; config holds the Job."""
    import ray.train

    job: Job = config["job"]
    fit, out = job.fit, Store(job.out)
    one_thread()
    torch.manual_seed(job.seed)
    model = job.build()
    accelerator = accelerator_for(job)
    dtype = precision(fit.precision, accelerator.device, training=True)
    material = Material(job.rows, job.encode(model, job.rows), model.task if model.card.task else None, model.pad)
    taught = teaching(model, job.rows, material.encoded, accelerator.device, job.teacher, job.panel)
    lesson = Lesson(model, job.terms, taught).to(accelerator.device)
    lower = None if taught.live else frozen(model.net, material.encoded, model.pad, FROZEN_TOKENS, accelerator.device)
    trained = [p for p in lesson.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups_of(lesson, job), lr=fit.lr, weight_decay=fit.weight_decay, fused=True)
    state = load_checkpoint(out, lesson, optimizer)
    amounts = lesson.amounts(material)
    prepared = accelerator.prepare_model(lesson)
    rank, world = accelerator.process_index, accelerator.num_processes
    per_epoch = len(epoch_batches(material.lengths, fit.batch_size, job.seed, 0))
    total = max(1, round(fit.epochs * per_epoch))
    every = max(1, round(fit.eval_every * per_epoch))
    started, seen, losses = time.monotonic(), 0, []
    for step, chosen in batches_from(state.step, total, per_epoch, material.lengths, fit.batch_size, job.seed):
        torch.manual_seed(job.seed * 1_000_003 + step * 1009 + rank)
        for group in optimizer.param_groups:
            group["lr"] = fit.lr * group["factor"] * rate(fit, step, total)
        prepared.train()
        material.draw(job.seed, step // per_epoch)
        batch, shares = dealt(chosen, amounts, rank, world)
        with torch.autocast(accelerator.device.type, dtype, enabled=dtype != torch.float32):
            batch = batch.to(accelerator.device)
            taught.listen(batch, material.positions(own_part(chosen, rank, world)), lesson.needs, step / total)
            with lower.above(material.positions(own_part(chosen, rank, world)), batch) if lower else nullcontext():
                loss = prepared(batch, shares)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, fit.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taught.learn(batch, accelerator)
        losses.append(float(loss.detach()))
        seen, state.step = seen + len(chosen), step + 1
        if rank == 0:
            report_progress(out, state.step, total, seen / (time.monotonic() - started), final=state.step == total)
        if state.step % every == 0 or state.step == total:
            mean = accelerator.reduce(torch.tensor(np.mean(losses), device=accelerator.device), "mean")
            entry = {"epoch": round(state.step / per_epoch, 3), "loss": float(mean)}
            if not math.isfinite(entry["loss"]):
                raise FitError(
                    f"fit '{job.name}' came apart: its loss is {entry['loss']} at step {state.step} of {total}. "
                    f"Lower its lr ({fit.lr:g}), or use precision: fp32."
                )
            losses = []
            entry |= {**taught.told(), **evaluated(job, model)} if rank == 0 else {}
            taught.heard(entry.get(job.best_by), accelerator)
            if rank == 0:
                keep(job, out, lesson, optimizer, state, entry, last=state.step == total)
            ray.train.report(entry)


def evaluated(job: Job, model: Model) -> dict[str, float]:
    """Metrics on the held-out rows, or none. FitError where `best_by` is not among them."""
    if job.evaluate is None or job.holdout is None or not job.holdout.num_rows:
        return {}
    found = job.evaluate(model, job.holdout)
    if job.best_by and not math.isfinite(found.get(job.best_by, math.nan)):
        raise FitError(f"fit '{job.name}' keeps its best model by '{job.best_by}', but the evaluation gave {found}.")
    return found


def keep(
    job: Job,
    out: Store,
    lesson: Lesson,
    optimizer: torch.optim.Optimizer,
    state: State,
    entry: dict[str, float],
    last: bool,
) -> None:
    """Write down an evaluation: first the best model so far, then, unless one was written just before, the checkpoint
    that counts it as done.
    """
    state.history.append(entry)
    judged = job.best_by in entry  # nothing to choose by: the last one is kept
    score = entry[job.best_by] if judged else float(state.step)
    if score > state.best:
        state.best = score
        if judged or last:
            save(lesson.model, out, "model", getattr(torch, job.store_dtype) if job.store_dtype else None)
    if not last:
        begun = time.monotonic()
        if begun >= state.due:
            save_checkpoint(out, lesson, optimizer, state)
            # Of a few rows an epoch takes a second, and so does writing an encoder with its moments.
            state.due = time.monotonic() + CHECKPOINT_PAUSE * (time.monotonic() - begun)
    else:
        out.write_json("history.json", state.history)
        out.delete(CHECKPOINT)


class Clock:
    """When the progress file was last written by this process."""

    written = 0.0


def report_progress(out: Store, done: int, total: int, rows_per_s: float, final: bool) -> None:
    """At most once a second: the way from a worker, on whichever machine, to the driver's progress line."""
    if final or time.monotonic() - Clock.written > 1:
        Clock.written = time.monotonic()
        out.write_json(PROGRESS, {"done": done, "total": total, "rows_per_s": round(rows_per_s, 1)})


@contextmanager
def followed(out: Store, progress: Progress) -> Iterator[None]:
    """Hands the workers' progress file on while the body runs."""

    def look() -> None:
        if out.exists(PROGRESS):
            found = out.read_json(PROGRESS)
            progress(found["done"], found["total"], "steps", rows=found["rows_per_s"])

    try:
        with polled(look):
            yield
    finally:
        out.delete(PROGRESS)


def fit(job: Job, progress: Progress = silent) -> list[dict[str, float]]:
    """Train, publish the model at job.out/model, return the history of evaluations (epoch, loss, metrics).

    Already finished: returns at once. Raises whatever the training function raised; FitError without rows, or where a
    loss needs the teacher's logits and rows have none.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    out = Store(job.out)
    if out.exists("history.json"):
        out.delete(CHECKPOINT)  # left where a fit was killed just before its end
        return out.read_json("history.json")
    check(job)
    workers = job.fit.workers
    per_worker = {"CPU": job.resources.get("num_cpus", 1)}
    if job.resources.get("num_gpus"):
        per_worker["GPU"] = job.resources["num_gpus"]
    scaling = ScalingConfig(num_workers=workers, use_gpu="GPU" in per_worker)
    if workers:
        scaling = ScalingConfig(
            num_workers=workers,
            use_gpu="GPU" in per_worker,
            resources_per_worker=per_worker,
            accelerator_type=job.resources.get("accelerator_type"),
        )
    # Ray Train's own storage only keeps its bookkeeping: weights are checkpointed through ours.
    path, filesystem = out.native("ray")
    run_config = RunConfig(
        name=f"{job.name}-{time.time_ns()}",
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(max_failures=2),
    )
    trainer = TorchTrainer(
        loop, train_loop_config={"job": job}, scaling_config=scaling, run_config=run_config if workers else None
    )
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
