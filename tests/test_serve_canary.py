"""A canary in the fronts: its share of the queries, the same ones always, counted once each; taken back when it is proven worse."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fronts import Front
from headtail.adapters.storage import Storage
from headtail.cache import Cache, StoredAnswer
from headtail.core.keys import query_key
from headtail.core.task import Task
from headtail.releases import canary, release
from headtail.releases.canary import ArmCounts, CanaryPolicy, CanaryWatcher, assign, read_canary
from headtail.releases.overrides import set_override
from headtail.stages import serve
from headtail.stages.serve.answerer import Miss, MissFailed, RealtimeReply
from headtail.stages.serve.canary_judge import CanaryJudge
from headtail.stages.serve.canary_watch import CanaryWatch
from headtail.stages.serve.front.counters import read_counters
from headtail.stages.serve.run_folder import RunFolder, open_seen
from headtail.stages.serve.shadow import ShadowConfig
from test_serve import config, published, segments
from timescale import eventually, limit

OTHER = "distill/fedcba9876543210"
HEAD = [f"pizza {i}" for i in range(200)]


def two(store: Storage, tmp_path: Path, task: Task) -> tuple[str, str]:
    """The current release, and another one whose snapshot has more."""
    new = published(store, tmp_path, task, [*HEAD, "only new"], student=OTHER).id
    old = published(store, tmp_path, task, HEAD).id
    return old, new


def front_of(store: Storage, tmp_path: Path, task: Task, broken: str = "") -> Front:
    """A front whose students answer misses, but that of the release `broken`."""

    async def ask(miss: Miss) -> RealtimeReply:
        if miss.served.release.id == broken:
            raise MissFailed("unavailable")
        return RealtimeReply(json.dumps(segments(miss.clean)), "stop", 0.5, "ab" * 16, miss.served.release.student, task.fingerprint)

    return Front(store, serve.Config(), tmp_path, ask, shared=tmp_path)


def ask_all(front: Front, queries: list[str]) -> dict[str, dict[str, Any]]:
    async def go() -> dict[str, dict[str, Any]]:
        async with front.client() as http:
            return {query: (await http.get("/v1/answer", params={"query": query})).json() for query in queries}

    return asyncio.run(go())


def follow(front: Front) -> None:
    async def go() -> None:
        await front.watch.refresh()
        await front.watch.refresh_canary()

    asyncio.run(go())


def arms(front: Front) -> Mapping[str, tuple[float, float]]:
    return {arm: (front.count(f"arm/{arm}/queries"), front.count(f"arm/{arm}/degraded")) for arm in ("champion", "canary")}


@pytest.mark.parametrize("quality, ends", [(0.5, "returned"), (0.9, "running")])
def test_a_canary_is_judged_by_the_shadow_model(store: Storage, tmp_path: Path, segmentation: Task, quality: float, ends: str) -> None:
    """Scores of both releases are alike on hits and on misses (0.9) or the canary's are lower; it has twice the hits in both cases."""
    old, new = two(store, tmp_path, segmentation)
    record = canary.start_canary(store, new, 0.5, who="ada", policy=CanaryPolicy(judged=True, min_queries=10))
    counted = CanaryWatcher(store, save_seconds=0)
    counted.add(record, ArmCounts(queries=20), ArmCounts(queries=20))
    shadow = ShadowConfig(share_hits=0.1, share_misses=1.0)
    judge = CanaryJudge(store, shadow, CanaryWatcher(store, rng=np.random.default_rng(1)), seed=2)
    rng, rows = np.random.default_rng(3), []
    for number in range(60_000):
        release_, cached = (old, new)[number % 2], rng.random() < (0.4, 0.8)[number % 2]
        if rng.random() < (shadow.share_hits if cached else shadow.share_misses):
            right = rng.random() < (1.0 if cached else 0.8) * (quality / 0.9 if release_ == new else 1.0)
            time = 4e15  # after the canary began
            rows.append({"query": f"q {number}", "release": release_, "time": time, "cached": cached, "score": float(right)})
    for at in range(0, len(rows), 500):
        judge.add(rows[at : at + 500])
    judge.add([{**rows[0], "query": "before", "time": 0}, {**rows[0], "query": "no score", "score": None}])
    judge.close()
    ended = read_canary(store)
    assert ended is not None
    assert ended.state == ends
    watch = ended.watches["judged"]
    assert watch.pairs > (30 if ends == "returned" else 500)
    if quality == 0.9:  # hits 1.0, misses 0.8: the canary is better by its 0.4 more hits, and that is what is measured
        assert watch.difference == pytest.approx(-0.4 * 0.2, abs=0.03)


