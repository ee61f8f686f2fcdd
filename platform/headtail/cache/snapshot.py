"""A snapshot: an immutable published cache of answers, and how it is looked up.

In: a snapshot built on local disk (`cache.builder`). Out: in the store `answers.parquet` (CACHED, sorted by query_key),
an LMDB file of the same rows and `manifest.json`, written last; and a Cache opened on it, which answers by exact
normalised text. The text is stored beside the answer and compared, so two texts with one hash are a miss, never a
wrong answer. Knows nothing of releases, models or servers.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic_core import from_json

from headtail.adapters.storage import LocalStorage, Storage, check_local, put, read_record, write_once
from headtail.cache.lmdb_file import FORMAT, SOURCES, VALUE
from headtail.cache.manifest import (
    REPUBLISH,
    SnapshotManifest,
    log_start,
    manifest_path,
    read_manifest,
    snapshot_damage,
    snapshot_path,
    utc_now,
)
from headtail.core import record
from headtail.core.errors import StorageError
from headtail.core.keys import NORMALISATION, fingerprint, normalise, query_key
from headtail.core.redact import redact
from headtail.core.rows import key_words

__all__ = [
    "Cache",
    "CachedAnswer",
    "LocalSnapshot",
    "SnapshotManifest",
    "StoredAnswer",
    "decode_value",
    "disk_errors",
    "open_snapshot",
    "publish_snapshot",
    "read_manifest",
    "snapshot_coverage",
    "snapshot_path",
    "stored_value",
]


_FULL = 16 << 20  # bytes free below which a disk is called full


class CachedAnswer(NamedTuple):
    """One answer found in a snapshot. `answer` is canonical JSON; `confidence` is None when the engine gave none."""

    query: str
    answer: str
    source: str
    confidence: float | None
    answer_key: bytes

    def plain_answer(self) -> Any:
        """The answer as plain values: what `json.loads` makes of it, in a third of the time."""
        return _decode(self.answer)


class StoredAnswer(NamedTuple):
    """One answer as it is stored: `answer` is the UTF-8 of canonical JSON, ready to be sent."""

    source: str
    confidence: float | None
    answer_key: bytes
    answer: bytes

    def plain_answer(self) -> Any:
        """The answer as plain values."""
        return _decode(self.answer)


def _decode(answer: str | bytes) -> Any:
    try:
        return from_json(answer)
    except ValueError:  # nested deeper than it goes
        return json.loads(answer)


class Cache:
    """An opened snapshot. Read-only, without locks, safe to share between threads; opens anew after a fork."""

    def __init__(self, folder: Path, manifest: SnapshotManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._path = str(folder / "lmdb")
        self._env = _environment(self._path)

    @classmethod
    def open(cls, folder: str | Path) -> Cache:
        """The snapshot in a local folder. StorageError when it is absent, damaged or of another format."""
        folder = Path(folder)
        manifest = read_record(LocalStorage(str(folder)), SnapshotManifest, "manifest.json")
        _check(folder, manifest)
        return cls(folder, manifest)

    def __reduce__(self) -> tuple[Any, ...]:  # an LMDB handle does not travel; the path does
        return Cache.open, (str(self.folder),)

    def __len__(self) -> int:
        return self.manifest.rows

    def lookup(self, text: str) -> CachedAnswer | None:
        """The answer to `text` as people type it, or None."""
        return self.find(normalise(text))

    def find(self, normalised: str) -> CachedAnswer | None:
        """The answer to a normalised text, or None. Ingest took personal data out, so a miss is tried again without it."""
        found = self.get(normalised)
        if found is None and (clean := redact(normalised)).any:
            return self.get(clean.text)
        return found

    def get(self, normalised: str) -> CachedAnswer | None:
        """The answer to exactly this text, or None."""
        value = self._value(normalised)
        return None if value is None else decode_value(value, normalised)

    def find_stored(self, normalised: str) -> StoredAnswer | None:
        """The same, with the answer's bytes as they are stored."""
        value = self._value(normalised)
        return None if value is None else stored_value(value, normalised)

    def _value(self, normalised: str) -> bytes | None:
        if self._env.pid != os.getpid():
            self._env = _environment(self._path)
        return self._env.get(query_key(normalised))

    def close(self) -> None:
        """Close the LMDB file; no lookup is possible after that."""
        del self._env


class _Environment:
    """An open LMDB handle and the process that opened it. Each thread keeps one transaction: the file never changes."""

    def __init__(self, path: str) -> None:
        self.pid = os.getpid()
        self.handle = lmdb.open(path, readonly=True, lock=False, create=False, readahead=False)
        self._own = threading.local()

    def get(self, key: bytes) -> bytes | None:
        try:
            txn = self._own.txn
        except AttributeError:
            txn = self._own.txn = self.handle.begin()
        found: bytes | None = txn.get(key)
        return found


