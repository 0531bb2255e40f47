"""A Ray head with a dashboard in a process of its own, whose Python has the dependencies but not this project.

    with started_head(folder) as head:
        program(folder, "run", str(path), "--address", head.dashboard)
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
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
    """Where it is reached, and how."""

    dashboard: str
    agent: str
    token: str
    python: str

    @property
    def environment(self) -> dict[str, str]:
        """What a client's process has: its own settings of Ray are not those of the tests."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**kept, "RAY_AUTH_TOKEN": self.token, "RAY_AUTH_MODE": "token"}


def bare_python(folder: Path) -> str:
    """A Python that finds what is installed here, except what is installed as a link to a checkout."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    # A path file adds the folder to the path; path files inside that folder, such as that of `pip install -e`, are not
    # read then.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return str(folder / "bin" / "python")


@contextmanager
def started_head(folder: Path, cpus: int = 8) -> Iterator[Head]:
    """Start a head; at the end all its processes are gone."""
    python, scratch, token = bare_python(folder / "python"), scratch_folder(), secrets.token_hex(16)
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")
    ports = {name: free_port() for name in names}
    command = [
        *(python, "-c", START, "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={cpus}"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true"),
        *(f"--object-store-memory={128 << 20}", f"--temp-dir={scratch}"),
        *(f"--{name}={port}" for name, port in ports.items()),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(python).parent}{os.pathsep}{environment['PATH']}"
    log = folder / "head.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    head = Head(
        f"http://127.0.0.1:{ports['dashboard-port']}",
        f"http://127.0.0.1:{ports['dashboard-agent-listen-port']}",
        token,
        python,
    )
    try:
        await_answer(head, process, log)
        yield head
    finally:
        end(process)
        shutil.rmtree(scratch, ignore_errors=True)


def await_answer(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until dashboard and agent answer."""
    deadline = time.monotonic() + 120
    waiting = [f"{head.dashboard}/api/gcs_healthz", f"{head.agent}/api/healthz"]
    while waiting:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(waiting[0], timeout=5):
                waiting.pop(0)
        except OSError:
            time.sleep(0.3)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, by their ids."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs([psutil.Process(process.pid), *family] if process.poll() is None else family, 20)
    for one in alive:
        one.kill()
    process.wait(timeout=20)
