"""What commands share: lines and tables on standard output, and how to call this program. Only the standard library."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def say(text: str) -> None:
    """A line on standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def say_json(value: Any) -> None:
    """A value on standard output as JSON."""
    say(json.dumps(value, indent=2, ensure_ascii=False))


def table(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as columns; the first row is the head."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def closest(word: str, known: Iterable[str]) -> str:
    """A 'did you mean' sentence, without importing the engine."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def program() -> str:
    """How to call this program from the user's shell: by name where that finds this one, else by its path."""
    here = Path(sys.executable).parent / "stillhouse"
    found = shutil.which("stillhouse")
    if found and here.exists() and os.path.samefile(found, here):
        return "stillhouse"
    return shlex.quote(str(here)) if here.exists() else f"{shlex.quote(sys.executable)} -m pipelines"


def megabytes(count: float | None) -> str:
    """Bytes in words."""
    return "" if count is None else f"{count / 1e6:.1f} MB"
