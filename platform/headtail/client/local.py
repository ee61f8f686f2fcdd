"""The local half of a client: the current release's snapshot, looked up in this process, with people's overrides laid over it.

In: a query. Out: its Answer when an override or the snapshot has it, else None. A thread looks for new overrides and at CURRENT; a new
snapshot is opened beside the old one and then takes its place in one assignment. While a canary runs, its snapshot answers the queries
that the servers would give it too. When the store cannot be reached, the open snapshot stays. Knows nothing of servers.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import NamedTuple

from headtail.adapters.storage import open_existing
from headtail.cache import Cache, open_snapshot
from headtail.client.answer import Answer, ClientError
from headtail.core.keys import query_key
from headtail.core.query import InvalidQuery, check_query
from headtail.core.rows import Source
from headtail.core.secrets import hide
from headtail.core.task import Task
from headtail.releases import canary
from headtail.releases import release as releases
from headtail.releases.overrides import Overrides, load_overrides

log = logging.getLogger("headtail.client")


class _Opened(NamedTuple):
    release: str
    snapshot: str
    cache: Cache
    task: Task
    overrides: Overrides


def clean_query(query: str, max_chars: int) -> str:
    """The text that a query is looked up by: normalised, without personal data. ClientError when the server would refuse it too."""
    if not isinstance(query, str):
        raise ClientError("invalid", f"the query is no text: {type(query).__name__}", field="query", fix="give a str")
    try:
        return check_query(query, max_chars)
    except InvalidQuery as error:
        raise ClientError("invalid", error.what, field="query", fix=error.fix) from None


class LocalHead:
    """An open snapshot that follows CURRENT. Safe to share between threads; after a fork the child follows it by itself.

    `refresh_failures`: looks at the store that failed.
    """

    def __init__(self, root: str, cache_dir: str = "", refresh_s: float = 5.0) -> None:
        self._store = open_existing(root)
        self._copies = Path(cache_dir).expanduser() if cache_dir else None
        self._every, self.refresh_failures = refresh_s, 0
        self._opened = self._open(releases.current_release(self._store).id)
        self._record: canary.CanaryRecord | None = None
        self._trial: tuple[canary.CanaryRecord, _Opened] | None = None
        self._follow_canary()
        self._start()

    @property
    def release(self) -> str:
        """Id of the release that answers."""
        return self._opened.release

    def look_up(self, query: str, clean: str) -> Answer | None:
        """The answer to a query whose clean text is `clean`, or None."""
        if self._pid != os.getpid():
            self._start()
        opened, trial = self._opened, self._trial
        if trial is not None and canary.assign(trial[0], query_key(clean), opened.release) == trial[1].release:
            opened = trial[1]
        found = opened.cache.find_stored(clean)
        if opened.overrides:
            found = opened.overrides.resolve(query_key(clean), found, opened.task.file.redacted == "cached")
        if found is None:
            return None
        confidence = None if found.confidence is None else round(found.confidence, 4)
        return Answer(
            query, clean, found.plain_answer(), found.source, True, False, confidence, found.answer_key.hex(),
            opened.release, opened.snapshot, "", "", True,
        )  # fmt: skip

    def fallback(self, query: str, clean: str, reason: str) -> Answer:
        """The task's fallback, marked degraded."""
        opened = self._opened
        return Answer(
            query, clean, opened.task.fallback(clean), Source.FALLBACK, False, True, None, None,
            opened.release, opened.snapshot, reason, "", True,
        )  # fmt: skip

    def refresh(self) -> bool:
        """Take new overrides, follow CURRENT if it moved, and the canary; True when another release is current now."""
        with self._refreshing:  # a caller and the thread may refresh at the same time
            old = self._opened
            self._opened = old._replace(overrides=load_overrides(self._store, old.task.name, old.overrides))
            found = releases.current_id(self._store)
            moved = bool(found) and found != old.release
            if moved:
                self._opened = self._open(found)
            before = self._trial[1] if self._trial else old
            self._follow_canary()
            self._remove_copies(old, before)
            return moved

    def _follow_canary(self) -> None:
        """Open the canary's snapshot while it runs."""
        self._record, opened = canary.read_canary(self._store, self._record), self._opened
        if self._record is None or self._record.state != "running" or self._record.champion != opened.release:
            self._trial = None
            return
        held = self._trial[1] if self._trial else None
        trial = held if held is not None and held.release == self._record.canary else self._open(self._record.canary)
        self._trial = self._record, trial._replace(overrides=opened.overrides)

    def _remove_copies(self, *old: _Opened) -> None:
        """Remove our own copies of snapshots that are not open any more; a mapped file stays readable until it is closed."""
        needed = {self._opened.snapshot, *([self._trial[1].snapshot] if self._trial else [])}
        for one in old if self._copies is not None else ():
            if one.snapshot not in needed:
                shutil.rmtree(one.cache.folder, ignore_errors=True)

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive() and self._pid == os.getpid():
            self._thread.join()

    def _open(self, release: str) -> _Opened:
        record = releases.load_release(self._store, release)
        cache = open_snapshot(self._store, record.snapshot, self._copies)
        task = releases.open_task(record)
        return _Opened(record.id, record.snapshot, cache, task, load_overrides(self._store, task.name))

    def _start(self) -> None:
        self._pid, self._stop, self._refreshing = (
            os.getpid(),
            threading.Event(),
            threading.Lock(),
        )  # a parent's thread may hold the old lock
        self._thread = threading.Thread(target=self._follow, args=(self._stop,), name="headtail-refresh", daemon=True)
        self._thread.start()

    def _follow(self, stop: threading.Event) -> None:
        while not stop.wait(self._every):
            try:
                if self.refresh():
                    log.info("now answering from release %s", self._opened.release)
            except Exception as error:  # the store cannot be reached, or a snapshot is half copied: go on with the open one
                self.refresh_failures += 1
                log.warning("cannot follow CURRENT, still answering from %s: %s", self._opened.release, hide(str(error)))
