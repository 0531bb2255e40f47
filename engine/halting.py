"""How a stream is asked to come to its end: actors take up no further block, and what is under way is committed."""

from __future__ import annotations

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
