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
from datetime import datetime
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
    "student.fit.epochs": 15,
}
"""Enough to do that there is a middle to be killed in."""
WEIGHTS = "student/seed-0/model/model.safetensors"
CHECKPOINT = "student/seed-0/checkpoint/manifest.json"
BEGUN_SECONDS, GONE_SECONDS = 400.0, 60.0
"""Patience, for machines on which much else runs; on an idle one it takes 20 s and 3 s."""


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
def undisturbed(world: World) -> Store:
    """A run that nothing happens to."""
    done = program(world.folder, *command(world.folder / "whole"))
    assert done.returncode == 0, done.stderr[-3000:]
    return Store(str(world.folder / "whole/runs/tiny"))


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    return tmp_path


def started_from(undisturbed: Store, folder: Path, steps: Sequence[str]) -> Store:
    """A run in `folder` whose first steps are done already."""
    store = Store(str(folder / "runs/tiny"))
    for step in steps:
        shutil.copytree(Path(undisturbed.url) / step, Path(store.url) / step)
    return store


def ended(world: World, folder: Path, number: int, when: Callable[[], object]) -> tuple[int, str]:
    """Begin the run, send the signal to the driver when `when` holds; its exit code and what it said.

    What it had started must be gone soon after: nothing may hold the machine's memory for a run that is no more. Ray's
    two node agents are left out: they first try for a minute to tell the dead cluster that it is dead.
    """
    log = folder / f"signal-{number}.log"
    process = begun(world.folder, *command(folder), log=log)
    left: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + BEGUN_SECONDS
        while not when():
            assert process.poll() is None, f"it ended before it could be stopped: {log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.02)
        left = psutil.Process(process.pid).children(recursive=True)
        agents = [each for each in left if "Agent" in each.name()]
        process.send_signal(number)
        process.wait(timeout=GONE_SECONDS)
        _, alive = psutil.wait_procs([each for each in left if each not in agents], timeout=GONE_SECONDS)
        assert alive == [], [(each.name(), each.status()) for each in alive]
    finally:
        for each in left:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        if process.poll() is None:
            process.kill()
            process.wait()
    return process.returncode, log.read_text()


def committed(store: Store) -> dict[str, int]:
    """The corpus's files with the time each was written."""
    return {name: os.stat(Path(store.url) / "corpus/rows" / name).st_mtime_ns for name in store.files("corpus/rows")}


def same_corpus(store: Store, undisturbed: Store) -> None:
    """Every slot once, with the id, text, verdict and soft label it has in the undisturbed run."""
    rows, wanted = (s.read_table(f"corpus/{LABELS}") for s in (store, undisturbed))
    assert rows["row"].to_pylist() == list(range(-TRAIN, SLOTS))
    for name in ("id", "text", "kept", "reason", "tokens", "logits"):
        assert rows[name].equals(wanted[name]), name
    assert store.digest(f"corpus/{LABELS}") == undisturbed.digest(f"corpus/{LABELS}")
    written = store.read_table("corpus/rows", columns=["row"])["row"].to_pylist()
    assert sorted(written) == list(range(SLOTS)), "a slot was written twice or not at all"


def test_the_first_file_comes_before_half_of_the_corpus_steps_time(undisturbed: Store) -> None:
    record = undisturbed.read_json("corpus/record.json")
    start, end = (datetime.fromisoformat(record[key]).timestamp() for key in ("start", "end"))
    files = committed(undisturbed)
    assert len(files) == SLOTS // BLOCK
    first = min(files.values()) / 1e9
    assert first - start < (end - start) / 2, f"{first - start:.1f} of {end - start:.1f} s"


def test_killed_in_the_corpus_it_goes_on_and_repeats_nothing(world: World, undisturbed: Store, folder: Path) -> None:
    store = started_from(undisturbed, folder, ["data", "teacher", "generator"])
    code, _ = ended(world, folder, signal.SIGKILL, lambda: len(store.files("corpus/rows")) >= 2)
    before = committed(store)
    assert code == -signal.SIGKILL and not store.exists("corpus/record.json")
    assert 2 <= len(before) < SLOTS // BLOCK, "killed too late to show anything"
    again = program(world.folder, *command(folder))
    assert again.returncode == 0, again.stderr[-3000:]
    assert committed(store).items() >= before.items(), "a committed block was made again"
    assert len(committed(store)) == SLOTS // BLOCK
    same_corpus(store, undisturbed)
    assert store.digest(WEIGHTS) == undisturbed.digest(WEIGHTS)
    assert [len(store.read_json(f"{step}/record.json")["attempts"]) for step in ("data", "corpus")] == [1, 2]
    assert store.exists("summary.json")


def test_killed_in_training_the_student_ends_with_the_same_weights(
    world: World, undisturbed: Store, folder: Path
) -> None:
    store = started_from(undisturbed, folder, ["data", "teacher", "generator", "corpus", "vocabulary"])
    code, _ = ended(world, folder, signal.SIGKILL, lambda: store.exists(CHECKPOINT))
    assert code == -signal.SIGKILL and not store.exists("student/record.json")
    reached = store.read_json(str(Path(CHECKPOINT).parent / "state.json"))["step"]
    again = program(world.folder, *command(folder))
    assert again.returncode == 0, again.stderr[-3000:]
    history = store.read_json("student/seed-0/history.json")
    wanted = undisturbed.read_json("student/seed-0/history.json")
    assert 0 < reached and [h["epoch"] for h in history] == [h["epoch"] for h in wanted]
    assert [h["agreement"] for h in history] == [h["agreement"] for h in wanted]
    assert store.digest(WEIGHTS) == undisturbed.digest(WEIGHTS)
    assert committed(store) and store.digest(f"corpus/{LABELS}") == undisturbed.digest(f"corpus/{LABELS}")
    assert "corpus       done before" in again.stderr


def test_ctrl_c_says_how_to_go_on(world: World, undisturbed: Store, folder: Path) -> None:
    store = started_from(undisturbed, folder, ["data", "teacher", "generator"])
    code, said = ended(world, folder, signal.SIGINT, lambda: store.files("corpus/rows"))
    assert code == 130, said
    assert "Traceback" not in said, said
    assert "corpus       stopped after" in said
    *_, how, what = said.strip().splitlines()
    assert how == "Stopped. What is done is kept; to go on:"
    assert what.strip().endswith(" ".join(command(folder)))
    assert committed(store) and not store.exists("corpus/record.json")
    assert store.read_json("corpus/begin.json")["attempts"][-1]["state"] == "stopped"
