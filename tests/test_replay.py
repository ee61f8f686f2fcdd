"""A replay must say what happened: every request counted once, errors never as answers, shares and quality as an oracle has them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fronts import Front
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import output_table
from headtail.core.config import TrackingConfig, build_config
from headtail.core.errors import ConfigError, HeadtailError, InputError
from headtail.core.keys import canonical, query_key
from headtail.core.receipt import Receipt
from headtail.core.rows import HOLDOUT, HUMAN_LABELS
from headtail.core.task import Task
from headtail.releases import release
from headtail.stages import replay, serve
from headtail.stages.plan.result import Result as PlanResult
from headtail.stages.replay import REQUESTS, Event, EventReply
from headtail.stages.serve.answerer import Miss, MissFailed, RealtimeReply
from local_server import Running
from ports import free_port
from test_cache import answers, good, publish
from test_publish import leave
from timescale import limit

OFF = TrackingConfig(enabled=False)
Asgi = Callable[[Any, Any, Any], Awaitable[None]]


def holdout(store: Storage, counts: Mapping[str, int]) -> Receipt:
    rows = [{"query_key": query_key(q), "query": q, "count": n, "seen": not q.startswith("new")} for q, n in counts.items()]
    return leave(store, "ingest", "1090", {"holdout": pa.Table.from_pylist(rows, schema=HOLDOUT)})


def labels(store: Storage, wanted: Mapping[str, str]) -> Receipt:
    rows = [
        {"query_key": query_key(q), "query": q, "answer": canonical({"intent": i}), "count": 1, "stratum": "head"}
        for q, i in wanted.items()
    ]
    table = pa.Table.from_pylist(rows, schema=HUMAN_LABELS)
    return leave(store, "plan", "b1a4", {"human_labels": table}, result=PlanResult(head_limit="coverage", head_last_count=1))


COUNTS = {"pizza": 40, "burger": 30, "rare": 10, "new one": 5, "bad": 15}


@pytest.fixture
def state(store: Storage, tmp_path: Path, intent: Task) -> Front:
    """pizza and burger are cached (burger wrongly), `bad` breaks the student, the others are live."""
    holdout(store, COUNTS)
    labels(store, {"pizza": "browse", "burger": "price", "bad": "browse", "rare": "booking"})
    table = answers(good("pizza", '{"intent":"browse"}'), good("burger", '{"intent":"browse"}'))
    _, manifest = publish(store, tmp_path, table)
    release.promote(store, release.make_release(store, snapshot=manifest.id, task=intent, student="distill/x").id)

    async def live(miss: Miss) -> RealtimeReply:
        if miss.clean == "bad":
            raise MissFailed("overloaded")
        await asyncio.sleep(0.02)
        return RealtimeReply('{"intent": "booking"}', "stop", 0.9, "ab" * 16, "distill/x", intent.fingerprint)

    config = serve.Config(release=release.current_id(store), realtime_timeout_ms=int(1000 * limit(60)))
    return Front(store, config, tmp_path, live)


def config(root: str, url: str, **options: Any) -> replay.Config:
    data = {"root": root, "url": url, "tracking": OFF, "task": "query_intent", "timeout_s": limit(5), **options}
    return build_config(replay.Config, data, where="test")


def test_a_replay_counts_every_event_once(store: Storage, root: str, state: Front) -> None:
    with Running(state.app) as server:
        receipt = replay.run(config(root, server.url, requests=1000))  # more than there are: all of them
    assert receipt.rows == {"requests": 100, "errors": 0, "cache": 70, "realtime": 15, "fallback": 15}
    m = receipt.metrics
    assert (m["cache_hit_share"], m["realtime_share"], m["fallback_share"], m["degraded_share"]) == (0.7, 0.15, 0.15, 0.15)
    assert m["requests"] == 100
    assert m["errors"] == 0
    # human labels: pizza 40 right, burger 30 wrong, bad 15 right by its fallback, rare 10 right
    assert m["quality_requests"] == 95
    assert m["quality"] == pytest.approx(65 / 95)
    table = output_table(store, receipt, "requests")
    assert table.schema == REQUESTS
    assert Counter(table.column("query").to_pylist()) == COUNTS
    assert Counter(table.column("reason").to_pylist()) == {"": 85, "overloaded": 15}
    assert {row["query"] for row in table.to_pylist() if not row["seen"]} == {"new one"}
    live_ms = [row["latency_ms"] for row in table.to_pylist() if row["source"] == "realtime_student"]
    assert min(live_ms) >= 20
    assert m["p50_ms/realtime"] == pytest.approx(np.quantile(live_ms, 0.5))
    cache_ms = [row["latency_ms"] for row in table.to_pylist() if row["cached"]]
    assert m["p50_ms/cache"] == pytest.approx(np.quantile(cache_ms, 0.5))
    assert m["p50_ms"] <= m["p95_ms"] <= m["p99_ms"]
    assert b"<svg" in store.read(receipt.output("latency.svg" if "latency.svg" in receipt.outputs else "latency").path)
    assert receipt.result.server.id == release.current_id(store)


def test_the_same_release_is_not_measured_twice_and_another_is(
    store: Storage, root: str, tmp_path: Path, state: Front, intent: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Running(state.app) as server:
        asked = config(root, server.url, requests=50)
        first = replay.run(asked)
        named = asked.model_copy(update={"release": release.current_id(store)})
        monkeypatch.setattr(replay, "send", lambda *_: pytest.fail("sent again"))
        assert replay.run(asked).fingerprint == replay.run(named).fingerprint == first.fingerprint
    found = replay.find_replay(named)  # the server is gone
    assert found is not None
    assert found.fingerprint == first.fingerprint
    assert replay.find_replay(named.model_copy(update={"requests": 51})) is None
    assert replay.find_replay(named.model_copy(update={"release": "another"})) is None
    monkeypatch.undo()
    _, manifest = publish(store, tmp_path, answers(good("pizza", '{"intent":"price"}')))
    release.promote(store, release.make_release(store, snapshot=manifest.id, task=intent).id)
    with Running(Front(store, serve.Config(release=release.current_id(store)), tmp_path).app) as server:
        second = replay.run(asked.model_copy(update={"url": server.url}))
    assert second.fingerprint != first.fingerprint
    assert second.rows["realtime"] == 0


def test_a_sample_is_drawn_by_traffic_and_repeats(store: Storage) -> None:
    log = holdout(store, {f"q{i}": max(1, 1000 // (i + 1)) for i in range(300)})
    one, two = replay.draw_events(store, log, 500, 7), replay.draw_events(store, log, 500, 7)
    assert one == two
    assert one != replay.draw_events(store, log, 500, 8)
    top = Counter(event.query for event in one).most_common(1)[0]
    assert top[0] == "q0"
    assert 50 < top[1] < 110  # 1000 of about 6400 events: 78 expected


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=20), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_no_event_is_drawn_twice(counts: list[int], share: float, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = open_storage(str(tmp_path_factory.mktemp("store")))
    have = {f"q{i}": n for i, n in enumerate(counts)}
    log = holdout(store, have)
    wanted = max(1, int(share * sum(counts)))
    drawn = Counter(event.query for event in replay.draw_events(store, log, wanted, seed))
    assert drawn.total() == wanted
    assert all(n <= have[query] for query, n in drawn.items())
    assert Counter(event.query for event in replay.draw_events(store, log, 10**6, seed)) == have


async def _reply(send: Any, status: int, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


def flaky(served: Mapping[str, Any]) -> Asgi:
    """A server that fails in every way it can, by query."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/v1/release":
            await _reply(send, 200, json.dumps(served).encode())
            return
        body = b""
        more = True
        while more:
            part = await receive()
            body, more = body + part.get("body", b""), part.get("more_body", False)
        query = json.loads(body)["query"]
        good_reply = {
            "answer": {"intent": "browse"},
            "source": "teacher",
            "cached": True,
            "degraded": False,
            "reason": "",
            "release": served["id"],
        }
        if query == "pizza":
            await _reply(send, 200, json.dumps(good_reply).encode())
        elif query == "burger":
            await _reply(send, 500, b'{"error": "boom"}')
        elif query == "rare":
            await asyncio.sleep(limit(3))
        elif query == "bad":
            await _reply(send, 200, b"<html>a proxy's idea of an answer</html>")
        else:
            await _reply(send, 200, b'{"unexpected": 1}')

    return app


