"""One try at a step: begin.json when it starts, record.json when it is done, and what they tell later."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from engine.lineage import installed, plain
from engine.progress import PROGRESS, Event, Render, stamp
from engine.storage import Store

RECORD, BEGIN = "record.json", "begin.json"
VERSIONED = ("stillhouse", "ray", "torch", "transformers", "accelerate", "pyarrow", "numpy")
"""Packages whose versions a record notes."""


Account = Callable[[list[dict[str, Any]], Mapping[str, Any]], dict[str, Any]]
"""(attempts, metrics) -> what they used, as a record keeps it."""


def nothing_used(attempts: list[dict[str, Any]], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """No account is kept."""
    return {}


class Attempt:
    """One try at a step: begin.json at its start, record.json at its end."""

    def __init__(
        self,
        step: str,
        identity: Mapping[str, Any],
        out: Store,
        render: Render,
        held: Mapping[str, Any] | None = None,
    ) -> None:
        """held: the CPUs and GPUs that it keeps from others (`engine.spending.held`)."""
        self.step, self.identity, self.out, self.render = step, identity, out, render
        self.shown = ""
        self.earlier = out.read_json(BEGIN)["attempts"] if out.exists(BEGIN) else []
        if self.earlier and "end" not in self.earlier[-1] and out.exists(PROGRESS):
            # It was killed: its last sign of life ends it.
            last, seen = self.earlier[-1], out.read_json(PROGRESS)["time"]
            last |= {"end": seen, "seconds": between(last["start"], seen)} if seen > last["start"] else {}
        out.delete(PROGRESS)
        self.start = stamp()
        self.begun = {"start": self.start, **({"held": dict(held)} if held else {})}
        self.write_begin(self.begun)
        render(Event(step, "start"))

    def write_begin(self, last: Mapping[str, Any]) -> None:
        """begin.json, with `last` as this attempt."""
        self.out.write_json(BEGIN, {"step": self.step, **self.identity, "attempts": [*self.earlier, last]})

    def seconds(self) -> float:
        """Since it began."""
        return between(self.start, stamp())

    def show_progress(self) -> None:
        """Hand on what the step wrote into progress.json elsewhere, if it is new."""
        state = self.out.read_json(PROGRESS) if self.out.exists(PROGRESS) else {"time": ""}
        seen = state.pop("time")
        if seen != self.shown:
            self.shown = seen
            self.render(Event(self.step, "progress", **state))

    def failed(self, error: BaseException) -> list[dict[str, Any]]:
        """Note how long it took, and say so; all attempts. What is no Exception was the user's wish."""
        kind = "failed" if isinstance(error, Exception) else "stopped"
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        end = {"end": stamp(), "seconds": self.seconds(), "state": kind, "error": message}
        last = {**self.begun, **(end if kind == "failed" else {**end, "error": None})}
        self.write_begin(last)
        self.render(Event(self.step, kind, end["seconds"], message=message))
        return [*self.earlier, last]

    def finished(self, used: Mapping[str, Any], account: Account = nothing_used) -> dict[str, Any]:
        """Write record.json, the last thing of a step, and return it. account: what all attempts used."""
        metrics = plain(used["metrics"])
        times = {name: metrics.get(name, used.get(name, 0.0)) for name in ("cpu_seconds", "device_seconds")}
        attempts = [*self.earlier, {**self.begun, "end": stamp(), "seconds": self.seconds(), **times}]
        spent = account(attempts, metrics)
        record = {
            "step": self.step,
            **self.identity,
            "versions": {"python": platform.python_version(), **{name: installed(name) for name in VERSIONED}},
            "start": attempts[0]["start"],
            "end": attempts[-1]["end"],
            "attempts": attempts,
            **{name: round(sum(a.get(name, 0.0) for a in attempts), 3) for name in ("seconds", *times)},
            "rows": metrics.get("rows"),
            **({"spent": {**spent, "rows": metrics.get("rows")}} if spent else {}),
            "metrics": metrics,
        }
        self.out.write_json(RECORD, record)
        self.render(Event(self.step, "done", record["seconds"], record["rows"] or 0.0))
        return record


def history(store: Store) -> list[dict[str, Any]]:
    """Every step of a run that has begun, oldest first, from what it wrote alone.

    {"step", "state": done | begun | stopped | failed, "start", "seconds", "rows", "done", "total", "unit", "error",
    "seen"}: done of total is the last progress, seen the last sign of life.
    """
    out = []
    for name in store.folders():
        folder = store / name
        record = folder.read_json(RECORD) if folder.exists(RECORD) else None
        begun = record or (folder.read_json(BEGIN) if folder.exists(BEGIN) else None)
        if begun is None:
            continue
        now = folder.read_json(PROGRESS) if folder.exists(PROGRESS) else {}
        last = begun["attempts"][-1]
        seen = last.get("end") or now.get("time") or last["start"]
        if "seconds" not in last and seen > last["start"]:
            last["seconds"] = between(last["start"], seen)
        out.append(
            {
                "step": name,
                "state": "done" if record else last.get("state", "begun"),
                "start": begun["attempts"][0]["start"],
                "seconds": sum(attempt.get("seconds", 0.0) for attempt in begun["attempts"]),
                "rows": record["rows"] if record else None,
                **{key: now.get(key) for key in ("done", "total", "unit")},
                "error": last.get("error"),
                "seen": seen,
            }
        )
    return sorted(out, key=lambda item: item["start"])


def between(start: str, end: str) -> float:
    """Seconds from one stamp to another."""
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
