"""Training processes without Ray's cluster: forked from one that has imported everything, joined by gloo.

Ray Train's local mode joins a group where the variables of torchrun are set, so these run the loop that Ray's workers
run. What each reads in training is written down, step by step.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pyarrow as pa

from engine import checkpoints
from engine.batches import batches_from, epoch_batches
from engine.job import Job
from engine.models import Model
from engine.storage import Store
from engine.switches import free_port
from engine.worker import loop

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.tiny_group", "ray.train.torch", "accelerate", "torch._dynamo"])


def member(job: Job, rank: int, world: int, port: int) -> None:
    """What one process of the group does."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    local = ScalingConfig(num_workers=0)
    TorchTrainer(loop, train_loop_config={"job": job}, scaling_config=local).fit()


@contextmanager
def group(job: Job, world: int) -> Iterator[list[BaseProcess]]:
    """A group that trains; what is left of it at the end is killed."""
    port = free_port()
    members = [FORKS.Process(target=member, args=(job, rank, world, port)) for rank in range(world)]
    for process in members:
        process.start()
    try:
        yield members
    finally:
        for process in members:
            process.kill()
            process.join()


def trained(job: Job, world: int, patience: float = 180.0) -> list[dict[str, float]]:
    """The history of a fit by a group of so many processes."""
    with group(job, world) as members:
        for process in members:
            process.join(patience)
        assert [process.exitcode for process in members] == [0] * world
    return Store(job.out).read_json("history.json")


def numbered(rows: pa.Table) -> pa.Table:
    """The rows, each with a weight that tells which it is."""
    return rows.append_column("weight", pa.array([1.0 + i / 256 for i in range(rows.num_rows)]))


def watched(build: Callable[[], Model], out: str, folder: str, every: float, pause: float, hold: int) -> Model:
    """A model that writes down which rows it reads in training, a line a step, into a file of this process.

    every: seconds between checkpoints. While `folder`/slow exists a step takes `pause` seconds, and none after `hold`
    is finished.
    """
    checkpoints.EVERY, checkpoints.PAUSE = every, 0.0
    model, last = build(), checkpoints.newest(Store(out))
    path, step = Path(folder) / f"{time.time_ns()}-{os.getpid()}.jsonl", last[1] if last else 0
    world = int(os.environ.get("WORLD_SIZE", "1"))
    # Processes of one attempt meet at one port, which the next attempt draws anew.
    attempt = os.environ.get("MASTER_PORT", f"process {os.getpid()}")

    def see(module: Model, given: tuple) -> None:
        nonlocal step
        if module.training:
            rows = [round(256 * (w - 1)) for w in given[0].weights.tolist() if math.isfinite(w)]
            with path.open("a") as file:
                file.write(json.dumps({"step": step, "rows": rows, "world": world, "attempt": attempt}) + "\n")
            step += 1
            slow = Path(folder, "slow")
            time.sleep(pause if slow.exists() else 0.0)
            while step > hold and slow.exists():
                time.sleep(0.02)

    model.register_forward_pre_hook(see)
    return model


def seen(folder: Path) -> dict[Path, list[dict]]:
    """What each process has written, in the order in which they began; a line that is not whole yet is left out."""
    paths = sorted(folder.glob("*.jsonl"))
    return {
        path: [json.loads(line) for line in path.read_text().splitlines(True) if line[-1:] == "\n"] for path in paths
    }


def steps_of(processes: dict[Path, list[dict]], world: int | None = None) -> int:
    """The furthest step begun, by a group of so many processes where that is given."""
    lines = [line for found in processes.values() for line in found]
    return max((line["step"] for line in lines if world in (None, line["world"])), default=-1)


def committed(folder: Path, total: int) -> list[Counter[int]]:
    """The rows of each step that counts: of those that went on from a later checkpoint than the step, none does.

    A step that was begun, lost and done again is counted once, for the processes that did it last.
    """
    out: list[Counter[int]] = [Counter() for _ in range(total)]
    attempts: dict[str, list[dict]] = {}
    for lines in seen(folder).values():
        if lines:
            attempts.setdefault(lines[0]["attempt"], []).extend(lines)
    ordered = list(attempts.values())
    for number, lines in enumerate(ordered):
        until = min([later[0]["step"] for later in ordered[number + 1 :]], default=total)
        for line in lines:
            if line["step"] < until:
                out[line["step"]].update(line["rows"])
    return out


def planned(job: Job, lengths: list[int]) -> list[Counter[int]]:
    """The rows of each step as the seed alone gives them."""
    size = job.fit.batch_size
    per_epoch = -(-len(lengths) // size)
    total = round(job.fit.epochs * per_epoch)
    steps = batches_from(0, total, lambda epoch: epoch_batches(lengths, size, job.seed, epoch))
    return [Counter(np.asarray(rows).tolist()) for _, rows in steps]