@pytest.mark.slow
def test_errors_are_errors_and_never_answers(store: Storage, root: str) -> None:
    holdout(store, COUNTS)
    labels(store, dict.fromkeys(COUNTS, "browse"))
    with Running(flaky({"id": "r1", "task": "query_intent"})) as server:
        receipt = replay.run(config(root, server.url, timeout_s=limit(1.5), concurrency=16))
    assert receipt.rows == {"requests": 100, "errors": 60, "cache": 40, "realtime": 0, "fallback": 0}
    assert receipt.metrics["quality"] == pytest.approx(2 * 40 / (2 * 40 + 60))  # an error is an answer missed
    table = output_table(store, receipt, "requests")
    by_query = {row["query"]: (row["status"], row["source"]) for row in table.to_pylist()}
    assert by_query == {"pizza": (200, "teacher"), "burger": (500, ""), "rare": (0, ""), "bad": (0, ""), "new one": (0, "")}
    assert any("30 requests failed" in note for note in receipt.notes)
    answered = [row["latency_ms"] for row in table.to_pylist() if row["status"] == 200 and row["source"]]
    assert receipt.metrics["p99_ms"] == pytest.approx(np.quantile(answered, 0.99))  # latency is of answers


def test_a_release_that_moves_meanwhile_is_told(store: Storage, root: str) -> None:
    holdout(store, {"pizza": 5})
    labels(store, {})
    served = {"id": "r1", "task": "query_intent"}
    with Running(flaky(served)) as server:
        plain = replay.server_facts
        try:
            replay.server_facts = lambda url, timeout_s: {**plain(url, timeout_s), "id": "r0"}  # the server had another a moment ago
            receipt = replay.run(config(root, server.url))
        finally:
            replay.server_facts = plain
    assert any("release changed" in note and "r1" in note for note in receipt.notes)
    assert "quality" not in receipt.metrics  # no human labels: no figure, rather than 0 or 1


