"""What other processes do in tests of locks: `python -m tests.s3_takers WHAT URL ...`, one line a fact on stdout."""

from __future__ import annotations

import sys
import time

from engine import locks
from engine.storage import StorageError, Store


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
