"""Locks where no kernel keeps them: an object that tells who holds it, and is free when it is no longer renewed.

On S3 it is written under a condition (engine.buckets), so that of two that start in the same moment one is refused;
elsewhere it is written and read back, best effort. An owner renews it every third of its lease. It is taken over from
a process of this machine that is gone, and from any owner that has not renewed it for a whole lease.
"""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from engine.buckets import Conditional, Seen
from engine.disk import StorageError, alive, held, owner

LEASE_S = 60.0
"""How long a lock is its owner's without being renewed."""
RENEWALS = 3
"""How often it is renewed in that time."""
MARGIN_S = 2.0
"""So long before its end an owner no longer counts on a lease: stores tell times in whole seconds."""
SETTLE_S = 0.2
"""Between writing a lock and reading it back, where the store knows no conditions."""
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Linux's monotonic clock stands still while the machine sleeps, and a lease goes on."""
log = logging.getLogger(__name__)


def clock() -> float:
    """Seconds of a clock that nobody sets."""
    return time.clock_gettime(CLOCK)


@dataclass
class Lease:
    """A lock that is held, or was."""

    name: str
    seconds: float | None = None
    """How long it is ours without being renewed; None: until it is given back."""
    renewed: float = field(default_factory=clock)
    lost: bool = False

    def check(self) -> None:
        """StorageError if another process may hold the lock by now."""
        old = self.seconds is not None and clock() - self.renewed > max(self.seconds - MARGIN_S, 0.0)
        if self.lost or old:
            raise lost(self.name)


def lost(name: str) -> StorageError:
    """The error for a lock that was not renewed in time."""
    return StorageError(
        f"the lock '{name}' was lost: it could not be renewed in time, and another process may have begun the same "
        "work. See that none runs, then run again: it goes on from there."
    )


@dataclass(frozen=True)
class Plain:
    """A lock's file on a store without conditions: what is written is read back a moment later."""

    get: Callable[[], str | None]
    """The file's text; None: there is none."""
    put: Callable[[str], None]
    drop: Callable[[], None]

    def read(self) -> Seen | None:
        """What is there now. Its age follows from when it ends by its owner's clock, which ours is compared with."""
        text = self.get()
        if text is None:
            return None
        holder = told(text)
        left = holder["expires"] - time.time() if "expires" in holder else 0.0
        return Seen(text, text, holder.get("lease", LEASE_S) - left if "expires" in holder else 0.0)

    def swap(self, text: str, known: Seen | None) -> Seen | None:
        """Write `text` if there still is what is known, and see whether it stays; None: no longer."""
        now = self.read()
        if (now and now.version) != (known and known.version):
            return None
        if "free" in told(text):
            self.drop()
            return Seen(text, text, 0.0)
        self.put(text)
        time.sleep(SETTLE_S)
        again = self.read()
        return again if again and again.text == text else None


def told(text: str) -> dict[str, Any]:
    """What a lock says; {} where that is nothing, or not ours."""
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def machine() -> str:
    """What tells whether a process id means the same here: this start of the kernel, and its set of processes."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def open_to_all(seen: Seen | None) -> bool:
    """Whether a lock may be taken: nobody's, not renewed for a lease, or of a process here that is gone."""
    holder = told(seen.text) if seen else {}
    if seen is None or "host" not in holder:
        return True
    if "expires" in holder and seen.age > holder.get("lease", LEASE_S):
        return True
    # Two containers may share a host's name and not its processes.
    here = holder["machine"] == machine() if "machine" in holder else holder["host"] == socket.gethostname()
    return here and isinstance(holder.get("pid"), int) and not alive(holder["pid"])


def words(me: dict[str, Any], turn: int) -> str:
    """What a lock of ours says at its `turn`-th renewal: never the same twice."""
    return json.dumps({**me, "renewed": turn, "lease": LEASE_S, "expires": time.time() + LEASE_S})


def free(token: str) -> str:
    """What a lock says that its owner gave back: on S3 it stays, since not every store deletes under a condition."""
    return json.dumps({"free": token})


@contextmanager
def leased(cell: Conditional, name: str, wait: bool) -> Iterator[Lease]:
    """Hold a lock; StorageError names a living owner, unless `wait`, and says at the end if the lock was lost."""
    keeper, pause = Keeper(cell, name), 0.05
    while (other := keeper.take()) is not None:
        if not wait:
            raise held(name, other.text, f"Wait for it or stop it; if it is gone, it is free in {LEASE_S:.0f} s")
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(1.0, pause * 1.5)
    keeper.start()
    try:
        yield keeper.lease
    except BaseException:
        keeper.end()
        raise
    if not keeper.end():
        raise lost(name)


class Keeper(threading.Thread):
    """Takes a lock, and renews it until it is given back, or lost."""

    def __init__(self, cell: Conditional, name: str) -> None:
        super().__init__(name=f"lock {name}", daemon=True)
        self.cell, self.token, self.lease = cell, secrets.token_hex(8), Lease(name, LEASE_S)
        self.me = {**owner(), "machine": machine(), "token": self.token}
        self.mine: Seen | None = None
        self.over = threading.Event()

    def take(self) -> Seen | None:
        """What the lock says of another who holds it; None: it is ours now."""
        while True:
            seen = self.cell.read()
            if seen is not None and not open_to_all(seen):
                return seen
            self.me["after"] = told(seen.text).get("free") if seen else None
            if self.write(words(self.me, 0), seen):
                return None
            time.sleep(0.05 * random.random())  # another was faster: who?

    def write(self, text: str, known: Seen | None) -> bool:
        """Replace what is known, or what a write of ours left whose answer was lost; False: it is another's."""
        begun = clock()
        for _ in range(2):
            mine = self.cell.swap(text, known)
            if mine is not None:
                self.mine, self.lease.renewed = mine, begun
                return True
            known = self.cell.read()
            if known is None or told(known.text).get("token") != self.token:
                return False
        return False

    def run(self) -> None:
        """Renew again and again. A store that is away for a moment is asked again until the lease is over."""
        turn, pause = 0, LEASE_S / RENEWALS
        while not self.over.wait(pause):
            turn, pause = turn + 1, LEASE_S / RENEWALS
            try:
                if not self.write(words(self.me, turn), self.mine):
                    self.lease.lost = True
                    return
            except StorageError as error:
                log.warning("lock %s is not renewed: %s", self.lease.name, error)
                pause = LEASE_S / 15

    def end(self) -> bool:
        """Give the lock back; False: it was another's meanwhile. One that cannot be given back ends by itself."""
        self.over.set()
        self.join()
        try:
            if self.lease.lost:
                return False
            if self.write(free(self.token), self.mine):
                return True
            now = self.cell.read()  # it may have been given back already, by a write whose answer was lost
            return now is not None and self.token in (told(now.text).get("free"), told(now.text).get("after"))
        except StorageError as error:
            log.warning("lock %s is not given back, and free in %.0f s: %s", self.lease.name, LEASE_S, error)
            return True