def test_what_is_wrong_is_named(store: Storage, root: str, state: Front) -> None:
    with pytest.raises(InputError, match="no server answers"):
        replay.run(config(root, f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(ConfigError, match="url"):
        config(root, "localhost:8000")
    with Running(state.app) as server:
        with pytest.raises(ConfigError, match="another release"):
            replay.run(config(root, server.url, release="feed"))
        with pytest.raises(ConfigError, match="another task"):
            replay.run(config(root, server.url, task="query_segmentation"))
        with pytest.raises(InputError, match="no headtail server"):
            replay.run(config(root, server.url + "/docs"))
        holdout(store, {})
        with pytest.raises(InputError, match="no holdout traffic"):
            replay.run(config(root, server.url))
        holdout(store, {"burger": 3})
    with Running(flaky({"id": "r9", "task": "query_intent"})) as server, pytest.raises(HeadtailError, match="every request failed"):
        replay.run(config(root, server.url))


def test_figures_of_one_slow_request() -> None:
    event = Event(b"k" * 16, "q", True)
    found = replay.replay_figures([EventReply(event, 200, 1234.5, {}, "fallback", False, True, "timeout")], 2.0)
    assert found.answered.p50_ms == found.paths["fallback"].p99_ms == 1234.5
    assert (found.requests_per_s, found.paths["cache"].p50_ms) == (0.5, None)
    metrics = found.metrics()
    assert metrics["p50_ms"] == metrics["p99_ms/fallback"] == 1234.5
    assert not {"p50_ms/cache", "quality"} & metrics.keys()
