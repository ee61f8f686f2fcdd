"""The dynamic tier: what is given again, to whom, for how long; and a Redis that goes away."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headtail.adapters.redis_link import RedisLink
from headtail.adapters.storage import Storage
from headtail.core.keys import query_key
from headtail.core.task import Task
from headtail.stages import serve
from headtail.stages.serve.answerer import Answerer, Miss, MissFailed, OpenRelease, RealtimeReply, Reply
from headtail.stages.serve.dynamic import (
    AnswerStore,
    DynamicConfig,
    DynamicTier,
    LocalAnswers,
    RedisAnswers,
    may_store,
    open_answers,
)
from headtail.stages.serve.front.watch import open_served
from headtail.stages.serve.student_tier import StudentTier
from redis_server import RedisServer, needs_redis
from test_serve import published, reply, segments
from timescale import limit


class Student:
    """Counts how often it is asked. `made`: what it says, or raises."""

    def __init__(self, made: RealtimeReply | Exception) -> None:
        self.calls, self.made = 0, made

    async def __call__(self, miss: Miss) -> RealtimeReply:
        self.calls += 1
        if isinstance(self.made, Exception):
            raise self.made
        return self.made


class Setup:
    """An Answerer with a dynamic tier before a student."""

    def __init__(self, served: OpenRelease, store: AnswerStore, made: RealtimeReply | Exception, ttl_s: float = 60.0) -> None:
        self.now = 1_000_000.0
        self.student = Student(made)
        self.tier = DynamicTier(store, ttl_s, clock=lambda: self.now)
        self.answerer = Answerer(served, serve.Config(realtime_timeout_ms=int(limit(5) * 1000)), [self.tier, StudentTier(self.student)])

    async def ask(self, query: str, side_inputs: Mapping[str, Sequence[str]] | None = None) -> Reply:
        found = await self.answerer.answer(query, side_inputs)
        while self.tier._writes:
            await asyncio.sleep(0)
        return found


@pytest.fixture
def served(store: Storage, tmp_path: Path, segmentation: Task) -> OpenRelease:
    published(store, tmp_path, segmentation)
    return open_served(store, "current")


@contextlib.asynccontextmanager
async def redis_answers(folder: Path) -> AsyncIterator[RedisAnswers]:
    with RedisServer(folder) as server:
        store = RedisAnswers(RedisLink(server.url, timeout_s=limit(5)))
        yield store
        await store.close()


@contextlib.asynccontextmanager
async def local_answers(folder: Path) -> AsyncIterator[LocalAnswers]:
    yield LocalAnswers(1 << 20)


STORES = [pytest.param(local_answers, id="local"), pytest.param(redis_answers, id="redis", marks=needs_redis)]
OpenStore = Callable[[Path], contextlib.AbstractAsyncContextManager[AnswerStore]]


@pytest.mark.parametrize("opener", STORES)
def test_an_answer_is_given_again_to_the_same_question_only(opener: OpenStore, tmp_path: Path, served: OpenRelease) -> None:
    async def use() -> None:
        async with opener(tmp_path) as store:
            setup = Setup(served, store, reply(served.task, segments("sushi ü")))
            first, second = await setup.ask("Sushi  BERLIN"), await setup.ask("sushi berlin")
            assert (first.source, second.source, setup.student.calls) == ("realtime_student", "dynamic", 1)
            assert second.answer == first.answer == segments("sushi ü")
            assert (second.confidence, second.answer_key) == (first.confidence, first.answer_key) == (0.8, "ab" * 16)
            assert (second.degraded, second.reason, second.release) == (False, "", served.release.id)
            side = served.task.side_inputs[0]
            await setup.ask("sushi paris")
            await setup.ask("sushi berlin", {side: ["Sushi Bar"]})
            await setup.ask("sushi berlin", {side: ["Sushi", "Bar"]})
            assert setup.student.calls == 4
            assert (await setup.ask("sushi berlin", {side: ["Sushi", "Bar"]})).source == "dynamic"
            assert (await setup.ask("sushi berlin", {side: []})).source == "dynamic"
            assert (setup.tier.hits, setup.tier.misses, setup.tier.spoiled) == (3, 4, 0)
            await store.drop(query_key("sushi berlin"))
            assert [(await setup.ask("sushi berlin", inputs)).source for inputs in ({}, {side: ["Sushi Bar"]})] == ["realtime_student"] * 2
            assert (await setup.ask("sushi paris")).source == "dynamic"

    asyncio.run(use())


@pytest.mark.parametrize("opener", STORES)
def test_an_answer_is_bound_to_its_release_and_ends(opener: OpenStore, tmp_path: Path, served: OpenRelease) -> None:
    async def use() -> None:
        async with opener(tmp_path) as store:
            setup = Setup(served, store, reply(served.task))
            await setup.ask("sushi")
            other = served.release.model_copy(update={"id": "0123456789abcdef"})
            setup.answerer.served = dataclasses.replace(served, release=other)
            assert (await setup.ask("sushi")).source == "realtime_student"
            assert (await setup.ask("sushi")).source == "dynamic"
            setup.answerer.served = served
            assert (await setup.ask("sushi")).source == "dynamic"
            setup.now += 60.0
            assert (await setup.ask("sushi")).source == "realtime_student"
            assert (await setup.ask("sushi")).source == "dynamic"

    asyncio.run(use())


@needs_redis
def test_servers_share_answers_and_redis_ends_them(tmp_path: Path, served: OpenRelease) -> None:
    async def use() -> None:
        with RedisServer(tmp_path) as server:
            config = DynamicConfig(redis_url=server.url, redis_timeout_ms=int(limit(5) * 1000))
            one, two = (Setup(served, open_answers(config), reply(served.task), limit(2)) for _ in range(2))
            assert [(await setup.ask("sushi")).source for setup in (one, two, one)] == ["realtime_student", "dynamic", "dynamic"]
            await asyncio.sleep(limit(2) + 0.2)
            store = two.tier.store
            assert isinstance(store, RedisAnswers)
            assert await store.link.call(lambda redis: redis.dbsize()) == 0
            for setup in (one, two):
                await setup.tier.close()

    asyncio.run(use())


@needs_redis
def test_an_outage_is_a_miss_and_counted_and_ends_by_itself(tmp_path: Path, served: OpenRelease) -> None:
    async def use() -> None:
        now = 0.0
        with RedisServer(tmp_path) as server:
            link = RedisLink(server.url, timeout_s=limit(5), clock=lambda: now)
            setup = Setup(served, RedisAnswers(link), reply(served.task))
            await setup.ask("sushi")
            assert (await setup.ask("sushi")).source == "dynamic"
            server.kill()
            found = [await setup.ask("sushi") for _ in range(20)]
            assert {(one.source, one.degraded) for one in found} == {("realtime_student", False)}
            assert (link.failures, setup.student.calls) == (3, 21)
            server.start()
            now = 60.0
            await setup.ask("sushi")
            assert (await setup.ask("sushi")).source == "dynamic"
            await setup.tier.close()

    asyncio.run(use())


@pytest.mark.parametrize("opener", STORES)
@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        ("answer", '{"segments": "x"}'),
        ("answer", 3),
        ("confidence", "x"),
        ("answer_key", 1),
        ("until", "x"),
    ],
)
def test_what_does_not_fit_the_schema_is_never_given(opener: OpenStore, damage: Any, tmp_path: Path, served: OpenRelease) -> None:
    """Somebody else may write to the store."""

    async def use() -> None:
        async with opener(tmp_path) as store:
            setup = Setup(served, store, reply(served.task))
            await setup.ask("sushi")
            (value, query, variant) = await stored(store, setup)
            bad = damage if isinstance(damage, bytes) else json.dumps(json.loads(value) | {damage[0]: damage[1]}).encode()
            await store.put(query, variant, bad, 60)
            assert (await setup.ask("sushi")).source == "realtime_student"
            assert setup.tier.spoiled == 1

    asyncio.run(use())


async def stored(store: AnswerStore, setup: Setup) -> tuple[bytes, bytes, bytes]:
    """The one value of a store, and its two keys."""
    seen: list[tuple[bytes, bytes]] = []
    get = store.get

    async def spy(query: bytes, variant: bytes) -> bytes | None:
        seen.append((query, variant))
        return await get(query, variant)

    store.get = spy  # type: ignore[method-assign]
    assert (await setup.ask("sushi")).source == "dynamic"
    store.get = get  # type: ignore[method-assign]
    value = await get(*seen[0])
    assert value is not None
    return value, *seen[0]


@pytest.mark.parametrize("opener", STORES)
def test_two_questions_with_one_digest_are_a_miss(opener: OpenStore, tmp_path: Path, served: OpenRelease) -> None:
    async def use() -> None:
        async with opener(tmp_path) as store:
            setup = Setup(served, store, reply(served.task))
            await setup.ask("sushi")
            value, query, variant = await stored(store, setup)
            await store.put(query, variant, value.replace(b"sushi", b"pizza"), 60)
            assert (await setup.ask("sushi")).source == "realtime_student"
            assert setup.tier.spoiled == 0

    asyncio.run(use())


def test_only_what_may_be_given_again_is_stored(served: OpenRelease) -> None:
    async def use(made: RealtimeReply | Exception) -> Reply:
        setup = Setup(served, LocalAnswers(1 << 20), made)
        first, second = await setup.ask("sushi"), await setup.ask("sushi")
        assert setup.student.calls == 2
        assert first.source == second.source
        return second

    task = served.task
    assert asyncio.run(use(MissFailed("unavailable"))).degraded
    assert asyncio.run(use(RuntimeError("x"))).degraded
    assert asyncio.run(use(reply(task, finish_reason="length"))).reason == "truncated"
    assert asyncio.run(use(reply(task, "no json"))).reason == "invalid"
    assert asyncio.run(use(reply(task, task_fingerprint="other"))).reason == "outdated"
    assert asyncio.run(use(reply(task, stands_for="distill/fedcba9876543210"))).reason == "previous_student"


@pytest.mark.parametrize(
    "changes", [{"source": "fallback"}, {"source": "dynamic"}, {"source": "teacher"}, {"degraded": True}, {"reason": "x"}]
)
def test_may_store(changes: dict[str, Any]) -> None:
    good = Reply("q", "q", {}, "realtime_student", False, False, 0.5, "k", "r", "s", 1.0, "")
    assert may_store(good)
    assert not may_store(good._replace(**changes))


def test_the_output_checks_hold_for_what_is_given_again(served: OpenRelease) -> None:
    async def use() -> None:
        setup = Setup(served, LocalAnswers(1 << 20), reply(served.task))
        setup.answerer._checks = (lambda miss, found: "withheld",)
        assert [(await setup.ask("sushi")).reason for _ in range(2)] == ["withheld"] * 2

    asyncio.run(use())


def test_a_deleted_query_is_neither_stored_nor_given(served: OpenRelease) -> None:
    async def use() -> None:
        setup = Setup(served, LocalAnswers(1 << 20), reply(served.task))
        await setup.ask("sushi")
        setup.tier.deleted = frozenset([query_key("sushi"), query_key("secret")])
        assert [(await setup.ask(query)).source for query in ("sushi", "secret", "secret")] == ["realtime_student"] * 3
        store = setup.tier.store
        assert isinstance(store, LocalAnswers)
        assert len(store) == 0, "what was stored is gone, and nothing came after it"
        setup.tier.deleted = frozenset()
        assert [(await setup.ask(query)).source for query in ("secret", "sushi")] == ["realtime_student"] * 2

    asyncio.run(use())


def test_memory_is_bounded_and_the_least_used_goes_first() -> None:
    async def use() -> None:
        store = LocalAnswers(100_000)
        for number in range(1000):
            await store.put(b"%d" % number, b"v", bytes(600), 60)
            assert await store.get(b"0", b"v") is not None
        assert len(store) == 100
        assert await store.get(b"999", b"v") is not None
        assert await store.get(b"1", b"v") is None
        await store.put(b"big", b"v", bytes(200_000), 60)
        assert len(store) == 100, "what is larger than all of the room is not kept"
        assert await store.get(b"big", b"v") is None

    asyncio.run(use())


@given(st.lists(st.tuples(st.sampled_from("pgd"), st.integers(0, 4), st.integers(0, 2), st.integers(0, 30)), max_size=60))
def test_the_local_store_is_a_dictionary_with_ends(steps: list[tuple[str, int, int, int]]) -> None:
    async def use() -> None:
        now, model = 0.0, dict[tuple[bytes, bytes], tuple[float, bytes]]()
        store = LocalAnswers(1 << 20, clock=lambda: now)
        for kind, query_number, variant_number, size in steps:
            now += 1
            query, variant = bytes([query_number]), bytes([variant_number])
            if kind == "p":
                await store.put(query, variant, bytes(size), float(size))
                model[query, variant] = now + size, bytes(size)
            elif kind == "d":
                await store.drop(query)
                model = {key: value for key, value in model.items() if key[0] != query}
            end, value = model.get((query, variant), (0.0, b""))
            assert await store.get(query, variant) == (value if end > now else None)
        await store.close()
        assert (len(store), store._bytes) == (0, 0)

    asyncio.run(use())


@needs_redis
def test_one_query_takes_a_bounded_share_of_redis(tmp_path: Path) -> None:
    async def use() -> None:
        async with redis_answers(tmp_path) as store:
            for number in range(200):
                await store.put(b"q", b"%d" % number, b"x", 60)
            length = await store.link.call(lambda redis: redis.hlen("headtail:answer:" + b"q".hex()))
            assert 0 < (length or 0) <= 64
            assert await store.get(b"q", b"199") == b"x"

    asyncio.run(use())
