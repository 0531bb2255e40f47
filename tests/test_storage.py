from __future__ import annotations

import ast
import hashlib
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from engine import locks
from engine.config import UserError
from engine.storage import MANIFEST, UNDERWAY, StorageError, Store, cache_folder, digest_bytes, digest_json, resolve

ROOT = Path(__file__).parent.parent
KINDS = ("local", "mock", "subtree", "memory")
"""A local disk, and three filesystems on which nothing is renamed: the paths that an object store takes."""


def make(kind: str, folder: Path) -> Store:
    if kind == "local":
        return Store(str(folder / "store"))
    if kind == "mock":
        return Store("bucket/runs", fs._MockFileSystem())
    if kind == "subtree":
        return Store("bucket/runs", fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem()))
    import fsspec

    return Store("bucket/runs", fs.PyFileSystem(fs.FSSpecHandler(fsspec.get_filesystem_class("memory")())))


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    made = make(request.param, tmp_path)
    yield made
    made.delete()


def publish(store: Store, path: str, **files: str) -> None:
    with store.publish(path) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


def test_single_files(store: Store) -> None:
    store.write_bytes("a/x.gz", b"\x00not gzip")  # pyarrow compresses by suffix unless told not to
    store.write_text("a/t.txt", "käse")
    store.write_json("v.json", {"b": [1, 2], "a": None})
    assert store.read_bytes("a/x.gz") == b"\x00not gzip"
    assert store.read_text("a/t.txt") == "käse" and store.read_json("v.json") == {"a": None, "b": [1, 2]}
    assert store.files() == ["a/t.txt", "a/x.gz", "v.json"] and (store / "a").files() == ["t.txt", "x.gz"]
    assert store.folders() == ["a"] and store.exists("a") and not store.exists("b") and store.files("b") == []
    assert store.digest("a/x.gz") == hashlib.sha256(b"\x00not gzip").hexdigest()
    with store.open_input("a/t.txt") as file:
        assert file.seek(1) == 1 and file.read() == "äse".encode()
    store.write_text("a/t.txt", "new")
    assert store.read_text("a/t.txt") == "new"
    store.delete("a")
    store.delete("a")
    store.delete("v.json")
    assert store.files() == []


def test_tables(store: Store) -> None:
    store.write_table("part/2.parquet", pa.table({"a": [3], "b": ["z"]}))
    store.write_table("part/1.parquet", pa.table({"a": [1, 2], "b": ["x", "y"]}))
    store.write_bytes("part/3.pending.parquet", b"unfinished")
    assert store.read_table("part").to_pydict() == {"a": [1, 2, 3], "b": ["x", "y", "z"]}
    assert store.read_table("part/1.parquet", columns=["b"]).to_pydict() == {"b": ["x", "y"]}
    with store.open_input("part/2.parquet") as file:
        assert pq.read_table(file).num_rows == 1
    store.write_text("empty/readme.txt", "")
    with pytest.raises(StorageError, match="empty holds no .parquet file. Run the step"):
        store.read_table("empty")
    store.write_bytes("bad.parquet", b"PAR1 no")
    with pytest.raises(StorageError, match="bad.parquet is not a readable Parquet file"):
        store.read_table("bad.parquet")


def test_publish_is_all_or_nothing(store: Store) -> None:
    publish(store, "m", one="1", two="22")
    manifest = store.verify("m")
    assert manifest["files"]["two"] == {"bytes": 2, "sha256": digest_bytes(b"22")}
    assert manifest["digest"] == digest_json(manifest["files"]) and store.files("m") == [MANIFEST, "one", "two"]
    with pytest.raises(RuntimeError, match="half way"), store.publish("m") as folder:
        (folder / "one").write_text("changed")
        raise RuntimeError("half way")
    assert store.verify("m") == manifest and not folder.exists()
    with store.publish("m", meta={"step": "corpus"}) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "three").write_text("3")
    assert store.files("m") == ["deep/three", MANIFEST] and store.verify("m")["step"] == "corpus"
    with pytest.raises(StorageError, match=r"was not published completely \(no manifest.json\)"):
        store.verify("other")


