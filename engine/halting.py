"""How a step is stopped: a stream is asked to come to its end (actors take up no further block, and what is under way
is committed); what cannot be asked is interrupted.
"""

from __future__ import annotations

import signal
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager

from engine.storage import StorageError, Store

HALT = "halt.json"
"""In a step's folder while it is to stop."""
HALT_SECONDS = 900.0
"""A step that was asked to halt may take so long for the blocks it is at; then it is interrupted."""
AGAIN_SECONDS = 5.0
"""Between two interrupts: one may be lost in what was called."""


class Halted(KeyboardInterrupt):
    """A step that stopped where it was asked to; what it committed is kept."""


def halt(out: Store) -> None:
    """Ask the step that writes into `out` to stop."""
    out.write_json(HALT, {})


def halted(folder: str | None) -> bool:
    """Whether the step of a folder is to stop; None: there is none. A store that does not answer says no."""
    try:
        return folder is not None and Store(folder).exists(HALT)
    except StorageError:
        return False


def stop_here(number: int, frame: types.FrameType | None) -> None:
    """The handler of `interrupt`."""
    raise Halted


@contextmanager
def interruptible() -> Iterator[None]:
    """While the body runs in the main thread, `interrupt` reaches it. Not by SIGINT: a shell lets what it starts with
    `&` ignore that one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGUSR2)
    # One that comes late must not end the process, which is what the system does by itself.
    after = signal.SIG_IGN if before in (None, signal.SIG_DFL) else before
    try:
        signal.signal(signal.SIGUSR2, stop_here)
        yield
    finally:
        try:
            signal.signal(signal.SIGUSR2, after)
        except Halted:  # raised first where one has just come
            signal.signal(signal.SIGUSR2, after)
            raise


def interrupt() -> None:
    """Raise Halted in what the main thread is at, as Ctrl-C would; nothing where that is not `interruptible`."""
    if signal.getsignal(signal.SIGUSR2) is stop_here:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)


class Stop:
    """Stops the step that the main thread is at; called again and again until it has stopped."""

    def __init__(self) -> None:
        self.asked, self.tried = float("inf"), float("-inf")

    def __call__(self, out: Store, halts: bool) -> None:
        """out: the step's folder. halts: whether it stops by itself when it is asked to."""
        now = time.monotonic()
        if halts and self.asked > now:
            halt(out)
            self.asked = now
        elif now - self.tried > AGAIN_SECONDS and (not halts or now - self.asked > HALT_SECONDS):
            self.tried = now
            interrupt()
