"""A canary in a running server: real fronts, stub students. One that errs, is slow or degrades is taken back; a good one is promoted."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from headtail.adapters.storage import Storage, open_storage
from headtail.core.keys import query_key
from headtail.core.rows import FEEDBACK, REQUEST_LOG, SHADOW
from headtail.core.sequential import Margins
from headtail.core.task import Task, load_task
from headtail.releases import canary, release
from headtail.releases.canary import CanaryPolicy, CanaryRecord, assign, canary_verdict, read_canary
from headtail.stages import serve
from headtail.stages.serve import canary_watch
from headtail.stages.serve.answerer import RealtimeReply
from headtail.stages.serve.frames import Hello
from headtail.stages.serve.front.counters import read_counters
from headtail.stages.serve.student_link import FrontAddress, FrontLinks
from test_serve import STUDENT, config, published, segments
from timescale import eventually, limit

pytestmark = pytest.mark.slow
FRONTS, SLOW_MS = 2, 1000.0
FAULTS = {"errors": "boom", "slow": "late", "degraded": "cut"}
CANARIES = {fault: f"distill/{number:016x}" for number, fault in enumerate((*FAULTS, "fine"), 1)}
Served = tuple[serve.Server, Storage, dict[str, str]]


class Students:
    """The champion's student and one for each canary, in a thread, linked to the fronts as replicas on Ray would be."""

    def __init__(self, folder: Path, task: Task) -> None:
        self._folder, self._task, self._loop, self._ready = folder, task, asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self._loop.run_until_complete(self._teach())
        self._loop.close()

    async def _teach(self) -> None:
        self._end = asyncio.Event()
        addresses = [FrontAddress(str(self._folder / f"link-{row}.sock")) for row in range(FRONTS)]
        links = [
            FrontLinks(addresses, Hello(student, self._task.fingerprint, "m"), self._answers(student, fault))
            for fault, student in {"": STUDENT, **CANARIES}.items()
        ]
        for link in links:
            link.start()
        while not all(link.connected == FRONTS for link in links):
            await asyncio.sleep(0.01)
        self._ready.set()
        await self._end.wait()
        for link in links:
            await link.close()

    def _answers(self, student: str, fault: str) -> Any:
        async def answer(query: str, side_inputs: Mapping[str, Sequence[str]]) -> RealtimeReply:
            if fault == "errors":
                raise ValueError("boom")
            if fault == "slow":
                await asyncio.sleep(1.2 * limit(SLOW_MS) / 1000)
            reason = "length" if fault == "degraded" else "stop"
            return RealtimeReply(json.dumps(segments(query, "name")), reason, 0.5, "cd" * 16, student, self._task.fingerprint)

        return answer

    def __enter__(self) -> Students:
        self._thread.start()
        assert self._ready.wait(limit(20))
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(limit(10))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that compares every 0.2 s, and the id of a release for each canary."""
    scratch, store = tmp_path_factory.mktemp("scratch"), open_storage(str(tmp_path_factory.mktemp("store")))
    task = load_task("query_segmentation")
    champion = published(store, scratch, task)
    ids = {
        fault: release.make_release(store, snapshot=champion.snapshot, task=task, student=student).id for fault, student in CANARIES.items()
    }
    shadow = {"model": {"model": "null", "engine": "null", "usd_per_million_tokens_in": 1.0}, "share_hits": 1.0, "share_misses": 0.2}
    options = {"shadow": shadow, "students": "elsewhere", "log_rotate_s": 0.5, "refresh_s": 0.1, "dynamic": {"enabled": False}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canary_watch, "WINDOW_S", 0.2)
        with (
            serve.start_server(config(store.root, realtime_timeout_ms=int(limit(5000)), **options)) as server,
            Students(server._supervisor._folder.path, task),
        ):
            yield server, store, {"champion": champion.id, **ids}


def begin(served: Served, fault: str, **policy: Any) -> CanaryRecord:
    """Start a canary and wait until the fronts split and the comparison has begun."""
    server, store, ids = served
    if canary.is_running(store, read_canary(store)):  # of a test that failed
        canary.stop_canary(store, who="ada")
    record = canary.start_canary(
        store, ids[fault], 0.5, who="ada", policy=CanaryPolicy.model_validate({"min_queries": 30, "slow_ms": limit(SLOW_MS), **policy})
    )
    eventually(lambda: {row["canary"] for row in read_counters(server._supervisor._folder.counters).rows[:FRONTS]} == {int(ids[fault], 16)})
    time.sleep(2 * server.config.refresh_s + 2 * 0.2 + 0.2)  # what the watch waits for, and its first window
    return record


def ask_all(server: serve.Server, queries: Sequence[str]) -> dict[str, dict[str, Any]]:
    async def go() -> dict[str, dict[str, Any]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=limit(20)) as http:

            async def one(query: str) -> dict[str, Any]:
                found: dict[str, Any] = (await http.get("/v1/answer", params={"query": query})).json()
                return found

            found: dict[str, dict[str, Any]] = {}
            for at in range(0, len(queries), 40):  # fewer at once than max_misses
                part = queries[at : at + 40]
                found |= dict(zip(part, await asyncio.gather(*map(one, part)), strict=True))
            return found

    return asyncio.run(go())


def state(store: Storage) -> CanaryRecord:
    found = read_canary(store)
    assert found is not None
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_canary_whose_student_errs_is_slow_or_is_cut_is_taken_back(served: Served, fault: str) -> None:
    server, store, ids = served
    begin(served, fault)
    end, asked = time.monotonic() + limit(30), 0
    while state(store).state == "running":
        assert time.monotonic() < end, canary_verdict(state(store))
        found = ask_all(server, [f"{fault} {number}" for number in range(asked, asked + 80)])
        assert {answer["source"] for answer in found.values()} <= {"realtime_student", "fallback"}, "always an answer"
        asked += 80
    record = state(store)
    assert (record.state, record.who, record.canary) == ("returned", "headtail", ids[fault])
    assert fault in record.worse
    assert record.worse in ((fault,), ("errors", "degraded")), "an error is a degraded answer too"
    assert release.current_id(store) == ids["champion"]
    again = [f"{fault} after {number}" for number in range(20)]
    eventually(lambda: {answer["release"] for answer in ask_all(server, again).values()} == {ids["champion"]})


def test_without_traffic_it_is_undecided_and_says_why(served: Served) -> None:
    _, store, ids = served
    begin(served, "fine")
    time.sleep(1)
    verdict = canary_verdict(state(store))
    assert verdict.word == "undecided"
    assert verdict.reasons == ("0 of at least 30 queries", "errors: no data", "degraded: no data", "slow: no data")
    with pytest.raises(Exception, match="this canary is undecided: 0 of at least 30 queries"):
        canary.promote_canary(store, who="ada")
    assert release.current_id(store) == ids["champion"]
    canary.stop_canary(store, who="ada")


def test_assignment_is_sticky_and_logged_with_outcomes_and_promotion_makes_it_the_champion(served: Served) -> None:
    server, store, ids = served
    record = begin(served, "fine", margins=Margins(harm=0.2))
    queries = [f"fine {number}" for number in range(120)]
    answers = [ask_all(server, queries) for _ in range(2)]
    for found in answers:
        assert {query: answer["release"] for query, answer in found.items()} == {
            query: assign(record, query_key(query), ids["champion"]) for query in queries
        }
    rated = {answers[1][query]["request_id"]: answers[1][query]["release"] for query in queries[:10]}
    for query in queries[:10]:
        said = {"request_id": answers[1][query]["request_id"], "query": query, "rating": "up", "used": True}
        assert httpx.post(f"{server.url}/v1/feedback", json=said, timeout=limit(20)).status_code == 202

    def logged() -> list[tuple[str, str]]:
        """(request id, release) of each request of which somebody said that its answer was used: the log joined with feedback."""
        lines = table(store, "requests", REQUEST_LOG, "fine ")
        used = {row["request_id"] for row in table(store, "feedback", FEEDBACK, "fine ") if row["used"]}
        return [(row["request_id"], row["release"]) for row in lines if row["request_id"] in used] if len(lines) >= 240 else []

    assert dict(eventually(lambda: found if len(found := logged()) == 10 else [])) == rated
    arms: dict[str, set[str]] = {}
    for row in table(store, "requests", REQUEST_LOG, "fine "):
        arms.setdefault(row["query"], set()).add(row["release"])
    assert {query: arms[query] for query in queries} == {query: {answers[0][query]["release"]} for query in queries}
    asked = 0
    while (verdict := canary_verdict(watched(server))).word != "fine":
        assert asked < 4000, verdict
        ask_all(server, [f"more {number}" for number in range(asked, asked + 120)])
        asked += 120
    server._supervisor._tasks[0]._canary._watcher.save()
    assert canary.promote_canary(store, who="ada").state == "promoted"
    assert release.current_id(store) == ids["fine"]
    eventually(lambda: {answer["release"] for answer in ask_all(server, queries[:20]).values()} == {ids["fine"]})


def test_a_sample_of_the_answers_was_asked_again_off_the_way(served: Served) -> None:
    server, store, _ = served
    ask_all(server, ["pizza near me"])
    eventually(lambda: table(store, "shadow", SHADOW, "pizza near me"))
    rows = table(store, "shadow", SHADOW, "")
    assert {row["state"] for row in rows} == {"answered"}
    assert {row["source"] for row in rows} >= {"teacher", "realtime_student"}
    assert 0 < sum(row["source"] == "realtime_student" for row in rows) < len(table(store, "requests", REQUEST_LOG, ""))
    text = httpx.get(f"{server.admin_url}/metrics", timeout=limit(20)).text
    assert 'headtail_shadow_compared_total{outcome="differ",source="teacher",task="query_segmentation"} 1.0' in text


def watched(server: serve.Server) -> CanaryRecord:
    """The record with what the watch has not written yet."""
    found = server._supervisor._tasks[0]._canary._record
    assert found is not None
    return found


def table(store: Storage, folder: str, schema: Any, prefix: str) -> list[dict[str, Any]]:
    files = Path(store.root, folder).rglob("*.parquet")
    return [row for file in files for row in pq.read_table(file, schema=schema).to_pylist() if row["query"].startswith(prefix)]
