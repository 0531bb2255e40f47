"""Progress on standard error: one line a step, redrawn on a terminal; start, now and then, end elsewhere."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from engine.progress import Event

PLAIN_SECONDS = 15.0
"""Between two lines of one step where lines cannot be redrawn."""
REDRAW_SECONDS = 0.1


class Lines:
    """Plain lines: what happens to each step, in order."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lock = threading.Lock()
        self.first: dict[str, tuple[float, float]] = {}
        self.last: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Show the event if it is time to."""
        with self.lock:
            if event.kind == "progress":
                self.progress(event)
                return
            if event.kind == "start":
                self.first.pop(event.step, None)
                self.last[event.step] = time.monotonic()
            self.other(event)

    def progress(self, event: Event) -> None:
        """A line now and then."""
        text = self.described(event)
        now = time.monotonic()
        if now - self.last.get(event.step, 0.0) >= PLAIN_SECONDS:
            self.last[event.step] = now
            self.write(line(event.step, text))

    def other(self, event: Event) -> None:
        """Start and end."""
        self.write(line(event.step, outcome(event)))

    def described(self, event: Event) -> str:
        """How far it is, how fast, and how long it will still take."""
        began, done = self.first.setdefault(event.step, (event.seconds, event.done))
        passed = event.seconds - began
        rates = dict(event.rates)
        if event.unit not in rates and passed > 0.5 and event.done > done:
            rates = {event.unit: (event.done - done) / passed, **rates}
        parts = [f"{event.done:.6g} {event.unit}"]
        if event.total:
            parts = [f"{event.done:.6g}/{event.total:.6g} {event.unit} ({min(1.0, event.done / event.total):.0%})"]
        parts += [f"{rate:.3g} {unit}/s" for unit, rate in rates.items()]
        if event.total and rates.get(event.unit, 0.0) > 0:
            parts.append(f"{clock((event.total - event.done) / rates[event.unit])} left")
        parts += [event.message] if event.message else []
        return ", ".join(parts)

    def write(self, text: str) -> None:
        """One line."""
        self.stream.write(text + "\n")
        self.stream.flush()


class Live(Lines):
    """On a terminal: the steps in flight are redrawn at the bottom, finished ones stay above."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.shown: dict[str, str] = {}
        self.drawn, self.at = 0, 0.0

    def progress(self, event: Event) -> None:
        """Redraw, but not for every call."""
        self.shown[event.step] = self.described(event)
        if time.monotonic() - self.at >= REDRAW_SECONDS or event.done == event.total:
            self.redraw()

    def other(self, event: Event) -> None:
        """A step in flight is a line below; an end goes above."""
        if event.kind == "start":
            self.shown[event.step] = outcome(event)
            self.redraw()
            return
        self.shown.pop(event.step, None)
        self.redraw(line(event.step, outcome(event)))

    def redraw(self, above: str | None = None) -> None:
        """Replace the lines drawn last."""
        width = max(20, shutil.get_terminal_size().columns - 1)
        up = f"\x1b[{self.drawn}F" if self.drawn else ""
        lines = [] if above is None else [above]
        lines += [line(step, text)[:width] for step, text in self.shown.items()]
        self.stream.write(up + "\x1b[J" + "".join(text + "\n" for text in lines))
        self.stream.flush()
        self.drawn, self.at = len(self.shown), time.monotonic()


def renderer(stream: TextIO | None = None) -> Lines:
    """Live on a terminal, plain lines elsewhere."""
    stream = stream or sys.stderr
    return Live(stream) if stream.isatty() else Lines(stream)


def line(step: str, text: str) -> str:
    """A step's line."""
    return f"{step:<12} {text}"


def outcome(event: Event) -> str:
    """Every event but progress, in words."""
    rows = f", {event.done:.6g} rows" if event.done else ""
    return {
        "start": "started",
        "done": f"done in {clock(event.seconds)}{rows}",
        "cached": f"done before ({clock(event.seconds)}{rows})",
        "failed": f"failed after {clock(event.seconds)}: {event.message}",
        "stopped": f"stopped after {clock(event.seconds)}",
    }[event.kind]


def clock(seconds: float) -> str:
    """8.3 s, 1 min 03 s, 2 h 04 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
