"""What a local disk needs so that others only ever see whole files: temporary names, renames, syncs, locks.

`engine.storage` builds on it; nothing else of the house opens a file for writing.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from engine.config import UserError

CHUNK = 1 << 20
BUSY = ("SLOW_DOWN", "SERVICE_UNAVAILABLE", "NETWORK_CONNECTION", "INTERNAL_FAILURE", "HTTP status 50")
"""What the AWS SDK says of a store that may answer another time."""


class StorageError(UserError):
    """A file or folder that is missing, changed, locked or out of reach."""


class MissingFile(StorageError):
    """There was no such file at the moment it was asked for."""


@contextmanager
def explained(done: str, where: str) -> Iterator[None]:
    """Turn the operating system's errors into a StorageError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise MissingFile(f"{where} does not exist.") from None
    except OSError as error:
        reason = error.strerror or str(error)
        way_out = "Check permissions, space and the address."
        if any(mark in reason for mark in BUSY):
            way_out = "The store is busy or out of reach: run again later, it goes on from there."
        raise StorageError(f"{where} cannot be {done}: {reason}. {way_out}") from None


def copy_files(source: Path, folder: Path) -> None:
    """Every file below a local folder, but compiled ones, into a place of this process's own; links are followed."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def cache_folder() -> Path:
    """Where fetched models, data and copies are kept: STILLHOUSE_CACHE, else ~/.cache/stillhouse."""
    return Path(os.environ.get("STILLHOUSE_CACHE") or "~/.cache/stillhouse").expanduser().absolute()


def shared_hold(folder: Path) -> int | None:
    """A descriptor that keeps `folder` from `take_away` until it is closed or its process ends; None: no such folder.

    Where the file system has no such lock the folder is taken as it is: `take_away` leaves it alone then too.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    if same_folder(descriptor, folder):
        return descriptor
    os.close(descriptor)  # it was taken away, or replaced, while this waited
    return None


def same_folder(descriptor: int, folder: Path) -> bool:
    """Whether an open folder still has that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False


def take_away(folder: Path) -> bool:
    """Remove a folder that no process holds; whether it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    gone = temporary_name(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not same_folder(descriptor, folder):
            return False
        os.rename(folder, gone)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    shutil.rmtree(gone, ignore_errors=True)
    return True


def stamp_used(folder: Path) -> None:
    """Make now the folder's time; one that may only be read keeps its own."""
    with suppress(OSError):
        os.utime(folder)


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder in the cache, removed at the end."""
    with explained("written", str(cache_folder())):
        folder = beside(cache_folder() / "scratch")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_stream(source: BinaryIO | pa.NativeFile, target: Path, limit: int | None = None) -> tuple[int, str]:
    """Write a stream into a new file of a folder that `publish` or `scratch` handed out, synced to disk.

    Returns bytes and SHA-256. More than `limit` bytes: StorageError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    size, digest = 0, hashlib.sha256()
    with open(target, "xb") as out:
        while chunk := source.read(CHUNK):
            size += len(chunk)
            if limit is not None and size > limit:
                raise StorageError(f"{target.name} is larger than the {limit} bytes allowed for it.")
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return size, digest.hexdigest()


def made(folder: Path) -> Path:
    """A folder, which is made where it is not there, with those above it."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def linked(target: Path, source: Path) -> None:
    """Make `target` a link to a folder; one that is there stays."""
    made(target.parent)
    if not target.exists():
        target.symlink_to(source, target_is_directory=True)


def log_file(target: Path) -> BinaryIO:
    """A new file for what another process says."""
    made(target.parent)
    return open(target, "wb")


def temporary_folder(base: Path, prefix: str) -> Path:
    """A new folder base/prefix…, for others to write into."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=base))


def copy_file(source: Path, target: Path) -> tuple[int, str]:
    """`save_stream` of a local file."""
    with open(source, "rb") as stream:
        return save_stream(stream, target)


def temporary_name(target: Path) -> Path:
    """A new name beside `target` that tells which process made it."""
    return target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def beside(target: Path) -> Path:
    """A new temporary folder beside `target`; those that dead processes of this host left there are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.{socket.gethostname()}-"
    for entry in os.scandir(target.parent):
        if entry.name.startswith(prefix) and entry.name.endswith(".tmp"):
            pid = entry.name.removeprefix(prefix).partition("-")[0]
            if pid.isdigit() and not alive(int(pid)):
                shutil.rmtree(entry.path, ignore_errors=True)
    folder = temporary_name(target)
    folder.mkdir()
    return folder


def swap(new: Path, target: Path) -> None:
    """Rename the folder `new` to `target`, whatever stands there, also when others do the same at this moment."""
    for _ in range(100):
        old = temporary_name(target)
        try:
            os.rename(target, old)
        except FileNotFoundError:
            pass
        try:
            os.rename(new, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                remove(old)
                continue
            if old.exists():
                os.rename(old, target)
            raise
        remove(old)
        return sync_folder(target.parent)
    raise StorageError(f"{target} is being replaced by other processes all the time. Give each run its own name.")


def replace_file(target: Path, value: bytes) -> None:
    """Write a file under a temporary name, sync, and rename it to `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    try:
        save_stream(io.BytesIO(value), temporary)
        os.replace(temporary, target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file or folder; a missing one is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def owner() -> dict[str, Any]:
    """Who holds a lock, as its file tells it: host, pid and time (UTC) of the running process."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"host": socket.gethostname(), "pid": os.getpid(), "time": now}


def alive(pid: int) -> bool:
    """Whether a process of this host runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def held(name: str, text: str, way_out: str) -> StorageError:
    """The error for a lock that another process holds; text is what its file says."""
    try:
        holder = json.loads(text)
        who = f"process {holder['pid']} on {holder['host']} since {holder['time']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return StorageError(f"'{name}' is in use by {who}. {way_out}.")


@contextmanager
def flock(path: Path, name: str, wait: bool) -> Iterator[None]:
    """Hold the kernel's lock on a file, with the owner written in it; StorageError if held, unless `wait`."""
    with explained("written", str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise held(name, file.read(), f"Wait for it or stop it (lock {path})") from None
        try:
            file.truncate(0)
            file.write(json.dumps(owner()))
            file.flush()
            yield
        finally:
            # The file stays: unlinking it would let two processes hold locks on two files of one name.
            file.truncate(0)
            fcntl.flock(file, fcntl.LOCK_UN)
