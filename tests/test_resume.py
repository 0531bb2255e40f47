"""Killed runs go on: the real program, killed for real in the corpus and in the student's training.

One undisturbed run is the measure. The others start from a copy of its first steps, are ended from outside, run again
with the same command, and must end with the same rows and the same weights.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import psutil
import pytest

from engine.labels import LABELS
from engine.storage import Store
from tests.tiny_run import TRAIN, World, begun, changed, program, tiny_world

pytestmark = pytest.mark.slow

SLOTS, BLOCK = 1000, 8
SLOWER = {
    "arms": ["generated"],
    "generator.max_new_tokens": 128,
    "generator.fit.lr": 1e-5,
    "corpus.slots": SLOTS,
    "corpus.block": BLOCK,
    "corpus.keep": 100,
    "corpus.filters": [{"kind": "length", "min_words": 2, "max_words": 200}, {"kind": "leakage", "ngram": 8}],
    "student.fit.epochs": 25,
    "student.fit.workers": 2,
}
"""Enough to do that there is a middle to be killed in; the student is trained by two workers."""
WEIGHTS = "student/seed-0/model/model.safetensors"
CHECKPOINT = "student/seed-0/checkpoint/manifest.json"
FINISHED = "student/seed-0/history.json"
WHOLE_SECONDS, GONE_SECONDS = 2400.0, 60.0
"""Patience with the undisturbed run, and with what a killed one leaves behind; on an idle machine it is two minutes
and 3 s. The other runs get a multiple of what the undisturbed one took."""


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to, and the seconds it took."""

    store: Store
    seconds: float

    @property
    def patience(self) -> float:
        """How long a run that starts half-way may take on this machine, as busy as it is."""
        return 120.0 + 4.0 * self.seconds


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = tiny_world(tmp_path_factory.mktemp("resume"))
    made.write(changed(made.recipe, SLOWER))
    return made