_OPEN: weakref.WeakValueDictionary[str, _Environment] = weakref.WeakValueDictionary()  # LMDB opens a file once per process


def _environment(path: str) -> _Environment:
    real = os.path.realpath(path)
    environment = _OPEN.get(real)
    if environment is not None and environment.pid != os.getpid():
        environment.handle.close()  # inherited by fork; this process needs its own
        environment = None
    if environment is None:
        try:
            environment = _Environment(real)
        except lmdb.Error as error:
            raise StorageError(f"the LMDB file cannot be opened: {error}", where=path, fix=REPUBLISH) from error
        _OPEN[real] = environment
    return environment


def decode_value(value: bytes, normalised: str) -> CachedAnswer | None:
    """A value of the LMDB file as the answer to `normalised`; None when it belongs to another text."""
    found = stored_value(value, normalised)
    if found is None:
        return None
    source, confidence, answer_key, answer = found
    return tuple.__new__(CachedAnswer, (normalised, answer.decode(), source, confidence, answer_key))


def stored_value(value: bytes, normalised: str) -> StoredAnswer | None:
    """The same, with the answer left as bytes."""
    kind, confidence, answer_key = VALUE.unpack_from(value)
    if kind >> 4 != FORMAT:
        raise StorageError(
            "a cached value has an unknown format", value=kind >> 4, fix="serve this snapshot with the headtail version that made it"
        )
    text = normalised.encode("utf-8", "surrogatepass")
    end = VALUE.size + len(text)
    if not value.startswith(text, VALUE.size) or value[end]:
        return None  # another text with the same hash
    known = None if confidence != confidence else confidence
    return tuple.__new__(StoredAnswer, (SOURCES[kind & 15], known, answer_key, value[end + 1 :]))


def _check(folder: Path, manifest: SnapshotManifest) -> None:
    if manifest.format != FORMAT or manifest.normalisation != NORMALISATION:
        raise StorageError(
            "this snapshot was made by another version of headtail",
            where=str(folder),
            value=f"format {manifest.format}, normalisation {manifest.normalisation}; this version reads {FORMAT} and {NORMALISATION}",
            fix="run ingest and all stages after it again with this version, or serve it with the version that made it",
        )
    lmdb_path = folder / "lmdb" / "data.mdb"
    size = lmdb_path.stat().st_size if lmdb_path.exists() else None
    if size != manifest.files["lmdb"].bytes:
        raise StorageError("the LMDB file does not match its manifest", where=str(lmdb_path), value=f"{size} bytes", fix=REPUBLISH)
    check_local(lmdb_path, manifest.files["lmdb"].sha256)


def open_snapshot(store: Storage, snapshot: str, into: Path | None = None) -> Cache:
    """A snapshot of a store, opened from local disk.

    A local store is opened in place unless `into` is given (give it when the store is a network mount: LMDB must not
    be mapped over one). From S3 it is fetched below `into` and its digest checked; without `into` the copy lives in a
    temporary folder, as long as the Cache does.
    """
    manifest = read_manifest(store, snapshot)
    if into is None and (folder := store.local_path(snapshot_path(snapshot))) is not None:
        return Cache.open(str(folder))
    ours = Path(tempfile.mkdtemp(prefix="headtail-cache-")) if into is None else None
    target = (into or ours or Path()) / snapshot_path(snapshot)
    try:
        _fetch(store, manifest, target)
        opened = Cache.open(target)
    except BaseException:
        if ours is not None:
            shutil.rmtree(ours, ignore_errors=True)
        raise
    if ours is not None:
        weakref.finalize(opened, _remove, ours, os.getpid())
    return opened