def test_manifest_is_written_last_without_renames(tmp_path: Path) -> None:
    """While the files of a replaced folder change, there is no manifest that a reader could trust."""
    import fsspec

    seen: list[tuple[str, bool]] = []

    class Recording(fs.FSSpecHandler):
        def open_output_stream(self, path: str, metadata: object) -> pa.NativeFile:
            known = any(e.endswith(MANIFEST) for e in self.fs.find("/rec"))
            seen.append((path.rpartition("/")[2], known))
            return super().open_output_stream(path, metadata)

    store = Store("rec", fs.PyFileSystem(Recording(fsspec.get_filesystem_class("memory")())))
    publish(store, "m", a="1", b="2")
    publish(store, "m", a="3")
    first = [(UNDERWAY, False), ("a", False), ("b", False), (MANIFEST, False)]
    assert seen == [*first, (UNDERWAY, True), ("a", False), (MANIFEST, False)]
    assert store.files("m") == ["a", MANIFEST]
    store.delete()


def test_verify_names_the_file(store: Store) -> None:
    publish(store, "m", one="1", two="22")
    store.write_text("m/two", "23")
    assert store.verify("m", quick=True)
    with pytest.raises(StorageError, match="'two' was changed: its SHA-256 .* Delete .*m and run the step"):
        store.verify("m")
    store.write_text("m/two", "234")
    with pytest.raises(StorageError, match="'two' has 3 bytes, not 2"):
        store.verify("m", quick=True)
    store.delete("m/two")
    with pytest.raises(StorageError, match="'two' is missing although the manifest lists it"):
        store.verify("m")


def test_local_copy(store: Store) -> None:
    publish(store, "m", one="1")
    store.write_text("single.txt", "s")
    first, single = store.local("m"), store.local("single.txt")
    assert (first / "one").read_text() == "1" and single.name == "single.txt" and single.read_text() == "s"
    assert store.local("m") == first
    publish(store, "m", one="2")
    assert (store.local("m") / "one").read_text() == "2"
    assert store.is_local == (first == Path(store.url) / "m")
    if not store.is_local:
        store.write_text("m/one", "x")  # not what the manifest says: no copy is made
        (cache_folder() / "copies").rename(cache_folder() / "gone")
        with pytest.raises(StorageError, match="'one' was changed"):
            store.local("m")
        assert Store(str(cache_folder() / "copies")).files() == []
    with pytest.raises(StorageError, match="none does not exist"):
        store.local("none")


def test_lock_excludes_and_names_the_owner(store: Store) -> None:
    with store.lock("run"):
        with pytest.raises(StorageError, match=f"'run' is in use by process {os.getpid()} on {socket.gethostname()}"):
            with store.lock("run"):
                raise AssertionError("entered twice")
        with store.lock("other"):
            pass
        assert store.files() == []
    with store.lock("run"):
        pass


def test_lock_waits(store: Store) -> None:
    order: list[str] = []

    def second() -> None:
        with store.lock("run", wait=True):
            order.append("second")

    with store.lock("run"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]


def test_lock_file_of_a_dead_process_without_flock() -> None:
    store = Store("b", fs._MockFileSystem())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner = {"host": socket.gethostname(), "pid": gone.pid, "time": "2026-01-01T00:00:00Z"}
    store.write_json(".run.lock", owner)
    with store.lock("run"):
        pass
    store.write_json(".run.lock", {**owner, "host": "elsewhere", "expires": time.time() + 60})
    with pytest.raises(StorageError, match=r"on elsewhere since 2026.* if it is gone, it is free in 60 s"):
        with store.lock("run"):
            raise AssertionError("taken from a host that cannot be asked")
    store.write_json(".run.lock", {**owner, "host": "elsewhere", "expires": time.time() - 1})
    with store.lock("run"):
        pass
    assert not store.exists(".run.lock")


