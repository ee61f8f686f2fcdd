"""The link between fronts and students: misses multiplexed over connections that students open, and what happens when one is gone."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fronts import Front
from headtail.adapters.storage import Storage
from headtail.core.task import Task
from headtail.releases import release
from headtail.stages import serve
from headtail.stages.serve.answerer import ANY_RELEASE, RealtimeReply, Reply
from headtail.stages.serve.frames import (
    AnswerRow,
    Answers,
    AskMisses,
    AskRow,
    BadFrame,
    Cancel,
    FrameBuffer,
    Hello,
    Message,
    encode_frame,
)
from headtail.stages.serve.front.link import PER_TURN, StudentLink
from headtail.stages.serve.student_link import AnswerQuery, FrontAddress, FrontLinks
from headtail.stages.serve.student_tier import StudentTier
from ports import free_port
from test_serve import STUDENT, published, segments
from timescale import limit

OTHER = "distill/fedcba9876543210"


class Pupil:
    """A student in this process. `gate`: closed, it answers nothing."""

    def __init__(self, task: Task, stands_for: str = STUDENT, label: str = "name") -> None:
        self.task, self.stands_for, self.label = task, stands_for, label
        self.seen: list[str] = []
        self.cancelled: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def answer(self, query: str, side_inputs: Mapping[str, Sequence[str]]) -> RealtimeReply:
        self.seen.append(query)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(query)
            raise
        if query == "break":
            raise ValueError("broken")
        return RealtimeReply(json.dumps(segments(query, self.label)), "stop", 0.5, "cd" * 16, self.stands_for, self.task.fingerprint)

    def hello(self, **changes: Any) -> Hello:
        return Hello(**{"student": self.stands_for, "task": self.task.fingerprint, "model": "m", **changes})


@asynccontextmanager
async def linked(
    pupil: Pupil, addresses: Sequence[FrontAddress], answer: AnswerQuery | None = None, **hello: Any
) -> AsyncIterator[FrontLinks]:
    links = FrontLinks(addresses, pupil.hello(**hello), answer or pupil.answer)
    links.start()
    try:
        yield links
    finally:
        await links.close()


@asynccontextmanager
async def listening(
    store: Storage, tmp_path: Path, name: str = "s", **options: Any
) -> AsyncIterator[tuple[Front, StudentLink, FrontAddress]]:
    """A front whose misses go over a link. It lives in a short folder: the path of a Unix socket has 107 bytes."""
    config = serve.Config(**{"realtime_timeout_ms": int(1000 * limit(5)), "refresh_s": 0.05, **options})
    link = StudentLink(config.realtime_timeout_ms / 1000)
    socket = tmp_path / name
    await link.listen(socket)
    front = Front(store, config, tmp_path, link.ask, link)
    try:
        yield front, link, FrontAddress(str(socket))
    finally:
        await link.close()


async def until(check: Any, seconds: float = 5) -> None:
    end = time.monotonic() + limit(seconds)
    while not check():
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.005)


async def ask(front: Front, query: str) -> Reply:
    return await front.answerer.answer(query)


# ---- frames

ROWS = st.lists(
    st.tuples(st.integers(0, 2**63), st.text(max_size=20), st.dictionaries(st.text(max_size=5), st.lists(st.text(max_size=5)))), max_size=5
)


@given(rows=ROWS, cuts=st.lists(st.integers(1, 50)))
def test_frames_come_out_as_they_went_in_however_they_are_cut(rows: list[Any], cuts: list[int]) -> None:
    sent: list[Message] = [
        AskMisses([AskRow(number, query, side_inputs, 1.5) for number, query, side_inputs in rows]),
        Cancel([row[0] for row in rows]),
        Hello("s", "t"),
        Answers([AnswerRow(1, None, "error")], 3),
    ]
    data, buffer, came, at = b"".join(map(encode_frame, sent)), FrameBuffer(), list[Message](), 0
    for cut in [*cuts, len(data)]:
        came += buffer.feed(data[at : at + cut])
        at += cut
    assert came == sent


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x02\x00\x00\x00\xc1\xc1", b"GET / HTTP/1.1\r\n\r\n"])
def test_what_is_no_frame_is_an_error(data: bytes) -> None:
    with pytest.raises(BadFrame):
        list(FrameBuffer().feed(data))


# ---- misses


def test_misses_that_come_together_go_in_one_frame_and_each_gets_its_own_answer(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)

    async def go() -> None:
        async with listening(store, tmp_path) as (front, link, address):
            link._counters = front.counters
            pupil = Pupil(segmentation)
            async with linked(pupil, [address]):
                await until(lambda: link.connections)
                replies = await asyncio.gather(*(ask(front, f"rare {i}") for i in range(40)))
                assert [reply.answer for reply in replies] == [segments(f"rare {i}", "name") for i in range(40)]
                assert {(reply.source, reply.reason) for reply in replies} == {("realtime_student", "")}
                assert front.count("student_misses") == 40
                assert front.count("student_frames") <= 3
                assert (await ask(front, "break")).reason == "error"
                assert (await ask(front, "after")).reason == ""
            await until(lambda: not link.connections)

    asyncio.run(go())


def test_a_front_does_other_things_between_the_answers_of_a_frame(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)
    seen: list[int] = []

    async def go() -> None:
        async with listening(store, tmp_path) as (front, link, address):
            pupil = Pupil(segmentation)
            pupil.gate.clear()
            async with linked(pupil, [address]):
                await until(lambda: link.connections)
                asks = [asyncio.create_task(ask(front, f"rare {i}")) for i in range(40)]
                await until(lambda: len(pupil.seen) == 40)
                pupil.gate.set()
                while not all(one.done() for one in asks):
                    seen.append(sum(one.done() for one in asks))
                    await asyncio.sleep(0)

    asyncio.run(go())
    steps = [later - before for before, later in itertools.pairwise([*seen, 40])]
    assert max(steps) <= 2 * PER_TURN
    assert sum(steps) == 40


def test_without_a_student_a_miss_is_unavailable_at_once(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)

    async def go() -> None:
        async with listening(store, tmp_path, realtime_timeout_ms=60_000) as (front, _, _address):
            reply = await ask(front, "rare")
            assert (reply.reason, reply.degraded) == ("unavailable", True)
            assert reply.latency_ms < limit(100)

    asyncio.run(go())


def test_a_student_that_dies_is_told_at_once_and_another_takes_its_misses(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)

    async def go() -> None:
        async with listening(store, tmp_path, realtime_timeout_ms=60_000) as (front, link, address):
            dying, living = Pupil(segmentation), Pupil(segmentation, label="topic")
            dying.gate.clear()
            async with linked(dying, [address]) as links:
                await until(lambda: len(link.connections) == 1)
                alone = asyncio.create_task(ask(front, "alone"))
                await until(lambda: dying.seen == ["alone"])
                started = time.perf_counter()
                next(iter(links._open)).abort()
                assert (await alone).reason == "unavailable"
                assert time.perf_counter() - started < limit(1)
                await until(lambda: len(link.connections) == 1)  # it connects again by itself
                async with linked(living, [address]):
                    await until(lambda: len(link.connections) == 2)
                    both = [asyncio.create_task(ask(front, f"q{i}")) for i in range(4)]
                    await until(lambda: len(dying.seen) + len(living.seen) == 5)
                    next(iter(links._open)).abort()
                    replies = await asyncio.gather(*both)
                    assert {reply.reason for reply in replies} == {""}
                    assert {reply.answer["segments"][0]["label"] for reply in replies} == {"topic"}

    asyncio.run(go())


def test_a_caller_who_leaves_and_a_time_that_is_over_free_the_student(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)

    async def go() -> None:
        async with listening(store, tmp_path, realtime_timeout_ms=300) as (front, link, address):
            pupil = Pupil(segmentation)
            pupil.gate.clear()
            async with linked(pupil, [address]) as links:
                await until(lambda: link.connections)
                leaving = asyncio.create_task(ask(front, "leaving"))
                await until(lambda: pupil.seen)
                leaving.cancel()
                await until(lambda: pupil.cancelled == ["leaving"])
                assert (await ask(front, "late")).reason == "timeout"
                await until(lambda: pupil.cancelled == ["leaving", "late"])
                assert (links.queue, front.answerer.in_flight, link.connections[0].pending) == (0, 0, {})
                pupil.gate.set()
                assert (await ask(front, "in time")).reason == ""

    asyncio.run(go())


def test_more_misses_than_may_wait_get_the_fallback_at_once(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)

    async def go() -> None:
        async with listening(store, tmp_path, max_misses=8) as (front, link, address):
            pupil = Pupil(segmentation)
            pupil.gate.clear()
            async with linked(pupil, [address]):
                await until(lambda: link.connections)
                waiting = [asyncio.create_task(ask(front, f"rare {i}")) for i in range(200)]
                await until(lambda: sum(task.done() for task in waiting) == 192)
                assert {task.result().reason for task in waiting if task.done()} == {"overloaded"}
                assert (await ask(front, "pizza near me")).cached
                await until(lambda: len(pupil.seen) == 8)
                pupil.gate.set()
                assert [reply.reason for reply in await asyncio.gather(*waiting)].count("") == 8

    asyncio.run(go())


# ---- over TCP


def test_over_tcp_a_student_needs_the_token(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)

    async def go() -> None:
        port = free_port()
        link = StudentLink(limit(5), token="secret")
        await link.listen(host="127.0.0.1", port=port)
        pupil, address = Pupil(segmentation), FrontAddress(str(tmp_path / "elsewhere" / "s"), "127.0.0.1", port)
        front = Front(store, serve.Config(), tmp_path, link.ask, link)
        async with linked(pupil, [address], token="guess"):
            await asyncio.sleep(0.2)
            assert link.connections == []
            assert (await ask(front, "rare")).reason == "unavailable"
        async with linked(pupil, [address._replace(socket="")], token="secret"):
            await until(lambda: link.connections)
            assert (await ask(front, "rare")).answer == segments("rare", "name")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(encode_frame(Answers([], 0)))  # before it said who it is
        assert await reader.read() == b""
        writer.close()
        await link.close()

    asyncio.run(go())


def test_a_front_that_comes_back_is_found_again_and_one_that_stays_away_is_bad_health(
    store: Storage, tmp_path: Path, segmentation: Task
) -> None:
    published(store, tmp_path, segmentation)

    async def go() -> None:
        pupil = Pupil(segmentation)
        async with linked(pupil, [FrontAddress(str(tmp_path / "s"))]) as links:
            links.check(30)  # not yet
            for _ in range(3):
                async with listening(store, tmp_path) as (front, link, _address):
                    await until(lambda link=link: link.connections)
                    links.check(0)
                    assert (await ask(front, "rare")).reason == ""
                await until(lambda: links.connected == 0)
            with pytest.raises(ConnectionError, match="no front process was reached"):
                links.check(0)

    asyncio.run(go())


# ---- releases


def test_a_release_is_served_when_its_student_is_there(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)

    async def go() -> None:
        async with listening(store, tmp_path, swap_wait_s=limit(30)) as (front, link, address), linked(Pupil(segmentation), [address]):
            await until(lambda: link.connections)
            second = published(store, tmp_path, segmentation, ["new"], student=OTHER)
            following = asyncio.create_task(front.watch.follow())
            await asyncio.sleep(0.4)
            assert (await ask(front, "new")).reason == ""  # the old release and its own student go on
            assert front.answerer.served.release.id != second.id
            async with linked(Pupil(segmentation, OTHER), [address]):
                await until(lambda: front.answerer.served.release.id == second.id)
                reply = await ask(front, "rare")
                assert (reply.release, reply.reason) == (second.id, "")
                assert (await ask(front, "new")).cached
            await until(lambda: len(link.connections) == 1)
            assert (await ask(front, "rare")).reason == "previous_student"
            following.cancel()

    asyncio.run(go())


def test_after_a_while_a_release_is_served_without_its_student(store: Storage, tmp_path: Path, segmentation: Task, intent: Task) -> None:
    published(store, tmp_path, segmentation)

    async def go() -> None:
        async with listening(store, tmp_path, swap_wait_s=0.2) as (front, link, address), linked(Pupil(segmentation), [address]):
            await until(lambda: link.connections)
            published(store, tmp_path, segmentation, ["new"], student=OTHER)
            assert await front.watch.refresh()
            assert (await ask(front, "rare")).reason == "previous_student"
            published(store, tmp_path, intent, ["new"], student=OTHER)
            assert await front.watch.refresh()
            reply = await ask(front, "rare")
            assert (reply.reason, reply.answer) == ("outdated", intent.fallback("rare"))

    asyncio.run(go())


@pytest.mark.parametrize("before, reason", [("", "no_student"), (OTHER, "unavailable")])
def test_a_rollback_is_served_at_once_and_never_uses_the_student_that_was_taken_back(
    store: Storage, tmp_path: Path, segmentation: Task, before: str, reason: str
) -> None:
    first = published(store, tmp_path, segmentation, student=before)
    published(store, tmp_path, segmentation, ["new"])

    async def go() -> None:
        async with listening(store, tmp_path, swap_wait_s=limit(60)) as (front, link, address), linked(Pupil(segmentation), [address]):
            await until(lambda: link.connections)
            assert (await ask(front, "rare")).reason == ""
            release.rollback(store)
            started = time.monotonic()
            assert await front.watch.refresh()
            assert time.monotonic() - started < limit(2)
            reply = await ask(front, "rare")
            assert (reply.release, reply.reason, reply.degraded) == (first.id, reason, True)

    asyncio.run(go())


def test_a_model_that_the_config_names_stands_for_every_release_of_its_task(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)

    async def go() -> None:
        async with (
            listening(store, tmp_path, swap_wait_s=limit(60)) as (front, link, address),
            linked(Pupil(segmentation, ANY_RELEASE), [address]),
        ):
            await until(lambda: link.connections)
            for student in (OTHER, ""):
                published(store, tmp_path, segmentation, ["new", student], student=student)
                assert await front.watch.refresh()
                assert (await ask(front, "rare")).reason == ""

    asyncio.run(go())


def test_a_swap_under_load_fails_no_request_and_mixes_no_two_releases(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    """Hits, misses and swaps in turn. Each release's student labels what it answers, so a mixture would be seen."""
    releases = {}
    for student, label in ((STUDENT, "name"), (OTHER, "topic")):
        releases[published(store, tmp_path, segmentation, ["pizza near me", f"only {label}"], student=student).id] = label

    async def go() -> None:
        async with listening(store, tmp_path, refresh_s=0.01) as (front, link, address):
            pupils = [Pupil(segmentation, STUDENT, "name"), Pupil(segmentation, OTHER, "topic")]
            async with linked(pupils[0], [address]), linked(pupils[1], [address]):
                await until(lambda: len(link.connections) == 2)
                following, stop, seen = asyncio.create_task(front.watch.follow()), False, []

                async def caller(number: int) -> None:
                    while not stop:
                        seen.append(await ask(front, f"rare {number}"))
                        seen.append(await ask(front, "pizza near me"))
                        await asyncio.sleep(0)

                callers = [asyncio.create_task(caller(i)) for i in range(8)]
                for turn in range(6):
                    wanted = list(releases)[turn % 2]
                    await asyncio.to_thread(release.promote, store, wanted)
                    await until(lambda wanted=wanted: front.answerer.served.release.id == wanted)
                    await asyncio.sleep(0.03)
                stop = True
                await asyncio.gather(*callers)
                following.cancel()
                assert {reply.release for reply in seen} == set(releases)
                assert {reply.reason for reply in seen} == {""}
                for reply in seen:
                    assert reply.cached or reply.answer["segments"][0]["label"] == releases[reply.release]

    asyncio.run(go())


def test_the_tier_asks_the_link(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)

    async def go() -> None:
        async with listening(store, tmp_path) as (front, link, address), linked(Pupil(segmentation), [address]):
            await until(lambda: link.connections)
            assert [type(tier) for tier in front.answerer.tiers] == [StudentTier]
            async with front.client() as http:
                shown = (await http.get("/v1/release")).json()
            assert shown["realtime"]["student"] == "m"

    asyncio.run(go())
