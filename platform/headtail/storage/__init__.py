"""One door to where things are kept: a directory or S3.

In: bytes, Arrow tables, files, all under paths relative to the store's root. Out: the same, and a FileRef (rows, bytes,
SHA-256) for what was written. Every write is whole or absent; `create` lets exactly one writer win; `replace` moves a
pointer in one step. No caller lists a directory to learn what is true: manifests say it. `files` and `litter` list, to find
garbage.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pyarrow.fs as pafs

from headtail.errors import StorageError
from headtail.storage.base import FileRef, Storage, Stored, checked, told
from headtail.storage.tables import (
    column_bytes,
    fetch_folder,
    put,
    put_folder,
    read_json,
    read_table,
    stream_table,
    table_columns,
    write_json,
    write_table,
)

__all__ = [
    "FileRef",
    "LocalStorage",
    "S3Storage",
    "Storage",
    "Stored",
    "column_bytes",
    "fetch_folder",
    "open_storage",
    "put",
    "put_folder",
    "read_json",
    "read_table",
    "stream_table",
    "table_columns",
    "write_json",
    "write_table",
]

_ASIDE = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")  # what LocalStorage calls a file until it is whole


def open_storage(root: str) -> Storage:
    """The store at a directory (made when absent) or s3://bucket/prefix."""
    if root.startswith("s3://"):
        return S3Storage(root.rstrip("/"))
    if "://" in root:
        raise StorageError("this kind of store is not supported", where="root", value=root, fix="use a directory or s3://bucket/prefix")
    return LocalStorage(str(Path(root).expanduser().resolve()))


@dataclass(frozen=True)
class LocalStorage:
    """A directory. Writes go to a temporary name beside the target, are fsynced, then renamed."""

    root: str

    @property
    def filesystem(self) -> pafs.FileSystem:
        return pafs.LocalFileSystem()

    def full(self, path: str) -> str:
        """StorageError when `path` leads out of the root, be it by a link in the store."""
        full = os.path.join(self.root, checked(path, self.root))
        real, root = os.path.realpath(full), os.path.realpath(self.root)  # 60 us together
        if real != root and not real.startswith(root.rstrip("/") + "/"):
            fix = "mount the folder there instead of linking it, or make it a store of its own"
            raise StorageError("a link in the store leads out of it", where=full, value=real, fix=fix)
        return full

    def uri(self, path: str) -> str:
        return os.path.join(self.root, path)

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
        with told("write", self.full(path)):
            os.replace(self._write_aside(path, data), self.full(path))
            _sync_folder(Path(self.full(path)).parent)

    def create(self, path: str, data: bytes) -> bool:
        with told("write", self.full(path)):
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
        with told("write", self.full(path)):
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

    def remove(self, path: str) -> None:
        with told("remove", self.full(path)):
            target = Path(self.full(path))
            target.unlink(missing_ok=True)
            for folder in target.parents:  # folders are no more than parts of names: an empty one goes too
                if folder == Path(self.root) or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()
            if folder.is_dir():
                _sync_folder(folder)

    def files(self, folder: str) -> list[Stored]:
        found = []
        for place, _, names in os.walk(self.full(folder)):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # finished or removed by another process just now
                    about = os.stat(os.path.join(place, name))
                    when = datetime.datetime.fromtimestamp(about.st_ctime, datetime.UTC)  # a file moved in keeps its old mtime
                    found.append(Stored(os.path.relpath(os.path.join(place, name), self.root), about.st_size, when))
        return sorted(found)

    def litter(self, before: datetime.datetime) -> list[Stored]:
        return [one for one in self.files("") if one.modified < before and _ASIDE.fullmatch(os.path.basename(one.path))]

    def discard(self, stored: Stored) -> None:
        self.remove(stored.path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@lru_cache(maxsize=4)
def _s3(pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    """boto3's client, which takes 50 ms to make: one for a process and its AWS_* settings, for all threads."""
    import boto3
    from botocore.config import Config as BotoConfig

    return boto3.client("s3", config=BotoConfig(retries={"max_attempts": 8, "mode": "adaptive"}))


@dataclass(frozen=True)
class S3Storage:
    """A bucket and prefix. An S3 put is whole or absent by itself; `create` is a conditional put (If-None-Match: *)."""

    root: str

    @property
    def _client(self) -> Any:
        settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
        return _s3(os.getpid(), settings)

    @property
    def _bucket(self) -> str:
        return urlparse(self.root).netloc

    def _key(self, path: str) -> str:
        return "/".join(part for part in (urlparse(self.root).path.strip("/"), checked(path, self.root)) if part)

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
        return f"{self.root}/{path}"

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
        with told("read", str(local)):
            self._client.upload_file(str(local), self._bucket, self._key(path))
            local.unlink()

    def fetch(self, path: str, into: Path) -> Path:
        target = into / checked(path, self.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        with told("write", str(target)):
            aside.write_bytes(self.read(path)) if self.size(path) < 1 << 26 else self._client.download_file(
                self._bucket, self._key(path), str(aside)
            )
            os.replace(aside, target)
        return target

    def remove(self, path: str) -> None:
        self._call("remove", path, "delete_object")

    def files(self, folder: str) -> list[Stored]:
        pages = self._pages("list_objects_v2", f"{folder}/" if folder else "", "Contents")
        return [Stored(path, item["Size"], item["LastModified"]) for path, item in pages]

    def litter(self, before: datetime.datetime) -> list[Stored]:
        pages = self._pages("list_multipart_uploads", "", "Uploads")
        return [Stored(path, 0, item["Initiated"], item["UploadId"]) for path, item in pages if item["Initiated"] < before]

    def discard(self, stored: Stored) -> None:
        if stored.upload:
            self._call("abort an upload", stored.path, "abort_multipart_upload", UploadId=stored.upload)
        else:
            self.remove(stored.path)

    def _pages(self, name: str, path: str, items: str) -> Iterator[tuple[str, Any]]:
        """Each item of a listing, by its path relative to the root."""
        from botocore.exceptions import BotoCoreError, ClientError

        root = self._key("")
        prefix = f"{root}/{path}" if root else path
        try:
            for page in self._client.get_paginator(name).paginate(Bucket=self._bucket, Prefix=prefix):
                yield from ((item["Key"][len(root) + 1 if root else 0 :], item) for item in page.get(items, ()))
        except (BotoCoreError, ClientError) as error:
            raise StorageError(f"cannot list: {error}", where=self.uri(path), fix="check bucket, credentials and permissions") from error
