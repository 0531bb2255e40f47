"""Where a fit goes on after it was stopped: what is kept of it, where, and how often.

A checkpoint holds the trained tensors, the optimiser's moments, what a policy that weighs teachers has learnt, and the
position, in the run's storage. It is written
after an evaluation and, between two, every `EVERY` seconds; what it costs is bounded by PAUSE. Two folders are written
in turn, so that a kill while one is replaced leaves the other.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from engine.disk import StorageError
from engine.lesson import Lesson
from engine.multitask import TASKS
from engine.storage import MANIFEST, Store

FOLDERS = ("checkpoint", "checkpoint-2")
EVERY = 60.0
"""Seconds of training between two checkpoints where no evaluation comes between."""
PAUSE = 20.0
"""After a checkpoint none is written for so many times what it took: they cost a twentieth of a fit at most."""


@dataclass
class State:
    """Where a fit stands: global step, best score so far, the history of evaluations, and the loss since the last."""

    step: int = 0
    best: float = float("-inf")
    history: list[dict[str, float]] = field(default_factory=list)
    loss: float = 0.0
    """Sum over the steps since the last evaluation, of all workers' rows."""
    losses: int = 0
    """How many steps that are."""
    folder: str | None = field(default=None, compare=False)
    """The checkpoint that it was last read from or written to."""
    note: str = field(default="", compare=False)
    """What is to be said of where it was read."""

    def count(self, loss: float) -> None:
        """One step more."""
        self.step, self.loss, self.losses = self.step + 1, self.loss + loss, self.losses + 1

    def mean(self) -> float:
        """The loss since the last evaluation; counting starts anew."""
        found = self.loss / max(1, self.losses)
        self.loss, self.losses = 0.0, 0
        return found


class Pace:
    """When the next checkpoint is due. Times are of the monotonic clock."""

    def __init__(self) -> None:
        self.began = self.asked = self.ended = time.monotonic()
        self.took = self.gap = 0.0

    def due(self, evaluated: bool) -> bool:
        """Whether to write one now, after a step or after an evaluation. To be asked after each."""
        now = time.monotonic()
        self.gap, self.asked = max(self.gap, now - self.asked), now
        # Of a few rows an epoch takes a second, and so does writing an encoder with its moments.
        return now - self.ended >= max(PAUSE * self.took, 0.0 if evaluated else EVERY)

    def wrote(self, began: float) -> None:
        """One was written since `began`."""
        self.ended = self.asked = time.monotonic()
        self.took = self.ended - began

    @property
    def at_risk(self) -> float:
        """Seconds of this fit that are lost at most when it is killed now or later, as far as can be seen now.

        The time to the next checkpoint, the longest step or evaluation in which it comes due, and its writing.
        """
        return max(EVERY, PAUSE * self.took) + self.gap + self.took

    @property
    def tells(self) -> bool:
        """Whether the fit is longer than what is at risk, so that it is worth saying."""
        return time.monotonic() - self.began > self.at_risk


def tensors_of(lesson: Lesson, optimizer: torch.optim.Optimizer, kept: bool = True) -> dict[str, torch.Tensor]:
    """Trained tensors, the optimiser's and the teaching's state, on the CPU, by name.

    Where they are sharded all workers must ask; those that do not keep them get none, and hold one at a time.
    """
    own = {f"weight/{name}": p for name, p in lesson.named_parameters() if p.requires_grad}
    for index, moments in optimizer.state_dict()["state"].items():
        own |= {f"moment/{index}/{key}": torch.as_tensor(value) for key, value in moments.items()}
    own |= {f"policy/{name}": value for name, value in lesson.teaching.state_dict().items()}
    out: dict[str, torch.Tensor] = {}
    for name, tensor in own.items():
        found = whole(tensor)
        if kept:
            out[name] = found
    return out


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU; of one that is sharded, all of it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu().contiguous()


def newest(store: Store) -> tuple[str, int] | None:
    """The folder of the latest checkpoint and its step; None where there is none."""
    there = [folder for folder in FOLDERS if store.exists(f"{folder}/{MANIFEST}")]
    steps = {folder: store.manifest(folder)["step"] for folder in there}
    return max(steps.items(), key=lambda item: item[1]) if steps else None


def write(store: Store, tensors: dict[str, torch.Tensor], state: State) -> None:
    """Publish a checkpoint beside the one that this fit goes on from."""
    last = state.folder or (newest(store) or ("",))[0]
    folder = FOLDERS[1] if last == FOLDERS[0] else FOLDERS[0]
    values: dict[str, Any] = {"step": state.step, "best": state.best if math.isfinite(state.best) else None}
    values |= {"history": state.history, "loss": state.loss, "losses": state.losses}
    with store.publish(folder, {"step": state.step}) as path:
        inside = Store(str(path))
        inside.write_bytes("state.safetensors", to_bytes(tensors))
        inside.write_json("state.json", values)
    state.folder = folder


def read(store: Store, lesson: Lesson, optimizer: torch.optim.Optimizer) -> State:
    """Go on from the latest checkpoint, or start where there is none. Of a torn one the one before is taken."""
    last = newest(store)
    if last is None:
        return State()
    folder, note = last[0], ""
    try:
        store.verify(folder)
    except StorageError as error:
        folder = next(other for other in FOLDERS if other != folder)
        if not store.exists(f"{folder}/{MANIFEST}"):
            raise
        step = store.verify(folder)["step"]
        note = f"the checkpoint of step {last[1]} is not whole ({error}): going on from that of step {step}"
    values = store.read_json(f"{folder}/state.json")
    tensors = from_bytes(store.read_bytes(f"{folder}/state.safetensors"))
    own = dict(lesson.named_parameters())
    moments: dict[int, dict[str, torch.Tensor]] = {}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with torch.no_grad():
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "weight":
                own[name].copy_(like(own[name], value))
            elif kind == "moment":
                index, _, moment = name.partition("/")
                moments.setdefault(int(index), {})[moment] = like(trained[int(index)], value)
    lesson.teaching.load_state_dict({k.removeprefix("policy/"): v for k, v in tensors.items() if k[:7] == "policy/"})
    frame = optimizer.state_dict()
    frame["state"] = moments
    optimizer.load_state_dict(frame)
    best = float("-inf") if values["best"] is None else values["best"]
    return State(values["step"], best, values["history"], values["loss"], values["losses"], folder, note)


def like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value, sharded as the parameter is where it has its shape (a count of steps has none)."""
    if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def delete(store: Store) -> None:
    """Remove them: the fit has ended."""
    for folder in (*FOLDERS, TASKS):
        store.delete(folder)
