"""Where a precompute job stands: which rows are safe in the store, and whether a driver still works on it.

In: a store and a job's folder. Out: a JobState. Reads the manifest, the shards' receipts and journals, and the lease; lists no
folder and writes nothing, so it may be asked about a job that runs. Knows nothing of engines or of what answers are for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from headtail.adapters.storage import Storage, read_record
from headtail.batch.job import JobFolder, edition_count, read_journal, read_receipt
from headtail.batch.lease import SILENT_S, holder_gone, last_holder
from headtail.batch.prepare import InputManifest
from headtail.core.errors import StorageError

Phase = Literal["done", "running", "dead", "stopped", "waiting"]
_LOOKUP_THREADS = 16  # threads that look at shards; a look at S3 takes some 20 ms


@dataclass(frozen=True)
class JobState:
    """How far a job is. `rows_done`: rows that are safe in the store, failed ones and duplicates included; `rows`: all rows, None
    before they are counted; `silent_s`: seconds since the last sign of life, None when no driver ever held the job.

    Phases: done; running (a driver renews the lease); dead (the driver is gone, or silent for SILENT_S); stopped (the driver ended
    by itself: an error, a limit, Ctrl-C); waiting (no driver ever held it).
    """

    path: str
    phase: Phase
    rows_done: int
    rows: int | None
    driver: str
    silent_s: float | None


def job_state(store: Storage, path: str) -> JobState:
    """The state of the job in folder `path`."""
    manifest = _manifest(store, path)
    rows = manifest.rows if manifest else None
    phase, driver, silent = driver_state(store, path)
    if any(store.exists(f"{path}/{name}") for name in ("receipt.json", "probe.json")):
        return JobState(path, "done", rows or 0, rows, driver, silent)
    done = rows_done(store, path, manifest) if manifest else 0
    return JobState(path, phase, done, rows, driver, silent)


def driver_state(store: Storage, path: str) -> tuple[Phase, str, float | None]:
    """What the lease of the run at `path` says: its phase, its driver in words, and the seconds since its last sign of life."""
    held = last_holder(store, path)
    if held is None:
        return "waiting", "", None
    lease, seconds = held
    phase: Phase = "stopped" if lease.ended else "dead" if holder_gone(lease) or seconds >= SILENT_S else "running"
    return phase, f"process {lease.pid} on {lease.host}", seconds


def rows_done(store: Storage, path: str, manifest: InputManifest) -> int:
    """Input rows whose outcome is safe: those of published shards, and those that the journals of open shards name."""
    job = JobFolder(path)
    numbers = sorted({shard for part in manifest.parts for shard in part.shards})

    def of_shard(number: int) -> int:
        edition = edition_count(job, store, number)
        try:
            if edition:
                receipt = read_receipt(job, store, number, edition - 1)
                return receipt.rows + receipt.duplicates
            found = read_journal(job, store, number)
        except StorageError:  # the driver removed it meanwhile
            return 0
        return sum(ref.rows or 0 for ref in found.segments)

    with ThreadPoolExecutor(_LOOKUP_THREADS) as pool:
        return sum(pool.map(of_shard, numbers))


def _manifest(store: Storage, path: str) -> InputManifest | None:
    file = JobFolder(path).manifest_path()
    return read_record(store, InputManifest, file) if store.exists(file) else None
