"""Remove snapshots that nobody needs any more, and the remains of killed writers.

In: a store, what must stay and why, an age in days. Out: CollectionReport: what was (or would be) removed, its bytes, what stayed.
A snapshot is removed in this order: the mark that it is being collected, its manifest (now it does not exist), its files, the
mark. After a kill between any two steps, the next call goes on. Local files that a server has mapped stay readable until it closes them.
Knows nothing of releases: the caller says what must stay, again after each mark.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from pydantic import Field
from rich.table import Table

from headtail.adapters import append_log
from headtail.adapters.storage import Storage, StoredFile, write_once
from headtail.cache.manifest import FOLDER, LOG, PublishStart, manifest_path, mark_path, read_manifest, snapshot_path, utc_now
from headtail.core.config import Config

IDLE = datetime.timedelta(days=1)  # a publish or a write that has not ended by then was killed
_EVER = datetime.datetime.min.replace(tzinfo=datetime.UTC)


class RemovedItem(Config):
    """One thing that was taken away, or would be."""

    what: str = Field(description="snapshot | unfinished snapshot | unfinished write")
    path: str = Field(description="folder or file, relative to the store's root")
    bytes: int = Field(ge=0, description="its files together; 0 for an upload that S3 holds in parts")
    since: str = Field(description="when it was published, begun or written; UTC, ISO 8601")


class CollectionReport(Config):
    """What a collection did."""

    dry_run: bool = Field(description="true: nothing was touched")
    gone: tuple[RemovedItem, ...] = Field(description="what went, or would go")
    kept: dict[str, str] = Field(description="snapshots that stay, and why")

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.gone)


def collect_snapshots(
    store: Storage,
    needed: Callable[[], Mapping[str, str]],
    *,
    older_than: datetime.timedelta,
    also: Iterable[str] = (),
    dry_run: bool = False,
) -> CollectionReport:
    """Collect every snapshot that is neither in `needed()` (id -> why) nor younger than `older_than`; then the litter.

    Snapshots are known from the log and from `also`, not by listing; listing finds only what no manifest names.
    """
    work = _Collection(store, needed, older_than, dry_run)
    for snapshot in sorted({*work.begun, *also}):
        work.collect_published(snapshot)
    for snapshot, files in files_by_snapshot(store).items():
        work.collect_unfinished(snapshot, files)
    return CollectionReport(dry_run=dry_run, gone=(*work.gone, *_litter(store, dry_run)), kept=work.kept)


class _Collection:
    """One call of `collect_snapshots`."""

    def __init__(self, store: Storage, needed: Callable[[], Mapping[str, str]], older_than: datetime.timedelta, dry_run: bool) -> None:
        self.store, self._ask, self._age, self._dry = store, needed, older_than, dry_run
        self.gone: list[RemovedItem] = []
        self.kept: dict[str, str] = {}
        self._read_state()

    def _read_state(self) -> None:
        """Read again what is needed and when each snapshot was last begun."""
        self.needed = self._ask()
        self.begun = {
            entry.snapshot: datetime.datetime.fromisoformat(entry.at)
            for entry in append_log.read_entry_records(self.store, PublishStart, LOG)
        }

    def collect_published(self, snapshot: str) -> None:
        """A snapshot with a manifest."""
        if not self.store.exists(manifest_path(snapshot)):
            return
        manifest = read_manifest(self.store, snapshot)

        def stays() -> str:
            last = max(datetime.datetime.fromisoformat(manifest.created), self.begun.get(snapshot, _EVER))
            return self.needed.get(snapshot) or (
                f"younger than {self._age / datetime.timedelta(days=1):g} days" if utc_now() - last < self._age else ""
            )

        size = sum(ref.bytes for ref in manifest.files.values())
        self._take(snapshot, RemovedItem(what="snapshot", path=snapshot_path(snapshot), bytes=size, since=manifest.created), stays)

    def collect_unfinished(self, snapshot: str, files: list[StoredFile]) -> None:
        """Files without a manifest: a publish or a collection was killed, or is at work."""
        path, marked = snapshot_path(snapshot), any(one.path == mark_path(snapshot) for one in files)
        if path in {one.path for one in self.gone}:
            return
        if self.store.exists(manifest_path(snapshot)):
            if marked and not self._dry:
                self.store.remove(mark_path(snapshot))  # a collector was killed after its mark, and the snapshot is needed by now
            return
        last = max(one.modified for one in files)

        def stays() -> str:
            busy = not marked and utc_now() - max(last, self.begun.get(snapshot, _EVER)) < IDLE
            return "being published, or killed less than a day ago" if busy else ""

        size, since = sum(one.bytes for one in files), last.isoformat(timespec="seconds")
        self._take(snapshot, RemovedItem(what="unfinished snapshot", path=path, bytes=size, since=since), stays)

    def _take(self, snapshot: str, one: RemovedItem, stays: Callable[[], str]) -> None:
        """Take a snapshot away unless it `stays` (a reason), also by what is true after the mark."""
        reason = stays()
        if not reason and not self._dry:
            write_once(self.store, mark_path(snapshot), b"headtail gc is taking this snapshot away\n")  # or a killed one's mark
            self._read_state()
            reason = stays()
            if reason:
                self.store.remove(mark_path(snapshot))
            else:
                _finish(self.store, snapshot)
        if reason:
            self.kept[snapshot] = reason
        else:
            self.gone.append(one)


def remove_snapshot(store: Storage, snapshot: str) -> int:
    """Take one snapshot away, whatever needs it; its bytes. None there is fine. Servers that have it open keep it until they close it."""
    held = store.files(snapshot_path(snapshot))
    if held:
        write_once(store, mark_path(snapshot), b"a deletion is taking this snapshot away\n")
        _finish(store, snapshot)
    return sum(one.bytes for one in held)


def _finish(store: Storage, snapshot: str) -> None:
    """Manifest, files, mark."""
    store.remove(manifest_path(snapshot))
    for one in store.files(snapshot_path(snapshot)):
        if one.path != mark_path(snapshot):
            store.discard(one)
    store.remove(mark_path(snapshot))


def files_by_snapshot(store: Storage) -> dict[str, list[StoredFile]]:
    """The files below each snapshot's folder, also of those without a manifest."""
    found: dict[str, list[StoredFile]] = defaultdict(list)
    for one in store.files(FOLDER):
        if not one.path.startswith(f"{LOG}/"):
            found[one.path.split("/")[1]].append(one)
    return dict(sorted(found.items()))


def _litter(store: Storage, dry_run: bool) -> list[RemovedItem]:
    """Temporary files of killed writers; on S3 uploads that were never completed."""
    found = store.litter(utc_now() - IDLE)
    for one in found if not dry_run else ():
        store.discard(one)
    return [
        RemovedItem(what="unfinished write", path=one.path, bytes=one.bytes, since=one.modified.isoformat(timespec="seconds"))
        for one in found
    ]


def collection_table(report: CollectionReport) -> Table:
    """A CollectionReport for people."""
    verb = "would go" if report.dry_run else "gone"
    title = f"{len(report.gone)} {verb}, {report.bytes / 1e9:,.2f} GB; {len(report.kept)} snapshots stay"
    table = Table("", "path", "GB", "since, or why it stays", title=title, title_justify="left")
    for one in report.gone:
        table.add_row(f"{verb}: {one.what}", one.path, f"{one.bytes / 1e9:,.3f}", one.since)
    for snapshot, reason in report.kept.items():
        table.add_row("stays", snapshot_path(snapshot), "", reason)
    return table