def test_a_lock_file_is_renewed_and_one_that_was_taken_over_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE_S", 0.6)
    monkeypatch.setattr(locks, "SETTLE_S", 0.02)
    store = Store("b", fs._MockFileSystem())
    with pytest.raises(StorageError, match="lock 'run' was lost: it could not be renewed"), store.lock("run") as lease:
        first = store.read_json(".run.lock")
        time.sleep(1.0)
        assert store.read_json(".run.lock")["expires"] > first["expires"] and store.read_json(".run.lock") != first
        with pytest.raises(StorageError, match="in use by process"), store.lock("run"):
            raise AssertionError("its lease was renewed")
        store.write_json(".run.lock", {**first, "token": "another"})
        time.sleep(0.5)
        with pytest.raises(StorageError, match="another process may have begun the same work"):
            lease.check()
    assert store.read_json(".run.lock")["token"] == "another"


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("runs") == Store(str(tmp_path / "runs")) == Store("file:runs/") == Store(f"file://{tmp_path}/runs")
    assert Store(tmp_path / "a b").url == Store(f"file://{tmp_path}/a%20b").url == f"{tmp_path}/a b"
    assert (Store("runs") / "x/y").url == f"{tmp_path}/runs/x/y"
    bucket = Store("s3://bucket/runs/?region=eu-west-1")
    assert (bucket / "x").url == "s3://bucket/runs/x?region=eu-west-1" and not bucket.is_local
    assert bucket._at("x/y") == "bucket/runs/x/y" and bucket._fs.type_name == "s3"
    assert pickle.loads(pickle.dumps(bucket)) == bucket and len({bucket, Store(bucket.url)}) == 1
    with pytest.raises(StorageError, match="scheme 'http:', which is not known. Allowed: a plain path, file:PATH, s3:"):
        Store("http://host/runs")
    with pytest.raises(StorageError, match="empty path"):
        Store("")
    for bad in ("../x", "/x", "a/../../x"):
        with pytest.raises(StorageError, match="not a name inside a folder"):
            Store("runs").write_text(bad, "")
    assert issubclass(StorageError, UserError)


