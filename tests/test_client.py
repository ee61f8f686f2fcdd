"""The in-process client: no network for a hit, an answer in time whatever the server does, and a new snapshot without a restart."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fronts import Front
from headtail.adapters.storage import Storage
from headtail.client import Answer, AsyncClient, Client, ClientConfig, ClientError
from headtail.client.exchange import Exchanges, HttpReply, NoAnswer, Send, Sleep
from headtail.core.errors import ConfigError, InputError
from headtail.core.keys import query_key
from headtail.core.task import Task
from headtail.releases import release
from headtail.releases.canary import assign, promote_canary, read_canary, start_canary, stop_canary
from headtail.releases.overrides import remove_override, set_override, tombstone_query
from headtail.stages import serve
from headtail.stages.serve.errors import RequestError
from headtail.stages.serve.front.counters import read_counters
from headtail.stages.serve.metrics import prometheus_text
from local_server import Running
from ports import free_port
from test_serve import published, says, segments
from timescale import limit

SIDE = "businesses"


@pytest.fixture
def nowhere() -> str:
    """A URL that refuses connections."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture
def head(store: Storage, tmp_path: Path, segmentation: Task) -> Storage:
    """A store whose current release answers two queries."""
    published(store, tmp_path, segmentation)
    return store


def config(url: str, store: Storage | None = None, **changes: Any) -> ClientConfig:
    fields = {"url": url, "timeout_ms": int(limit(5) * 1000), "connect_timeout_ms": int(limit(5) * 1000), "backoff_ms": 1.0}
    return ClientConfig(**{**fields, "root": store.root if store else "", **changes})


class Scripted:
    """An ASGI app that answers each request with the next of its replies, and the last one for ever."""

    def __init__(self, *replies: tuple[int, bytes] | tuple[int, bytes, dict[str, str]]) -> None:
        self.replies, self.seen = list(replies), list[tuple[str, dict[str, str], Any]]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        self.seen.append((scope["path"], {k.decode(): v.decode() for k, v in scope["headers"]}, json.loads(body)))
        status, text, *rest = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        headers = [(name.encode(), value.encode()) for name, value in (rest[0] if rest else {}).items()]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text})


def served_answer(query: str = "q", **changes: Any) -> dict[str, Any]:
    fields = Answer(query, query, {"segments": []}, "realtime_student", False, False, 0.5, "k", "r", "s", "", "id1", False)._asdict()
    return {name: value for name, value in fields.items() if name != "local"} | {"latency_ms": 1.0, "of_a_later_version": 1} | changes


def error(code: str, **fields: Any) -> tuple[int, bytes, dict[str, str]]:
    made = RequestError(code, **fields)
    return made.status, made.body("id2"), dict(made.headers)


GOOD = (200, json.dumps(served_answer()).encode())


# ---- a hit


