"""Places for misses: who waits for a student, how long, and that nobody takes another's place. Students take time, over a real link."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fronts import Front
from headtail.adapters.storage import Storage
from headtail.core.keys import query_key
from headtail.core.task import Task
from headtail.releases import canary, release
from headtail.releases.canary import assign
from headtail.stages import serve
from headtail.stages.serve.answerer import ESCALATION, RealtimeReply
from headtail.stages.serve.escalation import EscalationTier
from headtail.stages.serve.front.tiers import open_tiers
from headtail.stages.serve.places import MissPlaces
from test_serve import published
from test_serve_link import OTHER, Pupil, linked, listening, until
from timescale import limit

STUDENT_S = limit(0.1)
FOREVER_MS = int(1000 * limit(60))


class Slow(Pupil):
    """A student that takes `STUDENT_S` for each query, and any number of queries at once."""

    async def answer(self, query: str, side_inputs: Mapping[str, Sequence[str]]) -> RealtimeReply:
        await asyncio.sleep(STUDENT_S)
        return await super().answer(query, side_inputs)


async def ask_many(front: Front, queries: Sequence[str], **more: Any) -> list[dict[str, Any]]:
    async with front.client() as http:
        response = await http.post("/v1/answers", json={"queries": list(queries), **more}, timeout=limit(60))
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["answers"]
    return found


def reasons(found: Sequence[Mapping[str, Any]]) -> Counter[str]:
    return Counter(one["reason"] for one in found)


# ---- places


def test_each_release_has_its_own_places() -> None:
    places = MissPlaces(2)
    taken = [places.take("a"), places.take("a")]
    assert places.take("a") is None
    assert places.take("b") is not None
    assert taken[0] is not None
    for _ in range(2):
        taken[0].give()  # twice is once
    assert places.take("a") is not None
    assert places.take("a") is None


def test_calls_with_many_queries_share_half_of_the_places_and_take_turns() -> None:
    async def go() -> None:
        places, running, order = MissPlaces(4), 0, list[str]()

        async def one(name: str, call: Any, seconds: float) -> bool:
            nonlocal running
            async with call.turn("a", asyncio.get_running_loop().time() + seconds) as mine:
                if mine:
                    running += 1
                    assert running <= 2
                    order.append(name)
                    await asyncio.sleep(0)
                    running -= 1
                return bool(mine)

        calls = {name: places.call() for name in ("first", "second")}
        tasks = [asyncio.create_task(one(name, call, 60.0)) for name, call in calls.items() for _ in range(20)]
        assert all(await asyncio.gather(*tasks))
        assert order.index("second") < 8, "a later call does not wait for the whole of an earlier one"
        turns = [places.call().turn("a", asyncio.get_running_loop().time() + limit(60)) for _ in range(2)]
        for turn in turns:
            await turn.__aenter__()
        assert not await one("late", places.call(), 0.02)
        for turn in turns:
            await turn.__aexit__(None, None, None)
        assert await one("free again", places.call(), 60.0)

    asyncio.run(go())


# ---- calls with many queries


def test_the_clock_of_a_miss_starts_when_it_has_a_place(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    """160 misses, 4 at a time: 4 s of work under a limit of 3 s for each of them."""
    published(store, tmp_path, segmentation)

    async def go() -> None:
        options: dict[str, Any] = {"max_misses": 8, "realtime_timeout_ms": int(1000 * 30 * STUDENT_S), "answers_timeout_ms": FOREVER_MS}
        async with listening(store, tmp_path, **options) as (front, link, address), linked(Slow(segmentation), [address]):
            await until(lambda: link.connections)
            started = time.monotonic()
            found = await ask_many(front, [f"rare {number}" for number in range(160)])
            assert reasons(found) == {"": 160}
            assert time.monotonic() - started >= 40 * STUDENT_S * 0.9
            assert all(one["latency_ms"] < 1000 * 30 * STUDENT_S for one in found)

    asyncio.run(go())


def test_a_call_may_take_so_long_and_no_longer(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    """Misses that were asked by then are late, those without a turn were too many. The caller may ask for less time, not for more."""
    published(store, tmp_path, segmentation)

    async def go() -> None:
        options: dict[str, Any] = {"max_misses": 8, "realtime_timeout_ms": FOREVER_MS, "answers_timeout_ms": 600}
        async with listening(store, tmp_path, **options) as (front, link, address):
            pupil = Pupil(segmentation)
            pupil.gate.clear()
            async with linked(pupil, [address]):
                await until(lambda: link.connections)
                for more, seconds in (({}, 0.6), ({"timeout_ms": 200}, 0.2), ({"timeout_ms": 10**7}, 0.6), ({"timeout_ms": None}, 0.6)):
                    started = time.monotonic()
                    found = await ask_many(front, ["pizza near me", *(f"rare {number}" for number in range(20))], **more)
                    assert seconds <= time.monotonic() - started < seconds + limit(3)
                    assert found[0]["cached"]
                    assert reasons(found[1:]) == {"timeout": 4, "overloaded": 16}
                await until(lambda: len(pupil.cancelled) == 16)
                assert front.answerer.in_flight == 0
                async with front.client() as http:
                    refused = await http.post("/v1/answers", json={"queries": ["q"], "timeout_ms": 0})
                assert (refused.status_code, refused.json()["error"]["field"]) == (422, "timeout_ms")

    asyncio.run(go())


def test_callers_with_one_query_have_places_beside_many_calls(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)

    async def go() -> None:
        options: dict[str, Any] = {"max_misses": 8, "realtime_timeout_ms": FOREVER_MS, "answers_timeout_ms": FOREVER_MS}
        async with listening(store, tmp_path, **options) as (front, link, address), linked(Slow(segmentation), [address]):
            await until(lambda: link.connections)
            calls = [asyncio.create_task(ask_many(front, [f"{call} {number}" for number in range(20)])) for call in range(5)]
            await until(lambda: front.answerer.in_flight == 4)
            async with front.client() as http:
                alone = await asyncio.gather(*(http.post("/v1/answer", json={"query": f"alone {number}"}) for number in range(4)))
            assert reasons([one.json() for one in alone]) == {"": 4}
            assert not any(call.done() for call in calls)
            assert [reasons(await call) for call in calls] == [{"": 20}] * 5

    asyncio.run(go())


# ---- arms


@pytest.mark.parametrize("many", [False, True])
def test_a_canary_whose_student_hangs_takes_no_place_of_the_champion(
    store: Storage, tmp_path: Path, segmentation: Task, many: bool
) -> None:
    champion = published(store, tmp_path, segmentation)
    trial = release.make_release(store, snapshot=champion.snapshot, task=segmentation, student=OTHER)

    async def go() -> None:
        options: dict[str, Any] = {"max_misses": 4, "realtime_timeout_ms": FOREVER_MS, "answers_timeout_ms": int(1000 * limit(10))}
        async with listening(store, tmp_path, **options) as (front, link, address):
            front.watch._folder = tmp_path
            hangs = Pupil(segmentation, OTHER)
            hangs.gate.clear()
            async with linked(Pupil(segmentation), [address]), linked(hangs, [address]):
                await until(lambda: len(link.connections) == 2)
                record = canary.start_canary(store, trial.id, 0.5, who="ada")
                await front.watch.refresh_canary()
                arms: dict[str, list[str]] = {champion.id: [], trial.id: []}
                for query in (f"rare {number}" for number in range(100)):
                    arms[assign(record, query_key(query), champion.id)].append(query)
                waiting = [asyncio.create_task(ask_many(front, arms[trial.id]))] if many else []
                await until(lambda: front.answerer.in_flight == 2 * many)
                theirs = [asyncio.create_task(front.answerer.answer(query)) for query in arms[trial.id][:20]]
                await until(lambda: sum(one.done() for one in theirs) == 16 + 2 * many)
                if many:
                    assert reasons(await ask_many(front, arms[champion.id][:20])) == {"": 20}
                for query in arms[champion.id][:20]:
                    assert (await front.answerer.answer(query)).reason == ""
                assert {one.result().reason for one in theirs if one.done()} == {"overloaded"}
                for task in (*theirs, *waiting):
                    task.cancel()

    asyncio.run(go())


def test_a_bigger_model_that_hangs_takes_no_place_of_the_student(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    """What it works on has its own bound, `escalation.max_waiting`."""
    published(store, tmp_path, segmentation)

    async def go() -> None:
        escalation = {"model": {"model": "m"}, "threshold": 0.9, "max_waiting": 50, "timeout_ms": FOREVER_MS, "per_minute": 0}
        options: dict[str, Any] = {"max_misses": 4, "escalation": escalation, "dynamic": {"enabled": False}}
        async with listening(store, tmp_path, **options) as (front, link, address):
            front.answerer.tiers = tuple(open_tiers(serve.Config(**options), link, tmp_path))
            hangs = Pupil(segmentation, ESCALATION)
            hangs.gate.clear()
            async with linked(Pupil(segmentation), [address]), linked(hangs, [address]):
                await until(lambda: link.connections and link.bigger)
                tier = front.answerer.tiers[-1]
                assert isinstance(tier, EscalationTier)
                waiting = []
                for number in range(20):
                    waiting.append(asyncio.create_task(front.answerer.answer(f"unsure {number}")))
                    await until(lambda number=number: tier.waiting == number + 1)
                hangs.gate.set()
                assert Counter((one.source, one.reason) for one in await asyncio.gather(*waiting)) == {("escalated", ""): 20}

    asyncio.run(go())


def test_others_get_their_turns_while_a_thousand_hits_are_answered(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)
    front = Front(store, serve.Config(), tmp_path)

    async def go() -> None:
        turns, done = 0, False

        async def other() -> None:
            nonlocal turns
            while not done:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(other())
        found = await ask_many(front, ["pizza near me"] * 1000)
        done = True
        await beside
        assert {one["source"] for one in found} == {"teacher"}
        assert len(found) == 1000
        assert turns >= 20

    asyncio.run(go())


# ---- callers who leave

ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("/v1/answer", {"query": "one"}),
    "many": ("/v1/answers", {"queries": ["one", "two", "pizza near me"]}),
    "chat": ("/v1/chat/completions", {"model": "query_segmentation", "messages": [{"role": "user", "content": "one"}]}),
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_caller_who_leaves_frees_the_student_on_every_route(store: Storage, tmp_path: Path, segmentation: Task, route: str) -> None:
    published(store, tmp_path, segmentation)
    path, body = ROUTES[route]
    wait = 2 if route == "many" else 1

    async def go() -> None:
        async with listening(store, tmp_path, realtime_timeout_ms=FOREVER_MS, answers_timeout_ms=FOREVER_MS) as (front, link, address):
            pupil = Pupil(segmentation)
            pupil.gate.clear()
            async with linked(pupil, [address]) as links:
                await until(lambda: link.connections)
                sent, came = list[Any](), asyncio.Queue[dict[str, Any]]()
                await came.put({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})

                async def send(message: Any) -> None:
                    sent.append(message)

                scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
                call = asyncio.create_task(front.app(scope, came.get, send))
                await until(lambda: len(pupil.seen) == wait)
                assert front.count("in_flight") == wait
                await came.put({"type": "http.disconnect"})
                await until(lambda: len(pupil.cancelled) == wait)
                await call
                assert (sent, front.count("callers_left"), front.count("in_flight")) == ([], 1, 0)
                assert (links.queue, front.answerer.in_flight, link.connections[0].pending) == (0, 0, {})
                pupil.gate.set()
                async with front.client() as http:
                    assert (await http.post(path, json=body)).status_code == 200

    asyncio.run(go())


def test_feedback_is_taken_from_a_caller_who_does_not_wait(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    """A page sends it and is closed. What waits for no model is finished whether or not its caller is there."""
    published(store, tmp_path, segmentation)
    front = Front(store, serve.Config(), tmp_path)
    assert {path for path, route in front.app._routes.items() if route.waits} == {"/v1/answers", "/v1/chat/completions"}
