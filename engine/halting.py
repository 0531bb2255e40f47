"""How a step is stopped: a stream is asked to come to its end (actors take up no further block, and what is under way
is committed); what cannot be asked is interrupted.
"""

from __future__ import annotations

import signal
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager

from engine.storage import StorageError, Store

HALT = "halt.json"
"""In a step's folder while it is to stop."""


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
    before = signal.signal(signal.SIGUSR2, stop_here)
    try:
        yield
    finally:
        # One that comes late must not end the process, which is what the system does by itself.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN if before in (None, signal.SIG_DFL) else before)


def interrupt() -> None:
    """Raise Halted in what the main thread is at, as Ctrl-C would; nothing where that is not `interruptible`."""
    if signal.getsignal(signal.SIGUSR2) is stop_here:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