def test_a_hit_uses_no_network(head: Storage, nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    with Client(config(nowhere, head)) as client:
        found = client.answer("  Pizza\u00a0NEAR me ")
        assert (found.answer, found.source, found.cached, found.degraded, found.local) == (
            segments("pizza near me"),
            "teacher",
            True,
            False,
            True,
        )
        assert (found.normalised, found.release) == ("pizza near me", client.release)
        assert client.answer("me@example.com login").answer == segments("<email> login")
        assert client.counts[:3] == (2, 0, 0)


def test_an_asynchronous_hit_does_not_suspend(head: Storage, nowhere: str) -> None:
    async def use() -> None:
        async with AsyncClient(config(nowhere, head)) as client:
            steps = client.answer("pizza near me")
            with pytest.raises(StopIteration) as done:
                steps.send(None)
            assert done.value.value.answer == segments("pizza near me")

    asyncio.run(use())


def test_a_hit_is_what_the_server_answers(head: Storage, tmp_path: Path, segmentation: Task) -> None:
    front = Front(head, serve.Config(), tmp_path, says(segmentation))
    with Running(front.app) as server, Client(config(server.url, head)) as near, Client(config(server.url)) as far:
        for query in (" Pizza\u00a0NEAR me", "me@example.com login"):
            left, right = near.answer(query), far.answer(query)
            assert left._replace(local=False, request_id=right.request_id) == right
            assert (left.local, right.local) == (True, False)


# ---- a miss


def test_a_miss_is_answered_by_the_server(head: Storage, tmp_path: Path, segmentation: Task) -> None:
    front = Front(head, serve.Config(realtime_timeout_ms=60_000), tmp_path, says(segmentation))

    async def use(url: str) -> Answer:
        async with AsyncClient(config(url, head)) as client:
            return await client.answer("something rare", {SIDE: ["Sushi Bar"]})

    with Running(front.app) as server, Client(config(server.url, head)) as client:
        found = client.answer("something rare", {SIDE: ["Sushi Bar"]})
        assert (found.answer, found.source, found.degraded, found.local) == (segments("from the student"), "realtime_student", False, False)
        assert asyncio.run(use(server.url))._replace(request_id="") == found._replace(request_id="")
        assert client.counts[:3] == (0, 1, 0)
        with pytest.raises(ClientError) as refused:
            client.answer("x", {"unheard_of": ["a"]})
        assert (refused.value.code, refused.value.status, refused.value.field) == ("invalid", 422, "side_inputs")


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Scripted(GOOD)
    with Running(app) as server:
        with Client(config(server.url, api_key="htk_one")) as client:
            assert client.answer("q").request_id == "id1"
        monkeypatch.setenv("HEADTAIL_API_KEY", "htk_two")
        with Client(config(server.url)) as client:
            client.answer("q")
        monkeypatch.delenv("HEADTAIL_API_KEY")
        with Client(config(server.url)) as client:
            client.answer("q")
    assert [headers.get("authorization") for _, headers, _ in app.seen] == ["Bearer htk_one", "Bearer htk_two", None]
    assert "htk_one" not in repr(config("http://x", api_key="htk_one"))


@pytest.mark.parametrize("query", ["", " \u200b", "x" * 201, "x" * 10**6, "a\ud800", None, b"pizza", 7])
def test_what_the_server_would_refuse_is_refused_here(query: Any, nowhere: str) -> None:
    with Client(config(nowhere)) as client, pytest.raises(ClientError) as refused:
        client.answer(query)
    assert (refused.value.code, refused.value.field) == ("invalid", "query")


@pytest.mark.parametrize("code", ["unauthorized", "forbidden", "invalid", "not_found", "too_large"])
def test_a_refusal_is_an_error_and_is_not_asked_again(code: str, head: Storage) -> None:
    app = Scripted(error(code, field="query"))
    with Running(app) as server, Client(config(server.url, head)) as client:
        with pytest.raises(ClientError) as refused:
            client.answer("rare")
        assert (refused.value.code, refused.value.field, refused.value.request_id) == (code, "query", "id2")
        assert len(app.seen) == 1


FAILED = [(503, b"<html>proxy</html>"), (502, b""), (504, b""), error("overloaded"), error("rate_limited")]


@pytest.mark.parametrize("failure", [(status, body) for status, body, *_ in FAILED], ids=lambda failure: str(failure[0]))
def test_a_failure_is_tried_again(failure: tuple[int, bytes]) -> None:
    app = Scripted(failure, failure, GOOD)
    with Running(app) as server, Client(config(server.url)) as client:
        assert client.answer("q").answer == {"segments": []}
        assert client.counts.retries == 2
    assert len(app.seen) == 3


REASONS = {503: "server_busy", 429: "rate_limited", 500: "server_error", 502: "unreachable", 504: "unreachable", 302: "server_error"}


@pytest.mark.parametrize("status", REASONS)
def test_a_server_that_goes_on_failing_gives_the_fallback(status: int, head: Storage) -> None:
    with Running(Scripted((status, b"", {"location": "http://elsewhere"}))) as server:
        with Client(config(server.url, head)) as client:
            found = client.answer("rare ONE")
            assert (found.degraded, found.reason, found.source, found.local) == (True, REASONS[status], "fallback", True)
            assert found.answer == release.open_task(release.current_release(head)).fallback("rare one")
            assert client.counts.fallbacks == 1
        for alone in (config(server.url), config(server.url, head, fallback=False)):
            with Client(alone) as client, pytest.raises(ClientError) as failed:
                client.answer("rare")
            assert failed.value.code == REASONS[status]


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"query": "q"}', json.dumps(served_answer(degraded="no")).encode()])
def test_what_is_no_answer_is_not_taken_for_one(body: bytes, head: Storage) -> None:
    with Running(Scripted((200, body))) as server, Client(config(server.url, head)) as client:
        assert client.answer("rare").reason == "server_error"