def _fetch(store: Storage, manifest: SnapshotManifest, target: Path) -> None:
    """A copy of a snapshot's LMDB file in the local folder `target`, whole and checked."""
    ref = manifest.files["lmdb"]
    with disk_errors("fetch the snapshot to", target):
        (target / "lmdb").mkdir(parents=True, exist_ok=True)
    with disk_errors("fetch the snapshot to", target), (target / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one server share a copy: one fetches, the others find it
        if _is_copy(target, manifest):
            return
        with tempfile.TemporaryDirectory(dir=target) as aside:
            found = store.fetch(ref.path, Path(aside))
            local = shutil.copyfile(found, Path(aside) / "whole.mdb") if store.local_path(ref.path) else found
            os.replace(local, target / "lmdb" / "data.mdb")
        (target / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")


def _is_copy(target: Path, manifest: SnapshotManifest) -> bool:
    """Whether the local folder holds this snapshot, whole."""
    written, data = target / "manifest.json", target / "lmdb" / "data.mdb"
    if not (written.is_file() and data.is_file() and written.read_text(encoding="utf-8") == manifest.model_dump_json()):
        return False
    try:
        check_local(data, manifest.files["lmdb"].sha256)
    except StorageError:
        return False  # damaged since: fetched again
    return True


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child must not take its parent's copy away
        shutil.rmtree(folder, ignore_errors=True)


class LocalSnapshot(NamedTuple):
    """A snapshot on local disk, not yet in a store. `prefixes`: the first 8 bytes of every key, ascending."""

    parquet: Path
    lmdb: Path
    rows_by_source: dict[str, int]
    left_out: dict[str, int]
    examples: tuple[str, ...]
    content: str
    prefixes: npt.NDArray[np.uint64]

    @property
    def rows(self) -> int:
        return len(self.prefixes)


def publish_snapshot(
    store: Storage,
    built: LocalSnapshot,
    *,
    task: str,
    task_fingerprint: str,
    lineage: Sequence[str] = (),
    min_confidence: Mapping[str, float] | None = None,
    coverage: float | None = None,
    words: Path | None = None,
) -> SnapshotManifest:
    """Move a built snapshot into the store: files first, manifest last. The same snapshot again adds a line to the log.

    One that is in the store and damaged is written anew. `words`: a Parquet file of the log's words, see `cache.words`.
    """
    least = {source: float(value) for source, value in (min_confidence or {}).items()}
    mark = fingerprint([FORMAT, NORMALISATION, task_fingerprint, list(lineage), least, built.content])[:16]
    path = snapshot_path(mark)
    log_start(store, mark)
    if store.exists(manifest_path(mark)):
        if not snapshot_damage(store, mark):
            return read_manifest(store, mark)
        store.remove(manifest_path(mark))  # now it does not exist, until its files are written again
    manifest = SnapshotManifest(
        id=mark,
        task=task,
        task_fingerprint=task_fingerprint,
        rows=built.rows,
        rows_by_source=built.rows_by_source,
        left_out=built.left_out,
        min_confidence=least,
        coverage=coverage,
        lineage=tuple(lineage),
        examples=built.examples,
        content=built.content,
        files={
            "answers": put(store, built.parquet, f"{path}/answers.parquet", built.rows),
            "lmdb": put(store, built.lmdb / "data.mdb", f"{path}/lmdb/data.mdb", built.rows),
            **({"words": put(store, words, f"{path}/words.parquet")} if words is not None else {}),
        },
        created=utc_now().isoformat(timespec="seconds"),
    )
    held = write_once(store, manifest_path(mark), (manifest.model_dump_json(indent=2) + "\n").encode())  # last: now it exists
    first = record.parse_record(SnapshotManifest, held, store.uri(manifest_path(mark)))
    if first.files != manifest.files:
        what, fix = "two publishes of one snapshot at once wrote files that differ", "remove this folder and publish again, one at a time"
        raise StorageError(what, where=store.uri(path), fix=fix)
    if not all(store.exists(ref.path) for ref in manifest.files.values()):
        store.remove(manifest_path(mark))
        what, fix = (
            "a deletion took this snapshot away while it was published",
            "run headtail publish again: it leaves out what was deleted",
        )
        raise StorageError(what, where=store.uri(path), fix=fix)
    return first


def snapshot_coverage(prefixes: npt.NDArray[np.uint64], queries: Iterable[pa.Table | pa.RecordBatch]) -> float | None:
    """Share of events whose query is in the snapshot; `queries` has query_key and count. None without events.

    Keys are compared by their first 8 bytes: with 50 million keys a false hit has odds of 1 in 400,000 per log.
    """
    events = hits = 0
    for piece in queries:
        if piece.num_rows:
            found = key_words(piece.column("query_key"))[0]
            counts = np.asarray(piece.column("count").to_numpy(zero_copy_only=False), dtype=np.int64)
            events += int(counts.sum())
            if len(prefixes):
                place = np.minimum(np.searchsorted(prefixes, found), len(prefixes) - 1)
                hits += int(counts[prefixes[place] == found].sum())
    return hits / events if events else None


@contextmanager
def disk_errors(action: str, where: Path) -> Iterator[None]:
    """Errors of the disk and of LMDB as StorageError that says what to do."""
    try:
        yield
    except (OSError, lmdb.Error) as error:
        fix = "free space, or set TMPDIR to a larger disk; nothing half published is visible, run again"
        full = isinstance(error, lmdb.Error) and shutil.disk_usage(where).free < _FULL
        said = f"No space left on device ({error})" if full else str(error)  # LMDB calls a write cut short an input/output error
        raise StorageError(f"cannot {action} local disk: {said}", where=str(where), fix=fix) from error
