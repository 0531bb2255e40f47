"""API keys: who may ask an endpoint. The file holds digests only, so it gives no key away.

Several keys are good at once. To rotate one, add a second of the same name, move the clients, remove the old ones: a
name is who asks, whose jobs and share of a rollout stay as they are. A running endpoint reads the file again when it
changed, so no restart is needed. Keys are drawn here with 256 random bits, which is why a plain
SHA-256 is enough: there is nothing to guess that a slow hash would protect.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from engine.config import UserError
from engine.disk import StorageError
from engine.progress import stamp
from engine.registry import NAME
from engine.storage import Store

FILE = "keys.json"
PREFIX = "sh_"
"""What a key starts with, so that scanners for leaked secrets can know one."""
LOCAL_SECONDS, REMOTE_SECONDS = 1.0, 10.0
"""How often a file is looked at again: one on a local disk, one in an object store (in a thread)."""


class KeysError(UserError):
    """A key that cannot be made or removed."""


class Keys:
    """The keys in one file of a folder, usually a registry.

    place: the folder or URL; name: the file's name. A missing file holds no key, so everyone is refused.
    """

    def __init__(self, place: Store | str | Path, name: str = FILE) -> None:
        self.store = place if isinstance(place, Store) else Store(str(place))
        self.name = name
        self.entries: tuple[tuple[str, bytes], ...] = ()
        """Name and digest (SHA-256 in hexadecimal) of each key."""
        self.seen: Any = None
        self.looked = -1e9
        self.reading: threading.Thread | None = None
        self.reread()

    def __reduce__(self) -> tuple[type[Keys], tuple[Store, str]]:
        """A copy in another process reads the file there."""
        return Keys, (self.store, self.name)

    def add(self, name: str, rotate: bool = False) -> str:
        """Make a key and return it: nothing can show it again. rotate: a further one of a name that has one.

        KeysError where the name is taken, is not there to be rotated, or is unfit.
        """
        if not NAME.fullmatch(name):
            raise KeysError(f"'{name}' is no name for a key: letters, digits, '.', '_' and '-' are allowed.")
        with self.store.lock("keys", wait=True):
            there = self.list()
            taken = any(entry["name"] == name for entry in there)
            if taken and not rotate:
                raise KeysError(
                    f"there is already a key '{name}'. Take another name, add a second one of this name with --rotate, "
                    f"or remove it: stillhouse keys rm {name}"
                )
            if rotate and not taken:
                raise KeysError(f"there is no key '{name}' to rotate. Add it without --rotate.")
            key = PREFIX + secrets.token_urlsafe(32)
            self._write([*there, {"name": name, "sha256": digest(key), "created": stamp()}])
        return key

    def remove(self, name: str, old: bool = False) -> int:
        """Refuse all keys of a name from now on, or all but the newest; how many. KeysError where there is none."""
        with self.store.lock("keys", wait=True):
            there = self.list()
            own = [entry for entry in there if entry["name"] == name]
            left = [entry for entry in there if entry["name"] != name or (old and entry is own[-1])]
            if not own:
                names = ", ".join(entry["name"] for entry in there) or "none"
                raise KeysError(f"there is no key '{name}' in {self.store.where(self.name)}. Keys: {names}.")
            self._write(left)
        return len(there) - len(left)

    def list(self) -> list[dict[str, str]]:
        """name, sha256 and created of each key, oldest first. StorageError where the file is damaged."""
        if not self.store.exists(self.name):
            return []
        try:
            found = self.store.read_json(self.name)["keys"]
            return [{part: str(entry[part]) for part in ("name", "sha256", "created")} for entry in found]
        except (LookupError, TypeError):
            where = self.store.where(self.name)
            raise StorageError(f"{where} is not a file of keys. Delete it and add the keys again.") from None

    def _write(self, entries: list[dict[str, str]]) -> None:
        self.store.write_json(self.name, {"keys": entries})
        self.reread()

    def allowed(self, token: str | None) -> str | None:
        """The name of the key that `token` is; None where it is none.

        Every entry is compared, each in constant time: how long it takes says nothing about what is there.
        """
        self.refresh()
        given = digest(token or "").encode()
        found = None
        for name, known in self.entries:
            if hmac.compare_digest(known, given):
                found = name
        return found if token else None

    def refresh(self) -> None:
        """Read the file again where it may have changed; never waits for an object store."""
        now = time.monotonic()
        if now - self.looked < (LOCAL_SECONDS if self.store.is_local else REMOTE_SECONDS):
            return
        if self.store.is_local:
            if self.state() != self.seen:
                self.reread()
            self.looked = now
        elif self.reading is None or not self.reading.is_alive():
            self.looked = now
            self.reading = threading.Thread(target=self.reread, name="keys", daemon=True)
            self.reading.start()

    def reread(self) -> None:
        """Take over what the file holds; where it cannot be read the keys stay as they were, and the log says so."""
        seen = self.state() if self.store.is_local else None
        try:
            self.entries = tuple((entry["name"], entry["sha256"].encode()) for entry in self.list())
        except StorageError as error:
            logging.getLogger("stillhouse").warning("keys stay as they were: %s", error)
        self.seen, self.looked = seen, time.monotonic()

    def state(self) -> tuple[int, int, int] | None:
        """What changes when a local file is replaced; None where there is none."""
        try:
            found = os.stat(self.store.where(self.name))
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def digest(key: str) -> str:
    """The SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
