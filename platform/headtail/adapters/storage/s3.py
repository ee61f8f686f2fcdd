"""A store in a bucket of S3, or of a store with S3's protocol.

In: bytes and files under relative paths. Out: the same; a put is whole or absent by itself, `create` is a conditional put
(If-None-Match: *). A call that S3 did not answer, or answered with "later", is repeated within a bounded time (see
`retries`). Each object carries the mark of its write, so that a writer whose reply was lost recognises its own object.
"""

from __future__ import annotations

import datetime
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pyarrow as pa
import pyarrow.fs as pafs

from headtail.adapters.storage import retries
from headtail.adapters.storage.base import StoredFile, check_path, storage_errors
from headtail.adapters.storage.ranges import Ranges
from headtail.core.errors import StorageError

PROBE = ".headtail/conditional-put"  # stays in the store: who can write it a second time must not trust conditional puts
_WRITER = "headtail-writer"  # metadata: the mark of the write that made an object


@lru_cache(maxsize=4)
def _s3(pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    """boto3's client, which takes 50 ms to make: one for a process and its AWS_* settings, for all threads."""
    import boto3
    from botocore.config import Config as BotoConfig

    session = boto3.Session()
    ways: dict[str, Any] = {
        "retries": {"total_max_attempts": 1, "mode": "standard"},  # boto's own do not know that 409 and 429 mean "later"
        "connect_timeout": retries.TIMEOUT_S,
        "read_timeout": retries.TIMEOUT_S,
    }
    client = session.client("s3", config=BotoConfig(**ways))
    if not _amazon(client):  # many refuse boto3's newer checksums; without them the payload itself is signed, which is as safe
        for name in ("request_checksum_calculation", "response_checksum_validation"):
            if f"AWS_{name.upper()}" not in os.environ:
                ways[name] = "when_required"
        client = session.client("s3", config=BotoConfig(**ways))
    client.meta.events.register("needs-retry.s3", retries.retry_handler())
    return client


@lru_cache(maxsize=8)
def _arrow_files(pid: int, settings: tuple[tuple[str, str], ...]) -> pafs.FileSystem:
    """Arrow's client; to make one takes 20 ms. Arguments as of `_s3`."""
    client = _s3(pid, settings)
    ways: dict[str, Any] = {"retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=retries.ATTEMPTS)}
    if not _amazon(client):
        parsed = urlparse(client.meta.endpoint_url)
        virtual = (client.meta.config.s3 or {}).get("addressing_style") == "virtual"
        ways |= {"endpoint_override": parsed.netloc, "scheme": parsed.scheme, "force_virtual_addressing": virtual}
    return pafs.S3FileSystem(**ways)


def _amazon(client: Any) -> bool:
    host = urlparse(client.meta.endpoint_url).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


@lru_cache(maxsize=64)
def _require_conditional_puts(store: S3Storage, pid: int, settings: tuple[tuple[str, str], ...]) -> None:
    """StorageError unless one of two conditional puts of one object is refused. Looked at once per process, before the first."""
    if store._put_new(PROBE, b"kept: headtail writes this to see that it cannot be written twice\n") and store._put_new(PROBE, b"again\n"):
        raise StorageError(
            "this store ignores If-None-Match: two jobs could publish at once, and one would overwrite the other",
            where=store.uri(PROBE),
            fix="update the store to a version with conditional writes, or choose another --root",
        )


def open_object(path: str) -> pa.NativeFile:
    """`bucket/key`, as `S3Storage.open`."""
    bucket, _, key = path.partition("/")
    return S3Storage(f"s3://{bucket}").open(key)


@dataclass(frozen=True)
class S3Storage:
    """A bucket and prefix."""

    root: str

    @property
    def _settings(self) -> tuple[tuple[str, str], ...]:
        return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))

    @property
    def _client(self) -> Any:
        return _s3(os.getpid(), self._settings)

    @property
    def _bucket(self) -> str:
        return urlparse(self.root).netloc

    def _key(self, path: str) -> str:
        return "/".join(part for part in (urlparse(self.root).path.strip("/"), check_path(path, self.root)) if part)

    def _at(self, path: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._key(path)}

    @property
    def filesystem(self) -> pafs.FileSystem:
        return _arrow_files(os.getpid(), self._settings)

    def full(self, path: str) -> str:
        return f"{self._bucket}/{self._key(path)}"

    def local_path(self, path: str) -> Path | None:
        return None

    def uri(self, path: str) -> str:
        return f"{self.root}/{path}"

    @contextmanager
    def _plain_errors(self, action: str, path: str) -> Iterator[None]:
        """boto's errors as StorageError that says what to do."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError, ValueError) as error:
            cause = error.__context__ if isinstance(error, Boto3Error) and error.__context__ else error
            raise retries.refusal(action, self.uri(path), cause) from error

    def exists(self, path: str) -> bool:
        with self._plain_errors("look", path):
            return self._head(path) is not None

    def size(self, path: str) -> int:
        with self._plain_errors("look", path):
            return int(self._client.head_object(**self._at(path))["ContentLength"])

    def _head(self, path: str) -> Any:
        from botocore.exceptions import ClientError

        try:
            return self._client.head_object(**self._at(path))
        except ClientError as error:
            if retries.http_status(error) == 404:
                return None
            raise

    def read(self, path: str) -> bytes:
        return self._get(path)

    def open(self, path: str) -> pa.NativeFile:
        """For Arrow's readers too: its own client can take up 429 only where a whole read is made again."""
        return pa.PythonFile(Ranges(self.size(path), lambda begin, end: self._get(path, Range=f"bytes={begin}-{end - 1}")), mode="r")

    def _get(self, path: str, **part: str) -> bytes:
        patience = retries.Patience()
        with self._plain_errors("read", path):
            while True:
                body = self._client.get_object(**self._at(path), **part)["Body"]
                try:
                    return bytes(body.read())
                except retries.broken_read_errors() as error:  # the client tries again until an answer begins; here it ended too soon
                    patience.wait(error)

    def replace(self, path: str, data: bytes) -> None:
        with self._plain_errors("write", path):
            self._client.put_object(**self._at(path), Body=data)

    def create(self, path: str, data: bytes) -> bool:
        with self._plain_errors("write", path):
            _require_conditional_puts(self, os.getpid(), self._settings)
            return self._put_new(path, data)

    def _put_new(self, path: str, data: bytes) -> bool:
        """Put unless there is one. After any refusal a read decides: 409 wrote nothing; 412 may be our own put whose answer was lost."""
        from botocore.exceptions import ClientError

        mark, patience = uuid.uuid4().hex, retries.Patience()
        while True:
            try:
                self._client.put_object(**self._at(path), Body=data, IfNoneMatch="*", Metadata={_WRITER: mark})
                return True
            except ClientError as error:
                if retries.http_status(error) not in (409, 412):
                    raise
                found = self._head(path)
                if found is not None:
                    return bool(found["Metadata"].get(_WRITER) == mark)
                patience.wait(error)

    def put_file(self, local: Path, path: str) -> None:
        from boto3.exceptions import S3UploadFailedError

        mark = uuid.uuid4().hex
        with storage_errors("read", str(local)), self._plain_errors("write", path):
            try:
                self._client.upload_file(str(local), self._bucket, self._key(path), ExtraArgs={"Metadata": {_WRITER: mark}})
            except S3UploadFailedError:  # perhaps done, its answer lost, and the next one "no such upload"
                found = self._head(path)
                if found is None or found["Metadata"].get(_WRITER) != mark:
                    raise
            local.unlink()

    def fetch(self, path: str, into: Path) -> Path:
        target = into / check_path(path, self.root)
        with storage_errors("write", str(target)), self._plain_errors("read", path):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._client.download_file(self._bucket, self._key(path), str(target))  # under another name until it is whole
        return target

    def remove(self, path: str) -> None:
        with self._plain_errors("remove", path):
            self._client.delete_object(**self._at(path))

    def files(self, folder: str) -> list[StoredFile]:
        pages = self._pages("list_objects_v2", f"{folder}/" if folder else "", "Contents")
        return [StoredFile(path, item["Size"], item["LastModified"]) for path, item in pages]

    def litter(self, before: datetime.datetime) -> list[StoredFile]:
        pages = self._pages("list_multipart_uploads", "", "Uploads")
        return [StoredFile(path, 0, item["Initiated"], item["UploadId"]) for path, item in pages if item["Initiated"] < before]

    def discard(self, stored: StoredFile) -> None:
        if stored.upload:
            with self._plain_errors("abort an upload", stored.path):
                self._client.abort_multipart_upload(**self._at(stored.path), UploadId=stored.upload)
        else:
            self.remove(stored.path)

    def _pages(self, name: str, path: str, items: str) -> Iterator[tuple[str, Any]]:
        """Each item of a listing, by its path relative to the root."""
        root = self._key("")
        prefix = f"{root}/{path}" if root else path
        with self._plain_errors("list", path):
            for page in self._client.get_paginator(name).paginate(Bucket=self._bucket, Prefix=prefix):
                yield from ((item["Key"][len(root) + 1 if root else 0 :], item) for item in page.get(items, ()))
