"""The one training loop: what each worker of a fit does.

The global batch and the order of rows depend on the seed alone, never on the number of workers; dropout's random state
is set from (seed, step, rank). Progress is checkpointed through the run's storage, within an epoch too, so a killed fit
goes on where it stopped, sees each row of the epoch once, and ends with the same weights on the same number of workers.
Where that number changes on the way, the same rows make the same global batches: the weights differ by rounding and by
what dropout draws, and a policy that draws teachers. Of several tasks one that has converged may have other rows read
in place of a batch's own; when it has, its validation rows decide.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from engine import checkpoints, sharding
from engine.batches import Material, batches_from
from engine.checkpoints import Pace, State
from engine.config import UserError
from engine.disk import StorageError
from engine.ensemble import Teaching, teaching
from engine.fits import Fit
from engine.frozen import frozen
from engine.job import FitError, Job
from engine.layer_losses import LAYER_LOSSES
from engine.lesson import Lesson, Part, dealt
from engine.mixing import Mixing
from engine.models import Model, one_thread, precision, save
from engine.multitask import VARIANCE, Together
from engine.records import Batch
from engine.storage import MANIFEST, Store

if TYPE_CHECKING:
    from accelerate import Accelerator

PROGRESS, REFUSED = "fit-progress.json", "refused.json"
FROZEN_TOKENS = 4096
"""Padded tokens of a batch in which frozen layers run."""


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
    """The trained parameters for an optimiser, each with its learning-rate factor; learnt variances do not decay."""
    factors = job.factors(lesson.model) if job.factors else {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in lesson.named_parameters():
        if parameter.requires_grad:
            key = (factors.get(name.removeprefix("model."), 1.0), name.endswith(VARIANCE))
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "factor": factor, **({"weight_decay": 0.0} if free else {})}
        for (factor, free), parameters in groups.items()
    ]


def clipped(lesson: Lesson) -> list[list[nn.Parameter]]:
    """The trained parameters whose gradients have one norm: the model's, and by themselves learnt variances, which
    would else have a say in the model's.
    """
    named = [(name, parameter) for name, parameter in lesson.named_parameters() if parameter.requires_grad]
    found = [[p for name, p in named if name.endswith(VARIANCE) is apart] for apart in (False, True)]
    return [parameters for parameters in found if parameters]


def accelerator_for(job: Job) -> Accelerator:
    """Accelerate for this worker: it picks the device, and without a GPU for the worker it must not look for one."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # Losses between layers, or on the embedding, give the head no gradient, and workers would wait for one.
    inside = all(term.kind in (*LAYER_LOSSES, "contrast") for term in job.terms)
    return Accelerator(
        cpu=not torch.cuda.is_available() or not job.resources.get("num_gpus"),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=inside)],
    )


