"""The store's protocol, the description of a stored file, and the translation of the operating system's errors.

In: nothing. Out: Storage (the protocol that a directory and S3 both keep), FileRef, StoredFile, `storage_errors`.
"""

from __future__ import annotations

import datetime
import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.fs as pafs

from headtail.adapters.storage.retries import PERMISSIONS, Patience
from headtail.core.errors import StorageError
from headtail.core.paths import store_path


class StoredFile(NamedTuple):
    """A file, or part of one, that lies in a store. `upload`: the id of an upload to S3 that was never finished."""

    path: str
    bytes: int
    modified: datetime.datetime
    upload: str = ""


def check_path(path: str, root: str) -> str:
    """`path`, which is "" for the root itself; StorageError unless it can only lie below `root`."""
    try:
        return store_path(path) if path else path
    except ValueError as error:
        fix = "a record of this store was changed by hand, or an option names a wrong path"
        raise StorageError(str(error), where=root, value=repr(path), fix=fix) from None


class Storage(Protocol):
    """What a store can do. Two implementations: LocalStorage, S3Storage. Both pickle, so workers can hold one."""

    @property
    def root(self) -> str: ...
    @property
    def filesystem(self) -> pafs.FileSystem: ...
    def full(self, path: str) -> str:
        """The path within `filesystem`."""
        ...

    def local_path(self, path: str) -> Path | None:
        """The file itself where it lies on this machine's file system; None for an object store."""
        ...

    def uri(self, path: str) -> str:
        """For people and receipts."""
        ...

    def exists(self, path: str) -> bool: ...
    def read(self, path: str) -> bytes: ...
    def open(self, path: str) -> pa.NativeFile:
        """A file to read from and to seek in, piece by piece."""
        ...

    def replace(self, path: str, data: bytes) -> None:
        """Write whole, over what was there, in one atomic step."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Write only if absent. True for the one writer who wins."""
        ...

    def put_file(self, local: Path, path: str) -> None:
        """Move a finished local file in, whole or not at all."""
        ...

    def fetch(self, path: str, into: Path) -> Path:
        """A local copy of a file; for a local store the file itself."""
        ...

    def size(self, path: str) -> int: ...
    def remove(self, path: str) -> None:
        """Take a file away for good; none there is fine."""
        ...

    def files(self, folder: str) -> list[StoredFile]:
        """What lies below a folder. For garbage only: manifests say what exists."""
        ...

    def litter(self, before: datetime.datetime) -> list[StoredFile]:
        """What writes left behind that began before `before` and never ended."""
        ...

    def discard(self, stored: StoredFile) -> None:
        """Take away what `files` or `litter` found."""
        ...


@contextmanager
def storage_errors(action: str, where: str) -> Iterator[None]:
    """Operating-system errors as StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        fix = {
            errno.ENOSPC: "free space or choose another --root; nothing half written is visible, run again to resume",
            errno.EDQUOT: "free space or choose another --root; run again to resume",
            errno.EACCES: "check the permissions of this path or choose another --root",
            errno.EPERM: "check the permissions of this path or choose another --root",
            errno.EROFS: "this file system is read-only: choose another --root",
        }.get(error.errno or 0, "")
        raise StorageError(f"cannot {action}: {error.strerror or error}", where=where, fix=fix) from error


def retry_call(call: Callable[[], Any]) -> Any:
    """`call`, whole and not in the middle of something, to a file system of Arrow. Its client of S3 tries again by itself, but for 429."""
    patience = Patience()
    while True:
        try:
            return call()
        except OSError as error:
            if "HTTP status 429" not in str(error):
                raise
            patience.wait(error)


@contextmanager
def table_errors(store: Storage, path: str) -> Iterator[None]:
    """Arrow's errors while it reads a file of the store as StorageError."""
    try:
        yield
    except FileNotFoundError:
        raise StorageError("not in the store", where=store.uri(path)) from None
    except (pa.ArrowInvalid, OSError) as error:
        fix = "if the store answers (headtail doctor), the file is damaged: run the stage that wrote it again"
        if "ACCESS_DENIED" in str(error):
            fix = PERMISSIONS
        raise StorageError(f"file cannot be read: {error}", where=store.uri(path), fix=fix) from error
