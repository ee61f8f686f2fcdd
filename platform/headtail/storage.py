"""One door to where things are kept: a directory or S3.

In: bytes, Arrow tables, files, all under paths relative to the store's root. Out: the same, and a FileRef (rows, bytes,
SHA-256) for what was written. Every write is whole or absent; `create` lets exactly one writer win; `replace` moves a
pointer in one step. No caller lists a directory to learn what is true: manifests say it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import Field

from headtail.config import Config
from headtail.errors import InputError, StorageError
from headtail.keys import sha256_file


class FileRef(Config):
    """A file that was written: where, how much, and the digest that proves it."""

    path: str = Field(description="relative to the store's root")
    bytes: int = Field(ge=0, description="size")
    sha256: str = Field(description="hex digest of the bytes")
    rows: int | None = Field(None, description="rows, for tables")


class Storage(Protocol):
    """What a store can do. Two implementations: LocalStorage, S3Storage. Both pickle, so workers can hold one."""

    @property
    def root(self) -> str: ...
    @property
    def filesystem(self) -> pafs.FileSystem: ...
    def full(self, path: str) -> str:
        """The path within `filesystem`."""
        ...

    def uri(self, path: str) -> str:
        """For people and receipts."""
        ...

    def exists(self, path: str) -> bool: ...
    def read(self, path: str) -> bytes: ...
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


def open_storage(root: str) -> Storage:
    """The store at a directory (made when absent) or s3://bucket/prefix."""
    if root.startswith("s3://"):
        return S3Storage(root.rstrip("/"))
    if "://" in root:
        raise StorageError("this kind of store is not supported", where="root", value=root, fix="use a directory or s3://bucket/prefix")
    return LocalStorage(str(Path(root).expanduser().resolve()))


@contextmanager
def _told(action: str, where: str) -> Iterator[None]:
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


