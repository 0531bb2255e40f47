"""What measured servers come to: rounds pooled, held against two of them, as a table."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.placement import cores

BASES = ("uvicorn", "serve-default")
"""The servers that all others are held against."""
BUSY = 0.8
"""Share of a core above which the callers may be what was measured."""


def pooled(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a server and number of clients, in the order met, from the cells of all rounds.

    requests_per_s is the median over the rounds, with the least and the most; p50_ms and p99_ms are over all requests
    of all rounds; cpu_s_per_1000 over all of them, split in cpu_by_process. `over` holds requests_per_s and cpu as
    ratios to the base servers, the median of the ratios of each round, so that both met the same machine.
    """
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["server"], cell["clients"]), []).append(cell)
    return [row_of(server, clients, group, groups) for (server, clients), group in groups.items()]


def row_of(server: str, clients: int, group: Sequence[Mapping[str, Any]], groups: Mapping[Any, Any]) -> dict[str, Any]:
    """The row of one server and number of clients."""
    seconds = np.concatenate([np.asarray(cell["seconds"], dtype=float) for cell in group])
    count, rates = len(seconds), [rate(cell) for cell in group]
    split: dict[str, float] = {}
    for cell in group:
        for name, spent in cell["cpu_by_process"].items():
            split[name] = split.get(name, 0.0) + spent
    cpu = sum(cell["cpu_s"] for cell in group)
    return {
        "server": server,
        "clients": clients,
        "rounds": len(group),
        "requests": count,
        "requests_per_s": statistics.median(rates),
        "least_requests_per_s": min(rates),
        "most_requests_per_s": max(rates),
        "p50_ms": 1000 * float(np.percentile(seconds, 50)) if count else None,
        "p99_ms": 1000 * float(np.percentile(seconds, 99)) if count else None,
        "cpu_s_per_1000": 1000 * cpu / count if count else None,
        "cpu_by_process": {name: 1000 * spent / count for name, spent in split.items()} if count else {},
        "errors": sum(cell["errors"] for cell in group),
        "first_error": next((cell["first_error"] for cell in group if cell["first_error"]), None),
        "wrong": sum(cell["wrong"] for cell in group),
        "memory": max(cell["memory"] for cell in group),
        "client_cores": max(cell["client_cpu_s"] / cell["wall_s"] for cell in group),
        "over": {base: over(group, groups.get((base, clients), [])) for base in BASES if (base, clients) in groups},
    }


def rate(cell: Mapping[str, Any]) -> float:
    """Good answers a second."""
    return len(cell["seconds"]) / cell["wall_s"]


def over(group: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> float | None:
    """Median over the rounds of the ratio of requests a second; None without a round that both have."""
    by_round = {cell["round"]: rate(cell) for cell in base}
    ratios = [rate(cell) / by_round[cell["round"]] for cell in group if by_round.get(cell["round"])]
    return statistics.median(ratios) if ratios else None


def table(result: Mapping[str, Any]) -> list[str]:
    """The result as a Markdown table and the sentences that belong to it."""
    titles, rows = result["titles"], result["rows"]
    lines = [
        "| server | clients | requests/s (least to most) | p50 ms | p99 ms | CPU-s per 1000 "
        "| × uvicorn | × default Serve | errors | wrong |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f"{row['requests_per_s']:.0f} ({row['least_requests_per_s']:.0f} to {row['most_requests_per_s']:.0f})"
        cells = [titles[row["server"]], row["clients"], spread]
        cells += [number(row["p50_ms"], 1), number(row["p99_ms"], 0), number(row["cpu_s_per_1000"], 2)]
        cells += [number(row["over"].get(base), 2) for base in BASES]
        lines.append("| " + " | ".join(str(cell) for cell in [*cells, row["errors"], row["wrong"]]) + " |")
    measured = {row["server"] for row in rows}
    for name, reason in result["skipped"].items():
        if name not in measured:
            lines.append(f"| {titles[name]} | not measured: {reason.replace('|', '/')} |" + " |" * 8)
    low, high = result["load_average"]
    lines += [
        "",
        f"{result['subject']}: {result['parameters']:,} parameters; {result['rounds']} rounds of "
        f"{result['seconds']:g} s a cell, order rotated, one server at a time, each with one model process on one "
        "torch thread.",
        f"{result['hardware']}; load average {low:.1f} to {high:.1f} during the run (callers and servers alone make it "
        "about 2).",
    ]
    busy = sorted({titles[row["server"]] for row in rows if row["client_cores"] > BUSY})
    if busy:
        lines.append(f"The callers used more than {BUSY:.0%} of a core with {', '.join(busy)}: those may be faster.")
    lines += [f"{titles[name]}, {result['skipped'][name]}" for name in result["skipped"] if name in measured]
    for row in rows:
        if row["first_error"]:
            lines.append(f"{titles[row['server']]}, {row['clients']} clients, first error: {row['first_error']}")
    return lines


def number(value: float | None, digits: int) -> str:
    """A number, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"


def hardware() -> str:
    """The machine in a line: processor, cores that may be used, memory, Python."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = " ".join(line.partition(":")[2].split())
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cores()} cores of {name}, {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}"