def test_a_server_that_is_not_there_costs_little_after_a_while(head: Storage, nowhere: str) -> None:
    with Client(config(nowhere, head, breaker_failures=3, breaker_pause_s=3600.0)) as client:
        assert {client.answer(f"rare {number}").reason for number in range(4)} == {"unreachable"}
        assert client.counts.breaker_open
        started = time.perf_counter()
        for number in range(200):
            client.answer(f"rare {number}")
        assert time.perf_counter() - started < limit(2)
        assert client.answer("pizza near me").source == "teacher"
    with Client(config("", head)) as client:
        assert client.answer("rare").reason == "unreachable"


def test_a_server_that_comes_back_is_used_again(head: Storage) -> None:
    port = free_port()
    with Client(config(f"http://127.0.0.1:{port}", head, breaker_failures=1, breaker_pause_s=0.01, retries=0)) as client:
        assert client.answer("rare").degraded
        running = Running(Scripted(GOOD))
        running.port = running.server.config.port = port
        with running:
            end = time.monotonic() + limit(20)
            while client.answer("rare").degraded:
                assert time.monotonic() < end
                time.sleep(0.02)


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_caller_waits_no_longer_than_it_said(head: Storage, silent: str) -> None:
    async def use() -> Answer:
        async with AsyncClient(config(silent, head, timeout_ms=200)) as client:
            return await client.answer("rare")

    with Client(config(silent, head, timeout_ms=200)) as client:
        started = time.perf_counter()
        both = [client.answer("rare"), asyncio.run(use())]
        assert time.perf_counter() - started < limit(10)
    assert [(found.degraded, found.reason) for found in both] == [(True, "client_timeout")] * 2


class Trickling:
    """Sends a byte of its response now and then, for two seconds."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"40")]})
        for _ in range(40):
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.sleep(0.05)


def test_a_server_that_trickles_is_left(head: Storage) -> None:
    async def use(url: str) -> Answer:
        async with AsyncClient(config(url, head, timeout_ms=200)) as client:
            return await client.answer("rare")

    with Running(Trickling()) as server, Client(config(server.url, head, timeout_ms=200)) as client:
        both = [client.answer("rare"), asyncio.run(use(server.url))]
    assert {found.reason for found in both} == {"client_timeout"}, "one that waited for all of it would say server_error"


def test_threads_share_a_client(head: Storage) -> None:
    with Running(Echo()) as server, Client(config(server.url, head)) as client, ThreadPoolExecutor(8) as pool:
        queries = ["pizza near me" if number % 2 else f"rare {number}" for number in range(400)]
        found = list(pool.map(client.answer, queries))
        assert [one.query for one in found] == queries
        assert [one.local for one in found] == [number % 2 == 1 for number in range(400)]
        assert [one.normalised for one in found] == queries


class Echo(Scripted):
    """Answers each query with itself."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            body = json.loads((await receive())["body"])
            answer = json.dumps(served_answer(body["query"])).encode()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
            await send({"type": "http.response.body", "body": answer})


def test_loopback_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch, nowhere: str) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, nowhere)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Running(Scripted(GOOD)) as server, Client(config(server.url)) as client:
        assert client.answer("q").request_id == "id1"


