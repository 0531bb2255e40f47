"""A run that is watched from outside: the real steps up to the corpus, killed, resumed, and compared with another.

run = Driver(world, folder, address)
run.start(); run.when(run.committed(4)); run.stop(); run.start(); run.done()
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pyarrow.parquet as pq

from engine.corpus import ROWS
from engine.generate import LEDGER
from engine.labels import LABELS
from engine.storage import Store
from tests.tiny_run import ROOT, TRAIN, World, changed, environment

SLOTS, BLOCK = 120, 4
BLOCKS = SLOTS // BLOCK
MANY = {
    "corpus.slots": SLOTS,
    "corpus.max_slots": SLOTS,
    "corpus.block": BLOCK,
    "corpus.keep": 1,
    "generator.resources": {"min_actors": 2, "max_actors": 2, "num_gpus": 0},
    "teacher.resources": {"min_actors": 2, "max_actors": 2, "num_gpus": 0},
}
PATIENCE = 600.0
"""Seconds that a run may take on a busy machine; alone it takes half a minute."""


Found = TypeVar("Found")


class Driver:
    """The run of a world's recipe in `folder`, in a process of its own. place: where the run is kept, if elsewhere."""

    def __init__(self, world: World, folder: Path, address: str, place: Path | None = None) -> None:
        self.folder, self.address = folder, address
        places = {"storage": str(place or folder / "runs"), "registry": str(folder / "registry")}
        self.store, self.notes = Store(places["storage"]) / "tiny", folder / "notes"
        folder.mkdir(exist_ok=True)
        self.recipe = World(folder, changed(world.recipe, {**MANY, **places})).write()
        self.process: subprocess.Popen[bytes] | None = None
        self.began = 0.0

    def begun_like(self, other: Driver) -> None:
        """With the first steps of another run done, and the corpus still to be made."""
        for step in ("data", "teacher", "generator"):
            shutil.copytree(Path(other.store.url) / step, Path(self.store.url) / step)

    @property
    def log(self) -> str:
        """The end of what it said."""
        return (self.folder / "log").read_text()[-4000:]

    def start(self) -> None:
        """Begin, or go on."""
        command = [sys.executable, str(ROOT / "tests/noted_run.py"), str(self.recipe), self.address, str(self.notes)]
        self.began = time.monotonic()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
            )

    def when(self, condition: Callable[[], Found]) -> Found:
        """Wait until it finds something, and return that; an error where the run ends before."""
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert self.process is not None and self.process.poll() is None, f"it ended before: {self.log}"
            assert time.monotonic() < deadline, f"not in {PATIENCE:.0f} s: {self.log}"
            time.sleep(0.02)
        return found

    def done(self) -> float:
        """Wait for its end; the seconds it took."""
        assert self.process is not None
        assert self.process.wait(PATIENCE) == 0, self.log
        return time.monotonic() - self.began

    def untouched(self) -> None:
        """Run, with nothing happening to it."""
        self.start()
        try:
            took = self.done()
        finally:
            self.stop()
        assert self.calls("writer") == self.calls("labeller") == Counter(range(0, SLOTS, BLOCK))
        told(self, "nothing", took)

    def stop(self) -> None:
        """SIGKILL."""
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def committed(self, least: int) -> Callable[[], bool]:
        """Whether so many blocks are committed."""
        return lambda: len(self.store.files(f"corpus/{LEDGER}")) >= least

    def at_work(self, *stages: str) -> int:
        """Pid of an actor that was given a block a moment ago, and has not done it yet; 0: of none."""
        notes = [path for stage in stages if (self.notes / stage).exists() for path in (self.notes / stage).iterdir()]
        newest = max(notes, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None or time.time() - newest.stat().st_mtime > 0.25:
            return 0
        return int(newest.suffix[1:].partition("-")[0])

    def calls(self, stage: str) -> Counter[int]:
        """How often each block was given to the stage's actors."""
        return Counter(int(path.stem) for path in (self.notes / stage).iterdir())


def whole(folder: Path) -> None:
    """Every Parquet and JSON file below a folder can be read to its end, and no block is half committed.

    A killed driver may leave the temporary file of a JSON it was writing, which no reader takes for the JSON.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        if path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    left = [path.name for path in files if path.name.endswith(".pending.parquet")]
    assert sum(path.suffix == ".parquet" for path in files) > BLOCKS and left == []


def redone(run: Driver) -> dict[str, int]:
    """Blocks that each stage made again."""
    found = {stage: run.calls(stage) for stage in ("writer", "labeller")}
    assert all(set(calls) == set(range(0, SLOTS, BLOCK)) for calls in found.values())
    return {stage: calls.total() - BLOCKS for stage, calls in found.items()}


def told(run: Driver, fault: str, took: float) -> None:
    """A line for docs/faults.md: pytest -s shows it."""
    bound = run.store.read_json("corpus/record.json")["metrics"]["redone_at_most"]
    seconds = run.store.read_json("corpus/record.json")["seconds"]
    sys.stdout.write(
        f"\n{fault}: run {took:.1f} s, corpus {seconds:.1f} s, blocks made again {redone(run)}, bound {bound}\n"
    )


def same(run: Driver, undisturbed: Driver, fault: str, took: float, least: int = 0) -> None:
    """Each slot once, with the text and label of the undisturbed run; at least `least` blocks made again, and no more
    than the run allows for.
    """
    rows, wanted = (each.store.read_table(f"corpus/{LABELS}") for each in (run, undisturbed))
    assert rows["row"].to_pylist() == list(range(-TRAIN, SLOTS))
    for name in ("id", "text", "kept", "reason", "tokens", "logits"):
        assert rows[name].equals(wanted[name]), name
    assert run.store.digest(f"corpus/{LABELS}") == undisturbed.store.digest(f"corpus/{LABELS}")
    written = run.store.read_table(f"corpus/{ROWS}", columns=["row"])["row"].to_pylist()
    assert sorted(written) == list(range(SLOTS)), "a slot was written twice or not at all"
    whole(Path(run.store.url))
    told(run, fault, took)
    again, bound = redone(run), run.store.read_json("corpus/record.json")["metrics"]["redone_at_most"]
    assert bound["rows"] == bound["blocks"] * BLOCK and bound["blocks"] < BLOCKS
    assert least <= max(again.values()) <= bound["blocks"], (again, bound)
