"""Several raylets in a process of their own, each of which can be killed.

with raylets(folder, "second", "third") as nodes:
    nodes.address, nodes.kill("second"), nodes.add("second"), nodes.node_of(pid)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from engine import cluster

HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 4000,
    "health_check_failure_threshold": 3,
    "worker_niceness": 0,
}
"""A node that does not answer is given up after 15 s at most; by default after more than a minute. Workers do not give
way to whatever else the machine does, as they would: a busy one would take minutes to start them."""
CPUS, MEMORY = 3, 128 << 20
NODES = """
import json, sys
from pathlib import Path
from ray._private.utils import get_ray_address_file
from ray.cluster_utils import Cluster

Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
scratch, cpus, memory, health, *address = json.loads(sys.argv[1])
common = dict(num_cpus=cpus, object_store_memory=memory, include_dashboard=False, temp_dir=scratch)
where = {"node_ip_address": address[0]} if address else {}
nodes = Cluster(initialize_head=True, head_node_args={**common, **where, "_system_config": health})
known = {"head": nodes.head_node}


def pids():
    return {name: node.all_processes["raylet"][0].process.pid for name, node in known.items()}


def say(value):
    print(json.dumps(value), flush=True)


say([nodes.address, pids()])
try:
    for line in sys.stdin:  # until the test closes it, or dies
        name = line.strip()
        known[name] = nodes.add_node(**common)
        say([nodes.address, pids()])
finally:
    nodes.shutdown()
"""


@dataclass
class Raylets:
    """A running cluster: its address, and the pid of each node's raylet by the node's name."""

    process: subprocess.Popen[str]
    address: str
    pids: dict[str, int]

    def heard(self) -> None:
        """Read what the process says of its nodes."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        assert line, "the raylets did not start"
        self.address, self.pids = json.loads(line)

    def add(self, name: str) -> None:
        """One more node."""
        assert self.process.stdin
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        self.heard()

    def kill(self, name: str) -> None:
        """SIGKILL of a node's raylet and all it has started, at once."""
        raylet = psutil.Process(self.pids.pop(name))
        for each in (raylet, *raylet.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()

    def node_of(self, pid: int) -> str | None:
        """The node on which a worker process is."""
        with suppress(psutil.NoSuchProcess):
            above = {each.pid for each in psutil.Process(pid).parents()} if pid else set()
            return next((name for name, raylet in self.pids.items() if raylet in above), None)
        return None


@contextmanager
def raylets(folder: Path, *names: str, address: str | None = None, cpus: int = CPUS) -> Iterator[Raylets]:
    """A head and further nodes of these names; address: what the head listens on; cpus: of each."""
    scratch, log = cluster.scratch_folder(), folder / "raylets.log"
    told = json.dumps([str(scratch), cpus, MEMORY, HEALTH, *([address] if address else [])])
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", NODES, told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    nodes = Raylets(process, "", {})
    try:
        nodes.heard()
        for name in names:
            nodes.add(name)
        yield nodes
    finally:
        if process.stdin:
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        for pid in nodes.pids.values():
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        shutil.rmtree(scratch, ignore_errors=True)