# ---- many at once


def test_many_queries_are_one_request_for_the_misses(head: Storage) -> None:
    refusal = json.loads(RequestError("invalid", "no", field="query").body("id3"))
    rows = {"answers": [served_answer("rare"), refusal]}
    queries = ["pizza near me", "rare", "odd", "", "rare", "Pizza near me"]

    async def use(url: str) -> list[Any]:
        async with AsyncClient(config(url, head)) as client:
            return await client.answers(queries)

    app = Scripted((200, json.dumps(rows).encode()))
    with Running(app) as server, Client(config(server.url, head)) as client:
        for found in (client.answers(queries), asyncio.run(use(server.url))):
            assert [one.source if isinstance(one, Answer) else one.code for one in found] == [
                "teacher",
                "realtime_student",
                "invalid",
                "invalid",
                "realtime_student",
                "teacher",
            ]
        assert client.answers([]) == []
        assert client.counts[:2] == (2, 3)  # each occurrence counts
    with pytest.raises(ClientError, match="closed"):
        client.answer("pizza near me")
    assert [(path, body) for path, _, body in app.seen] == [
        ("/v1/answers", {"queries": ["rare", "odd"], "timeout_ms": int(limit(5) * 900)})
    ] * 2


def test_many_queries_get_the_fallback_when_the_answers_do_not_add_up(head: Storage) -> None:
    for body in (b'{"answers": []}', b"{}", b'{"answers": [1, 2]}', b"[]"):
        with Running(Scripted((200, body))) as server, Client(config(server.url, head)) as client:
            found = client.answers(["a", "b", "pizza near me"])
            assert [one.reason for one in found if isinstance(one, Answer)] == ["server_error", "server_error", ""], body


def test_more_than_a_server_takes_are_several_requests(nowhere: str) -> None:
    with Client(config(nowhere)) as client:
        queries = [f"q{number}" for number in range(2500)]
        steps, sizes, given = client._core.resolve_many(queries), [], None
        while True:
            try:
                step = steps.send(given)
            except StopIteration as done:
                found = done.value
                break
            assert isinstance(step, Send)
            sizes.append(len(step.body["queries"]))
            given = HttpReply(200, json.dumps({"answers": [served_answer(query) for query in step.body["queries"]]}).encode())
        assert sizes == [1000, 1000, 500]
        assert [one.query for one in found if isinstance(one, Answer)] == queries


# ---- retries, without a network


def run_exchange(statuses: Sequence[HttpReply | None], takes_s: float = 0.0, **changes: Any) -> tuple[list[float], str]:
    """Sleeps of one exchange, and how it ended. Each try takes `takes_s` of a clock that this function moves."""
    now, settings = 0.0, ClientConfig(**{"timeout_ms": 1000, "backoff_ms": 100.0, **changes})
    exchanges = Exchanges(settings, clock=lambda: now, jitter=lambda: 0.5)
    steps, given, sleeps, left = exchanges.ask("/v1/answer", {}), None, list[float](), list(statuses)
    try:
        while True:
            step = steps.send(given)
            if isinstance(step, Sleep):
                sleeps.append(step.seconds)
                now, given = now + step.seconds, None
            else:
                assert 0 < step.timeout_s <= settings.timeout_ms / 1000
                now, given = now + min(takes_s, step.timeout_s), left.pop(0)
    except StopIteration:
        return sleeps, "answered"
    except NoAnswer as failure:
        return sleeps, failure.reason
    finally:
        assert now <= settings.timeout_ms / 1000 + 1e-9, "no longer than timeout_ms"


DONE = HttpReply(200, b"{}")


def test_pauses_double_and_have_jitter() -> None:
    assert run_exchange([None, None, DONE]) == ([0.05, 0.1], "answered")
    assert run_exchange([None, None, None]) == ([0.05, 0.1], "unreachable")
    assert run_exchange([None], retries=0) == ([], "unreachable")


