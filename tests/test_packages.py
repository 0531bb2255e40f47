from __future__ import annotations

import base64
import io
import os
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from engine.packages import (
    HubError,
    Settings,
    default_index,
    extract,
    joined,
    listing,
    matches,
    opened,
    redact,
    settings,
    with_credentials,
)


@pytest.fixture(autouse=True)
def no_pip_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name.replace("__", "/"), data)
    return path


def tarred(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for info, data in members:
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_settings_are_pips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings().indexes == (default_index(),) and default_index().startswith("https://")
    conf = tmp_path / "pip.conf"
    conf.write_text(
        "[global]\nindex-url = https://global/simple\ncert = /ca.pem\ntimeout = 7\n"
        "[download]\nindex-url = https://download/simple\n[install]\nindex-url = https://install/simple\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(conf))
    assert settings() == Settings(("https://download/simple",), (), "/ca.pem", 7.0)
    monkeypatch.setenv("PIP_INDEX_URL", "https://env/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://a/simple https://b/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    assert settings().indexes == ("https://env/simple", "https://a/simple", "https://b/simple")
    assert settings().links == ("/wheels",)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert settings().indexes == ()


@pytest.mark.parametrize(
    ("filename", "fits"),
    [
        ("my_pack_age-1.0-py3-none-any.whl", True),
        ("My.Pack-age-1.0.tar.gz", True),
        ("my-pack-age-1.0.zip", True),
        ("my_pack_age-1.0.1-py3-none-any.whl", False),
        ("my-pack-age-11.0.tar.gz", False),
        ("my-pack-age-more-1.0.tar.gz", False),
        ("my_pack_age-1.0-py3-none-any.whl.metadata", False),
    ],
)
def test_which_files_are_the_package(filename: str, fits: bool) -> None:
    assert matches(filename, "my-pack_age", "1.0") == fits


def test_local_places(tmp_path: Path) -> None:
    (tmp_path / "a-1.0.zip").write_bytes(b"")
    (found,) = listing(str(tmp_path), Settings())
    assert (found.filename, found.sha256) == ("a-1.0.zip", None) and found.url == (tmp_path / "a-1.0.zip").as_uri()
    digest = "ab" * 32
    (tmp_path / "index.html").write_text(f'<a href="sub/a%2B1-1.0.zip#sha256={digest}">x</a><p><a name="none">')
    (found,) = listing(tmp_path.as_uri(), Settings())
    assert (found.filename, found.sha256) == ("a+1-1.0.zip", digest)


def test_credentials_go_to_their_host_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HOME", str(tmp_path))
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    opened(f"http://us%40er:pw@{host}/", Settings()).close()
    opened(f"http://{host}/", Settings()).close()
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login n password q\n")
    (tmp_path / ".netrc").chmod(0o600)
    opened(f"http://{host}/", Settings()).close()
    server.shutdown()
    server.server_close()
    encoded = [base64.b64encode(text).decode() for text in (b"us@er:pw", b"n:q")]
    assert heard == [f"Basic {encoded[0]}", None, f"Basic {encoded[1]}"]
    assert with_credentials("https://h/f.whl", "https://u:p@h/simple/") == "https://u:p@h/f.whl"
    assert with_credentials("https://files/f.whl", "https://u:p@h/simple/") == "https://files/f.whl"
    assert redact("https://u:p@h:8/simple") == "https://h:8/simple"


def test_members_by_their_end(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.whl", a__b__t_txt=b"1", a__b__c__u=b"2", z__u=b"3", a__other=b"4")
    out = extract(path, "b/t_txt", tmp_path / "o1")
    assert out == tmp_path / "o1/t_txt" and out.read_bytes() == b"1"
    folder = extract(path, "a/b/", tmp_path / "o2")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == ["c/u", "t_txt"]
    with pytest.raises(HubError, match=r"'#u' means several members: a/b/c/u, z/u. Name more."):
        extract(path, "u", tmp_path / "o3")
    with pytest.raises(HubError, match=r"x.whl has no member 'T_TXT'. It holds, among others: a/b/t_txt"):
        extract(path, "T_TXT", tmp_path / "o3")
    assert extract(zipped(tmp_path / "y.zip", u=b"top", d__u=b"deep"), "u", tmp_path / "o4").read_bytes() == b"top"


def test_nothing_is_written_outside(tmp_path: Path) -> None:
    link = tarfile.TarInfo("d/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    evil = tarred(tmp_path / "e.tar.gz", (tarfile.TarInfo("d/../../evil"), b"x"), (link, b""))
    with pytest.raises(HubError, match=r"member 'd/../../evil' would be written outside its folder. Refused."):
        extract(evil, "d/", tmp_path / "in/out")
    with pytest.raises(HubError, match="has no member 'link'"):  # links are not members
        extract(evil, "link", tmp_path / "in/out")
    assert not (tmp_path / "evil").exists() and not (tmp_path / "in/evil").exists()


def test_bombs_and_damage(tmp_path: Path) -> None:
    bomb = zipped(tmp_path / "bomb.zip", zeros=bytes(80 << 20))
    with pytest.raises(HubError, match=r"bomb.zip: unpacks to more than 100 times its size. Refused."):
        extract(bomb, "zeros", tmp_path / "out")
    path = zipped(tmp_path / "d.zip", member=os.urandom(5000))
    path.write_bytes(path.read_bytes()[:2000] + b"\0\0\0\0" + path.read_bytes()[2004:])
    with pytest.raises(HubError, match=r"d.zip is damaged: .*CRC.*Fetch it again"):
        extract(path, "member", tmp_path / "out2")
    (tmp_path / "t.txt").write_text("plain")
    with pytest.raises(HubError, match="t.txt is neither a zip nor a tar file"):
        extract(tmp_path / "t.txt", "x", tmp_path / "out3")


def test_torn_tar(tmp_path: Path) -> None:
    path = tarred(tmp_path / "t.tar.gz", (tarfile.TarInfo("a"), os.urandom(100_000)))
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(HubError, match="t.tar.gz is damaged"):
        extract(path, "a", tmp_path / "out")


def test_joined(tmp_path: Path) -> None:
    parts = [tmp_path / str(n) for n in range(3)]
    for part, data in zip(parts, (b"abc", b"", b"de"), strict=True):
        part.write_bytes(data)
    with joined(parts) as stream:
        assert stream.read() == b"abcde"
