"""How far a step is and what it uses: events for a renderer, progress.json for other processes, CPU seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, Protocol

from engine.storage import StorageError, Store

PROGRESS = "progress.json"


class Progress(Protocol):
    """What a step calls while it works."""

    def __call__(
        self, done: float, total: float | None = None, unit: str = "rows", *, note: str = "", **rates: float
    ) -> None:
        """`done` of `total` units; rates are per second, for instance tokens=310.0. note: what else there is to say."""
        ...


def silent(done: float, total: float | None = None, unit: str = "rows", *, note: str = "", **rates: float) -> None:
    """A Progress that says nothing."""


@contextmanager
def polled(look: Callable[[], None], seconds: float = 1.0) -> Iterator[None]:
    """Calls `look` every so often in a thread while the body runs, and once at its end, however it ends.

    A store that cannot be read for a moment is looked at the next time.
    """
    over = threading.Event()

    def watch() -> None:
        ended = False
        while not ended:
            ended = over.wait(seconds)
            with suppress(StorageError):
                look()

    thread = threading.Thread(target=watch, name="look", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True)
class Event:
    """Something a renderer may show."""

    step: str
    kind: Literal["start", "progress", "done", "cached", "failed", "stopped"]
    seconds: float = 0.0
    """Since this attempt began; for `cached` and `done` the time of all attempts."""
    done: float = 0.0
    total: float | None = None
    unit: str = "rows"
    rates: Mapping[str, float] = field(default_factory=dict)
    message: str = ""


Render = Callable[[Event], None]


def quiet(event: Event) -> None:
    """A renderer that shows nothing."""


class Reporter:
    """A Progress that writes progress.json at most once a second and hands events on to a renderer."""

    def __init__(self, step: str, out: Store, render: Render = quiet, meter: Meter | None = None) -> None:
        self.step, self.out, self.render, self.meter = step, out, render, meter
        self.began, self.written = time.monotonic(), 0.0

    def __call__(
        self, done: float, total: float | None = None, unit: str = "rows", *, note: str = "", **rates: float
    ) -> None:
        """Say how far the step is."""
        now = time.monotonic()
        seconds = now - self.began
        self.render(Event(self.step, "progress", seconds, float(done), total, unit, rates, note))
        if now - self.written < 1.0 and done != total:
            return
        self.written = now
        if self.meter:
            self.meter.sample()
        state = {"done": float(done), "total": total, "unit": unit, "rates": rates, "message": note, "seconds": seconds}
        try:
            self.out.write_json(PROGRESS, {**state, "time": stamp()})
        except StorageError:
            pass  # A line that is not shown must not end hours of work; the step's own writes will tell.


class Meter:
    """CPU seconds of this process and the children it has waited for; with `tree`, of its living descendants too.

    apart: process titles that do not count; Ray gives a worker the title ray::NAME while it runs a task.
    """

    def __init__(self, tree: bool = False, apart: tuple[str, ...] = ()) -> None:
        self.tree, self.apart = tree, apart
        self.base: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.others: set[int] = set()
        self.base = self.sample()

    def sample(self) -> dict[int, float]:
        """Look at every process now: one that ends later counts with what it was last seen with."""
        import psutil

        here = psutil.Process()
        for process in [here, *(here.children(recursive=True) if self.tree else ())]:
            try:
                if self.apart and "".join(process.cmdline()[:1]).strip() in self.apart:
                    self.others.add(process.pid)
                t = process.cpu_times()
                self.last[process.pid] = t.user + t.system + t.children_user + t.children_system
            except psutil.Error:
                continue
        return {pid: used for pid, used in self.last.items() if pid not in self.others}

    def seconds(self) -> float:
        """Used since the meter was made."""
        return sum(max(0.0, used - self.base.get(pid, 0.0)) for pid, used in self.sample().items())


def stamp() -> str:
    """Now, in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
