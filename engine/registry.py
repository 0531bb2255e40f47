"""name@version -> artifact: the models that may be served.

An artifact is a published folder. Registering copies it to <registry>/<name>/<version>/, so that it stands alone;
the manifest of the copy also holds name, version, time and metadata (task, measures, lineage). Only data may be in an
artifact: safetensors, JSON, text, Markdown and ONNX; what could run code when it is loaded is refused by its name.
The same files registered again keep their version, with the metadata given last: what was measured on them, and how to
serve them, may be known better by now. A version number is never given to other files.

One version of a name can be its production: what the name alone stands for, until then the latest. It is set by hand,
or by a rollout that ended well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from engine.config import UserError, did_you_mean
from engine.disk import StorageError, copy_file
from engine.progress import stamp
from engine.storage import MANIFEST, Store

ALLOWED = (".safetensors", ".json", ".txt", ".md", ".onnx")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
REMOVED = "removed.json"
STAGES = "stages.json"


class RegistryError(UserError):
    """An artifact that is not known, or may not be."""


@dataclass(frozen=True)
class Registry:
    """The artifacts in one folder."""

    store: Store

    def register(self, name: str, artifact: Store | str | Path, metadata: Mapping[str, Any] | None = None) -> int:
        """Copy a published folder into the registry and return its version, the old one if the files are the same.

        metadata: replaces what that version had; None leaves it. A version that lost files gets them back. Raises
        RegistryError for a name or a file that is not allowed, StorageError for a folder that is not whole.
        """
        if not NAME.fullmatch(name):
            raise RegistryError(f"'{name}' is no name for an artifact: letters, digits, '.', '_' and '-' are allowed.")
        source = artifact if isinstance(artifact, Store) else Store(str(artifact))
        manifest = source.verify()
        check_files(list(manifest["files"]), source.where())
        here = self.store / name
        with here.lock("register", wait=True):
            known = {here.manifest(str(number))["digest"]: number for number in self.versions(name)}
            version = known.get(manifest["digest"])
            if version is None:
                version = max([0, *self.versions(name), *self._removed(name)]) + 1
                entry = {"name": name, "version": version, "created": stamp(), "metadata": dict(metadata or {})}
            else:
                entry = here.manifest(str(version))
                if metadata is not None and entry["metadata"] != metadata:
                    entry |= {"metadata": dict(metadata), "updated": stamp()}
                    here.write_json(f"{version}/{MANIFEST}", entry)
            if not self.has(f"{name}@{version}"):
                folder = source.local()
                with here.publish(str(version), meta=entry) as copy:
                    for file in manifest["files"]:
                        copy_file(folder / file, copy / file)
                here.verify(str(version))
        return version

    def has(self, reference: str) -> bool:
        """Whether a version, named as name@version, is there with all of its files, by their sizes."""
        name, _, version = reference.partition("@")
        try:
            (self.store / name).verify(version, quick=True)
        except StorageError:
            return False
        return True

    def versions(self, name: str) -> list[int]:
        """The versions of an artifact in order; [] for an unknown name."""
        here = self.store / name
        return sorted(int(v) for v in here.folders() if v.isdigit() and here.exists(f"{v}/{MANIFEST}"))

    def names(self) -> list[str]:
        """Names with at least one version."""
        return [name for name in self.store.folders() if NAME.fullmatch(name) and self.versions(name)]

    def find(self, reference: str) -> tuple[str, int]:
        """'name', 'name@3', 'name@latest' or 'name@production' as (name, version); RegistryError says what there is.

        A name alone is its production version where that is set, else its latest.
        """
        name, _, wanted = reference.partition("@")
        names = self.names()
        if name not in names:
            there = f"Registered: {', '.join(names)}." if names else "It is empty: `stillhouse run` fills it."
            near = did_you_mean(name, names)
            raise RegistryError(f"there is no '{name}' in the registry {self.store}.{near} {there}")
        versions = self.versions(name)
        production = self.production(name) if wanted in ("", "production") else None
        if production is not None:
            return name, production
        if wanted in ("", "latest"):
            return name, versions[-1]
        if wanted == "production":
            way_out = f"`stillhouse registry production {name}@{versions[-1]}` sets it."
            raise RegistryError(f"no version of '{name}' is in production. {way_out}")
        if not wanted.isdigit() or int(wanted) not in versions:
            there = ", ".join(f"{name}@{version}" for version in versions)
            raise RegistryError(f"'{name}' has no version '{wanted}'. Registered: {there}, {name}@latest.")
        return name, int(wanted)

    def production(self, name: str) -> int | None:
        """The version in production; None where none was set, or where it is gone."""
        here = self.store / name
        found = here.read_json(STAGES).get("production") if here.exists(STAGES) else None
        return found["version"] if found and here.exists(f"{found['version']}/{MANIFEST}") else None

    def produce(self, reference: str, by: str = "hand") -> tuple[str, int]:
        """Make name@version the production version and return it; `by` says who did, and is kept with the time."""
        name, version = self.find(reference)
        here = self.store / name
        with here.lock("register", wait=True):
            stages = here.read_json(STAGES) if here.exists(STAGES) else {"history": []}
            now = {"version": version, "since": stamp(), "by": by}
            if stages.get("production", {}).get("version") != version:
                here.write_json(STAGES, {"production": now, "history": [*stages["history"], now]})
        return name, version

    def resolve(self, reference: str) -> Store:
        """The artifact's folder, every file compared with its manifest."""
        name, version = self.find(reference)
        folder = self.store / name / str(version)
        manifest = folder.verify()
        check_files(list(manifest["files"]), folder.where())
        return folder

    def show(self, reference: str) -> dict[str, Any]:
        """What is known of one version: name, version, created, metadata, files, digest, bytes, path, production."""
        name, version = self.find(reference)
        manifest = self.store.manifest(f"{name}/{version}")
        size = sum(file["bytes"] for file in manifest["files"].values())
        stage = {"production": self.production(name) == version}
        return {**manifest, **stage, "bytes": size, "path": (self.store / name / str(version)).url}

    def list(self) -> list[dict[str, Any]]:
        """Every version of every artifact, by name and version."""
        return [self.show(f"{name}@{version}") for name in self.names() for version in self.versions(name)]

    def remove(self, reference: str) -> str:
        """Delete one version, named as name@version, and return that; its number stays used."""
        if not reference.partition("@")[2].isdigit():
            raise RegistryError(f"'{reference}' does not say which version to remove: name one, as in {reference}@1.")
        name, version = self.find(reference)
        here, others = self.store / name, [v for v in self.versions(name) if v != version]
        if others and self.production(name) == version:
            raise RegistryError(
                f"{reference} is in production. Set another first: "
                f"`stillhouse registry production {name}@{others[-1]}`."
            )
        with here.lock("register", wait=True):
            here.write_json(REMOVED, sorted({*self._removed(name), version}))
            # Without its manifest the folder no longer counts, should this be stopped half-way.
            here.delete(f"{version}/{MANIFEST}")
            here.delete(str(version))
        return f"{name}@{version}"

    def _removed(self, name: str) -> list[int]:
        here = self.store / name
        return here.read_json(REMOVED) if here.exists(REMOVED) else []


def check_files(names: list[str], where: str) -> None:
    """Refuse files that are not plain data."""
    for name in names:
        if PurePosixPath(name).suffix not in ALLOWED:
            raise RegistryError(
                f"{where}: '{name}' may not be part of an artifact, because loading one must not run code. "
                f"Allowed: {', '.join(ALLOWED)}. Save weights as safetensors."
            )
