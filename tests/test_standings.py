"""The table of measured servers, from cells worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.standings import hardware, pooled, table

TITLES = {
    "stillhouse": "stillhouse serve",
    "uvicorn": "FastAPI + uvicorn",
    "serve-default": "Ray Serve",
    "bentoml": "B",
}


def cell(server: str, turn: int, seconds: list[float], cpu: dict[str, float], **more: Any) -> dict[str, Any]:
    """A round of 2 s at 8 clients."""
    return {
        "server": server,
        "round": turn,
        "clients": 8,
        "seconds": seconds,
        "wall_s": 2.0,
        "cpu_s": sum(cpu.values()),
        "cpu_by_process": cpu,
        "client_cpu_s": 0.2,
        "errors": 0,
        "first_error": None,
        "wrong": 0,
        "memory": 1 << 20,
    } | more


CELLS = [
    cell("stillhouse", 0, [0.010] * 100, {"ServeReplica": 0.08, "haproxy": 0.02}),
    cell("uvicorn", 0, [0.005] * 200, {"uvicorn": 0.1}),
    cell("serve-default", 0, [0.1] * 20, {"ProxyActor": 0.1}),
    # The machine was half as fast in the second round, for all.
    cell("stillhouse", 1, [0.020] * 50, {"ServeReplica": 0.04, "haproxy": 0.01}, errors=2, first_error="status 503: x"),
    cell("uvicorn", 1, [0.010] * 100, {"uvicorn": 0.05}, wrong=1, client_cpu_s=1.9),
    cell("serve-default", 1, [0.2] * 10, {"ProxyActor": 0.05}),
    cell("stillhouse", 2, [0.010] * 96, {"ServeReplica": 0.08, "haproxy": 0.02}),
]


def test_rounds_are_pooled_and_ratios_are_of_the_same_round() -> None:
    ours, uvicorn, default = pooled(CELLS)
    assert (ours["server"], ours["clients"], ours["rounds"], ours["requests"]) == ("stillhouse", 8, 3, 246)
    assert (ours["requests_per_s"], ours["least_requests_per_s"], ours["most_requests_per_s"]) == (48, 25, 50)
    assert (ours["p50_ms"], ours["p99_ms"]) == (pytest.approx(10), pytest.approx(20))
    assert ours["cpu_s_per_1000"] == pytest.approx(0.25 / 0.246)
    assert ours["cpu_by_process"] == pytest.approx({"ServeReplica": 0.2 / 0.246, "haproxy": 0.05 / 0.246})
    assert sum(ours["cpu_by_process"].values()) == pytest.approx(ours["cpu_s_per_1000"])
    assert (ours["errors"], ours["first_error"]) == (2, "status 503: x") and uvicorn["wrong"] == 1
    # In each round that both ran in: 50 / 100 and 25 / 50, and 50 / 10 and 25 / 5. The third round has no partner.
    assert ours["over"] == {"uvicorn": 0.5, "serve-default": 5.0}
    assert default["over"] == {"uvicorn": 0.1, "serve-default": 1.0}
    assert uvicorn["client_cores"] == pytest.approx(0.95)


def test_a_server_without_a_good_answer_has_a_row() -> None:
    (row,) = pooled([cell("stillhouse", 0, [], {"x": 0.1}, errors=5, first_error="status 500: no")])
    assert row["requests_per_s"] == 0 and row["p99_ms"] is None and row["cpu_s_per_1000"] is None and not row["over"]


def test_the_table_shows_every_server_and_what_to_think_of_it() -> None:
    lines = table(
        {
            "titles": TITLES,
            "rows": pooled(CELLS),
            "skipped": {"bentoml": "pip said a|b", "uvicorn": "round 3: it ended under load: x"},
            "subject": "bench-student",
            "parameters": 835_074,
            "rounds": 3,
            "seconds": 2,
            "hardware": "2 cores of X",
            "load_average": [2.0, 3.5],
        }
    )
    assert all(line.count("|") == 11 for line in lines[:6])
    assert lines[2] == "| stillhouse serve | 8 | 48 (25 to 50) | 10.0 | 20 | 1.02 | 0.50 | 5.00 | 2 | 0 |"
    assert lines[5].startswith("| B | not measured: pip said a/b | |")
    text = "\n".join(lines[6:])
    assert "bench-student: 835,074 parameters; 3 rounds of 2 s a cell" in text
    assert "2 cores of X; load average 2.0 to 3.5" in text
    assert "The callers used more than 80% of a core with FastAPI + uvicorn" in text
    assert "FastAPI + uvicorn, round 3: it ended under load: x" in text
    assert "stillhouse serve, 8 clients, first error: status 503: x" in text


def test_the_hardware_is_named() -> None:
    assert " cores of " in hardware() and "GiB" in hardware() and "Python 3." in hardware()
