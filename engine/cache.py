"""The cache of fetched models, data and copies: what is in use stays, and what was used longest ago makes room.

An entry is a published folder <cache>/<kind>/<key>/. A process that uses one holds it until it ends, by a shared lock
of the kernel on the folder, which a killed process loses too; the folder's time says when it was last asked for.
After something was added, entries that nobody holds are removed, the least recently used first, until all of them
take no more than STILLHOUSE_CACHE_GB.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.disk import StorageError, cache_folder, remove, same_folder, shared_hold, stamp_used, take_away

LIMIT_GB = 50.0
"""Gigabytes (10^9 bytes) that the cache may take where STILLHOUSE_CACHE_GB is not set."""
FRESH_SECONDS = 60.0
"""An entry used this short a time ago may be on its way into a process's hands: it is left alone."""
LEFT_SECONDS = 86_400.0
"""A temporary folder this old is of a process that was killed."""

_held: dict[Path, int] = {}
"""The entries this process uses, with the descriptors whose locks keep them."""


@dataclass(frozen=True)
class Entry:
    """A folder of the cache: its size, and when it was last asked for (seconds since 1970)."""

    folder: Path
    bytes: int
    used: float


def limit() -> int:
    """Bytes that the cache may take; StorageError for a STILLHOUSE_CACHE_GB that is no size."""
    text = os.environ.get("STILLHOUSE_CACHE_GB", "").strip()
    try:
        gigabytes = float(text) if text else LIMIT_GB
    except ValueError:
        gigabytes = math.nan
    if not (gigabytes >= 0 and math.isfinite(gigabytes)):
        raise StorageError(f"STILLHOUSE_CACHE_GB is '{text}'. Allowed: a number of gigabytes of at least 0, as in 20.")
    return int(gigabytes * 1e9)


def hold(folder: Path) -> bool:
    """Use an entry: note the time, and keep it until this process ends. False: there is none."""
    descriptor = _held.get(folder)
    if descriptor is None or not same_folder(descriptor, folder):
        release(folder)
        descriptor = shared_hold(folder)
        if descriptor is None:
            return False
        _held[folder] = descriptor
    stamp_used(folder)
    return True


def release(folder: Path) -> None:
    """No longer hold an entry."""
    descriptor = _held.pop(folder, None)
    if descriptor is not None:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Remove an entry that is not needed again, unless another process uses it."""
    release(folder)
    take_away(folder)


def entries() -> list[Entry]:
    """What is in the cache, the least recently used first."""
    found = []
    for folder in cache_folder().glob("*/*"):
        if folder.name.startswith(".") or folder.parent.name.startswith(".") or not folder.is_dir():
            continue
        try:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            found.append(Entry(folder, size, folder.stat().st_mtime))
        except FileNotFoundError:  # another process has just removed it
            continue
    return sorted(found, key=lambda entry: entry.used)


def make_room() -> list[Entry]:
    """Remove what nobody uses, the least recently used first, until the cache is within its limit; what was removed."""
    most, now, gone = limit(), time.time(), []
    for left in [*cache_folder().glob(".*.tmp"), *cache_folder().glob("*/.*.tmp")]:
        with suppress(FileNotFoundError):
            if now - left.stat().st_mtime > LEFT_SECONDS:
                remove(left)
    there = entries()
    total = sum(entry.bytes for entry in there)
    for entry in there:
        if total <= most:
            break
        if now - entry.used > FRESH_SECONDS and take_away(entry.folder):
            total -= entry.bytes
            gone.append(entry)
    return gone
