"""Tables, JSON and whole files of a store, on top of what any store can do.

In: a Storage and Arrow tables, plain values or local files. Out: the same at a path, and a FileRef (rows, bytes, SHA-256)
for what was written. Streams are read and written in bounded memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from headtail.adapters.storage.base import Storage, retry_call, storage_errors, table_errors
from headtail.adapters.storage.digests import check_digest
from headtail.core import record
from headtail.core.config import Config
from headtail.core.errors import InputError, StorageError
from headtail.core.keys import sha256_file
from headtail.core.receipt import FileRef
from headtail.core.secrets import hide_in

T = TypeVar("T", bound=Config)


def write_json(store: Storage, path: str, value: object) -> None:
    """`value` as readable JSON without secrets, replacing what was there."""
    store.replace(path, (json.dumps(hide_in(value), indent=2, ensure_ascii=False, default=str) + "\n").encode())


def write_once(store: Storage, path: str, data: bytes) -> bytes:
    """What lies at `path` from now on: `data`, or what another writer put there first."""
    return data if store.create(path, data) else store.read(path)


def read_bytes(store: Storage, ref: FileRef) -> bytes:
    """The bytes that `ref` names. StorageError when others are there."""
    return store.read(check_digest(store, ref))


def read_text(store: Storage, path: str) -> str:
    """The text of a small file, such as a pointer. StorageError when it is absent or not UTF-8."""
    try:
        return store.read(path).decode()
    except UnicodeDecodeError as error:
        raise StorageError(f"not UTF-8: {error}", where=store.uri(path), fix=record.FIX) from None


def read_json(store: Storage, file: str | FileRef) -> dict[str, Any]:
    """The JSON object of a file; its digest is checked when it is given. StorageError when it is absent, another, or no such object."""
    path = _path(store, file)
    return record.parse_object(store.read(path), store.uri(path))


def read_record(store: Storage, kind: type[T], path: str, layout: int | None = None) -> T:
    """The JSON object of a file as a `kind`. StorageError when it is absent, has another `layout` or wrong fields."""
    return record.parse_record(kind, store.read(path), store.uri(path), layout)


def write_table(
    store: Storage, path: str, table: pa.Table | Iterable[pa.Table | pa.RecordBatch], schema: pa.Schema | None = None
) -> FileRef:
    """A table, or a stream of them in bounded memory, as one Parquet file (zstd)."""
    pieces = [table] if isinstance(table, pa.Table) else table
    schema = table.schema if isinstance(table, pa.Table) else schema
    if schema is None:
        raise ValueError("a stream of tables needs its schema")
    rows = 0
    with tempfile.TemporaryDirectory(prefix="headtail-") as folder:
        local = Path(folder) / "table.parquet"
        with storage_errors("write", str(local)):
            with pq.ParquetWriter(local, schema, compression="zstd") as writer:
                for piece in pieces:
                    writer.write(piece)
                    rows += piece.num_rows
            return put(store, local, path, rows)


def _path(store: Storage, file: str | FileRef) -> str:
    return file if isinstance(file, str) else check_digest(store, file)


def read_table(store: Storage, file: str | FileRef, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file of the store; its digest is checked when it is given. StorageError when it is absent, another or damaged."""
    path = _path(store, file)
    with table_errors(store, path):
        return retry_call(lambda: pq.read_table(store.full(path), filesystem=store.filesystem, columns=columns))


@contextmanager
def open_table(store: Storage, path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file of the store, to be read in pieces. StorageError when it is absent or damaged, also while it is read."""
    with table_errors(store, path), pq.ParquetFile(store.open(path)) as opened:
        yield opened


def column_bytes(store: Storage, path: str, names: Collection[str]) -> int:
    """Bytes that some columns of a Parquet file take in the store, compressed; 0 for those it does not have."""
    with open_table(store, path) as opened:
        found = opened.metadata
    groups = [found.row_group(i) for i in range(found.num_row_groups)]
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in names)


def stream_table(
    store: Storage, file: str | FileRef, columns: list[str] | None = None, batch_rows: int = 65536
) -> Iterator[pa.RecordBatch]:
    """The batches of a Parquet file, in bounded memory. A digest that is given is checked first. Errors as `read_table`."""
    path = _path(store, file)
    with open_table(store, path) as opened:
        for group in range(opened.num_row_groups):  # one call for all would hold every group until the last is read (pyarrow 25)
            yield from opened.iter_batches(batch_size=batch_rows, columns=columns, row_groups=[group])


def put(store: Storage, local: Path, path: str, rows: int | None = None) -> FileRef:
    """A finished local file moved into the store, with its digest."""
    ref = FileRef(path=path, bytes=local.stat().st_size, sha256=sha256_file(local), rows=rows)
    store.put_file(local, path)
    return ref


def put_folder(store: Storage, local: Path, path: str) -> list[FileRef]:
    """Every file of a finished local folder moved in under `path`, in order of name."""
    files = sorted(p for p in local.rglob("*") if p.is_file())
    return [put(store, file, f"{path}/{file.relative_to(local)}") for file in files]


def fetch_folder(store: Storage, files: Iterable[str], into: Path) -> Path:
    """Local copies of `files`, which share a folder; returns that folder. For a local store nothing is copied."""
    folder = None
    for path in files:
        folder = store.fetch(path, into).parent if folder is None else (store.fetch(path, into), folder)[1]
    if folder is None:
        raise InputError("no files named", where="fetch_folder")
    return folder