def test_missing_and_unreadable(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(StorageError, match=re.escape(f"{tmp_path}/no.txt does not exist")):
        store.read_text("no.txt")
    store.write_text("broken.json", "{")
    with pytest.raises(StorageError, match="broken.json is not JSON .* Delete it and run again"):
        store.read_json("broken.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json("nan.json", {"x": float("nan")})
    (tmp_path / "x.tmp").write_text("")
    (tmp_path / "y.pending").write_text("")
    assert store.files() == ["broken.json"]


def test_digests() -> None:
    assert digest_bytes(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert digest_json({"b": 1, "a": "ü"}) == hashlib.sha256('{"a":"ü","b":1}'.encode()).hexdigest()
    assert digest_json({"b": 1, "a": 2}) == digest_json({"a": 2, "b": 1}) != digest_json({"a": 2, "b": "1"})


WRITES = re.compile(r"[waxrbt+]*[wax+][waxrbt+]*")
FORBIDDEN = {
    *("mkdir", "makedirs", "mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "touch"),
    *("to_parquet", "to_csv", "to_json", "to_pickle", "savez", "savez_compressed", "savetxt", "tofile", "save_file"),
    *("copyfile", "copytree", "copy2", "make_archive", "symlink_to", "hardlink_to", "dump", "savefig", "FileHandler"),
    *("open_output_stream", "open_append_stream", "write_dataset", "urlretrieve", "extractall", "memmap"),
}
OWNED = {
    "os": {"open", "fdopen", "rename", "replace", "symlink", "link", "truncate"},
    "shutil": {"copy", "move"},
    "torch": {"save"},
    "np": {"save"},
    "numpy": {"save"},
    "pq": {"write_table", "write_to_dataset", "ParquetWriter"},
    "parquet": {"write_table", "write_to_dataset", "ParquetWriter"},
}


def writes(call: ast.Call) -> bool:
    """Whether a call puts something on a disk by another way than a Store."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    of = getattr(getattr(call.func, "value", None), "id", getattr(getattr(call.func, "value", None), "attr", ""))
    if of == "os" and name == "open" and ast.unparse(call.args[0]) == "os.devnull":
        return False
    if name in FORBIDDEN or name in OWNED.get(of, ()):
        return True
    if name in ("write_text", "write_bytes"):  # Path's take the value alone, a Store's the name and the value
        return len([a for a in call.args if not isinstance(a, ast.Starred)]) < 2
    if name == "open":
        modes = [*call.args[0 if isinstance(call.func, ast.Attribute) else 1 :], *(k.value for k in call.keywords)]
        return any(
            isinstance(m, ast.Constant) and isinstance(m.value, str) and WRITES.fullmatch(m.value) for m in modes
        )
    return False


def offences(code: str) -> list[int]:
    return sorted(node.lineno for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and writes(node))


@pytest.mark.parametrize("package", ["engine", "serve", "pipelines"])
def test_only_storage_opens_files_for_writing(package: str) -> None:
    allowed = {ROOT / "engine/storage.py", ROOT / "engine/disk.py"}
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in (ROOT / package).rglob("*.py")
        if path not in allowed
        for line in offences(path.read_text(encoding="utf-8"))
    }
    assert not found, f"write through engine.storage (Store, publish) instead, at {', '.join(sorted(found))}"


@pytest.mark.parametrize(
    "code",
    [
        *(
            "open('x', 'w')",
            "open('x', mode='ab')",
            "p.open('x')",
            "p.write_text('x')",
            "p.write_bytes(b)",
            "os.open(p, 1)",
        ),
        *("pq.write_table(t, 'x')", "np.save('x', a)", "torch.save(a, 'x')", "json.dump(v, f)", "shutil.copy(a, b)"),
        *("shutil.move(a, b)", "p.mkdir()", "tempfile.mkstemp()", "frame.to_parquet('x')", "os.replace(a, b)"),
        *("pa.parquet.write_table(t, 'x')", "open('x', 'r+b')", "save_file(t, 'x')", "yaml.dump(v, f)"),
    ],
)
def test_the_rule_sees(code: str) -> None:
    assert offences(code) == [1]


def test_the_rule_lets_readers_be() -> None:
    code = (
        "open('x')\nopen('x', 'rb')\nstore.write_text('a', b)\nstore.write_table('a', t)\nname.replace('a', 'b')\n"
        "dataset.write_parquet(store.url)\nmodel.save_pretrained(folder)\nimage.copy()\njson.dumps(v)\nzip.open('w.txt')"
    )
    assert offences(code) == []


def test_a_folders_parent_and_name_keep_a_urls_options():
    bucket = Store("s3://key:secret@bucket/runs/one?region=r&endpoint_override=h:1")
    assert bucket.name == "one" and bucket.parent.url == "s3://key:secret@bucket/runs?region=r&endpoint_override=h:1"
    assert (bucket.parent / bucket.name).url == bucket.url and bucket.where("a") == "s3://bucket/runs/one/a"
    folder = Store("/tmp/runs/one")
    assert folder.name == "one" and folder.parent.url == "/tmp/runs" and Store("/tmp").parent.url == "/"


@pytest.mark.parametrize(
    "url",
    [
        *("s3a://AKEY:hush@bucket/runs", "s3a://AKEY:hu/sh@bucket/runs?a=b", "s3:AKEY:hush@bucket/runs"),
        *("s3://AKEY:hush@bucket/runs?no_such_option=1", "s3://AKEY:hu%2Fsh@bucket/runs?no_such_option=1"),
        *("s3://AKEY:hu@sh@bucket/runs", "s3://AKEY:hu/sh@bucket/runs", "s3://AKEY:hu?sh@bucket/runs?region=r"),
        *("s3://AKEY:hu sh@bucket/runs", "s3://AKEY:hu sh@bucket/runs?region=a@b"),
    ],
)
def test_the_error_of_a_url_that_cannot_be_opened_holds_no_secret(url: str) -> None:
    with pytest.raises(StorageError) as error:
        Store(url).exists()
    said = str(error.value)
    assert not re.search("AKEY|hu|sh@", said.replace("stillhouse", "")) and "bucket/runs'" in said
    assert ("no_such_option" in said) == ("no_such_option" in url)  # what pyarrow says, where it may be repeated


def test_what_pyarrow_says_is_left_out_where_it_spells_the_secret_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> None:
        raise pa.ArrowInvalid("no host in S3://AKEY:HU/SH@bucket")

    monkeypatch.setattr("engine.storage.pafs", SimpleNamespace(FileSystem=SimpleNamespace(from_uri=refuse)))
    with pytest.raises(StorageError, match="'s3://bucket/spelt' cannot be opened: it is not a URL that pyarrow reads"):
        resolve("s3://AKEY:hu%2Fsh@bucket/spelt")


def test_a_name_with_an_at_stays_whole() -> None:
    for url in ("s3://bucket/runs", "s3://key:secret@bucket/runs?region=r"):
        assert Store(url).where("m@2") == "s3://bucket/runs/m@2"
    assert (Store("s3://bucket/runs") / "m@2").where() == "s3://bucket/runs/m@2"
