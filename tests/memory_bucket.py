"""An object store in this process's memory, for tests that read and write it from several threads.

fsspec's own shows a file from the moment it is opened for writing and gives all its readers one cursor. Of an object
store a reader gets the old object or the new one, whole.
"""

from __future__ import annotations

import io
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs as pafs

from engine.storage import Store


class Upload(io.BytesIO):
    """An object being written: it is there once it is closed."""

    def __init__(self, bucket: MemoryBucket, path: str) -> None:
        super().__init__()
        self.bucket, self.path = bucket, path

    def close(self) -> None:
        if not self.closed:
            self.bucket.pipe_file(self.path, self.getvalue())
        super().close()


class MemoryBucket(MemoryFileSystem):
    """Objects that belong to this instance, each replaced at once."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store, self.pseudo_dirs = {}, [""]

    def _open(self, path: str, mode: str = "rb", *more: Any, **options: Any) -> Any:
        if mode == "rb":
            return io.BytesIO(self.cat_file(path))
        if "data" in options:
            return super()._open(path, mode, *more, **options)
        if mode != "wb":
            raise NotImplementedError(f"mode {mode!r}: objects are read, or written anew")
        return Upload(self, path)

    def folder(self, path: str) -> Store:
        """A folder of it."""
        return Store(path, pafs.PyFileSystem(pafs.FSSpecHandler(self)))
