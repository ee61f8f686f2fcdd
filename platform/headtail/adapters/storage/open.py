"""Open a store by its root: a directory or S3.

In: a root. Out: its Storage, created when absent, or an error that says what is wrong with the root. Knows nothing of what is kept.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from headtail.adapters.storage.base import Storage
from headtail.adapters.storage.local import LocalStorage
from headtail.adapters.storage.s3 import S3Storage, open_object
from headtail.core.errors import InputError, StorageError
from headtail.core.secrets import hide


def open_file(system: pafs.FileSystem, path: str) -> pa.NativeFile:
    """A file of an Arrow file system, to read from and to seek in. From S3 as from a store: calls are made again, errors say the cure."""
    return open_object(path) if system.type_name == "s3" else system.open_input_file(path)


def open_storage(root: str) -> Storage:
    """The store at a directory (made when absent) or s3://bucket/prefix."""
    if not root.strip():
        raise InputError("root is empty: it names no store", where="root", fix="give a directory or s3://bucket/prefix")
    if root.startswith("s3://"):
        if "@" in root[5:].partition("/")[0]:
            fix = "name the bucket alone, and export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise InputError("a bucket has no login in its address", where="root", value=hide(root), fix=fix)
        return S3Storage(root.rstrip("/"))
    if "://" in root:
        raise StorageError("this kind of store is not supported", where="root", value=root, fix="use a directory or s3://bucket/prefix")
    return LocalStorage(str(Path(root).expanduser().resolve()))


def open_existing(root: str) -> Storage:
    """As `open_storage`, for readers. InputError when there is no such directory; on S3 this is not known."""
    store = open_storage(root)
    folder = store.local_path("")
    if folder is not None and not folder.is_dir():
        what = "the store is a file, not a directory" if folder.exists() else "there is no store here"
        raise InputError(what, where=store.root, fix="check --root; a store is made by the first stage that runs in it")
    return store
