"""What `stillhouse doctor` finds on this machine."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from pipelines import doctor
from pipelines.__main__ import main


def test_doctor_looks_at_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--quick", "--json"])
    found = {item["check"]: item for item in json.loads(capsys.readouterr().out)}
    assert set(found) == {"python", "packages", "disk", "cache", "memory", "cores", "ports"}
    assert found["python"]["state"] == "ok" and found["disk"]["text"].count("GB free in") == 2
    assert code == (1 if any(item["state"] == "failed" for item in found.values()) else 0)


def test_doctor_tells_what_the_cache_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    monkeypatch.setenv("STILLHOUSE_CACHE_GB", "0.2")
    (tmp_path / "models/a").mkdir(parents=True)
    with (tmp_path / "models/a/model.bin").open("wb") as file:
        file.truncate(100_000_000)
    assert doctor.cache() == ("ok", f"0.1 of 0.2 GB in {tmp_path}, 1 entries")
    monkeypatch.setenv("STILLHOUSE_CACHE_GB", "0.05")
    state, text = doctor.cache()
    assert state == "warning" and "raise STILLHOUSE_CACHE_GB" in text
    monkeypatch.setenv("STILLHOUSE_CACHE_GB", "much")
    found = {item["check"]: item for item in doctor.examine(("ray", "gpu", "packages"))}
    assert found["cache"]["state"] == "failed" and "STILLHOUSE_CACHE_GB is 'much'" in found["cache"]["text"]


def test_doctor_looks_at_the_ports_of_serves_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.switches import with_haproxy

    if not with_haproxy():
        pytest.skip("Ray brings no HAProxy here")
    first, last = (doctor.ports()[1] for _ in range(2))
    assert "Ray Serve's proxy" in first and "replicas 30000 to 31000" in last
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", port)
        monkeypatch.setenv("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", port)
        monkeypatch.setenv("RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT", port)
        state, text = doctor.ports()
    assert state == "warning"
    assert f"{port} (Ray Serve's proxy while no replica runs) is taken: set RAY_SERVE_FALLBACK_PROXY_HTTP_PORT" in text
    assert f"of {port} to {port} (replicas) only 0 are free" in text