def test_retry_after_is_honoured_or_there_is_no_retry() -> None:
    assert run_exchange([HttpReply(503, b"", "0"), DONE]) == ([0.05], "answered")
    assert run_exchange([HttpReply(503, b"", "1")]) == ([], "server_busy")
    assert run_exchange([HttpReply(429, b"", "1"), DONE], timeout_ms=5000) == ([1.05], "answered")
    assert run_exchange([HttpReply(429, b"", "60")]) == ([], "rate_limited")
    assert run_exchange([HttpReply(503, b"", "Wed, 21 Oct 2026 07:28:00 GMT"), DONE]) == ([0.05], "answered")


def test_time_that_is_over_is_not_waited_for() -> None:
    assert run_exchange([None], takes_s=1.0) == ([], "client_timeout")
    assert run_exchange([None, None, None], takes_s=0.6)[0] == [0.05]
    assert run_exchange([None], takes_s=0.97) == ([], "unreachable")


@example(statuses=[None], takes=0.95, retries=1, after="")  # a pause that ends at the very end
@given(
    statuses=st.lists(st.sampled_from([None, 200, 429, 500, 502, 503, 504]), min_size=1, max_size=8),
    takes=st.floats(0, 1.5),
    retries=st.integers(0, 6),
    after=st.sampled_from(["", "0", "1", "2"]),
)
def test_an_exchange_ends_in_time(statuses: list[int | None], takes: float, retries: int, after: str) -> None:
    got = [None if status is None else HttpReply(status, b"{}", after) for status in statuses] + [DONE] * 10
    sleeps, end = run_exchange(got, takes, retries=retries)
    assert len(sleeps) <= retries
    assert end in {"answered", "unreachable", "rate_limited", "server_busy", "server_error", "client_timeout"}


# ---- the snapshot is followed


def test_a_new_snapshot_is_taken_without_a_restart(head: Storage, tmp_path: Path, segmentation: Task, nowhere: str) -> None:
    with Client(config(nowhere, head, refresh_s=0.05, retries=0)) as client:
        first = client.release
        assert client.answer("sushi").degraded
        published(head, tmp_path, segmentation, ["sushi"])
        end = time.monotonic() + limit(20)
        while client.answer("sushi").degraded:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert client.release != first
        assert client.answer("pizza near me").degraded
        release.rollback(head)
        assert client.refresh() or client.release == first
        assert client.answer("pizza near me").source == "teacher"


def test_copies_are_kept_apart_and_the_old_one_is_removed(head: Storage, tmp_path: Path, segmentation: Task, nowhere: str) -> None:
    copies = tmp_path / "copies"
    with Client(config(nowhere, head, cache_dir=str(copies), refresh_s=3600.0)) as client:
        (before,) = copies.rglob("data.mdb")
        published(head, tmp_path, segmentation, ["sushi"])
        assert client.refresh()
        (after,) = copies.rglob("data.mdb")
        assert before != after
        assert client.answer("sushi").local
        assert not client.refresh()


def test_what_people_decided_outranks_the_snapshot(head: Storage, nowhere: str) -> None:
    person = {"who": "ada", "why": "it is a dish"}
    given = json.dumps(segments("pizza"))
    with Client(config(nowhere, head, refresh_s=3600.0, breaker_failures=1)) as client:
        for query in ("pizza near me", "calzone"):
            set_override(head, query, given.replace("pizza", query), who="ada", why="it is a dish")
        assert not client.refresh()
        found = client.answer("Calzone")
        assert (found.answer, found.source, found.local) == (segments("calzone"), "human_override", True)
        assert client.answer("pizza near me").source == "human_override"
        remove_override(head, "pizza near me", **person)
        tombstone_query(head, query_key("calzone"), **person)
        client.refresh()
        assert [client.answer(query).source for query in ("pizza near me", "calzone")] == ["teacher", "fallback"]
        tombstone_query(head, query_key("pizza near me"), **person)
        client.refresh()
        assert client.answer("pizza near me").source == "fallback"
    with Client(config(nowhere, head)) as client:
        assert client.answer("pizza near me").source == "fallback"


