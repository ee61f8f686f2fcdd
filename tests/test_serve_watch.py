"""The watch of a front: overrides, CURRENT and the canary are looked at by the clock, whatever the front waits for."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fronts import Front
from headtail.adapters.storage import Storage
from headtail.core.task import Task
from headtail.releases import canary, release
from headtail.releases.overrides import load_overrides, set_override
from headtail.stages import serve
from headtail.stages.serve import student_link
from headtail.stages.serve.answerer import OpenRelease
from headtail.stages.serve.front import watch as watch_module
from headtail.stages.serve.front.link import StudentLink
from headtail.stages.serve.front.watch import ReleaseWatch
from headtail.stages.serve.student_link import FrontAddress
from test_serve import published, segments
from test_serve_link import OTHER, Pupil, linked, listening, until
from timescale import limit

REFRESH_S = 0.2
NEVER = "distill/aaaaaaaaaaaaaaaa"  # a student that does not come


@pytest.fixture(autouse=True)
def _frequent_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Students report ten times while a front looks once, as 2 s are to 5 s, and more so."""
    monkeypatch.setattr(student_link, "REPORT_S", REFRESH_S / 10)


@asynccontextmanager
async def following(
    store: Storage, tmp_path: Path, task: Task, **options: Any
) -> AsyncIterator[tuple[Front, StudentLink, FrontAddress, ReleaseWatch]]:
    """A front that follows, its student connected by a real link."""
    settings: dict[str, Any] = {"refresh_s": REFRESH_S, "swap_wait_s": limit(120), **options}
    async with listening(store, tmp_path, **settings) as (front, link, address), linked(Pupil(task), [address]):
        await until(lambda: link.connections)
        watch = ReleaseWatch(store, front.answerer, serve.Config(**settings), front.counters, link, folder=tmp_path)
        task_ = asyncio.create_task(watch.follow())
        try:
            yield front, link, address, watch
        finally:
            task_.cancel()


def decide(store: Storage, query: str) -> None:
    set_override(store, query, json.dumps(segments(query, "name")), who="ada", why="it is a name")


