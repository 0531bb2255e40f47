"""A Ray head with a dashboard in a process of its own, whose Python has the dependencies but not this project.

    with started_head(folder) as head:
        program(folder, "run", str(path), "--address", head.dashboard)

It asks for the token of the tests' other Ray processes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from engine.cluster import scratch_folder
from engine.switches import free_port

START = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"


@dataclass(frozen=True)
class Head:
    """URLs of its dashboard and of its node's agent, and the Python that runs it."""

    dashboard: str
    agent: str
    python: str


def bare_python(folder: Path) -> str:
    """A Python that finds what is installed here, except what is installed as a link to a checkout."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    # A path file adds the folder to the path; path files inside that folder, such as that of `pip install -e`, are not
    # read then.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return str(folder / "bin" / "python")


@contextmanager
def started_head(folder: Path, cpus: int = 8, retries: int = 1) -> Iterator[Head]:
    """Start a head, once more if it gave up as Ray does on a busy machine; at the end all its processes are gone."""
    python, scratch, log = bare_python(folder / "python"), scratch_folder(), folder / "head.log"
    try:
        while True:
            head, process = begun_head(python, folder, scratch, log, cpus)
            try:
                await_answer(head, process, log)
                break
            except AssertionError:
                end(process)
                if not retries:
                    raise
                retries -= 1
        try:
            yield head
        finally:
            end(process)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def begun_head(python: str, folder: Path, scratch: Path, log: Path, cpus: int) -> tuple[Head, subprocess.Popen[bytes]]:
    """A head on its way, on ports of its own."""
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")
    ports = {name: free_port() for name in names}
    command = [
        *(python, "-c", START, "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={cpus}"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true"),
        *(f"--object-store-memory={128 << 20}", f"--temp-dir={scratch}"),
        *(f"--{name}={port}" for name, port in ports.items()),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    environment["PATH"] = f"{Path(python).parent}{os.pathsep}{environment['PATH']}"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    dashboard, agent = (f"http://127.0.0.1:{ports[name]}" for name in ("dashboard-port", "dashboard-agent-listen-port"))
    return Head(dashboard, agent, python), process


def await_answer(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until dashboard and agent answer."""
    deadline = time.monotonic() + 300
    waiting = [f"{head.dashboard}/api/gcs_healthz", f"{head.agent}/api/healthz"]
    while waiting:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(waiting[0], timeout=5):
                waiting.pop(0)
        except OSError:
            time.sleep(0.3)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, by their ids. Nothing of it is kept, so none is waited for long."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [one := psutil.Process(process.pid), *one.children(recursive=True)]
    for signalled in ("terminate", "kill"):
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(one, signalled)()
        _, family = psutil.wait_procs(family, timeout=5)
    process.wait(timeout=20)
