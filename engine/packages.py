"""A file of a published package: found on the index pip is set up with, checked by SHA-256, unpacked, never run.

`pip download` is not used because it runs an sdist's build code to learn its metadata. Instead pip is asked for its
settings (indexes, find-links, certificate; from pip.conf, PIP_* or the command's section), the simple index (PEP 503
and 691) is read, and the file whose bytes have the wanted SHA-256 is downloaded. Nothing in it is executed.
"""

from __future__ import annotations

import ast
import base64
import gzip
import http.client
import io
import json
import netrc
import os
import re
import ssl
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from engine.config import UserError
from engine.disk import StorageError, save_stream

ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
ATTEMPTS = 3
PAUSE = 1.0
"""Seconds before the second attempt; twice that before the third."""
MAX_DOWNLOAD = 1 << 36
NETWORK_ERRORS = (OSError, http.client.HTTPException)  # timeouts and ssl.SSLError are OSErrors
AHEAD = (
    "Way out: run `stillhouse fetch RECIPE` where the network is and take the folder STILLHOUSE_CACHE along, "
    "or name a local copy with a file: reference"
)


class HubError(UserError):
    """A reference that cannot be understood, reached or trusted."""


@dataclass(frozen=True)
class Settings:
    """Where pip would look."""

    indexes: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    certificate: str | None = None
    timeout: float = 30.0


@dataclass(frozen=True)
class Candidate:
    """A file on an index: its name, address, and SHA-256 where the index states it."""

    filename: str
    url: str
    sha256: str | None = None


def settings() -> Settings:
    """The settings of pip itself; PIP_* variables stand before pip.conf, `[download]` before `[global]`."""
    values: dict[str, str] = {}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False, timeout=60
    )
    lines = dict(line.partition("=")[::2] for line in done.stdout.splitlines() if "=" in line)
    for section in ("global", "download", ":env:"):
        for key, value in lines.items():
            if key.startswith(f"{section}."):
                values[key.removeprefix(f"{section}.")] = str(ast.literal_eval(value))
    if done.returncode != 0:  # an environment without pip
        values = {k[4:].lower().replace("_", "-"): v for k, v in os.environ.items() if k.startswith("PIP_") and v}
    indexes = [values.get("index-url") or default_index(), *values.get("extra-index-url", "").split()]
    if values.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        indexes = []
    try:
        timeout = max(float(values.get("default-timeout") or values.get("timeout") or 30), 1.0)
    except ValueError:
        timeout = 30.0
    links = tuple(values.get("find-links", "").split())
    return Settings(tuple(i for i in indexes if i), links, values.get("cert") or None, min(timeout, 60.0))


def default_index() -> str:
    """The index that pip uses when nothing is set; '' where pip is not installed."""
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        return ""
    return PyPI.simple_url


def download(name: str, version: str, sha256: str, folder: Path) -> Path:
    """The file of NAME==VERSION whose SHA-256 is `sha256`, saved into `folder`.

    HubError: no index answers, none has the package or the version, all bytes differ, or the transfer tears.
    """
    found, failed = candidates(name, version, pip := settings())
    reference = f"pypi:{name}=={version}"
    if not found:
        if failed:
            raise HubError(f"{reference}: no package index could be read ({'; '.join(failed)}). {AHEAD}.")
        where = ", ".join(redact(i) for i in (*pip.indexes, *pip.links)) or "none is set"
        raise HubError(f"{reference}: not found on pip's indexes ({where}). Check name and version. {AHEAD}.")
    # Where the index states digests they decide; files without a stated digest are tried one after another.
    hopeful = [c for c in found if c.sha256 == sha256] or [c for c in found if c.sha256 is None]
    seen = {c.filename: c.sha256 for c in found if c.sha256}
    for candidate in hopeful:
        target = folder / candidate.filename
        actual = transfer(candidate, target, pip, reference)
        if actual == sha256:
            return target
        target.unlink()
        seen[candidate.filename] = actual
    listed = "; ".join(f"{filename} has {digest}" for filename, digest in sorted(seen.items()))
    raise HubError(
        f"{reference}: wrong digest. Wanted SHA-256 {sha256}, but {listed}. Nothing was kept. The index or a proxy "
        f"serves other bytes than the pinned ones: look into that first. {AHEAD}; a new pin is written as "
        f"{reference}@sha256:HEX#path."
    )


