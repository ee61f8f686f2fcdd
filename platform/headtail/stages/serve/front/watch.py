"""Which release a front serves: opened at the start, and swapped whole when CURRENT moves.

In: a store, the answerer, the link to the students. Out: the answerer's `served`, set in one assignment. A new release is served as soon
as its student is connected, or `swap_wait_s` is over; a rollback is served at once. Overrides, CURRENT and the canary are looked at every
`refresh_s`, also while a snapshot is fetched or a student is awaited. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import logging
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

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
from headtail.stages.serve.front.split import CanarySplit
from headtail.stages.serve.run_folder import open_seen

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
    """Keeps an answerer at CURRENT, at people's overrides and at the canary. Each of the three is looked at by the clock, whatever the
    others wait for. `link`: None when no student is started; `dynamic`: the tier that is told which queries were deleted; `folder`: where
    the server's processes share what they count of a canary; None: none is followed."""

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
        self._opening: dict[str, asyncio.Task[OpenRelease]] = {}  # by release
        self._left: dict[Path, float] = {}  # copies of snapshots that are served no more, and since when
        self._swap(answerer.served)
        counters.set("swapped_at", time.time())

    async def follow(self) -> None:
        """Look every `refresh_s` seconds; a look that fails leaves what is served as it is."""
        looks = {"overrides": self._refresh_overrides, "CURRENT": self._refresh_release, "the canary": self.refresh_canary}
        await asyncio.gather(*(self._repeat(what, look) for what, look in looks.items()))

    async def _repeat(self, what: str, look: Callable[[], Awaitable[object]]) -> None:
        while True:
            await asyncio.sleep(self._config.refresh_s)
            try:
                await look()
            except Exception as error:  # a store out of reach, a release half copied: keep serving
                self._counters.add("refresh_failures")
                log.warning("cannot follow %s, still serving %s: %s", what, self._answerer.served.release.id, hide(str(error)))

    async def refresh(self) -> bool:
        """Take new overrides, and follow CURRENT if it moved; True when another release is served now."""
        await self._refresh_overrides()
        return await self._refresh_release()

    async def _refresh_release(self) -> bool:
        """Follow CURRENT. A release that it names no more is not served, also when it was taken back while its student was awaited."""
        if self._config.release != "current":
            return False
        old, wanted = self._answerer.served, await self._current()
        moved = False
        if wanted not in ("", old.release.id):
            moved = await self._follow_to(wanted, old)
        await self._drop_copies()
        return moved

    async def _follow_to(self, wanted: str, old: OpenRelease) -> bool:
        opening = self._open(wanted)
        if not await self._wait_while_current(wanted, opening):
            return False  # if it is opened all the same, `_opened` puts its copy aside
        served = await opening
        self._opening.pop(wanted, None)
        waiting = asyncio.create_task(self._wait_for_student(served, old))
        try:
            there = await self._wait_while_current(wanted, waiting)
        finally:
            waiting.cancel()
        overrides = await asyncio.to_thread(load_overrides, self._store, served.task.name, served.overrides)  # also those of the wait
        if not there or await self._current() != wanted:
            self._leave(served)
            return False
        now = self._answerer.served
        newer = now.task.name == served.task.name and now.overrides.number > overrides.number
        self._swap(dataclasses.replace(served, overrides=now.overrides if newer else overrides))
        self._leave(old)
        log.warning("now serving release %s", wanted)
        return True

    async def _wait_while_current(self, wanted: str, work: asyncio.Task[Any]) -> bool:
        """Wait for `work`; every `refresh_s`, look whether CURRENT still names the release. False as soon as it does not."""
        while True:
            await asyncio.wait([work], timeout=self._config.refresh_s)
            if work.done():
                await work  # raises what it raised
                return True
            if await self._current() != wanted:
                return False

    async def _current(self) -> str:
        return await asyncio.to_thread(releases.current_id, self._store)

    async def _wait_for_student(self, served: OpenRelease, old: OpenRelease) -> None:
        """Until the release's own student is there, at most `swap_wait_s`, and as long as the old release has its own."""
        link = self._link
        if link is None or not served.release.student or not served.borrows:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.swap_wait_s):
                while link.has(old) and not link.has(served):
                    link.changed.clear()
                    await link.changed.wait()

    def _open(self, wanted: str) -> asyncio.Task[OpenRelease]:
        """A release that is being opened, which may take minutes where its snapshot is fetched."""
        opening = self._opening.get(wanted)
        if opening is None:
            arguments = self._store, wanted, self._config.copies, self._config.allow_task_code
            opening = self._opening[wanted] = asyncio.create_task(asyncio.to_thread(open_served, *arguments))
            opening.add_done_callback(lambda done: self._opened(wanted, done))
        return opening

    def _opened(self, wanted: str, opening: asyncio.Task[OpenRelease]) -> None:
        self._opening.pop(wanted, None)
        if not opening.cancelled() and opening.exception() is None:
            self._leave(opening.result())  # whoever waits for it uses it now

    def _leave(self, served: OpenRelease) -> None:
        """Remember that the local copy of a snapshot is used no more, if it is not."""
        if self._store.local_path("") is None or self._config.copies is not None:  # a copy of our own, not the store's file
            self._left[served.cache.folder] = time.monotonic()

    async def _drop_copies(self) -> None:
        """Remove copies that were left `keep_student_s` ago: until then a rollback finds them, as it finds the student."""
        used = {self._answerer.served.cache.folder, *([self._trial[0].cache.folder] if self._trial is not None else [])}
        self._left = {folder: since for folder, since in self._left.items() if folder not in used}
        if self._opening:
            return  # one of them may be opened at this moment
        for folder, since in list(self._left.items()):
            if time.monotonic() - since >= self._config.keep_student_s:
                del self._left[folder]
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)  # a mapped file stays readable until it is closed

    async def refresh_canary(self) -> None:
        """Follow the canary: its share is in force once its student is there, or `swap_wait_s` is over."""
        if self._folder is None or self._config.release != "current":
            return
        self._record = record = await asyncio.to_thread(read_canary, self._store, self._record)
        answerer, split = self._answerer, self._split
        if record is None or record.state != "running" or record.champion != answerer.served.release.id:
            answerer.split = self._split = None
            if self._trial is not None:
                self._leave(self._trial[0])
            self._trial = None
        elif split is not None and (split.record.salt, split.record.canary) == (record.salt, record.canary):
            answerer.split = self._split = dataclasses.replace(split, record=record)  # its share may be another one now
        elif (canary := await self._open_trial(record.canary)) is not None:
            canary = dataclasses.replace(canary, overrides=answerer.served.overrides)  # also those of the wait
            answerer.split = self._split = CanarySplit(record, canary, open_seen(self._folder, record.salt), self._counters)
            log.warning("release %s answers %.3g of the queries", record.canary, record.share)
        self._counters.set("canary", id_number(record.canary) if record is not None and self._split is not None else 0)

    async def _open_trial(self, wanted: str) -> OpenRelease | None:
        """The canary's release, opened; None while its snapshot is fetched or its student is awaited: the record is then read again."""
        if self._trial is None or self._trial[0].release.id != wanted:
            opening = self._open(wanted)
            await asyncio.wait([opening], timeout=self._config.refresh_s)
            if not opening.done():
                return None
            self._trial = opening.result(), time.monotonic()
        served, since = self._trial
        awaited = self._link is not None and served.release.student and not self._link.has(served)
        return None if awaited and time.monotonic() - since < self._config.swap_wait_s else served

    async def _refresh_overrides(self) -> None:
        name, known = self._answerer.served.task.name, self._answerer.served.overrides
        found = await asyncio.to_thread(load_overrides, self._store, name, known)
        served = self._answerer.served  # it may have been swapped meanwhile
        if served.task.name != name or served.overrides.number > found.number:
            return
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