def test_a_front_that_waits_for_a_student_looks_by_the_clock(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    """New overrides are served during the wait, and a release that is taken back is not served when its student comes after all."""
    first = published(store, tmp_path, segmentation)

    async def go() -> None:
        async with following(store, tmp_path, segmentation) as (front, link, address, _):
            second = published(store, tmp_path, segmentation, ["pizza near me", "new"], student=OTHER)
            await asyncio.sleep(3 * REFRESH_S)
            decide(store, "pizza near me")
            await until(lambda: front.answerer.served.find("pizza near me").source == "human_override")  # type: ignore[union-attr]
            assert front.answerer.served.release.id == first.id
            release.rollback(store)
            await asyncio.sleep(5 * REFRESH_S)
            served = set()
            async with linked(Pupil(segmentation, OTHER), [address]):
                await until(lambda: len(link.connections) == 2)
                for _ in range(40):
                    served.add(front.answerer.served.release.id)
                    await asyncio.sleep(REFRESH_S / 20)
                assert served == {first.id}
                release.promote(store, second.id)
                await until(lambda: front.answerer.served.release.id == second.id)
                assert front.answerer.served.find("pizza near me").source == "human_override"  # type: ignore[union-attr]

    asyncio.run(go())


def test_current_is_read_again_before_a_release_is_served(
    store: Storage, tmp_path: Path, segmentation: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken back within the last look: after the student came, before the swap."""
    first = published(store, tmp_path, segmentation)
    loads = load_overrides

    async def go() -> None:
        async with listening(store, tmp_path) as (front, _, _address):
            published(store, tmp_path, segmentation, ["new"])

            def load(*arguments: Any) -> Any:
                if front.answerer.served.release.id != release.current_id(store) and opened.is_set():
                    release.rollback(store)
                return loads(*arguments)

            opened, opens = threading.Event(), watch_module.open_served

            def open_served(*arguments: Any) -> OpenRelease:
                found = opens(*arguments)
                opened.set()
                return found

            monkeypatch.setattr(watch_module, "open_served", open_served)
            monkeypatch.setattr(watch_module, "load_overrides", load)
            assert not await front.watch.refresh()
            assert front.answerer.served.release.id == first.id

    asyncio.run(go())


def test_while_a_snapshot_is_fetched_overrides_and_a_rollback_are_followed(
    store: Storage, tmp_path: Path, segmentation: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fetch of the third release takes minutes: the front goes back to the first one meanwhile."""
    releases = [published(store, tmp_path, segmentation, [query], student="").id for query in ("one", "two")]
    slow, opens = threading.Event(), watch_module.open_served

    async def go() -> None:
        async with following(store, tmp_path, segmentation) as (front, _, _address, _watch):
            third = published(store, tmp_path, segmentation, ["three"], student="").id

            def open_served(store: Storage, ref: str, *arguments: Any) -> OpenRelease:
                if ref == third:
                    assert slow.wait(limit(60))
                return opens(store, ref, *arguments)

            monkeypatch.setattr(watch_module, "open_served", open_served)
            try:
                await asyncio.sleep(3 * REFRESH_S)
                decide(store, "pizza")
                await until(lambda: front.answerer.served.find("pizza") is not None)
                assert front.answerer.served.release.id == releases[1]
                release.promote(store, releases[0])
                await until(lambda: front.answerer.served.release.id == releases[0])
            finally:
                slow.set()
            await asyncio.sleep(3 * REFRESH_S)
            assert front.answerer.served.release.id == releases[0]

    asyncio.run(go())


def test_a_canary_is_followed_while_a_front_waits(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    """A canary that waits for its student has the overrides that were given meanwhile; one that ended while a release waits is ended."""
    champion = published(store, tmp_path, segmentation)
    trial = release.make_release(store, snapshot=champion.snapshot, task=segmentation, student=OTHER)

    async def go() -> None:
        async with following(store, tmp_path, segmentation) as (front, _, address, watch):
            canary.start_canary(store, trial.id, 0.5, who="ada")
            await until(lambda: watch._trial is not None)
            assert front.answerer.split is None
            decide(store, "pizza")
            await until(lambda: front.answerer.served.find("pizza") is not None)
            async with linked(Pupil(segmentation, OTHER), [address]):
                await until(lambda: front.answerer.split is not None)
                assert watch._split is not None
                assert watch._split.canary.find("pizza") is not None, "opened before the override was given"
                decide(store, "sushi")
                await until(lambda: watch._split is not None and watch._split.canary.find("sushi") is not None)
                published(store, tmp_path, segmentation, ["new"], student=NEVER)
                await asyncio.sleep(2 * REFRESH_S)
                release.promote(store, champion.id)
                canary.stop_canary(store, who="ada")
                await until(lambda: front.answerer.split is None)

    asyncio.run(go())


def test_the_copy_of_a_snapshot_stays_for_a_rollback_as_long_as_the_student(
    store: Storage, tmp_path: Path, segmentation: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollback within `keep_student_s` fetches nothing; after it the old copy is gone."""
    first = published(store, tmp_path, segmentation, ["one"])
    (copies := tmp_path / "copies").mkdir()
    front = Front(store, serve.Config(cache_dir=str(copies), keep_student_s=30.0), tmp_path)
    clock = [time.monotonic()]
    monkeypatch.setattr("headtail.stages.serve.front.watch.time.monotonic", lambda: clock[0])
    second = published(store, tmp_path, segmentation, ["two"])

    def look() -> set[str]:
        asyncio.run(front.watch.refresh())
        return {path.name for path in (copies / "snapshots").iterdir()}

    both = {first.snapshot, second.snapshot}
    assert look() == both
    assert front.answerer.served.release.id == second.id
    clock[0] += 29
    assert look() == both
    fetched = [(copies / "snapshots" / first.snapshot / "lmdb" / "data.mdb").stat().st_ino]
    release.rollback(store)
    assert look() == both
    assert front.answerer.served.release.id == first.id
    fetched.append((copies / "snapshots" / first.snapshot / "lmdb" / "data.mdb").stat().st_ino)
    assert fetched[0] == fetched[1], "fetched again"
    clock[0] += 29
    assert look() == both
    clock[0] += 2
    assert look() == {first.snapshot}
    assert front.ask("one").json()["cached"]


def test_one_look_that_fails_holds_up_no_other(
    store: Storage, tmp_path: Path, segmentation: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    published(store, tmp_path, segmentation)
    loads = load_overrides

    def broken(*_: Any) -> Any:
        raise OSError("away")

    async def go() -> None:
        async with following(store, tmp_path, segmentation) as (front, _, _address, _watch):
            monkeypatch.setattr(watch_module, "load_overrides", broken)
            monkeypatch.setattr(watch_module, "read_canary", broken)
            await until(lambda: "cannot follow overrides" in caplog.text and "cannot follow the canary" in caplog.text)
            assert front.count("refresh_failures") >= 2
            monkeypatch.setattr(watch_module, "load_overrides", loads)
            third = published(store, tmp_path, segmentation, ["three"], student="")
            await until(lambda: front.answerer.served.release.id == third.id)

    asyncio.run(go())
