"""A snapshot's manifest, which makes it exist; and the log of all snapshots that were ever begun, so that none has to be searched for.

In: a store. Out: SnapshotManifest by id; entries in `snapshots/log/<n>.json`. A snapshot that is being collected carries a mark
(COLLECTING) until its last file is gone; nobody may publish or promote it while the mark is there.
"""

from __future__ import annotations

import datetime

from pydantic import Field, FiniteFloat, model_validator

from headtail.adapters import append_log
from headtail.adapters.storage import Storage, check_digest, read_record
from headtail.cache.lmdb_file import FORMAT
from headtail.core.config import Config
from headtail.core.errors import InputError, StorageError
from headtail.core.keys import NORMALISATION, fingerprint
from headtail.core.paths import AnswersPath, StoreId
from headtail.core.receipt import FileRef
from headtail.core.record import Moment

FOLDER = "snapshots"
LOG = f"{FOLDER}/log"
COLLECTING = "COLLECTING"
REPUBLISH = "run headtail publish again: it builds the snapshot anew"


class SnapshotManifest(Config):
    """What a snapshot holds and where it comes from. Its presence is what makes the snapshot exist."""

    id: StoreId = Field(description="16 hex digits over content, task and lineage")
    format: int = Field(FORMAT, description="layout of a value in LMDB")
    normalisation: int = Field(NORMALISATION, description="version of keys.normalise that made the keys")
    task: StoreId = Field(description="name of the task")
    task_fingerprint: StoreId = Field(description="over all of the task that changes an answer")
    rows: int = Field(ge=0, description="answers")
    rows_by_source: dict[str, int] = Field(description="answers by who gave them")
    left_out: dict[str, int] = Field(description="rows that were offered and not published, by reason")
    min_confidence: dict[str, FiniteFloat] = Field(description="by source: answers below were left out")
    coverage: float | None = Field(None, description="share of events before the cut whose query is here")
    lineage: tuple[AnswersPath, ...] = Field((), description="receipts whose answers these are, first wins")
    examples: tuple[str, ...] = Field((), description="the most frequent queries, for people to try")
    content: StoreId = Field(description="hash over all keys, values and counts")
    files: dict[str, FileRef] = Field(description="answers (Parquet), lmdb, and words of the log where it is known; with digests")
    created: Moment = Field(description="UTC, ISO 8601")

    @property
    def own_id(self) -> str:
        """The id that this content has."""
        told = self.format, self.normalisation, self.task_fingerprint, self.lineage, self.min_confidence, self.content
        return fingerprint(told)[:16]

    @model_validator(mode="after")
    def _own_files_only(self) -> SnapshotManifest:
        if missing := {"answers", "lmdb"} - self.files.keys():
            raise ValueError(f"files: {' and '.join(sorted(missing))} must be named")
        for name, ref in self.files.items():
            if not ref.path.startswith(f"{snapshot_path(self.id)}/"):
                raise ValueError(f"files.{name}: {ref.path} is not below {snapshot_path(self.id)}/")
        return self


class PublishStart(Config):
    """An entry of the log: somebody set out to publish this snapshot. Whether it exists, its manifest says."""

    snapshot: StoreId = Field(description="id")
    at: Moment = Field(description="UTC, ISO 8601")


def snapshot_path(snapshot: str) -> str:
    """The folder of a snapshot, relative to the store's root."""
    return f"{FOLDER}/{snapshot}"


def manifest_path(snapshot: str) -> str:
    """Where the manifest of a snapshot is."""
    return f"{snapshot_path(snapshot)}/manifest.json"


def mark_path(snapshot: str) -> str:
    """Where the mark of a snapshot is that is being collected."""
    return f"{snapshot_path(snapshot)}/{COLLECTING}"


def read_manifest(store: Storage, snapshot: str) -> SnapshotManifest:
    """The manifest of a snapshot. StorageError when the snapshot does not exist."""
    path = manifest_path(snapshot)
    manifest = read_record(store, SnapshotManifest, path)
    if not snapshot == manifest.id == manifest.own_id:
        raise StorageError(
            "this manifest was changed after it was published: its content has another id", where=store.uri(path), fix=REPUBLISH
        )
    return manifest


def snapshot_damage(store: Storage, snapshot: str) -> str:
    """Why a snapshot of the store cannot be served; empty when its manifest and all its files are as they were written."""
    try:
        for ref in read_manifest(store, snapshot).files.values():
            check_digest(store, ref)
    except (InputError, StorageError) as error:
        return f"{error.what} ({error.where})"
    return ""


def log_start(store: Storage, snapshot: str) -> None:
    """Write down that a snapshot is about to be published. StorageError when it is being collected at this moment.

    The entry comes before the look: a collector marks first and then reads the log, so one of the two sees the other.
    """
    entry = PublishStart(snapshot=snapshot, at=utc_now().isoformat(timespec="seconds"))
    append_log.append_entry(store, LOG, lambda _: (entry.model_dump_json() + "\n").encode())
    if store.exists(mark_path(snapshot)):
        raise collection_error(store, snapshot)


def require_snapshot(store: Storage, snapshot: str) -> SnapshotManifest:
    """The manifest of a snapshot that may be made current. StorageError when it was collected, or is being."""
    if not store.exists(manifest_path(snapshot)):
        where = store.uri(manifest_path(snapshot))
        raise StorageError("this snapshot is not in the store: it was collected or deleted", where=where, fix="publish it again")
    if store.exists(mark_path(snapshot)):
        raise collection_error(store, snapshot)
    return read_manifest(store, snapshot)


def collection_error(store: Storage, snapshot: str) -> StorageError:
    """The error for who meets the mark."""
    fix = "run headtail gc to its end (it may have been killed), then try again"
    return StorageError("this snapshot is being collected", where=store.uri(snapshot_path(snapshot)), fix=fix)


def utc_now() -> datetime.datetime:
    """The time, in UTC."""
    return datetime.datetime.now(datetime.UTC)