def test_a_canary_that_need_not_be_judged_takes_no_scores(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    old, new = two(store, tmp_path, segmentation)
    canary.start_canary(store, new, 0.5, who="ada")
    judge = CanaryJudge(store, ShadowConfig(share_hits=1.0, share_misses=1.0))
    judge.add([{"query": "q", "release": name, "time": 4e15, "cached": True, "score": 0.0} for name in (old, new)])
    judge.close()
    record = read_canary(store)
    assert record is not None
    assert not record.watches


def test_a_query_meets_one_release_and_counts_once(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    old, new = two(store, tmp_path, segmentation)
    front, queries = front_of(store, tmp_path, segmentation), [*HEAD, "only new", *(f"rare {i}" for i in range(50))]
    assert {found["release"] for found in ask_all(front, queries).values()} == {old}
    assert arms(front) == {"champion": (0, 0), "canary": (0, 0)}
    record = canary.start_canary(store, new, 0.3, who="ada")
    follow(front)
    for _ in range(2):
        for query, found in ask_all(front, queries).items():
            assert found["release"] == assign(record, query_key(query), old), query
            assert found["cached"] == (query in HEAD or (query == "only new" and found["release"] == new))
    counts = arms(front)
    assert counts["champion"][0] + counts["canary"][0] == len(queries)  # of two rounds
    assert 30 < counts["canary"][0] < 130
    wider = canary.start_canary(store, new, 0.9, who="ada")
    follow(front)
    assert {query: found["release"] for query, found in ask_all(front, queries).items()} == {
        query: assign(wider, query_key(query), old) for query in queries
    }
    set_override(store, HEAD[0], json.dumps(segments(HEAD[0], "name")), who="ada", why="a name")
    follow(front)
    assert ask_all(front, HEAD[:1])[HEAD[0]]["source"] == "human_override"
    canary.stop_canary(store, who="ada")
    follow(front)
    assert {found["release"] for found in ask_all(front, queries).values()} == {old}


def test_when_current_moves_the_canary_is_over(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    old, new = two(store, tmp_path, segmentation)
    front = front_of(store, tmp_path, segmentation)
    canary.start_canary(store, new, 0.5, who="ada")
    follow(front)
    assert {found["release"] for found in ask_all(front, HEAD).values()} == {old, new}
    third = published(store, tmp_path, segmentation, [*HEAD, "third"]).id
    asyncio.run(front.watch.refresh())  # before the front has looked at the canary again
    assert {found["release"] for found in ask_all(front, HEAD).values()} == {third}
    follow(front)
    assert front.answerer.split is None


@pytest.mark.parametrize("broken", [True, False])
def test_a_canary_that_is_proven_worse_is_taken_back_and_one_that_is_not_stays(
    store: Storage, tmp_path: Path, segmentation: Task, broken: bool
) -> None:
    """The canary's student is away: its misses are degraded, the champion's are not."""
    old, new = two(store, tmp_path, segmentation)
    front = front_of(store, tmp_path, segmentation, new if broken else "")
    watch = CanaryWatch(store, front.path, 0.0, CanaryWatcher(store, 0.0, np.random.default_rng(1)))
    assert watch.step() is False
    canary.start_canary(store, new, 0.3, who="ada", policy=CanaryPolicy(min_queries=50, slow_ms=1e6))
    follow(front)
    assert watch.step()  # where it begins
    for window in range(6):
        ask_all(front, [f"rare {window} {i}" for i in range(150)])
        watch.step()
    watch.close()
    record = read_canary(store)
    assert record is not None
    assert sum(record.queries) == sum(count for count, _ in arms(front).values()) or record.state == "returned"
    assert (record.state, record.worse) == (("returned", ("degraded",)) if broken else ("running", ()))
    follow(front)
    served = {found["release"] for found in ask_all(front, [f"new {i}" for i in range(60)]).values()}
    assert served == ({old} if broken else {old, new})
    assert release.current_id(store) == old


def test_what_breaks_a_release_counts_against_it_as_an_error(
    store: Storage, tmp_path: Path, segmentation: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that cannot be read is a 500, one that breaks of many is an error in its place; a student that raises is degraded too."""
    old, new = two(store, tmp_path, segmentation)
    front = front_of(store, tmp_path, segmentation)
    record = canary.start_canary(store, new, 0.5, who="ada")
    follow(front)
    assert front.watch._trial is not None
    broken, read = front.watch._trial[0].cache, Cache.find_stored

    def stored(cache: Cache, clean: str) -> StoredAnswer | None:
        if cache is broken:
            raise OSError("a page of the snapshot is gone")
        return read(cache, clean)

    monkeypatch.setattr(Cache, "find_stored", stored)
    mine = [query for query in HEAD if assign(record, query_key(query), old) == new]
    other = next(query for query in HEAD if query not in mine)

    async def go() -> tuple[list[httpx.Response], list[dict[str, Any]], httpx.Response]:
        async with front.client() as http:
            alone = [await http.get("/v1/answer", params={"query": query}) for query in mine[:20]]
            many = (await http.post("/v1/answers", json={"queries": [other, *mine[20:30]]})).json()["answers"]
            chat = {"model": segmentation.name, "messages": [{"role": "user", "content": mine[30]}]}
            return alone, many, await http.post("/v1/chat/completions", json=chat)

    alone, many, chat = asyncio.run(go())
    assert {(found.status_code, found.json()["error"]["code"]) for found in alone} == {(500, "internal")}
    assert "page" not in alone[0].text
    assert many[0]["release"] == old
    assert {found["error"]["code"] for found in many[1:]} == {"internal"}
    assert chat.status_code == 500
    assert (front.count("arm/canary/queries"), front.count("arm/canary/errors"), front.count("arm/canary/degraded")) == (31, 31, 0)
    assert (front.count("arm/champion/queries"), front.count("arm/champion/errors")) == (1, 0)


def test_metrics_show_both(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    _, new = two(store, tmp_path, segmentation)
    front = front_of(store, tmp_path, segmentation)
    canary.start_canary(store, new, 0.5, who="ada")
    follow(front)
    ask_all(front, HEAD)

    async def go() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front.pages()), base_url="http://pages") as http:
            return (await http.get("/metrics")).text

    counts = arms(front)
    assert f'headtail_canary_total{{arm="canary",outcome="queries",task="query_segmentation"}} {counts["canary"][0]}' in asyncio.run(go())


# ---- each query counts once, also when the server is started again


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where servers keep their private folders: a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="ht-") as short:
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        yield Path(short)


def test_what_a_canary_counted_outlives_the_server_and_no_other_canary(folders: Path) -> None:
    settings, key, salts = serve.Config(port=18765), b"x" * 16, ("ab" * 8, "cd" * 8)
    folder = RunFolder(settings)
    assert [open_seen(folder.path, salt, what).add(key) for salt in salts for what in ("", "-judged")] == [True] * 4
    assert not open_seen(folder.path, salts[0]).add(key)
    folder.close()
    killed = RunFolder(settings)  # and the one after it, of a server that left all its files
    assert not open_seen(killed.path, salts[0]).add(key)
    (killed.path / "link-0.sock").touch()
    os.close(killed._lock)
    again = RunFolder(settings)
    assert not (again.path / "link-0.sock").exists()
    again.drop_seen(salts[0])
    counted = {(salt, what): not open_seen(again.path, salt, what).add(key) for salt in salts for what in ("", "-judged")}
    assert counted == {(salt, what): salt == salts[0] for salt in salts for what in ("", "-judged")}
    again.drop_seen("")
    assert sorted(path.name for path in again.path.iterdir()) == ["counters", "lock"]
    again.close()


def test_a_judge_that_is_started_again_counts_no_query_twice(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    old, new = two(store, tmp_path, segmentation)
    canary.start_canary(store, new, 0.5, who="ada", policy=CanaryPolicy(judged=True, min_queries=10))
    rows = [
        {"query": f"{name} {number}", "release": name, "time": 4e15, "cached": True, "score": 1.0}
        for name in (old, new)
        for number in range(9)
    ]
    pairs = []
    for seen in ({"seen": lambda salt: open_seen(tmp_path, salt, "-judged")}, {}):
        for _ in range(2):
            judge = CanaryJudge(store, ShadowConfig(share_hits=1.0, share_misses=1.0), CanaryWatcher(store, save_seconds=0), **seen)  # type: ignore[arg-type]
            judge.add(rows)
            judge.close()
            record = read_canary(store)
            assert record is not None
            pairs.append(record.watches["judged"].pairs)
    assert pairs == [9, 9, 18, 27], "with the file a restart changes nothing; without it each start counts them again"


@pytest.mark.slow
def test_a_server_that_is_started_again_counts_no_query_twice(store: Storage, tmp_path: Path, segmentation: Task, folders: Path) -> None:
    old, new = two(store, tmp_path, segmentation)
    canary.start_canary(store, new, 0.5, who="ada")
    settings = config(store.root, realtime_student=False, refresh_s=0.05, request_log=False)

    def count() -> float:
        """Queries counted by a new server that is asked for all of HEAD."""
        with serve.start_server(settings) as server:
            path = server._supervisor._folder.counters
            eventually(lambda: {row["canary"] for row in read_counters(path).rows[: settings.fronts]} == {int(new, 16)})
            with httpx.Client(base_url=server.url, timeout=limit(20)) as http:
                assert {http.get("/v1/answer", params={"query": query}).json()["release"] for query in HEAD} == {old, new}
            sums = read_counters(path).sums
            return sums["arm/champion/queries"] + sums["arm/canary/queries"]

    assert count() == len(HEAD)
    assert count() == 0
    canary.stop_canary(store, who="ada")
    canary.start_canary(store, new, 0.5, who="ada")
    assert count() == len(HEAD), "another canary counts anew"
    with serve.start_server(settings.model_copy(update={"count_canary": False})) as quiet:
        assert quiet._supervisor._tasks[0]._canary._thread is None
