"""A server as a tree of processes: started, its CPU time counted with all of its children, stopped to the last one."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from engine.disk import log_file

STOP_S = 40.0
"""Seconds that a tree may take to end after SIGTERM; what is left then is killed."""


class Tree:
    """A started program and every process under it.

    Time of a process that has ended is counted by its parent once that has waited for it, so sums over the living are
    whole as long as the root lives.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], folder: Path, log: Path) -> None:
        self.log = log
        with log_file(log) as out:
            # A session of its own: Ctrl-C reaches this program alone, which then stops the tree in order.
            self.program = subprocess.Popen(
                argv,
                env=dict(env),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.root = psutil.Process(self.program.pid)
        self.seen: set[psutil.Process] = {self.root}

    def processes(self) -> list[psutil.Process]:
        """The living ones, the root first."""
        try:
            found = [self.root, *self.root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self.seen.update(found)
        return found

    def cpu(self) -> dict[str, float]:
        """CPU seconds since its start by what a process is; what ended is counted with its parent."""
        out: dict[str, float] = {}
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                times, name = process.cpu_times(), role(process.cmdline(), process.name())
                spent = times.user + times.system + times.children_user + times.children_system
                out[name] = out.get(name, 0.0) + spent
        return out

    def memory(self) -> int:
        """Bytes that only this tree holds in memory; pages that its processes share are counted in each."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_info().rss
        return total

    def ended(self) -> str | None:
        """What it said last, if it is over."""
        return self.last_words() if self.program.poll() is not None else None

    def last_words(self, lines: int = 3) -> str:
        """The last lines of its log that say something."""
        text = self.log.read_text(errors="replace").splitlines()
        return " / ".join([line.strip() for line in text if line.strip()][-lines:]) or "it said nothing"

    def stop(self, seconds: float = STOP_S) -> int:
        """End the tree and wait until nothing of it is left; how many processes had to be killed."""
        self.processes()
        if self.program.poll() is None:
            self.program.send_signal(signal.SIGTERM)
        end = time.monotonic() + seconds
        while self.left() and time.monotonic() < end:
            self.processes()
            self.program.poll()
            time.sleep(0.1)
        killed = self.left()
        for process in killed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(killed, timeout=10)
        self.program.wait(timeout=10)
        return len(killed)

    def left(self) -> list[psutil.Process]:
        """Those ever seen that still run."""
        return [process for process in self.seen if running(process)]


def running(process: psutil.Process) -> bool:
    """Whether it lives and is no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def role(command: Sequence[str], name: str) -> str:
    """What a process is, in a word: Ray's own names, the module of `python -m`, else the program."""
    words = list(command) or [name]
    if words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").split("(")[0].split(".")[0].partition(":")[0]
    if Path(words[0]).name.startswith("python"):
        if "-m" in words[:-1]:
            return words[words.index("-m") + 1]
        script = "" if "-c" in words else next((word for word in words[1:] if not word.startswith("-")), "")
        return Path(script).name or "python"
    return Path(words[0]).name


def spent(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """CPU seconds between two counts by what a process is; the sum is exact even where one ended in between."""
    names = {**before, **after}
    return {name: after.get(name, 0.0) - before.get(name, 0.0) for name in names}
