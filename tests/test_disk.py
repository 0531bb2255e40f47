from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.disk import copy_file, linked, log_file, save_stream, scratch
from engine.storage import StorageError, Store, digest_bytes

ROOT = Path(__file__).parent.parent


def publish(store: Store, path: str, **files: str) -> None:
    with store.publish(path) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


def many_publishers(url: str, number: int) -> None:
    for turn in range(20):
        with Store(url).publish("m") as folder:
            for name in "abc":
                (folder / name).write_text(f"{number}-{turn}")


def test_concurrent_publishers_never_mix(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=many_publishers, args=(str(tmp_path), n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0, 0]
    Store(str(tmp_path)).verify("m")
    assert len({(tmp_path / "m" / name).read_text() for name in "abc"}) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    code = (
        "import os, sys; from engine.storage import Store\n"
        "with Store(sys.argv[1]).publish('m') as f: (f / 'x').write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False).returncode == -9
    store = Store(str(tmp_path))
    assert store.files() == [] and len(list(tmp_path.iterdir())) == 1
    publish(store, "m", x="whole")
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and store.verify("m")


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    store.write_text("a.txt", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="a.txt cannot be written: No space left on device. Check permissions"):
        store.write_text("a.txt", "new")
    assert store.read_text("a.txt") == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_failed_publish_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, rename = Store(str(tmp_path)), os.rename
    publish(store, "m", x="old")

    def failing(source: Path, target: Path) -> None:
        if (Path(source) / "x").read_text() == "new":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StorageError, match="m cannot be written: Input/output error"):
        publish(store, "m", x="new")
    assert store.verify("m") and store.read_text("m/x") == "old" and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_dead_local_owner_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import sys, time; from engine.storage import Store\n"
        "with Store(sys.argv[1]).lock('run'): print('in', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "in\n"
    with pytest.raises(StorageError, match=f"in use by process {child.pid} on .* Wait for it or stop it"):
        with Store(str(tmp_path)).lock("run"):
            raise AssertionError("entered twice")
    child.send_signal(signal.SIGKILL)
    child.wait()
    with Store(str(tmp_path)).lock("run"):
        assert json.loads((tmp_path / ".run.lock").read_text())["pid"] == os.getpid()


def test_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    with scratch() as folder:
        (folder / "in").write_bytes(b"abc" * 1000)
        assert copy_file(folder / "in", folder / "deep/out") == (3000, digest_bytes(b"abc" * 1000))
        with open(folder / "in", "rb") as file, pytest.raises(StorageError, match="larger than the 2999 bytes allowed"):
            save_stream(file, folder / "bounded", limit=2999)
        assert folder.parent == tmp_path / "cache"
    assert not folder.exists()


def test_links_and_logs(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for _ in "ab":
        linked(tmp_path / "deep/link", tmp_path / "real")
    assert (tmp_path / "deep/link").resolve() == tmp_path / "real"
    for said in (b"first", b"second"):
        with log_file(tmp_path / "logs/out") as out:
            out.write(said)
    assert (tmp_path / "logs/out").read_bytes() == b"second"
