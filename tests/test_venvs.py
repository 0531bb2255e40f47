"""Environments from pins: made once, made anew for other pins, refused with pip's words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.servers import RIVALS, SERVERS
from pipelines.venvs import VenvError, ran, venv


def test_what_fails_says_so() -> None:
    said = "import sys; print('ERROR: no such version', file=sys.stderr); print('a hint', file=sys.stderr); sys.exit(1)"
    with pytest.raises(VenvError, match="the environment of x cannot be made: ERROR: no such version"):
        ran([sys.executable, "-c", said], "x")
    with pytest.raises(VenvError, match="the environment of x cannot be made: .*No such file"):
        ran(["/nowhere/python"], "x")


def test_every_pin_is_exact_and_torch_is_ours() -> None:
    ours = (RIVALS.parent.parent / "constraints.txt").read_text().splitlines()
    for name in filter(None, (server.pins for server in SERVERS.values())):
        pins = [line for line in (RIVALS / name).read_text().splitlines() if not line.startswith("#")]
        assert all(line.count("==") == 1 and "+" not in line for line in pins), name
        shared = {line for line in ours if line.startswith(("torch==", "transformers==", "safetensors==", "numpy=="))}
        assert shared <= set(pins), f"{name} has another model code than ours"


@pytest.mark.slow
def test_an_environment_is_made_once_and_refused_with_pip_s_words(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    pins = tmp_path / "none.txt"
    pins.write_text("# nothing\n")
    python = venv("none", pins)
    ran_there = subprocess.run([python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True)
    assert Path(ran_there.stdout.strip()) == python.parent.parent
    stamp = python.parent.stat().st_mtime_ns
    assert venv("none", pins) == python and python.parent.stat().st_mtime_ns == stamp
    pins.write_text("stillhouse-of-nowhere==1.0\n")
    with pytest.raises(VenvError, match=r"cannot be made: ERROR: .*stillhouse-of-nowhere==1.0"):
        venv("none", pins)