def test_a_canary_answers_its_share_and_the_same_queries_always(head: Storage, tmp_path: Path, segmentation: Task, nowhere: str) -> None:
    queries = [f"place {number}" for number in range(200)]
    champion = published(head, tmp_path, segmentation, queries)
    trial = published(head, tmp_path, segmentation, [*queries, "calzone"])
    release.promote(head, champion.id)
    copies = tmp_path / "copies"
    with Client(config(nowhere, head, cache_dir=str(copies), refresh_s=3600.0)) as client:
        assert {client.answer(query).release for query in queries} == {champion.id}
        start_canary(head, trial.id, 0.3, who="ada")
        assert not client.refresh()
        found = {query: client.answer(query).release for query in queries}
        assert found == {query: assign(read_canary(head), query_key(query), champion.id) for query in queries}
        assert 30 < sum(one == trial.id for one in found.values()) < 90
        assert len(list(copies.rglob("data.mdb"))) == 2
        set_override(head, queries[0], json.dumps(segments(queries[0])), who="ada", why="as it is")
        client.refresh()
        assert client.answer(queries[0]).source == "human_override"
        stop_canary(head, who="ada")
        client.refresh()
        assert {client.answer(query).release for query in queries} == {champion.id}
        assert len(list(copies.rglob("data.mdb"))) == 1
        start_canary(head, trial.id, 0.5, who="ada")
        client.refresh()
        promote_canary(head, who="ada", accept_undecided=True)
        assert client.refresh()
        assert {client.answer(query).release for query in queries} == {trial.id}
    with Client(config(nowhere, head, refresh_s=3600.0)) as client:
        assert client.release == trial.id


def test_a_store_that_breaks_leaves_what_is_open(head: Storage, nowhere: str) -> None:
    with Client(config(nowhere, head, refresh_s=0.02)) as client:
        head.replace("CURRENT", b"0123456789abcdef")
        end = time.monotonic() + limit(20)
        while not client.counts.refresh_failures:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert client.answer("pizza near me").source == "teacher"


def test_an_asynchronous_client_follows_too(head: Storage, tmp_path: Path, segmentation: Task, nowhere: str) -> None:
    async def use() -> None:
        async with AsyncClient(config(nowhere, head, refresh_s=3600.0)) as client:
            published(head, tmp_path, segmentation, ["sushi"])
            assert await client.refresh()
            assert (await client.answer("sushi")).local
            assert client.counts.hits == 1

    asyncio.run(use())


def test_a_forked_child_has_its_own_connection_and_thread(head: Storage) -> None:
    app = Scripted(GOOD)
    with Running(app) as server, Client(config(server.url, head)) as client:
        client.answer("rare")
        http, thread = client._http, client._core.local._thread if client._core.local else None
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                good = client.answer("pizza near me").local and client.answer("rare").request_id == "id1"
                local = client._core.local
                fresh = client._http is not http and local is not None and local._thread is not thread and local._thread.is_alive()
                os.write(writer, b"1" if good and fresh else b"0")
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        assert os.read(reader, 1) == b"1"
        os.close(reader)
        assert client.answer("rare").request_id == "id1"


def test_a_key_crosses_no_network_in_clear_text(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="without encryption"):
        Client(ClientConfig(url="http://search.internal:8000", api_key="htk_x"))
    for url, changes in (("https://search.internal", {}), ("http://search.internal", {"key_without_tls": True}), ("http://localhost", {})):
        Client(ClientConfig(url=url, api_key="htk_x", **changes)).close()
    Client(ClientConfig(url="http://search.internal")).close()
    monkeypatch.setenv("HEADTAIL_API_KEY", "htk_y")
    with pytest.raises(ConfigError, match="without encryption"):
        AsyncClient(ClientConfig(url="http://search.internal"))


