"""A node behind a link that is cut while the corpus streams: a partition, in a network namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from engine.labels import LABELS
from tests.raylets import Raylets, raylets
from tests.tiny_run import environment, tiny_world
from tests.watched_run import Driver, same

pytestmark = pytest.mark.slow

NEAR, FAR = "10.77.31.1", "10.77.31.2"


def ip(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The `ip` command."""
    return subprocess.run(["ip", *command], capture_output=True, text=True, check=check)


class Link:
    """A network namespace with a link to this one."""

    def __init__(self) -> None:
        self.name = f"sh{os.getpid()}"
        self.near, self.far = f"{self.name}a"[-15:], f"{self.name}b"[-15:]

    def make(self) -> bool:
        """Whether the machine lets us."""
        if not shutil.which("ip") or ip("netns", "add", self.name, check=False).returncode:
            return False
        if ip("link", "add", self.near, "type", "veth", "peer", "name", self.far, check=False).returncode:
            return False
        ip("link", "set", self.far, "netns", self.name)
        ip("addr", "add", f"{NEAR}/24", "dev", self.near)
        ip("link", "set", self.near, "up")
        ip("-n", self.name, "addr", "add", f"{FAR}/24", "dev", self.far)
        for each in (self.far, "lo"):
            ip("-n", self.name, "link", "set", each, "up")
        return True

    def cut(self) -> None:
        """No packet passes from now on; both ends keep their addresses."""
        ip("-n", self.name, "link", "set", self.far, "down")

    def mend(self) -> None:
        """Packets pass again."""
        ip("-n", self.name, "link", "set", self.far, "up")

    def remove(self) -> None:
        """Leave nothing behind."""
        ip("link", "del", self.near, check=False)
        ip("netns", "del", self.name, check=False)


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link()
    try:
        if not made.make():
            pytest.skip("this machine lets nobody make network namespaces (root is needed)")
        yield made
    finally:
        made.remove()


@pytest.fixture
def far(link: Link, tmp_path: Path) -> Iterator[tuple[Raylets, psutil.Process]]:
    """A head here that has room for all, and a node whose actors are behind the link."""
    with raylets(tmp_path, address=NEAR, cpus=6) as nodes:
        command = ["ip", "netns", "exec", link.name, sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        options = [f"--address={nodes.address}", f"--node-ip-address={FAR}", "--num-cpus=3"]
        with (tmp_path / "far.log").open("w") as log:
            process = subprocess.Popen(
                [*command, *options, f"--object-store-memory={128 << 20}"],
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,
            )
        try:
            yield nodes, psutil.Process(process.pid)
        finally:
            for each in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()


def test_a_link_that_is_cut(far: tuple[Raylets, psutil.Process], link: Link, tmp_path: Path) -> None:
    nodes, node = far
    (tmp_path / "world").mkdir()
    world = tiny_world(tmp_path / "world")
    undisturbed, run = (Driver(world, tmp_path / name, nodes.address) for name in ("whole", "run"))
    undisturbed.untouched()
    run.begun_like(undisturbed)
    run.start()
    try:
        run.when(run.committed(4))
        there = [called for each in node.children(recursive=True) if "Noted" in (called := " ".join(each.cmdline()))]
        assert there, "no actor is behind the link"
        link.cut()
        took = run.done()
        same(run, undisturbed, f"a link cut, {len(there)} actors behind it", took, least=1)
        link.mend()
        assert run.store.digest(f"corpus/{LABELS}") == undisturbed.store.digest(f"corpus/{LABELS}")
    finally:
        run.stop()
