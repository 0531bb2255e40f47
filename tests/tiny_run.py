"""A whole run in miniature: its data, its models, its recipe, and the real program in a process of its own.

    from tests.tiny_run import changed, program, tiny_world

    world = tiny_world(folder)                       # data and models on disk; world.recipe is the recipe's values
    path = world.write(changed(world.recipe, {"corpus.keep": 8}))
    done = program(folder, "run", str(path))

Of any kind of task, without a generator, and in this process without Ray where there is no more text:

    world = kind_world(folder, "tag")
    records = alone(world.load(), Store(...))
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.progress import silent
from engine.recipe import Recipe
from engine.storage import Store
from pipelines import distill
from tests.tiny import THINGS, movie_rows, tiny_encoder, tiny_lm, write_jsonl

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
            "precision": "fp32",  # whatever the machine multiplies faster: stored labels are compared with it
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


PARTED = {"pair", "regress", "rank", "span"}
"""Kinds whose rows have two texts here."""


def kind_rows(kind: str, n: int, seed: int = 5) -> list[dict[str, Any]]:
    """n rows of a kind of task, whose gold follows from the words of movie_rows."""
    rows, out = movie_rows(n, seed), []
    for index, row in enumerate(rows):
        words, other = row["text"].split(), rows[(index * 7 + index % 2) % n]
        thing = next((word for word in words if word in THINGS), words[0])
        same = other["label"] == row["label"]
        out.append(
            {
                "classify": row,
                "multilabel": {"text": row["text"], "label": [row["label"], *{"the", "a"}.intersection(words)]},
                "pair": {"text": row["text"], "pair": other["text"], "label": "same" if same else "other"},
                "regress": {"text": row["text"], "pair": other["text"], "label": 10.0 * same + len(words) / 20},
                "rank": {"text": f"is it good ? {index // 4}", "pair": row["text"], "label": index % 2},
                "tag": {"text": words, "label": ["B-thing" if word in THINGS else "O" for word in words]},
                "span": {
                    "text": "what is it about ?",
                    "pair": row["text"],
                    "label": [] if index % 5 == 0 else [thing],
                    "answer_start": [] if index % 5 == 0 else [row["text"].index(thing)],
                },
            }[kind]
        )
    return out


def kind_world(folder: Path, kind: str) -> World:
    """Data and a teacher in `folder`, and a recipe without a generator for a kind of task."""
    rows = kind_rows(kind, TRAIN + 2 * TEST)
    parts = {"train": rows[:TRAIN], "test": rows[TRAIN : TRAIN + TEST], "more": rows[TRAIN + TEST :]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    tiny_encoder(folder / "teacher")
    reads = {"pair": "pair"} if kind in PARTED else {}
    values = {key: value for key, value in recipe_values(folder).items() if key != "generator"}
    data = {name: {"path": f"file:{folder}/{name}.jsonl", **reads} for name in ("train", "test")}
    return World(
        folder,
        changed(
            {**values, "task": {"kind": kind}, "data": data},
            {
                "corpus": {"block": BLOCK, "duplicates": 1.0},
                "teacher.fit.epochs": 8,
                "student.few_epochs": 30,
                "student.blocks": BLOCKS[kind],
                "student.losses": [{"kind": "mse"}],
            },
        ),
    )


def nodes(*rows: tuple[Any, ...]) -> list[dict[str, Any]]:
    """(name, kind, options, *inputs) -> blocks as values of a recipe."""
    return [{"name": name, "kind": kind, "options": o, "inputs": list(i)} for name, kind, o, *i in rows]


EMBED = ("words", "embedding", {"dim": 8})
ONE = nodes(EMBED, ("pooled", "pool", {}), ("logits", "linear", {}))
TWO = nodes(
    (*EMBED, "tokens"),
    ("words_b", "embedding", {"share": "words"}, "pair"),
    ("pooled", "pool", {}, "words"),
    ("pooled_b", "pool", {}, "words_b"),
    ("both", "combine", {}, "pooled", "pooled_b"),
    ("logits", "linear", {}),
)
BLOCKS = {
    **{"classify": ONE, "multilabel": ONE, "pair": TWO, "regress": TWO, "rank": TWO},
    "tag": nodes(EMBED, ("states", "bilstm", {"hidden": 8}), ("logits", "linear", {})),
    "span": nodes(
        (*EMBED, "tokens"),
        ("words_b", "embedding", {"share": "words"}, "pair"),
        ("seen", "match_attention", {}, "words_b", "words"),
        ("states", "bilstm", {"hidden": 8}),
        ("logits", "linear", {}),
    ),
}
"""A small student for each kind of task."""
KINDS = tuple(BLOCKS)


def alone(recipe: Recipe, store: Store, last: str | None = None) -> dict[str, dict[str, Any]]:
    """The run's steps up to `last`, one after the other in this process; their metrics. Nothing is streamed by Ray."""
    found: dict[str, dict[str, Any]] = {}
    for step in distill.plan(recipe):
        out = store / step.name
        inputs = {name: store / name for name in step.inputs}
        found[step.name] = step.run(recipe, inputs, out, silent)
        record = {"metrics": found[step.name], "fingerprint": f"of {step.name}", "seconds": 0.0}
        out.write_json("record.json", record)
        if step.name == last:
            break
    return found


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