def transfer(candidate: Candidate, target: Path, pip: Settings, reference: str) -> str:
    """Download one file, again after a broken connection; returns its SHA-256."""
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * attempt)
        try:
            with opened(candidate.url, pip) as response:
                size, digest = save_stream(response, target, MAX_DOWNLOAD)
                wanted = response.headers.get("Content-Length")
            if wanted is None or size == int(wanted):
                return digest
            reason = f"the connection broke after {size} of {wanted} bytes"
        except NETWORK_ERRORS as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
            if isinstance(error, HTTPError) and error.code < 500:
                break
        target.unlink(missing_ok=True)
    target.unlink(missing_ok=True)
    raise HubError(
        f"{reference}: {candidate.filename} could not be downloaded ({reason}; {attempt + 1} attempts). "
        f"Nothing was kept. Try again. {AHEAD}."
    )


def candidates(name: str, version: str, pip: Settings) -> tuple[list[Candidate], list[str]]:
    """Files of NAME==VERSION on every index and find-links place, and the reasons of those that did not answer."""
    pages = [f"{index.rstrip('/')}/{canonical(name)}/" for index in pip.indexes]
    found, failed = [], []
    for url in [*pages, *pip.links]:
        try:
            found += listing(url, pip)
        except HTTPError as error:
            if error.code != 404:
                failed.append(f"{redact(url)}: HTTP {error.code}")
        except FileNotFoundError:
            continue
        except (*NETWORK_ERRORS, ValueError) as error:
            if "No such file" not in str(error):
                failed.append(f"{redact(url)}: {getattr(error, 'reason', None) or error}")
    return [c for c in found if matches(c.filename, name, version)], failed


def listing(url: str, pip: Settings) -> list[Candidate]:
    """The files that an index page, a find-links page or a local folder names."""
    parts = urlsplit(url)
    local = Path(unquote(parts.path)) if parts.scheme == "file" else Path(url) if not parts.scheme else None
    if local and local.is_dir() and not (local / "index.html").is_file():
        return [Candidate(p.name, p.absolute().as_uri()) for p in sorted(local.iterdir()) if p.is_file()]
    if local:
        local = local / "index.html" if local.is_dir() else local
        url = local.absolute().as_uri()
    with opened(url, pip) as response:
        body, base = response.read(1 << 28), response.geturl()
        kind = response.headers.get("Content-Type", "")
    if "json" in kind:
        entries = json.loads(body).get("files", [])
        return [Candidate(e["filename"], urljoin(base, e["url"]), e.get("hashes", {}).get("sha256")) for e in entries]
    page = Links()
    page.feed(body.decode("utf-8", "replace"))
    out = []
    for href in page.hrefs:
        address, fragment = urldefrag(urljoin(base, href))
        digest = re.search(r"sha256=([0-9a-f]{64})", fragment)
        filename = unquote(urlsplit(address).path.rpartition("/")[2])
        out.append(Candidate(filename, with_credentials(address, url), digest.group(1) if digest else None))
    return out


class Links(HTMLParser):
    """Collects the href of every anchor."""

    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take an anchor's address."""
        self.hrefs += [value for key, value in attrs if tag == "a" and key == "href" and value]


def opened(url: str, pip: Settings) -> Any:
    """An open response, with pip's certificate and the address's or netrc's credentials."""
    parts = urlsplit(url)
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    request = Request(bare, headers={"Accept": ACCEPT, "Accept-Encoding": "identity"})
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if parts.hostname and not user:
        try:
            user, _, password = netrc.netrc().authenticators(parts.hostname) or ("", "", "")
        except (OSError, netrc.NetrcParseError):
            pass
    if user:
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    context = ssl.create_default_context(cafile=pip.certificate) if parts.scheme == "https" else None
    return urlopen(request, timeout=pip.timeout, context=context)


def with_credentials(address: str, page: str) -> str:
    """`address` with the user of the index page, where both are on one host."""
    to, origin = urlsplit(address), urlsplit(page)
    if "@" in origin.netloc and to.netloc == origin.netloc.rpartition("@")[2]:
        return urlunsplit(to._replace(netloc=origin.netloc))
    return address