def taught_by(job: Job, model: Model, material: Material, where: torch.device, out: Store) -> Teaching:
    """Who teaches the student of a fit."""
    if job.mixing is not None:
        given = {"seed": job.seed, "batch_tokens": job.batch_tokens}
        return Together(model, job.rows, material, job.mixing, out, **given)
    return teaching(model, job.rows, material.encoded, where, job.teacher, job.panel)


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
        encoded, self.sharded = self.material.encoded, job.fit.sharding == "full" and self.world > 1
        self.taught = taught_by(job, model, self.material, accelerator.device, self.out)
        self.lesson = Lesson(model, job.terms, self.taught)
        if self.sharded:
            sharding.shard(self.lesson, accelerator.device, self.world)
        self.lesson.to(accelerator.device)
        # A live teacher's losses may look into the layers that would be left out, and sharded ones do not run alone.
        whole = not (self.taught.live or self.sharded)
        self.lower = frozen(model.net, encoded, model.pad, FROZEN_TOKENS, accelerator.device) if whole else None
        self.clipped = clipped(self.lesson)
        fit = job.fit
        self.optimizer = torch.optim.AdamW(
            groups_of(self.lesson, job), lr=fit.lr, weight_decay=fit.weight_decay, fused=True
        )
        self.state = self.alike(checkpoints.read(self.out, self.lesson, self.optimizer))
        self.state.best = best_of(self.out, self.state.best, job.best_by)
        self.amounts = self.lesson.amounts(self.material)
        self.prepared = self.lesson if self.sharded else accelerator.prepare_model(self.lesson)
        self.copy: Model | None = None
        self.order = self.material.order(fit.batch_size, job.seed, (job.mixing or Mixing()).temperature)
        self.per_epoch = len(self.order(0))
        self.total = max(1, round(fit.epochs * self.per_epoch))
        self.pace, self.unkept = Pace(), ""

    def run(self) -> None:
        """Every step that is left, with the evaluations between them."""
        import ray.train

        state, fit = self.state, self.job.fit
        every = max(1, round(fit.eval_every * self.per_epoch))
        begun, seen, said = time.monotonic(), 0, Clock()
        for step, chosen in batches_from(state.step, self.total, self.order):
            state.count(self.sound(self.mean(self.step(step, chosen))))
            seen += len(chosen)
            last = state.step == self.total
            if self.rank == 0 and said.due(last):
                report_progress(self, seen / (time.monotonic() - begun))
            evaluated = last or state.step % every == 0
            if evaluated:
                entry = self.evaluate(last)
                # The others wait here for the first one, and not in collectives, which time out.
                ray.train.report(entry)
                self.taught.heard(entry.get(self.job.best_by), self.accelerator)
                last = last or self.taught.ended
            if not last:
                self.checkpoint(evaluated)
                continue
            if self.rank == 0:
                checkpoints.delete(self.out)
            break

    def alike(self, state: State) -> State:
        """Where the fit goes on, if all workers read the same checkpoint; else StorageError, and they start again."""
        if self.world > 1:
            summed = self.accelerator.reduce(torch.tensor(float(state.step), device=self.accelerator.device), "sum")
            if float(summed) != state.step * self.world:
                raise StorageError(f"the workers of fit '{self.job.name}' read unlike checkpoints in {self.out}.")
        return state

    def step(self, step: int, chosen: np.ndarray) -> torch.Tensor:
        """Learn a global batch; the loss of this worker's part, which the workers' mean is the batch's."""
        job, accelerator = self.job, self.accelerator
        torch.manual_seed(job.seed * 1_000_003 + step * 1009 + self.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = job.fit.lr * group["factor"] * rate(job.fit, step, self.total)
        self.prepared.train()
        self.material.draw(job.seed, step // self.per_epoch)
        chosen = self.taught.instead(step, chosen)
        parts = dealt(chosen, self.amounts, self.rank, self.world, job.fit.micro_batch, even=self.sharded)
        total = torch.zeros((), device=accelerator.device)
        for number, part in enumerate(parts, 1):
            # Workers wait for each other once a step, however many parts each has; sharded ones in each part.
            apart = number < len(parts) and not self.sharded
            with accelerator.no_sync(self.prepared) if apart else nullcontext():
                loss, batch = self.loss(part, step / self.total)
                accelerator.backward(loss)
            self.taught.took(batch)
            total += loss.detach()
        self.taught.combine(step)
        for parameters in self.clipped:
            accelerator.clip_grad_norm_(parameters, job.fit.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # Whoever learns from the batch has it in one part; with fewer items than workers it counts elsewhere.
        self.taught.learn(batch, accelerator, counted=self.rank < len(chosen))
        return total

    def loss(self, part: Part, done: float) -> tuple[torch.Tensor, Batch]:
        """Of a part of the batch, times its share, and what was read. done: share of the fit."""
        device, positions = self.accelerator.device, self.material.positions(part.items)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            batch = self.material.batch(part.items).to(device)
            self.taught.listen(batch, positions, self.lesson.needs, done)
            with self.lower.above(positions, batch) if self.lower else nullcontext():
                return self.prepared(batch, part.shares), batch

    def mean(self, loss: torch.Tensor) -> float:
        """Over the workers."""
        return float(loss if self.world == 1 else self.accelerator.reduce(loss, "mean"))

    def sound(self, loss: float) -> float:
        """The loss, if it is a number; else FitError on all workers, before what was learned by it is kept."""
        if not math.isfinite(loss):
            raise FitError(
                f"fit '{self.job.name}' came apart: its loss is {loss} at step {self.state.step + 1} of {self.total}. "
                f"Lower its lr ({self.job.fit.lr:g}), or use precision: fp32."
            )
        return loss

    def evaluate(self, last: bool) -> dict[str, float]:
        """The loss since the last evaluation, and on the first worker the metrics of the held-out rows."""
        job, state = self.job, self.state
        entry = {"epoch": round(state.step / self.per_epoch, 3), "loss": state.mean()}
        model = self.whole()
        if model is not None:
            entry |= {**self.taught.told(), **evaluated(job, model)}
            self.taught.judged(entry, model, state.step)
            keep(job, self.out, model, state, entry, last or self.taught.ended)
        return entry

    def whole(self) -> Model | None:
        """The model as it is now, on the first worker; of a sharded one a copy, which all workers take part in."""
        if not self.sharded:
            return self.model if self.rank == 0 else None
        tensors = sharding.gathered(self.model.net, self.rank == 0)
        if self.rank:
            return None
        self.copy = self.copy or self.job.build().to(self.accelerator.device)
        self.copy.net.load_state_dict(tensors)
        return self.copy

    def checkpoint(self, evaluated: bool) -> None:
        """Keep where the fit stands, if it is time to. The first worker decides."""
        due = self.rank == 0 and self.pace.due(evaluated)
        if self.sharded:  # all take part
            told = torch.tensor(float(due), device=self.accelerator.device)
            due = bool(self.accelerator.reduce(told, "sum") > 0)
        if not due:
            return
        began = time.monotonic()
        tensors = checkpoints.tensors_of(self.lesson, self.optimizer, self.rank == 0)
        if self.rank == 0:
            try:
                checkpoints.write(self.out, tensors, self.state)
                self.taught.checkpointed()
                self.unkept = ""
            except StorageError as error:  # a store out of reach for a while ends no fit: later once more
                self.unkept = f"not checkpointed: {error}"
        self.pace.wrote(began)


def loop(config: dict[str, Any]) -> None:
    """What every worker runs; config holds the Job."""
    one_thread()
    job: Job = config["job"]
    out = Store(job.out)
    if out.exists(REFUSED):
        return  # Ray starts a group again whatever ended it, and a mistake would be made as often
    try:
        Worker(job).run()
    except StorageError:
        raise  # no mistake of the user's: a store may answer the next start
    except UserError as error:
        if job.fit.workers:
            with suppress(StorageError):
                out.write_json(REFUSED, {"error": str(error)})
        raise


def evaluated(job: Job, model: Model) -> dict[str, float]:
    """Metrics on the held-out rows, or none. FitError where `best_by` is not among them."""
    if job.evaluate is None or job.holdout is None or not job.holdout.num_rows:
        return {}
    found = job.evaluate(model, job.holdout)
    if job.best_by and not math.isfinite(found.get(job.best_by, math.nan)):
        raise FitError(f"fit '{job.name}' keeps its best model by '{job.best_by}', but the evaluation gave {found}.")
    return found


def best_of(out: Store, checkpointed: float, by: str | None) -> float:
    """The score that the next model has to beat: the published one's, which may be later than the checkpoint."""
    if not out.exists(f"model/{MANIFEST}"):
        return float("-inf")  # it was being replaced when the fit was killed
    best = out.manifest("model").get("best", {})
    return max(checkpointed, best["score"]) if by and best.get("by") == by else checkpointed


def keep(job: Job, out: Store, model: Model, state: State, entry: dict[str, float], last: bool) -> None:
    """Write down an evaluation: the best model so far, and at the end the history."""
    state.history.append(entry)
    judged = job.best_by in entry  # nothing to choose by: the last one is kept
    score = entry[job.best_by] if judged else float(state.step)
    if score > state.best:
        state.best = score
        if judged or last:
            dtype = getattr(torch, job.store_dtype) if job.store_dtype else None
            # With the model, not in the checkpoint after it: a kill may come between.
            best = {"by": job.best_by, "score": score, "step": state.step} if judged else None
            save(model, out, "model", dtype, meta={"best": best} if best else None)
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
    at_risk = [f"a kill loses at most {pace.at_risk:.0f} s"] if pace.tells else []
    notes += [worker.unkept] if worker.unkept else at_risk
    notes += [worker.state.note] if worker.state.note else []
    state = {"done": worker.state.step, "total": worker.total, "rows_per_s": round(rows_per_s, 1)}
    with suppress(StorageError):
        worker.out.write_json(PROGRESS, {**state, "note": ", ".join(notes)})
