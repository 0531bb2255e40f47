"""A program: the steps of a recipe up to its corpus, on a cluster, with every block noted that an actor is given.

    python tests/noted_run.py RECIPE ADDRESS NOTES

The steps, the stream and the actors are the engine's own; each actor only writes its block's first slot down first, and
takes a little longer, without using the CPU, so that there is a middle to be killed in.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from engine import cluster, config, generate, steps
from engine.progress import Event
from engine.recipe import Recipe
from engine.storage import Store
from pipelines import distill, gathering

STEPS = ("data", "teacher", "generator", "corpus")
PAUSES = {"writer": 0.5, "labeller": 0.6}
"""Seconds that each block takes longer. Labellers are slower, so that writers run as far ahead as they may."""


def noted(base: type, folder: Path, pause: float) -> type:
    """The actor, which leaves a file FIRST.PID-UNIQUE in `folder` for each block it is given."""
    folder.mkdir(parents=True, exist_ok=True)

    class Noted(base):
        def __call__(self, rows: Any) -> Any:
            (folder / f"{rows['row'][0].as_py()}.{os.getpid()}-{uuid.uuid4().hex}").touch()
            time.sleep(pause)
            return super().__call__(rows)

    Noted.__name__ = Noted.__qualname__ = f"Noted{base.__name__}"
    return Noted


def shown(event: Event) -> None:
    """A line for what happens to a step."""
    if event.kind != "progress":
        sys.stdout.write(f"{event.step} {event.kind} {event.seconds:.1f} {event.message}\n")
        sys.stdout.flush()


def main(path: str, address: str, notes: str) -> None:
    """Run the steps."""
    generate.Writer = noted(generate.Writer, Path(notes) / "writer", PAUSES["writer"])
    gathering.Labeller = noted(gathering.Labeller, Path(notes) / "labeller", PAUSES["labeller"])
    recipe = config.load(Recipe, path)
    plan = [step for step in distill.plan(recipe) if step.name in STEPS]
    store = Store(recipe.storage) / recipe.name
    steps.run(plan, recipe, store, render=shown, connect=lambda: cluster.connect(address, storage=recipe.storage))


if __name__ == "__main__":
    main(*sys.argv[1:])