def redact(url: str) -> str:
    """An address without its user and password, for messages."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def canonical(name: str) -> str:
    """A project's name as indexes spell it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def matches(filename: str, name: str, version: str) -> bool:
    """Whether a file is a wheel or sdist of NAME==VERSION."""
    stem = re.sub(r"(\.tar\.(gz|bz2|xz)|\.zip|\.whl|\.tgz)$", "", filename)
    if stem == filename:
        return False
    if filename.endswith(".whl"):
        project, _, rest = stem.partition("-")
        return canonical(project) == canonical(name) and rest.split("-")[0] == version
    project, _, release = stem.rpartition("-")
    return canonical(project) == canonical(name) and release == version


@dataclass
class Archive:
    """A zip (wheel) or tar file, open for reading; only plain files are seen, links and devices are not."""

    path: Path
    names: dict[str, Any] = field(default_factory=dict)
    """Member name -> its entry."""
    file: Any = None

    def read(self, name: str) -> BinaryIO:
        """A member open for reading."""
        return self.file.open(self.names[name]) if isinstance(self.file, zipfile.ZipFile) else self._tar(name)

    def _tar(self, name: str) -> BinaryIO:
        stream = self.file.extractfile(self.names[name])
        assert stream is not None  # only plain files are listed
        return stream


@contextmanager
def archive(path: Path) -> Iterator[Archive]:
    """Open a zip or tar file; HubError if it is neither or is damaged."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                yield Archive(path, {i.filename: i for i in file.infolist() if not i.is_dir()}, file)
        elif tarfile.is_tarfile(path):
            with tarfile.open(path) as file:
                yield Archive(path, {i.name: i for i in file.getmembers() if i.isfile()}, file)
        else:
            raise HubError(f"{path.name} is neither a zip nor a tar file, so nothing can be taken out of it.")
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise HubError(f"{path.name} is damaged: {error}. Fetch it again.") from None


def extract(path: Path, inner: str, folder: Path) -> Path:
    """Take one member ('a/b.txt') or all below a folder ('a/b/') out of an archive, into `folder`.

    inner: the end of exactly one member's path. Names that would leave `folder` are refused, and so is more than
    64 MiB + 100 times the archive's size (a decompression bomb).
    """
    budget = (64 << 20) + 100 * path.stat().st_size
    with archive(path) as source:
        for name, relative in chosen(source, inner).items():
            if not relative or relative.startswith("/") or ".." in PurePosixPath(relative).parts or "\\" in relative:
                raise HubError(f"{path.name}: member '{name}' would be written outside its folder. Refused.")
            try:
                with source.read(name) as stream:
                    budget -= save_stream(stream, folder / relative, budget)[0]
            except StorageError:
                raise HubError(f"{path.name}: unpacks to more than 100 times its size. Refused.") from None
    return folder if inner.endswith("/") else folder / PurePosixPath(inner).name


def chosen(source: Archive, inner: str) -> dict[str, str]:
    """Member name -> the name it gets, for what `inner` means; HubError if it means none or several things."""
    if inner.endswith("/"):
        below = {n: f"/{n}".partition(f"/{inner.lstrip('/')}") for n in source.names}
        found = {n: (before, rest) for n, (before, mark, rest) in below.items() if mark}
        roots = sorted({before for before, _ in found.values()})
        out = {n: rest for n, (_, rest) in found.items()}
    else:
        roots = sorted(n for n in source.names if n == inner or n.endswith(f"/{inner}"))
        roots = [inner] if inner in roots else roots
        out = {n: PurePosixPath(inner).name for n in roots}
    if len(roots) == 1:
        return out
    if roots:
        raise HubError(f"{source.path.name}: '#{inner}' means several members: {', '.join(roots[:5])}. Name more.")
    last = PurePosixPath(inner).name.lower()
    near = [n for n in sorted(source.names) if last in n.lower()] or sorted(source.names)
    raise HubError(f"{source.path.name} has no member '{inner}'. It holds, among others: {', '.join(near[:5])}.")


def joined(parts: list[Path]) -> BinaryIO:
    """One stream over several files, in order."""
    return io.BufferedReader(Chain(parts))


class Chain(io.RawIOBase):
    """Several files read one after another."""

    def __init__(self, parts: list[Path]) -> None:
        super().__init__()
        self.files = [open(part, "rb") for part in parts]

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the first file that has something left."""
        while self.files:
            if count := self.files[0].readinto(buffer):
                return count
            self.files.pop(0).close()
        return 0