def test_wrong_settings_are_errors_at_the_start(root: str) -> None:
    with pytest.raises(ConfigError, match="a client needs a server or a store"):
        Client(ClientConfig(url="", root=""))
    with pytest.raises(InputError):
        Client(ClientConfig(root=root))
    with pytest.raises(ConfigError, match="the certificates cannot be read"):
        Client(ClientConfig(ca_file=root))
    for key in ("htk_one\n", "htk one", "htk_\u00e9"):
        with pytest.raises(ConfigError, match="a character that no key has") as wrong:
            Client(ClientConfig(api_key=key))
        assert "htk" not in str(wrong.value)
    with pytest.raises(ValueError, match="time_out"):
        ClientConfig(time_out=5)  # type: ignore[call-arg]


# ---- reports of local hits


def test_local_hits_are_in_the_servers_metrics_when_the_client_reports(head: Storage, tmp_path: Path, segmentation: Task) -> None:
    front = Front(head, serve.Config(), tmp_path, says(segmentation))
    with Running(front.app) as server:
        with Client(config(server.url, head, report_s=0.05)) as client:
            for _ in range(5):
                client.answer("pizza near me")
            end = time.monotonic() + limit(10)
            while front.count("client/current/teacher") < 5:
                assert time.monotonic() < end
                time.sleep(0.01)
            client.answer("pizza near me")
            client.answer("rare")  # a miss, which the server counts itself
            assert client.counts.unreported == 0
        assert front.count("client/current/teacher") == 6  # the last one at the end
        assert sum(front.count(f"client_seconds/{at}") for at in range(17)) == 6
        assert front.count("client_microseconds") > 0
        text = prometheus_text({"query_segmentation": read_counters(front.path)}).decode()
        assert 'headtail_client_hits_total{release="current",source="teacher",task="query_segmentation"} 6.0' in text
        assert 'headtail_client_hit_seconds_count{task="query_segmentation"} 6.0' in text

        async def other() -> None:
            async with AsyncClient(config(server.url, head, report_s=60)) as client:
                await client.answer("pizza near me")

        asyncio.run(other())
        assert front.count("client/current/teacher") == 7
        with Client(config(server.url, head)) as client:
            client.answer("pizza near me")
        assert front.count("client/current/teacher") == 7, "off unless it is asked for"


def test_a_report_that_the_server_does_not_take_is_counted_and_delays_nobody(head: Storage, nowhere: str) -> None:
    with Client(config(nowhere, head, report_s=0.01)) as client:
        client.answer("pizza near me")
        end = time.monotonic() + limit(10)
        while not client.counts.unreported:
            assert client.answer("pizza near me").cached
            assert time.monotonic() < end
            time.sleep(0.005)
    assert client.counts.unreported == client.counts.hits


BAD_REPORTS: list[tuple[dict[str, Any], str]] = [
    ({"release": "../x"}, "release"),
    ({"hits": {"nobody": 1}}, "hits.nobody.[key]"),
    ({"hits": {"teacher": -1}}, "hits.teacher"),
    ({"hits": {"teacher": 10**10}}, "hits.teacher"),
    ({"seconds": [0] * 16}, "seconds"),
    ({"sum_s": "NaN"}, "sum_s"),
    ({"query": "pizza"}, "query"),
]


@pytest.mark.parametrize("wrong, field", BAD_REPORTS)
def test_a_wrong_report_counts_nothing(wrong: dict[str, Any], field: str, head: Storage, tmp_path: Path, segmentation: Task) -> None:
    front = Front(head, serve.Config(), tmp_path, says(segmentation))
    body = {"release": "ab", "hits": {"teacher": 1}, "seconds": [0] * 17, "sum_s": 0.1, **wrong}

    async def go() -> httpx.Response:
        async with front.client() as http:
            return await http.post("/v1/client/hits", json=body)

    refused = asyncio.run(go())
    assert (refused.status_code, refused.json()["error"]["field"]) == (422, field)
    assert front.count("client/other/teacher") == 0
