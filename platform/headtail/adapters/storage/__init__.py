"""The only way to stored files: a directory or S3.

In: bytes, Arrow tables, files, all under paths relative to the store's root. Out: the same, and a FileRef (rows, bytes,
SHA-256) for what was written. Every write is whole or absent; `create` lets exactly one writer win; `replace` moves a
pointer in one step. No caller lists a directory to learn what exists: manifests say it. `files` and `litter` list, to find
garbage.
"""

from headtail.adapters.storage.base import Storage, StoredFile, retry_call
from headtail.adapters.storage.digests import check_digest, check_local
from headtail.adapters.storage.local import LocalStorage
from headtail.adapters.storage.open import open_existing, open_file, open_storage
from headtail.adapters.storage.s3 import S3Storage
from headtail.adapters.storage.tables import (
    column_bytes,
    fetch_folder,
    open_table,
    put,
    put_folder,
    read_bytes,
    read_json,
    read_record,
    read_table,
    read_text,
    stream_table,
    write_json,
    write_once,
    write_table,
)

__all__ = [
    "LocalStorage",
    "S3Storage",
    "Storage",
    "StoredFile",
    "check_digest",
    "check_local",
    "column_bytes",
    "fetch_folder",
    "open_existing",
    "open_file",
    "open_storage",
    "open_table",
    "put",
    "put_folder",
    "read_bytes",
    "read_json",
    "read_record",
    "read_table",
    "read_text",
    "retry_call",
    "stream_table",
    "write_json",
    "write_once",
    "write_table",
]
