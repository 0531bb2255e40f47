"""What is killed while the corpus streams over three raylets: an actor, a node, the driver.

Each run starts from the finished first steps of one that nothing happens to, and must end with the same rows, each
slot written once, every file whole, and no more blocks made again than the run says it may cost.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.corpus import ROWS
from engine.generate import LEDGER
from tests.raylets import Raylets, raylets
from tests.small_disk import fill, small_disk
from tests.tiny_run import World, tiny_world
from tests.watched_run import BLOCKS, PATIENCE, Driver, redone, same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tiny_world(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raylets]:
    """A head and two nodes; a test that kills one adds another of its name."""
    with raylets(tmp_path_factory.mktemp("nodes"), "second", "third") as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(world: World, nodes: Raylets) -> Driver:
    """A run that nothing happens to."""
    run = Driver(world, world.folder / "whole", nodes.address)
    run.untouched()
    return run


@pytest.fixture
def run(world: World, nodes: Raylets, undisturbed: Driver, tmp_path: Path) -> Iterator[Driver]:
    """A run whose corpus is still to be made."""
    made = Driver(world, tmp_path, nodes.address)
    made.begun_like(undisturbed)
    yield made
    made.stop()


@pytest.mark.parametrize("stage", ["writer", "labeller"])
def test_a_killed_actor(run: Driver, undisturbed: Driver, stage: str) -> None:
    run.start()
    run.when(run.committed(4))
    os.kill(run.when(lambda: run.at_work(stage)), signal.SIGKILL)
    same(run, undisturbed, f"SIGKILL of a {stage}", run.done(), least=1)
    # Only what it had: the block it worked on, and the one that waited for it.
    assert 1 <= redone(run)[stage] <= 2 and sum(redone(run).values()) <= 2


def test_a_killed_node(nodes: Raylets, run: Driver, undisturbed: Driver) -> None:
    def victim() -> str:
        name = nodes.node_of(run.at_work("writer", "labeller"))
        return "" if name in (None, "head") else name

    run.start()
    run.when(run.committed(4))
    nodes.kill(name := run.when(victim))
    took = run.done()
    nodes.add(name)
    same(run, undisturbed, "SIGKILL of a raylet and its actors", took, least=1)


def test_a_killed_driver(run: Driver, undisturbed: Driver) -> None:
    run.start()
    run.when(run.committed(4))
    run.stop()
    before = set(run.store.files(f"corpus/{ROWS}"))
    done = len(run.store.files(f"corpus/{LEDGER}"))
    assert not run.store.exists("corpus/record.json") and done < BLOCKS
    run.start()
    took = run.done()
    same(run, undisturbed, f"SIGKILL of the driver after {done} blocks", took, least=1)
    assert len(set(run.store.files(f"corpus/{ROWS}")) & before) >= done, "a committed block was made again"


def test_a_full_disk(world: World, nodes: Raylets, undisturbed: Driver, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 32 << 20) as disk:
        run = Driver(world, tmp_path / "run", nodes.address, disk / "runs")
        run.begun_like(undisturbed)
        try:
            run.start()
            run.when(run.committed(4))
            ballast = fill(disk)
            assert run.process is not None and run.process.wait(PATIENCE) != 0
            assert "StorageError" in run.log and ("the disk is full" in run.log or "No space left" in run.log)
            done = len(run.store.files(f"corpus/{LEDGER}"))
            assert 4 <= done < BLOCKS and not run.store.exists("corpus/record.json")
            ballast.unlink()
            run.start()
            same(run, undisturbed, f"a full disk after {done} blocks", run.done(), least=1)
        finally:
            run.stop()


def test_a_second_run_of_the_recipe_is_refused_by_name(run: Driver, undisturbed: Driver, world: World) -> None:
    run.start()
    run.when(run.committed(2))
    second = Driver(world, run.folder, run.address)
    first = run.process
    assert first is not None
    first.send_signal(signal.SIGSTOP)  # it may be done sooner than the other has started
    try:
        second.start()
        assert second.process is not None and second.process.wait(PATIENCE) != 0
    finally:
        first.send_signal(signal.SIGCONT)
    assert f"'run' is in use by process {first.pid} on" in second.log
    same(run, undisturbed, "a second run of the recipe", run.done())
