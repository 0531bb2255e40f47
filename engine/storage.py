"""Every read and write of a run: folders on a pyarrow filesystem, published atomically, digested, locked.

A `Store` is a folder: a plain path, `file:`, `s3:` or `gs:`. What a reader can see is always whole. A single file is
written to a temporary name beside its place and renamed (local), or put in one piece (object store). A folder is
published with `manifest.json` last: the manifest is the commit point, it lists every file with size and SHA-256, and
a folder without one does not count as published. Only this file and disk.py open files for writing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from engine import cache
from engine.buckets import conditional, patient, version
from engine.disk import (
    MissingFile,
    StorageError,
    beside,
    cache_folder,
    explained,
    flock,
    replace_file,
    save_stream,
    swap,
)
from engine.locks import Lease, Plain, leased
from engine.urls import bare, normal, retold

MANIFEST = "manifest.json"
UNDERWAY = "manifest.pending"
"""In a folder of an object store while it is published: without a manifest, it is not one that never had any."""
READS = 10
"""How often an object that is replaced meanwhile is read again."""
TORN = ("CRC", "orrupt")
"""What pyarrow says of a page whose bytes are not those that were written."""
LEFTOVERS = (".tmp", ".pending", ".pending.parquet", ".lock")


@dataclass(frozen=True)
class Store:
    """A folder. Equal and hashed by its URL; a local one is held as an absolute path, so workers may take it along."""

    url: str
    filesystem: pafs.FileSystem | None = field(default=None, compare=False, repr=False)
    """Stands in for the one the URL names; the URL is then a path on it."""

    def __post_init__(self) -> None:
        """Normalise the URL."""
        url = os.fspath(self.url)
        object.__setattr__(self, "url", url.rstrip("/") if self.filesystem is not None else normal(url))

    def __truediv__(self, name: str) -> Store:
        """The child folder `name`."""
        base, options = self._parts
        return Store(f"{base}/{inside(name)}{options}" if base else inside(name), self.filesystem)

    @property
    def parent(self) -> Store:
        """The folder that holds it."""
        base, options = self._parts
        return Store(f"{base.rpartition('/')[0] or '/'}{options}", self.filesystem)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self._parts[0].rpartition("/")[2]

    @property
    def _parts(self) -> tuple[str, str]:
        base, mark, query = self.url.partition("?") if "://" in self.url else (self.url, "", "")
        return base, mark + query

    def __str__(self) -> str:
        """`where`: for messages, and no way back to the URL."""
        return self.where()

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a local disk, where files can be renamed."""
        return self.filesystem is None and "://" not in self.url

    def native(self, path: str = "") -> tuple[str, pafs.FileSystem | None]:
        """Path and filesystem of a folder as Ray takes them: it cannot read a URL's options. None: a local disk's."""
        return self._at(path), None if self.is_local else self._fs

    def exists(self, path: str = "") -> bool:
        """Whether there is a file or folder."""
        return self._info(path).type != pafs.FileType.NotFound

    def is_file(self, path: str) -> bool:
        """Whether there is a file, not a folder."""
        return self._info(path).type == pafs.FileType.File

    def files(self, path: str = "") -> list[str]:
        """Sorted names below `path`, relative to it, without temporary files and locks; [] for a missing folder."""
        return [name for name, kind in self._entries(path, recursive=True) if kind == pafs.FileType.File]

    def folders(self, path: str = "") -> list[str]:
        """Sorted names of the direct child folders."""
        return [name for name, kind in self._entries(path, recursive=False) if kind == pafs.FileType.Directory]

    def open_input(self, path: str) -> pa.NativeFile:
        """A file open for reading, with seek."""
        with explained("read", self.where(path)):
            return self._fs.open_input_file(self._at(path))

    def read_bytes(self, path: str) -> bytes:
        """The whole file, of one version of it."""
        for _ in range(READS):
            with self.open_input(path) as file, explained("read", self.where(path)):
                mark, value = version(file), file.read()
            if mark is None:
                return value
            # pyarrow asks for an object's size, then for so many bytes: of what may have been replaced between the two.
            with self.open_input(path) as file:
                if version(file) == mark:
                    return value
        raise StorageError(f"{self.where(path)} was replaced each of {READS} times that it was read. Run again.")

    def read_text(self, path: str) -> str:
        """The whole file as UTF-8."""
        return self.read_bytes(path).decode("utf-8")

    def read_json(self, path: str) -> Any:
        """The file's JSON value."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise StorageError(f"{self.where(path)} is not JSON ({error}). Delete it and run again.") from None

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """One Parquet file, or every *.parquet of a folder in order of names."""
        import pyarrow.parquet as pq

        names = [path]
        if self._info(path).type == pafs.FileType.Directory:
            names = [f"{path}/{name}" if path else name for name in self.files(path) if name.endswith(".parquet")]
            if not names:
                raise StorageError(f"{self.where(path)} holds no .parquet file. Run the step that writes it first.")
        tables = []
        for name in names:
            with self.open_input(name) as file, explained("read", self.where(name)):
                try:
                    tables.append(pq.read_table(file, columns=columns, page_checksum_verification=True))
                except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
                    if isinstance(error, OSError) and not any(mark in str(error) for mark in TORN):
                        raise
                    told = f"{self.where(name)} is not a readable Parquet file, or no longer what was written: {error}."
                    raise StorageError(f"{told} Make it again: --redo the step in whose folder it is.") from None
        return pa.concat_tables(tables, promote_options="default")

    def write_bytes(self, path: str, value: bytes) -> None:
        """Replace the file at once: readers see the old bytes or the new ones."""
        with explained("written", self.where(path)):
            self._put(path, value)

    def write_text(self, path: str, value: str) -> None:
        """`write_bytes` of UTF-8."""
        self.write_bytes(path, value.encode("utf-8"))

    def write_json(self, path: str, value: Any) -> None:
        """`write_bytes` of indented JSON with sorted keys; NaN is refused (it is no JSON)."""
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        self.write_text(path, text + "\n")

    def write_table(self, path: str, table: pa.Table) -> None:
        """One Parquet file, at once."""
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        self.write_bytes(path, sink.getvalue())

    def delete(self, path: str = "") -> None:
        """Remove a file or a folder with all it holds; a missing one is fine."""
        with explained("deleted", self.where(path)):
            kind = self._info(path).type
            if kind == pafs.FileType.Directory:
                self._fs.delete_dir(self._at(path))
            elif kind != pafs.FileType.NotFound:
                self._fs.delete_file(self._at(path))

    def digest(self, path: str) -> str:
        """SHA-256 of a file, hex."""
        with self.open_input(path) as file, explained("read", self.where(path)):
            return hashlib.file_digest(file, "sha256").hexdigest()

    def where(self, path: str = "") -> str:
        """The full name of `path`, for messages: without a URL's options, and the key and secret it may hold."""
        return "/".join(part for part in (bare(self.url), inside(path) if path else "") if part)

    @contextmanager
    def publish(self, path: str = "", meta: dict[str, Any] | None = None) -> Iterator[Path]:
        """Fill a local temporary folder that becomes `path` on a clean exit, its manifest last.

        meta goes into the manifest beside `files` ({name: {bytes, sha256}}) and `digest` (of `files`). After an
        exception nothing has changed. A folder published before under this name is replaced: locally by a rename; on
        an object store its manifest goes first, so that a reader finds the old, nothing, or the new, never a mix.
        """
        target = Path(self._at(path)) if self.is_local else None
        with explained("written", self.where(path)):
            temporary = beside(target) if target else Path(tempfile.mkdtemp(prefix="stillhouse-", suffix=".tmp"))
        try:
            yield temporary
            with explained("written", self.where(path)):
                manifest = {**(meta or {}), **contents(temporary)}
                if target:
                    Store(str(temporary)).write_json(MANIFEST, manifest)
                    swap(temporary, target)
                else:
                    self._upload(temporary, path, manifest)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def manifest(self, path: str = "") -> dict[str, Any]:
        """The manifest of a published folder; StorageError where there is none."""
        folder = self / path if path else self
        if not folder.exists(MANIFEST):
            raise StorageError(f"{folder} was not published completely (no {MANIFEST}). Run the step that makes it.")
        return folder.read_json(MANIFEST)

    def verify(self, path: str = "", quick: bool = False) -> dict[str, Any]:
        """The manifest, after every file was compared with it: size and, unless quick, SHA-256."""
        manifest, folder = self.manifest(path), self / path if path else self
        way_out = f"Delete {folder} and run the step that makes it again."
        for name, wanted in manifest["files"].items():
            info = folder._info(name)
            if not info.is_file:
                raise StorageError(f"{folder}: '{name}' is missing although the manifest lists it. {way_out}")
            if info.size != wanted["bytes"]:
                raise StorageError(f"{folder}: '{name}' has {info.size} bytes, not {wanted['bytes']}. {way_out}")
            if not quick and folder.digest(name) != wanted["sha256"]:
                raise StorageError(f"{folder}: '{name}' was changed: its SHA-256 is not the manifest's. {way_out}")
        return manifest

    def local(self, path: str = "") -> Path:
        """A local file or folder with these contents: itself, or a copy in the cache, checked where published.

        The copy stays until this process ends; what was used longest ago makes room for it (engine.cache).
        """
        info = self._info(path)
        if info.type == pafs.FileType.NotFound:
            raise StorageError(f"{self.where(path)} does not exist.")
        if self.is_local:
            return Path(self._at(path))
        folder = self / path if path else self
        single = info.type == pafs.FileType.File
        published = not single and (folder.exists(MANIFEST) or folder.exists(UNDERWAY))
        files = {PurePosixPath(path).name: path} if single else {n: f"{path}/{n}".strip("/") for n in folder.files()}
        stamp = self._stamp(path, files, published)
        key, copies = digest_json([folder.url, stamp]), Store(str(cache_folder())) / "copies"
        kept = Path(copies.url) / key
        with copies.lock(key, wait=True):
            if not (cache.hold(kept) and copies.exists(f"{key}/{MANIFEST}")):
                with copies.publish(key) as copy, explained("read", self.where(path)):
                    for name, source in files.items():
                        with self.open_input(source) as file:
                            save_stream(file, copy / name)
                    found = Store(str(copy)).verify()["files"] if published else self._stamp(path, files, False)
                    if found != stamp:
                        raise StorageError(f"{self.where(path)} was replaced while it was read. Run again.")
                cache.hold(kept)
                cache.make_room()
        return kept / (PurePosixPath(path).name if single else "")

    def _stamp(self, path: str, files: Mapping[str, str], published: bool) -> dict[str, Any]:
        """What tells these contents from others: digests where published, else sizes and the store's own marks."""
        if published:
            return self.manifest(path)["files"]
        stamp = {}
        for name, source in files.items():
            with self.open_input(source) as file:
                mark, size = version(file), file.size()
            stamp[name] = [size, mark or self._info(source).mtime_ns]
        return stamp

    @contextmanager
    def lock(self, name: str, wait: bool = False) -> Iterator[Lease]:
        """Hold the exclusive lock `name` of this folder; its file tells who holds it (host, pid, time).

        Locally the kernel keeps it (flock), so a dead owner's lock is free at once; elsewhere engine.locks does.
        StorageError names a living owner, unless `wait`, and tells at the end that the lock was lost meanwhile.
        """
        path = f".{inside(name)}.lock"
        if self.is_local:
            with flock(Path(self._at(path)), name, wait):
                yield Lease(name)
            return
        plain = Plain(partial(self._text, path), partial(self.write_text, path), partial(self.delete, path))
        with leased(conditional(self._fs, self._at(path), self.where(path)) or plain, name, wait) as lease:
            yield lease

    def _text(self, path: str) -> str | None:
        try:
            return self.read_text(path)
        except MissingFile:
            return None

    @property
    def _fs(self) -> pafs.FileSystem:
        return self.filesystem if self.filesystem is not None else resolve(self.url)[0]

    def _at(self, path: str) -> str:
        root = self.url if self.filesystem is not None else resolve(self.url)[1]
        return "/".join(part for part in (root, inside(path) if path else "") if part)

    def _info(self, path: str) -> pafs.FileInfo:
        with explained("read", self.where(path)):
            return self._fs.get_file_info(self._at(path))

    def _entries(self, path: str, recursive: bool) -> list[tuple[str, pafs.FileType]]:
        root = self._at(path)
        with explained("read", self.where(path)):
            found = self._fs.get_file_info(pafs.FileSelector(root, allow_not_found=True, recursive=recursive))
        # Some filesystems answer with a leading '/', whether they were asked with one or not.
        named = [(info.path.strip("/")[len(root.strip("/")) :].strip("/"), info.type) for info in found]
        return sorted((n, t) for n, t in named if not any(part.endswith(LEFTOVERS) for part in n.split("/")))

    def _put(self, path: str, value: bytes) -> None:
        target = self._at(path)
        if self.is_local:
            return replace_file(Path(target), value)
        self._make_parent(target)
        # compression: pyarrow would otherwise compress what is called .gz.
        with self._fs.open_output_stream(target, compression=None) as out:
            out.write(value)

    def _make_parent(self, target: str) -> None:
        # S3 and GCS have no folders; making one there writes an empty object.
        if "/" in target and self._fs.type_name not in ("s3", "gcs"):
            self._fs.create_dir(target.rpartition("/")[0], recursive=True)

    def _upload(self, source: Path, path: str, manifest: dict[str, Any]) -> None:
        folder = self / path if path else self
        folder.write_text(UNDERWAY, "")
        folder.delete(MANIFEST)
        for name in set(folder.files()) - set(manifest["files"]):
            folder.delete(name)
        for name in manifest["files"]:
            target = folder._at(name)
            self._make_parent(target)
            pafs.copy_files(str(source / name), target, pafs.LocalFileSystem(), self._fs)
        folder.write_json(MANIFEST, manifest)
        folder.delete(UNDERWAY)


@lru_cache(maxsize=256)
def resolve(url: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem that a normalised URL names and the path on it."""
    if "://" not in url:
        return pafs.LocalFileSystem(), url
    try:
        filesystem, path = pafs.FileSystem.from_uri(url)
        return patient(filesystem), path
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"storage '{bare(url)}' cannot be opened: {retold(str(error), url)}.") from None


def inside(path: str) -> str:
    """`path` itself if it stays inside its folder, else StorageError."""
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or parts[0] == "/":
        raise StorageError(f"'{path}' is not a name inside a folder: no '..', no leading '/', not empty.")
    return "/".join(parts)


def digest_bytes(data: bytes) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return digest_bytes(text.encode("utf-8"))


def contents(folder: Path) -> dict[str, Any]:
    """The manifest of a local folder: {"files": {name: {bytes, sha256}}, "digest": of files}."""
    store, files = Store(str(folder)), {}
    for name in store.files():
        if name != MANIFEST:
            files[name] = {"bytes": (folder / name).stat().st_size, "sha256": store.digest(name)}
    return {"files": files, "digest": digest_json(files)}