@dataclass(frozen=True)
class LocalStorage:
    """A directory. Writes go to a temporary name beside the target, are fsynced, then renamed."""

    root: str

    @property
    def filesystem(self) -> pafs.FileSystem:
        return pafs.LocalFileSystem()

    def full(self, path: str) -> str:
        return os.path.join(self.root, path)

    uri = full

    def exists(self, path: str) -> bool:
        return os.path.exists(self.full(path))

    def size(self, path: str) -> int:
        return os.path.getsize(self.full(path))

    def read(self, path: str) -> bytes:
        try:
            return Path(self.full(path)).read_bytes()
        except FileNotFoundError:
            raise StorageError("not in the store", where=self.full(path)) from None

    def _aside(self, path: str) -> Path:
        target = Path(self.full(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")

    def _write_aside(self, path: str, data: bytes) -> Path:
        aside = self._aside(path)
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        return aside

    def replace(self, path: str, data: bytes) -> None:
        with _told("write", self.full(path)):
            os.replace(self._write_aside(path, data), self.full(path))
            _sync_folder(Path(self.full(path)).parent)

    def create(self, path: str, data: bytes) -> bool:
        with _told("write", self.full(path)):
            aside = self._write_aside(path, data)
            try:
                os.link(aside, self.full(path))  # fails if the name exists: one winner, also between processes
            except FileExistsError:
                return False
            finally:
                aside.unlink()
            _sync_folder(Path(self.full(path)).parent)
            return True

    def put_file(self, local: Path, path: str) -> None:
        with _told("write", self.full(path)):
            aside = self._aside(path)
            try:
                shutil.move(local, aside)
                with aside.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(aside, self.full(path))
            except OSError:
                aside.unlink(missing_ok=True)
                raise
            _sync_folder(Path(self.full(path)).parent)

    def fetch(self, path: str, into: Path) -> Path:
        return Path(self.full(path))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class S3Storage:
    """A bucket and prefix. An S3 put is whole or absent by itself; `create` is a conditional put (If-None-Match: *)."""

    root: str

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config as BotoConfig

        return boto3.client("s3", config=BotoConfig(retries={"max_attempts": 8, "mode": "adaptive"}))

    def __getstate__(self) -> dict[str, str]:
        return {"root": self.root}

    @property
    def _bucket(self) -> str:
        return urlparse(self.root).netloc

    def _key(self, path: str) -> str:
        return "/".join(part for part in (urlparse(self.root).path.strip("/"), path) if part)

    @property
    def filesystem(self) -> pafs.FileSystem:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if not endpoint:
            return pafs.S3FileSystem()
        parsed = urlparse(endpoint)
        return pafs.S3FileSystem(endpoint_override=parsed.netloc, scheme=parsed.scheme)

    def full(self, path: str) -> str:
        return f"{self._bucket}/{self._key(path)}"

    def uri(self, path: str) -> str:
        return f"s3://{self.full(path)}"

    def _call(self, action: str, path: str, name: str, **arguments: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return getattr(self._client, name)(Bucket=self._bucket, Key=self._key(path), **arguments)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in ("404", "NoSuchKey"):
                raise StorageError("not in the store", where=self.uri(path)) from None
            if code in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise FileExistsError(path) from None
            raise StorageError(
                f"cannot {action}: {code}: {error}", where=self.uri(path), fix="check bucket, credentials and permissions"
            ) from error
        except BotoCoreError as error:
            raise StorageError(f"cannot {action}: {error}", where=self.uri(path), fix="check AWS_* in the environment") from error

    def exists(self, path: str) -> bool:
        try:
            self._call("look", path, "head_object")
        except StorageError as error:
            if error.what == "not in the store":
                return False
            raise
        return True

    def size(self, path: str) -> int:
        return int(self._call("look", path, "head_object")["ContentLength"])

    def read(self, path: str) -> bytes:
        return bytes(self._call("read", path, "get_object")["Body"].read())

    def replace(self, path: str, data: bytes) -> None:
        self._call("write", path, "put_object", Body=data)

    def create(self, path: str, data: bytes) -> bool:
        try:
            self._call("write", path, "put_object", Body=data, IfNoneMatch="*")
        except FileExistsError:
            return False
        return True

    def put_file(self, local: Path, path: str) -> None:
        with _told("read", str(local)):
            self._client.upload_file(str(local), self._bucket, self._key(path))
            local.unlink()

    def fetch(self, path: str, into: Path) -> Path:
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        with _told("write", str(target)):
            aside.write_bytes(self.read(path)) if self.size(path) < 1 << 26 else self._client.download_file(
                self._bucket, self._key(path), str(aside)
            )
            os.replace(aside, target)
        return target


def write_json(store: Storage, path: str, value: object) -> None:
    """`value` as readable JSON, replacing what was there."""
    store.replace(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def read_json(store: Storage, path: str) -> Any:
    """The JSON at `path`. StorageError when it is absent or not JSON."""
    try:
        return json.loads(store.read(path))
    except json.JSONDecodeError as error:
        raise StorageError(f"not JSON: {error}", where=store.uri(path)) from error


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
        with _told("write", str(local)):
            with pq.ParquetWriter(local, schema, compression="zstd") as writer:
                for piece in pieces:
                    writer.write(piece)
                    rows += piece.num_rows
            return put(store, local, path, rows)


def read_table(store: Storage, path: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file of the store. StorageError when it is absent or damaged."""
    try:
        return pq.read_table(store.full(path), filesystem=store.filesystem, columns=columns)
    except FileNotFoundError:
        raise StorageError("table is not in the store", where=store.uri(path)) from None
    except pa.ArrowInvalid as error:
        raise StorageError(
            f"table cannot be read: {error}", where=store.uri(path), fix="it is damaged: run the stage that wrote it again"
        ) from error


def stream_table(store: Storage, path: str, columns: list[str] | None = None, batch_rows: int = 65536) -> Iterator[pa.RecordBatch]:
    """The batches of a Parquet file, in bounded memory."""
    with pq.ParquetFile(store.full(path), filesystem=store.filesystem) as file:
        yield from file.iter_batches(batch_size=batch_rows, columns=columns)


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
