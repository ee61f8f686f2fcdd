"""Who drives a job: a second driver of the same job waits, so that no row is paid for twice.

In: a job's folder. Out: a context within which this process holds the job's lease. A lease is a numbered file, made by a
conditional create and renewed every BEAT_S. It ends with its driver, when the holder's process is gone from this machine, or
when it was not renewed for SILENT_S by the waiting driver's clock; of several that wait, one gets the next number. Exactly-once
does not depend on it: a driver that was taken for dead may still publish, and the first to publish wins.
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from headtail.adapters import append_log
from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, read_record, retry_call
from headtail.core.config import Config
from headtail.core.errors import StorageError

BEAT_S = 10.0
SILENT_S = 60.0
LOOK_S = 1.0


class Lease(Config):
    """Who drives, or drove, a job."""

    host: str = Field(description="name of the machine")
    machine: str = Field("", description="boot and process namespace that `pid` belongs to; empty: not known")
    pid: int = Field(description="process id")
    process: str = Field("", description="when the process started, in clock ticks since boot")
    since: str = Field(description="UTC, ISO 8601")
    beat: int = Field(0, ge=0, description="how often it was renewed")
    ended: bool = Field(False, description="whether its driver ended, well or with an error")


@contextmanager
def hold_lease(store: Storage, path: str) -> Iterator[None]:
    """Within: this process drives the job at `path`. Waits as long as another does, and says so."""
    folder = f"{path}/work/drivers"
    number, lease = _acquire(store, folder)
    over = threading.Event()

    def write(**changes: object) -> None:
        try:
            store.replace(append_log.entry_path(folder, number), _data(lease, **changes))
        except StorageError as error:  # what it guards is money, not rows: the job itself meets the store's faults
            say(f"  the job's lease could not be written; another driver may have to wait, or may take this driver for dead: {error.what}")

    def renew() -> None:
        beat = 0
        while not over.wait(BEAT_S):
            beat += 1
            write(beat=beat)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        write(ended=True)


def _acquire(store: Storage, folder: str) -> tuple[int, Lease]:
    number, seen, seen_at, told = append_log.last_number(store, folder), (-1, -1), time.monotonic(), False
    while True:
        while store.exists(append_log.entry_path(folder, number + 1)):
            number += 1
        holder = _read(store, folder, number) if number else None
        if holder is not None and (number, holder.beat) != seen:
            seen, seen_at = (number, holder.beat), time.monotonic()
        if holder is None or holder.ended or holder_gone(holder) or time.monotonic() - seen_at >= SILENT_S:
            mine = _mine()
            if store.create(append_log.entry_path(folder, number + 1), _data(mine)):
                return number + 1, mine
            continue  # another that waited was first
        if not told:
            told = True
            who = f"process {holder.pid} on {holder.host}, since {holder.since}"
            say(f"  another driver runs this job ({who}): waiting for it to end, or to be silent for {SILENT_S:g} s; Ctrl-C ends this one")
        time.sleep(LOOK_S)


def last_holder(store: Storage, path: str) -> tuple[Lease, float] | None:
    """The newest lease of the job at `path`, and seconds since it was written, by the store's clock against ours. None: there is none."""
    folder = f"{path}/work/drivers"
    number = append_log.last_number(store, folder)
    if not number:
        return None
    lease, file = _read(store, folder, number), append_log.entry_path(folder, number)
    written = retry_call(lambda: store.filesystem.get_file_info(store.full(file))).mtime
    return lease, max(0.0, (datetime.datetime.now(datetime.UTC) - written).total_seconds()) if written else 0.0


def holder_gone(lease: Lease) -> bool:
    """Whether the holder's process is surely gone. One on another machine cannot be seen from here."""
    return bool(lease.machine) and lease.machine == _machine() and _process(lease.pid) != lease.process


def _mine() -> Lease:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Lease(host=socket.gethostname(), machine=_machine(), pid=os.getpid(), process=_process(os.getpid()), since=now)


def _machine() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return ""


def _process(pid: int) -> str:
    """When a process started; empty when there is none, or none that still runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # from field 3 on, see proc(5)
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _read(store: Storage, folder: str, number: int) -> Lease:
    path = append_log.entry_path(folder, number)
    return read_record(store, Lease, path)


def _data(lease: Lease, **changes: object) -> bytes:
    return lease.model_copy(update=changes).model_dump_json().encode()
