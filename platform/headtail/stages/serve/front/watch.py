"""Which release a front serves: opened at the start, and swapped whole when CURRENT moves.

In: a store, the answerer, the link to the students. Out: the answerer's `served`, set in one assignment. A new release is served as soon
as its student is connected, or `swap_wait_s` is over; a rollback is served at once. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import logging
import shutil
import tempfile
import time
from pathlib import Path

from headtail.adapters.storage import Storage
from headtail.cache import open_snapshot
from headtail.core.secrets import hide
from headtail.releases import release as releases
from headtail.releases.canary import CanaryRecord, read_canary
from headtail.releases.overrides import load_overrides
from headtail.stages.serve.answerer import Answerer, OpenRelease
from headtail.stages.serve.config import Config
from headtail.stages.serve.dynamic import DynamicTier
from headtail.stages.serve.front.counters import Counters, id_number
from headtail.stages.serve.front.link import StudentLink
from headtail.stages.serve.front.split import CanarySplit, open_seen

log = logging.getLogger("headtail.serve")


def open_served(store: Storage, ref: str, cache_dir: Path | None = None, allow_code: bool = False) -> OpenRelease:
    """A release, opened: its snapshot mapped, its task rebuilt, people's overrides laid over it.

    `cache_dir`: where snapshots of S3 are fetched to; `allow_code`: whether the task's own output check may run.
    """
    found = releases.load_release(store, ref)
    if cache_dir is None and store.local_path("") is None:
        cache_dir = Path(tempfile.mkdtemp(prefix="headtail-serve-"))
    cache = open_snapshot(store, found.snapshot, cache_dir)
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    guard = releases.open_guard(store, found, allow_code)
    overrides = load_overrides(store, found.task)
    return OpenRelease(found, cache, guard.task, since, not releases.rolled_back(store), overrides, guard if guard.active else None)


class ReleaseWatch:
    """Keeps an answerer at CURRENT, and at people's overrides. `link`: None when no student is started; `dynamic`: the tier that is told
    which queries were deleted; `folder`: where the server's processes share what they count of a canary; None: none is followed."""

    def __init__(
        self,
        store: Storage,
        answerer: Answerer,
        config: Config,
        counters: Counters,
        link: StudentLink | None = None,
        dynamic: DynamicTier | None = None,
        folder: Path | None = None,
    ) -> None:
        self._store, self._answerer, self._config, self._counters, self._link = store, answerer, config, counters, link
        self._dynamic, self._folder = dynamic, folder
        self._record: CanaryRecord | None = None
        self._split: CanarySplit | None = None
        self._trial: tuple[OpenRelease, float] | None = None  # the canary's release, and since when it waits for its student
        self._swap(answerer.served)
        counters.set("swapped_at", time.time())

    async def follow(self) -> None:
        """Look at CURRENT every `refresh_s` seconds; a look that fails leaves what is served as it is."""
        while True:
            await asyncio.sleep(self._config.refresh_s)
            try:
                if await self.refresh():
                    log.warning("now serving release %s", self._answerer.served.release.id)
                await self.refresh_canary()
            except Exception as error:  # a store out of reach, a release half copied: keep serving
                self._counters.add("refresh_failures")
                log.warning("cannot follow CURRENT, still serving %s: %s", self._answerer.served.release.id, hide(str(error)))

    async def refresh(self) -> bool:
        """Take new overrides, and follow CURRENT if it moved; True when another release is served now."""
        await self._refresh_overrides()
        old = self._answerer.served
        wanted = await asyncio.to_thread(releases.current_id, self._store) if self._config.release == "current" else ""
        if not wanted or wanted == old.release.id:
            return False
        served = await asyncio.to_thread(open_served, self._store, wanted, self._config.copies, self._config.allow_task_code)
        if not await self._student_is_there(served, old):
            return False  # CURRENT moved on meanwhile
        overrides = await asyncio.to_thread(load_overrides, self._store, served.task.name, served.overrides)  # also those of the wait
        self._swap(dataclasses.replace(served, overrides=overrides))
        self._drop_copy(old)
        return True

    def _drop_copy(self, old: OpenRelease) -> None:
        """Remove the local copy of a snapshot that is served no more."""
        ours = self._store.local_path("") is None or self._config.copies is not None  # a copy of our own, not the store's file
        if ours and old.cache.folder != self._answerer.served.cache.folder:
            shutil.rmtree(old.cache.folder, ignore_errors=True)  # a mapped file stays readable until it is closed

    async def _student_is_there(self, served: OpenRelease, old: OpenRelease) -> bool:
        """Wait for the release's own student, at most `swap_wait_s`, as long as the old release has its own. False when CURRENT names
        another release by then."""
        link = self._link
        if link is None or not served.release.student or not served.borrows:
            return True
        end = time.monotonic() + self._config.swap_wait_s
        while link.has(old) and not link.has(served) and (left := end - time.monotonic()) > 0:
            link.changed.clear()
            try:
                async with asyncio.timeout(min(left, self._config.refresh_s)):
                    await link.changed.wait()
            except TimeoutError:
                await self._refresh_overrides()  # a student may take minutes to start
                if await asyncio.to_thread(releases.current_id, self._store) != served.release.id:
                    return False
        return True

    async def refresh_canary(self) -> None:
        """Follow the canary: its share is in force once its student is there, or `swap_wait_s` is over."""
        if self._folder is None or self._config.release != "current":
            return
        self._record = record = await asyncio.to_thread(read_canary, self._store, self._record)
        answerer, split = self._answerer, self._split
        if record is None or record.state != "running" or record.champion != answerer.served.release.id:
            answerer.split = self._split = None
            if self._trial is not None:
                self._drop_copy(self._trial[0])
            self._trial = None
        elif split is not None and (split.record.salt, split.record.canary) == (record.salt, record.canary):
            answerer.split = self._split = dataclasses.replace(split, record=record)  # its share may be another one now
        elif (canary := await self._open_trial(record.canary)) is not None:
            answerer.split = self._split = CanarySplit(record, canary, open_seen(self._folder, record.salt), self._counters)
            log.warning("release %s answers %.3g of the queries", record.canary, record.share)
        self._counters.set("canary", id_number(record.canary) if record is not None and self._split is not None else 0)

    async def _open_trial(self, wanted: str) -> OpenRelease | None:
        """The canary's release, opened; None while its student is awaited."""
        if self._trial is None or self._trial[0].release.id != wanted:
            served = await asyncio.to_thread(open_served, self._store, wanted, self._config.copies, self._config.allow_task_code)
            self._trial = served, time.monotonic()
        served, since = self._trial
        awaited = self._link is not None and served.release.student and not self._link.has(served)
        return None if awaited and time.monotonic() - since < self._config.swap_wait_s else served

    async def _refresh_overrides(self) -> None:
        served = self._answerer.served
        found = await asyncio.to_thread(load_overrides, self._store, served.task.name, served.overrides)
        if (found.number, found.answers.keys()) != (served.overrides.number, served.overrides.answers.keys()):  # new, or one has ended
            self._swap(dataclasses.replace(served, overrides=found))
            if self._split is not None:
                self._answerer.split = self._split = self._split.with_overrides(found)

    def _swap(self, served: OpenRelease) -> None:
        if self._answerer.served.release.id != served.release.id:
            self._counters.set("swapped_at", time.time())
        self._answerer.served = served  # one assignment, between two awaits: no request sees half of it
        if self._dynamic is not None:
            self._dynamic.deleted = served.overrides.deleted
        for name, value in (
            ("release", id_number(served.release.id)),
            ("snapshot", id_number(served.release.snapshot)),
            ("snapshot_rows", served.cache.manifest.rows),
            ("published_at", datetime.datetime.fromisoformat(served.cache.manifest.created).timestamp()),
        ):
            self._counters.set(name, value)
