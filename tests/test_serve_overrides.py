"""People's overrides and deletions at the front: taken by every process, whatever else the front waits for."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from fronts import Front
from headtail.adapters.storage import Storage
from headtail.client import Client, ClientConfig
from headtail.core.keys import query_key
from headtail.core.task import Task
from headtail.releases import release
from headtail.releases.overrides import set_override, tombstone_query
from headtail.stages import serve
from headtail.stages.serve.answerer import OpenRelease
from headtail.stages.serve.dynamic import DynamicTier, LocalAnswers
from headtail.stages.serve.front.link import StudentLink
from headtail.stages.serve.front.watch import ReleaseWatch
from headtail.stages.serve.student_tier import StudentTier
from test_serve import config as server_config
from test_serve import published, says, segments
from timescale import limit


def decide(store: Storage, query: str) -> None:
    set_override(store, query, json.dumps(segments(query.replace("ada@example.com", "<email>"))), who="ada", why="it is a dish")


def test_an_override_for_everybody_s_mail_is_served_where_the_task_says_so(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    """Also when it lies in the store from before: by servers, and by clients that hold the snapshot."""
    shared = dataclasses.replace(segmentation, file=segmentation.file.model_copy(update={"redacted": "cached"}))
    for task, served in ((shared, True), (segmentation, False)):
        published(store, tmp_path, task, ["pizza near me"])
        if served:
            decide(store, "mail ada@example.com")
        found = Front(store, serve.Config(), tmp_path).ask("mail bob@example.com").json()
        assert found["cached"] is served
        with Client(ClientConfig(url="http://127.0.0.1:9", root=store.root, retries=0)) as client:
            assert client.answer("mail bob@example.com").cached is served


class Links:
    """In place of the link: the student of one release is connected, and no other."""

    def __init__(self, there: str) -> None:
        self.there, self.changed = there, asyncio.Event()

    def has(self, served: OpenRelease) -> bool:
        return served.release.id == self.there


def test_a_front_that_waits_for_a_student_takes_overrides(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    old = published(store, tmp_path, segmentation)
    settings = serve.Config(refresh_s=0.02, swap_wait_s=limit(60))
    front = Front(store, settings, tmp_path)

    async def use() -> None:
        links = Links(old.id)
        watch = ReleaseWatch(store, front.answerer, settings, front.counters, cast(StudentLink, links))
        new = published(store, tmp_path, segmentation, ["pizza near me", "sushi"], student="distill/fedcba9876543210")
        following = asyncio.create_task(watch.follow())
        await asyncio.sleep(0.1)
        decide(store, "calzone")

        async def eventually(check: Callable[[OpenRelease], bool]) -> None:
            end = time.monotonic() + limit(20)
            while not check(front.answerer.served):
                assert time.monotonic() < end
                await asyncio.sleep(0.01)

        await eventually(lambda served: served.find("calzone") is not None)
        assert front.answerer.served.release.id == old.id
        links.there = new.id
        links.changed.set()
        await eventually(lambda served: served.release.id == new.id)
        assert front.answerer.served.find("calzone") is not None, "the release was opened before the override was given"
        following.cancel()

    asyncio.run(use())


def test_no_cache_answers_a_deleted_query(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)
    front = Front(store, serve.Config(), tmp_path)
    held = LocalAnswers(1 << 20)
    tier = DynamicTier(held, 60.0)
    front.answerer.tiers = (tier, StudentTier(says(segmentation)))

    async def use() -> None:
        watch = ReleaseWatch(store, front.answerer, serve.Config(), front.counters, None, tier)
        async with front.client() as http:

            async def ask(query: str) -> str:
                found: str = (await http.post("/v1/answer", json={"query": query})).json()["source"]
                await asyncio.sleep(0)
                return found

            assert [await ask(query) for query in ("secret", "secret", "pizza near me")] == ["realtime_student", "dynamic", "teacher"]
            assert len(held) == 1
            for query in ("secret", "pizza near me"):
                tombstone_query(store, query_key(query), who="ada", why="its author asked for it")
            await watch.refresh()
            assert [await ask(query) for query in ("secret", "secret", "pizza near me")] == ["realtime_student"] * 3
            assert len(held) == 0

    asyncio.run(use())


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [False, True])
def test_all_processes_of_a_server_take_an_override(pinned: bool, store: Storage, tmp_path: Path, segmentation: Task) -> None:
    """Also of a server that stays with one release."""
    published(store, tmp_path, segmentation)
    decide(store, "before")
    options: dict[str, Any] = {"release": release.current_id(store)} if pinned else {}
    with serve.start_server(server_config(store.root, realtime_student=False, request_log=False, **options)) as server:

        def sources(query: str) -> set[str]:
            """By several connections, so that both processes are asked."""
            found = set()
            for _ in range(8):
                with Client(ClientConfig(url=server.url, timeout_ms=int(limit(20) * 1000))) as client:
                    found.add(client.answer(query).source)
            return found

        def become(query: str, source: str) -> None:
            end = time.monotonic() + limit(30)
            while sources(query) != {source}:
                assert time.monotonic() < end
                time.sleep(0.05)

        assert sources("before") == {"human_override"}
        decide(store, "calzone")
        become("calzone", "human_override")
        tombstone_query(store, query_key("pizza near me"), who="ada", why="")
        become("pizza near me", "fallback")