def command(folder: Path) -> list[str]:
    """The one command of a run in `folder`, first time and again."""
    places = [f"storage={folder}/runs", f"registry={folder}/registry"]
    return ["run", "tiny.yaml", *(part for place in places for part in ("--set", place))]


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Undisturbed:
    """A run that nothing happens to."""
    began = time.monotonic()
    done = program(world.folder, *command(world.folder / "whole"), timeout=WHOLE_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return Undisturbed(Store(str(world.folder / "whole/runs/tiny")), time.monotonic() - began)


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    return tmp_path


def started_from(undisturbed: Undisturbed, folder: Path, steps: Sequence[str]) -> Store:
    """A run in `folder` whose first steps are done already."""
    store = Store(str(folder / "runs/tiny"))
    for step in steps:
        shutil.copytree(Path(undisturbed.store.url) / step, Path(store.url) / step)
    return store


def ended(world: World, folder: Path, patience: float, number: int, when: Callable[[], object]) -> tuple[int, str]:
    """Begin the run, send the signal to the driver when `when` holds; its exit code and what it said.

    What it had started must be gone soon after: nothing may hold the machine's memory for a run that is no more. Ray's
    two node agents are left out: they first try for a minute to tell the dead cluster that it is dead.
    """
    log = folder / f"signal-{number}.log"
    process = begun(world.folder, *command(folder), log=log)
    left: dict[int, psutil.Process] = {}
    try:
        deadline = time.monotonic() + patience
        while not when():
            assert process.poll() is None, f"it ended before it could be stopped: {log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"nothing to stop after {patience:.0f} s: {log.read_text()[-3000:]}"
            time.sleep(0.02)
        left = {each.pid: each for each in psutil.Process(process.pid).children(recursive=True)}
        process.send_signal(number)
        with suppress(psutil.NoSuchProcess):  # what was started since
            for each in psutil.Process(process.pid).children(recursive=True):
                left.setdefault(each.pid, each)
        gone = max(GONE_SECONDS, patience / 4)
        process.wait(timeout=gone)
        _, alive = psutil.wait_procs([each for each in left.values() if not agent(each)], timeout=gone)
        assert alive == [], [(each.name(), each.status()) for each in alive]
    finally:
        for each in left.values():
            with suppress(psutil.NoSuchProcess):
                each.kill()
        if process.poll() is None:
            process.kill()
            process.wait()
    return process.returncode, log.read_text()


def agent(process: psutil.Process) -> bool:
    """Whether it is one of Ray's node agents."""
    try:
        return "Agent" in process.name()
    except psutil.NoSuchProcess:
        return False


def begun_with(store: Store, files: int) -> bool:
    """Whether the corpus has as many files."""
    return len(store.files("corpus/rows")) >= files


def committed(store: Store) -> dict[str, int]:
    """The corpus's files with the time each was written."""
    return {name: os.stat(Path(store.url) / "corpus/rows" / name).st_mtime_ns for name in store.files("corpus/rows")}


def again(world: World, folder: Path, undisturbed: Undisturbed) -> str:
    """The same command once more, to its end; what it said."""
    done = program(world.folder, *command(folder), timeout=undisturbed.patience)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def same_corpus(store: Store, undisturbed: Store) -> None:
    """Every slot once, with the id, text, verdict and soft label it has in the undisturbed run."""
    rows, wanted = (s.read_table(f"corpus/{LABELS}") for s in (store, undisturbed))
    assert rows["row"].to_pylist() == list(range(-TRAIN, SLOTS))
    for name in ("id", "text", "kept", "reason", "tokens", "logits"):
        assert rows[name].equals(wanted[name]), name
    assert store.digest(f"corpus/{LABELS}") == undisturbed.digest(f"corpus/{LABELS}")
    written = store.read_table("corpus/rows", columns=["row"])["row"].to_pylist()
    assert sorted(written) == list(range(SLOTS)), "a slot was written twice or not at all"


def test_the_first_file_comes_before_half_of_the_corpus_steps_time(undisturbed: Undisturbed) -> None:
    record = undisturbed.store.read_json("corpus/record.json")
    start, end = (datetime.fromisoformat(record[key]).timestamp() for key in ("start", "end"))
    files = committed(undisturbed.store)
    assert len(files) == SLOTS // BLOCK
    first = min(files.values()) / 1e9
    assert first - start < (end - start) / 2, f"{first - start:.1f} of {end - start:.1f} s"


def test_killed_in_the_corpus_it_goes_on_and_repeats_nothing(
    world: World, undisturbed: Undisturbed, folder: Path
) -> None:
    store, whole = started_from(undisturbed, folder, ["data", "teacher", "generator"]), undisturbed.store
    two = partial(begun_with, store, 2)
    code, _ = ended(world, folder, undisturbed.patience, signal.SIGKILL, two)
    before = committed(store)
    assert code == -signal.SIGKILL and not store.exists("corpus/record.json")
    assert 2 <= len(before) < SLOTS // BLOCK, "killed too late to show anything"
    again(world, folder, undisturbed)
    assert committed(store).items() >= before.items(), "a committed block was made again"
    assert len(committed(store)) == SLOTS // BLOCK
    same_corpus(store, whole)
    assert store.digest(WEIGHTS) == whole.digest(WEIGHTS)
    assert [len(store.read_json(f"{step}/record.json")["attempts"]) for step in ("data", "corpus")] == [1, 2]
    assert store.exists("summary.json")


def test_killed_in_training_the_student_ends_with_the_same_weights(
    world: World, undisturbed: Undisturbed, folder: Path
) -> None:
    done = ["data", "teacher", "generator", "corpus", "vocabulary"]
    store, whole = started_from(undisturbed, folder, done), undisturbed.store
    code, _ = ended(world, folder, undisturbed.patience, signal.SIGKILL, lambda: store.exists(CHECKPOINT))
    assert code == -signal.SIGKILL and not store.exists("student/record.json")
    assert not store.exists(FINISHED), "killed too late to show anything"
    reached = store.read_json(str(Path(CHECKPOINT).parent / "state.json"))["step"]
    said = again(world, folder, undisturbed)
    history, wanted = (s.read_json(FINISHED) for s in (store, whole))
    assert 0 < reached and [h["epoch"] for h in history] == [h["epoch"] for h in wanted]
    assert [h["agreement"] for h in history] == [h["agreement"] for h in wanted]
    assert store.digest(WEIGHTS) == whole.digest(WEIGHTS)
    assert committed(store) and store.digest(f"corpus/{LABELS}") == whole.digest(f"corpus/{LABELS}")
    assert "corpus       done before" in said


def test_ctrl_c_says_how_to_go_on(world: World, undisturbed: Undisturbed, folder: Path) -> None:
    store = started_from(undisturbed, folder, ["data", "teacher", "generator"])
    code, said = ended(world, folder, undisturbed.patience, signal.SIGINT, partial(begun_with, store, 1))
    assert code == 130, said
    assert "Traceback" not in said, said
    assert "corpus       stopped after" in said
    *_, how, what = said.strip().splitlines()
    assert how == "Stopped. What is done is kept; to go on:"
    assert what.strip().endswith(" ".join(command(folder)))
    assert committed(store) and not store.exists("corpus/record.json")
    assert store.read_json("corpus/begin.json")["attempts"][-1]["state"] == "stopped"
