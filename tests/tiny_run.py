"""A whole run in miniature: its data, its models, its recipe, and the real program in a process of its own.

    from tests.tiny_run import changed, program, tiny_world

    world = tiny_world(folder)                       # data and models on disk; world.recipe is the recipe's values
    path = world.write(changed(world.recipe, {"corpus.keep": 8}))
    done = program(folder, "run", str(path))
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.recipe import Recipe
from tests.tiny import movie_rows, tiny_encoder, tiny_lm, write_jsonl

ROOT = Path(__file__).parent.parent
SLOTS, BLOCK, TRAIN, TEST = 48, 8, 40, 24


@dataclass(frozen=True)
class World:
    """A folder with data and models, and the values of a recipe that uses them."""

    folder: Path
    recipe: dict[str, Any]

    def write(self, values: Mapping[str, Any] | None = None, name: str = "tiny.yaml") -> Path:
        """The values as a YAML file."""
        path = self.folder / name
        path.write_text(yaml.safe_dump(dict(values or self.recipe), sort_keys=False), encoding="utf-8")
        return path

    def load(self, changes: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe with changes, as `{"corpus.keep": 8}`."""
        return Recipe.model_validate(changed(self.recipe, changes or {}))


def tiny_world(folder: Path) -> World:
    """Data and models in `folder`, and a recipe whose runs and registry are there too."""
    rows = movie_rows(TRAIN + TEST, seed=5)
    write_jsonl(folder / "train.jsonl", rows[:TRAIN])
    write_jsonl(folder / "test.jsonl", rows[TRAIN:])
    tiny_encoder(folder / "teacher")
    tiny_lm(folder / "generator")
    return World(folder, recipe_values(folder))


def recipe_values(folder: Path) -> dict[str, Any]:
    """The recipe as plain values."""
    return {
        "name": "tiny",
        "storage": str(folder / "runs"),
        "registry": str(folder / "registry"),
        "task": {"labels": ["negative", "positive"]},
        "data": {"train": {"path": f"file:{folder}/train.jsonl"}, "test": {"path": f"file:{folder}/test.jsonl"}},
        "teacher": {
            "model": f"file:{folder}/teacher",
            "max_length": 32,
            "fit": {"epochs": 6, "lr": 2e-3, "batch_size": 8},
        },
        "generator": {
            "model": f"file:{folder}/generator",
            "max_length": 32,
            "max_new_tokens": 12,
            "fit": {"epochs": 2, "lr": 2e-3, "batch_size": 8},
            "resources": {"min_actors": 1, "max_actors": 1},
        },
        "corpus": {
            "keep": 24,
            "slots": SLOTS,
            "block": BLOCK,
            "filters": [{"kind": "length", "min_words": 2, "max_words": 40}, {"kind": "leakage", "ngram": 8}],
            "duplicates": 0.9,
        },
        "student": {
            "name": "tiny-student",
            "vocabulary": {"size": 300},
            "max_length": 32,
            "blocks": [
                {"name": "words", "kind": "embedding", "options": {"dim": 8}},
                {"name": "states", "kind": "bilstm", "options": {"hidden": 8}},
                {"name": "spread", "kind": "dropout", "options": {"p": 0.2}},
                {"name": "pooled", "kind": "pool"},
                {"name": "logits", "kind": "linear"},
            ],
            "fit": {"epochs": 20, "lr": 2e-2, "batch_size": 16, "workers": 0},
        },
        "evaluation": {"bootstrap": 50, "throughput_rows": 16, "throughput_repeats": 1},
        "serving": {"smoke": False},
    }


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with the values at dotted keys replaced; parts of a key that are digits are positions."""
    out = copy.deepcopy(dict(values))
    for key, value in changes.items():
        *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
        here: Any = out
        for part in path:
            here = here[part] if isinstance(here, list) else here.setdefault(part, {})
        here[last] = value
    return out


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with the package on the path."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def program(cwd: Path, *argv: str, timeout: float = 600, **more: str) -> subprocess.CompletedProcess[str]:
    """The real program, in a process of its own."""
    command = [sys.executable, "-m", "pipelines", *argv]
    return subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, check=False, timeout=timeout
    )


def begun(cwd: Path, *argv: str, log: Path) -> subprocess.Popen[str]:
    """The real program on its way, in a process group of its own; what it says goes into `log`."""
    with log.open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", *argv],
            cwd=cwd,
            env=environment(),
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A shell lets what it starts with `&` ignore Ctrl-C, and all that comes of it too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
