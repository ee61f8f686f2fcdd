"""Check that a file is the one that was written: its SHA-256 against the one in a receipt or a manifest.

In: a store and a FileRef, or a local file and its digest. Out: nothing, or StorageError. A process reads a file completely once for
each state of it (size and times), at 1.1 GB/s measured. A large local file is read once for all processes of this user: a note in the
user's cache folder records it. The note is not beside the file, because a writer of the store could change it there. Knows nothing of
what files hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

import pyarrow.fs as pafs

from headtail.adapters.storage.base import Storage, retry_call, table_errors
from headtail.core.errors import StorageError
from headtail.core.keys import sha256_file, sha256_stream
from headtail.core.receipt import FileRef

_known: dict[tuple[str, ...], tuple[object, ...]] = {}  # what was checked in this process, and its state then


def check_digest(store: Storage, ref: FileRef) -> str:
    """The path of `ref`, whose bytes are those that it names. StorageError when they are not, or the file is absent."""
    key = (store.root, ref.path, ref.sha256)
    with table_errors(store, ref.path):
        info = retry_call(lambda: store.filesystem.get_file_info(store.full(ref.path)))
    if info.type == pafs.FileType.NotFound:
        raise StorageError("not in the store", where=store.uri(ref.path), fix="it was deleted: run the stage that wrote it again")
    state = (info.size, info.mtime_ns)
    if _known.get(key) == state:
        return ref.path
    with table_errors(store, ref.path):
        found = retry_call(lambda: _sha256(store, ref.path))
    if found != ref.sha256:
        raise _digest_error(store.uri(ref.path))
    if state[1] % 1_000_000_000 or time.time_ns() - state[1] > 3_000_000_000:  # S3 tells seconds: it may be written again in this one
        _known[key] = state
    return ref.path


def _sha256(store: Storage, path: str) -> str:
    with store.filesystem.open_input_stream(store.full(path), compression=None) as file:
        return sha256_stream(file)


def check_local(path: Path, sha256: str) -> None:
    """StorageError unless the local file has this SHA-256."""
    about = path.stat()
    state = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)  # only the system sets the third
    key = (os.path.realpath(path), sha256)
    note = _notes() / hashlib.sha256("\0".join(map(str, (*key, *state))).encode()).hexdigest()
    if _known.get(key) == state or note.exists():
        return
    if sha256_file(path) != sha256:
        raise _digest_error(str(path))
    _known[key] = state
    with contextlib.suppress(OSError):  # no home, or a full one: each process checks for itself
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        note.touch(mode=0o600)


def _notes() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headtail" / "checked"


def _digest_error(where: str) -> StorageError:
    fix = "it was damaged or changed: remove its folder and run the stage that wrote it again; see docs/security.md"
    return StorageError("this file is not the one that was written: its SHA-256 differs", where=where, fix=fix)
