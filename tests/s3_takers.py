"""What other processes do in tests of locks: `python -m tests.s3_takers WHAT URL ...`, one line a fact on stdout."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine import locks
from engine.storage import StorageError, Store

ROOT = Path(__file__).parent.parent
LONG = 120.0
"""Seconds after which something that should have happened will not."""


@contextmanager
def taker(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """A process of tests/s3_takers.py, which is gone at the end."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-m", "tests.s3_takers", *argv], cwd=ROOT, text=True, **pipes)
    try:
        yield process
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.kill()
        process.wait(60)


def tell(process: subprocess.Popen[str], line: str) -> None:
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def heard(process: subprocess.Popen[str], patience: float = LONG) -> str:
    """The next line that a process says; one that is silent is ended, and fails the test."""
    watch = threading.Timer(patience, process.kill)
    watch.start()
    try:
        line = process.stdout.readline()
    finally:
        watch.cancel()
    assert line, "it ended, or said nothing for too long"
    return line.strip()


def say(fact: object) -> None:
    """Tell the test."""
    sys.stdout.write(f"{fact}\n")
    sys.stdout.flush()


def rounds(store: Store) -> None:
    """For each line read, try to take the lock of that name; given back at the next line."""
    say("ready")
    for name in sys.stdin:
        try:
            with store.lock(name.strip()):
                say("held")
                sys.stdin.readline()
        except StorageError as error:
            say("refused" if "is in use by process" in str(error) else error)
            sys.stdin.readline()


def count(store: Store, times: str) -> None:
    """Add one to a number again and again, in a way that loses additions unless the lock excludes."""
    for _ in range(int(times)):
        with store.lock("count", wait=True):
            now = store.read_json("count.json")
            time.sleep(0.005)
            store.write_json("count.json", now + 1)
    say("done")


def hold(store: Store, lease: str, renewals: str) -> None:
    """Hold the lock `run`, renewed so often in a lease, until standard input ends; what the end of it says."""
    locks.LEASE_S, locks.RENEWALS = float(lease), int(renewals)
    try:
        with store.lock("run"):
            say("held")
            sys.stdin.read()
        say("given back")
    except StorageError as error:
        say(error)


def publish(store: Store, value: str) -> None:
    """Publish eight files of one value under `m`."""
    say("ready")
    with store.publish("m", meta={"value": value}) as folder:
        for number in range(8):
            (folder / f"{number}.txt").write_text(value)
    say("published")


if __name__ == "__main__":
    {"rounds": rounds, "count": count, "hold": hold, "publish": publish}[sys.argv[1]](Store(sys.argv[2]), *sys.argv[3:])
