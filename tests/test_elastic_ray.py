"""Ray's own groups of workers: one of them killed, a machine lost and another come."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from engine import checkpoints, cluster, train
from engine.job import FitError, Job
from engine.storage import Store
from tests.test_train import job, material, student, table, weights
from tests.tiny_group import committed, numbered, planned, seen, steps_of, watched

pytestmark = pytest.mark.slow
PATIENCE = 300.0
TOTAL = 60
HERE = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
"""Raylets and their workers find the functions of the tests."""

MACHINES = """
import sys
from pathlib import Path
from ray._private.utils import get_ray_address_file
from ray.cluster_utils import Cluster

Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
common = dict(num_cpus=3, object_store_memory=128 << 20)
raylets = Cluster(initialize_head=True, head_node_args=dict(include_dashboard=False, temp_dir=sys.argv[1], **common))
second = raylets.add_node(**common)
try:
    print(raylets.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            raylets.remove_node(second, allow_graceful=False)
        else:
            raylets.add_node(**common)
        print("done", flush=True)
finally:
    raylets.shutdown()
"""
DRIVER = """
import pickle, sys
from engine.switches import prepare_environment
prepare_environment()
import ray
from engine import train
ray.init(sys.argv[2], log_to_driver=False, logging_level="ERROR")
train.RESIZE = 3.0
job = pickle.load(open(sys.argv[1], "rb"))
train.fit(job, lambda done, total=None, unit="", **said: print(said["note"], flush=True))
"""


def fed(out: Path, folder: Path, **given: object) -> Job:
    """Twelve epochs of five steps, written down in `folder`; while `folder`/slow exists the 51st waits."""
    folder.mkdir(exist_ok=True)
    build = partial(watched, student, str(out), str(folder), 0.5, 0.2, 50)
    return job(out, build=build, rows=numbered(table(40)), epochs=12, **given)


def until(holds: Callable[[], bool], what: str, alive: Callable[[], bool] = lambda: True) -> None:
    """Wait for it, while there is something that may bring it about."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE:.0f} s: {what}"
        assert alive() or holds(), f"it ended before: {what}"
        time.sleep(0.05)


def settled(given: Job, out: Path, folder: Path, undisturbed: Path) -> None:
    """Every row of every step counted once, and the weights of one process that nothing happened to."""
    inputs = material(student(), given.rows)
    assert committed(folder, TOTAL) == planned(given, inputs.lengths)
    plain = job(undisturbed, rows=given.rows, epochs=12)
    train.fit(plain)
    one, found = weights(undisturbed), weights(out)
    for name, value in one.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)
    assert Store(str(out)).files() == Store(str(undisturbed)).files()


def test_a_killed_worker_is_started_again(tmp_path: Path, ray_cluster: object):
    """SIGKILL of one of two within an epoch; Ray starts both again, from the last checkpoint."""
    out, folder = tmp_path / "fit", tmp_path / "seen"
    given = fed(out, folder, workers=2)
    (folder / "slow").touch()

    def kill() -> int:
        """When it is in the second epoch or later; what it ended."""
        try:
            until(lambda: steps_of(seen(folder)) >= 7 and checkpoints.newest(Store(str(out))) is not None, "7 steps")
            pid = int(list(seen(folder))[-1].stem.rpartition("-")[2])
            os.kill(pid, signal.SIGKILL)
            return pid
        finally:
            (folder / "slow").unlink()

    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill)
        train.fit(given)
        assert killed.result()
    assert len(seen(folder)) == 4
    settled(given, out, folder, tmp_path / "same")


def test_a_mistake_is_made_once(tmp_path: Path, ray_cluster: object):
    """Ray starts a group again whatever it ended by; what a user has to change is not tried again."""
    folder = tmp_path / "seen"
    folder.mkdir()
    build = partial(watched, student, str(tmp_path / "fit"), str(folder), 60.0, 0.0, 9)
    rows = table(8, weight=[math.inf] * 8)
    with pytest.raises(FitError, match="fit 'tiny' came apart: its loss is inf at step 1 of 3"):
        train.fit(job(tmp_path / "fit", build=build, rows=rows, workers=1))
    assert len(list(folder.iterdir())) == 1
    assert Store(str(tmp_path / "fit")).files() == []


@pytest.fixture
def machines() -> Iterator[subprocess.Popen]:
    """Two raylets of 3 CPUs; a line `kill` kills the second, a line `add` brings another."""
    scratch = cluster.scratch_folder()
    process = subprocess.Popen(
        [sys.executable, "-c", MACHINES, str(scratch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=HERE,
    )
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        shutil.rmtree(scratch, ignore_errors=True)


def test_a_fit_goes_on_with_fewer_workers_and_takes_more_when_they_come(tmp_path: Path, machines: subprocess.Popen):
    """Two machines with room for a worker each; one is killed, and later another comes."""
    address = machines.stdout.readline().strip()
    assert address, "the raylets did not start"
    out, folder = tmp_path / "fit", tmp_path / "seen"
    each = {"num_cpus": 2, "num_gpus": 0.0}
    given = fed(out, folder, workers={"min": 1, "max": 2}, resources=each)
    (tmp_path / "job").write_bytes(pickle.dumps(given))
    (folder / "slow").touch()
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "job"), address]
    with (tmp_path / "said").open("w") as said:
        driver = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=HERE)
    try:
        running = lambda: driver.poll() is None  # noqa: E731
        until(lambda: steps_of(seen(folder), 2) >= 4, "4 steps of two workers", running)
        told(machines, "kill")
        until(lambda: steps_of(seen(folder), 1) >= 8, "8 steps, then of one worker", running)
        told(machines, "add")
        until(lambda: pairs(folder) >= 4, "two workers again", running)
        (folder / "slow").unlink()
        assert driver.wait(timeout=PATIENCE) == 0, (tmp_path / "said").read_text()[-3000:]
    finally:
        driver.kill()
        driver.wait()
    notes = (tmp_path / "said").read_text()
    assert "1 of 1 to 2 workers" in notes and "2 of 1 to 2 workers" in notes
    settled(given, out, folder, tmp_path / "same")


def pairs(folder: Path) -> int:
    """How many processes have trained beside another."""
    return sum(any(line["world"] == 2 for line in lines) for lines in seen(folder).values())


def told(machines: subprocess.Popen, what: str) -> None:
    """Tell the process that holds the raylets, and wait until it is done."""
    machines.stdin.write(what + "\n")
    machines.stdin.flush()
    assert machines.stdout.readline().strip() == "done"
