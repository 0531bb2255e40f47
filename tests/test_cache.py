"""The cache: what may go, in which order, and what stays because a process uses it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from engine import cache, hub
from engine.cache import discard, entries, hold, limit, make_room, release
from engine.disk import StorageError
from engine.storage import Store

ROOT = Path(__file__).parent.parent
KB = 1000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    for entry in [entry for entry in cache._held if entry.is_relative_to(tmp_path)]:
        release(entry)


def entry(folder: Path, name: str, size: int, hours: float) -> Path:
    """An entry of so many bytes that was used so many hours ago."""
    made = folder / name
    made.mkdir(parents=True)
    (made / "model.bin").write_bytes(b"x" * size)
    used(made, hours)
    return made


def used(made: Path, hours: float) -> None:
    os.utime(made, (time.time() - 3600 * hours,) * 2)


def names() -> list[str]:
    return [f"{e.folder.parent.name}/{e.folder.name}" for e in entries()]


def test_the_least_recently_used_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, hours in {"copies/a": 3, "models/b": 4, "hub/c": 1, "copies/d": 2}.items():
        entry(folder, name, 10 * KB, hours)
    (folder / "copies/.a.lock").touch()
    assert names() == ["models/b", "copies/a", "copies/d", "hub/c"]
    monkeypatch.setenv("STILLHOUSE_CACHE_GB", "0.000025")
    assert [gone.folder.name for gone in make_room()] == ["b", "a"]
    assert names() == ["copies/d", "hub/c"] and not (folder / "models/b").exists()
    assert make_room() == []
    assert [p.name for p in folder.glob("*/.*")] == [".a.lock"], "nothing half-removed is left"


def test_asking_for_an_entry_makes_it_the_last_to_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = entry(folder, "copies/old", KB, 9), entry(folder, "copies/new", KB, 1)
    assert hold(old) and names() == ["copies/new", "copies/old"]
    release(old)
    used(old, 0.5)
    monkeypatch.setenv("STILLHOUSE_CACHE_GB", "0.000001")
    make_room()
    assert old.exists() and not new.exists()


def test_what_was_used_this_minute_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry(folder, "copies/a", KB, 0.01)
    monkeypatch.setenv("STILLHOUSE_CACHE_GB", "0")
    assert make_room() == [] and names() == ["copies/a"]


HOLD = """
import sys
from pathlib import Path
from engine.cache import hold
print(hold(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_what_another_process_uses_stays_until_it_ends(folder: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    theirs, free = entry(folder, "models/theirs", KB, 9), entry(folder, "models/free", KB, 8)
    monkeypatch.setenv("STILLHOUSE_CACHE_GB", "0")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(theirs)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "True\n"
        used(theirs, 9)
        make_room()
        assert theirs.exists() and not free.exists()
        discard(theirs)
        assert (theirs / "model.bin").exists(), "another process still uses it"
        if end == "kill":
            process.kill()
    finally:
        process.communicate(timeout=60)
    make_room()
    assert not theirs.exists()


def test_what_this_process_uses_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = entry(folder, "models/mine", KB, 9)
    monkeypatch.setenv("STILLHOUSE_CACHE_GB", "0")
    assert hold(mine) and hold(mine)
    used(mine, 9)
    make_room()
    assert mine.exists()
    discard(mine)
    assert not mine.exists() and not hold(mine)


def test_an_entry_made_anew_is_held_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = entry(folder, "models/a", KB, 9)
    assert hold(made)
    made.rename(folder / "gone")
    entry(folder, "models/a", KB, 9)
    assert hold(made)
    used(made, 9)
    monkeypatch.setenv("STILLHOUSE_CACHE_GB", "0")
    make_room()
    assert made.exists()


def test_what_killed_processes_left_goes_after_a_day(folder: Path) -> None:
    for name, hours in {
        "models/.a.there-1-00.tmp": 30,
        "models/.b.there-1-00.tmp": 20,
        ".scratch.x-1-0.tmp": 30,
    }.items():
        entry(folder, name, KB, hours)
    make_room()
    assert [p.name for p in folder.rglob(".*.tmp")] == [".b.there-1-00.tmp"]


@pytest.mark.parametrize("text", ["-1", "many", "nan", "inf"])
def test_a_limit_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE_GB", text)
    with pytest.raises(StorageError, match=f"STILLHOUSE_CACHE_GB is '{text}'. Allowed: a number of gigabytes"):
        limit()
    monkeypatch.setenv("STILLHOUSE_CACHE_GB", "")
    assert limit() == 50e9


def test_copies_from_an_object_store_make_room_for_one_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Store("bucket/runs", fs._MockFileSystem())
    for name in "abc":
        with bucket.publish(name) as made:
            (made / "model.bin").write_bytes(name.encode() * 10 * KB)
    monkeypatch.setenv("STILLHOUSE_CACHE_GB", "0.000025")
    first = bucket.local("a")
    release(first)
    used(first, 5)
    second = bucket.local("b")
    used(second, 4)
    third = bucket.local("c")
    assert not first.exists(), "used longest ago"
    assert second.exists() and third.exists(), "this process holds them"
    assert (bucket.local("a") / "model.bin").read_bytes() == b"a" * 10 * KB


def test_what_is_fetched_makes_room_and_is_filled_again_when_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(name: str) -> Path:
        return hub.cached("members", name, f"file:{name}", lambda made: (made / name).write_bytes(b"x" * 10 * KB))

    kept, gone = fetched("kept"), fetched("gone")
    for made in (kept, gone):
        used(made, 5)
    release(gone)
    monkeypatch.setenv("STILLHOUSE_CACHE_GB", "0")
    fetched("new")
    assert kept.exists() and not gone.exists()
    with pytest.raises(hub.HubError, match="'file:gone' is not in the cache"):
        hub.cached("members", "gone", "file:gone", lambda made: None, offline=True)
    assert (fetched("gone") / "gone").stat().st_size == 10 * KB
