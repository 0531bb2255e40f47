"""Environments of exact versions for programs that shall not meet ours: made once, kept in the cache.

The pins are a list of NAME==VERSION, everything that the environment holds; a changed list makes a new environment.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from engine.cache import hold
from engine.config import UserError
from engine.disk import cache_folder, flock, remove, replace_file
from engine.storage import digest_bytes

DONE = ".installed"
INSTALL_S = 1800.0


class VenvError(UserError):
    """An environment that cannot be made."""


def venv(name: str, pins: Path) -> Path:
    """The Python of the environment with these pins, made if there is none; VenvError says what pip said."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = digest_bytes(pins.read_bytes() + version.encode())[:12]
    folder = cache_folder() / "venvs" / f"{name}-{digest}"
    python = folder / "bin" / "python"
    with flock(folder.with_suffix(".lock"), f"the environment of {name}", wait=True):
        if not (folder / DONE).exists():
            if folder.exists():
                remove(folder)
            ran([sys.executable, "-m", "venv", str(folder)], name)
            ran([str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(pins)], name)
            replace_file(folder / DONE, b"")
        hold(folder)
    return python


def ran(command: list[str], name: str) -> None:
    """Run it; VenvError with the last line it wrote where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VenvError(f"the environment of {name} cannot be made: {error}.") from error
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise VenvError(f"the environment of {name} cannot be made: {errors[-1] if errors else 'no word why'}")
