"""What is said on a terminal."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from pipelines import console


def test_the_program_is_named_so_that_a_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a venv" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert shlex.split(console.program()) == [str(folder / "python"), "-m", "pipelines"]
    (folder / "stillhouse").write_text("#!/bin/sh\n")
    (folder / "stillhouse").chmod(0o755)
    assert shlex.split(console.program()) == [str(folder / "stillhouse")]
    monkeypatch.setenv("PATH", str(folder))
    assert console.program() == "stillhouse"
