"""Whatever the student does, a caller gets an answer; whatever the caller sends, the server stays up. test_serve_ray: on Ray Serve."""

from __future__ import annotations

import asyncio
import gc
import html
import json
import re
import shutil
import socket
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fronts import Front
from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import output_table
from headtail.batch.shard_requests import shard_requests
from headtail.core.config import TrackingConfig, build_config
from headtail.core.errors import ConfigError, InputError
from headtail.core.io_format import DEFAULT
from headtail.core.keys import normalise, query_key
from headtail.core.task import Task, load_task
from headtail.releases import release
from headtail.releases.overrides import remove_override, set_override, tombstone_query
from headtail.releases.release import Release
from headtail.stages import ingest, plan, serve
from headtail.stages.serve.admin import PAGE
from headtail.stages.serve.answerer import REASONS, AskStudent, Miss, MissFailed, RealtimeReply, guard_reply
from headtail.stages.serve.api import AnswerResponse
from ports import free_port
from test_cache import answers, good, publish
from timescale import limit

OFF = TrackingConfig(enabled=False)
STUDENT = "distill/0123456789abcdef"


def segments(text: str, label: str = "topic") -> dict[str, Any]:
    return {"segments": [{"label": label, "text": text}]}


def published(
    store: Storage, tmp_path: Path, task: Task, queries: Sequence[str] = ("pizza near me", "<email> login"), student: str = STUDENT
) -> Release:
    """A release whose snapshot answers `queries`, made current."""
    rows = [good(query, json.dumps(segments(query), sort_keys=True)) for query in queries]
    _, manifest = publish(store, tmp_path, answers(*rows), share_redacted=True)
    return release.promote(store, release.make_release(store, snapshot=manifest.id, task=task, student=student).id)


def reply(task: Task, answer: Any = None, **changes: Any) -> RealtimeReply:
    text = answer if isinstance(answer, str) else json.dumps(answer if answer is not None else segments("from the student"))
    return RealtimeReply(text, "stop", 0.8, "ab" * 16, STUDENT, task.fingerprint)._replace(**changes)


def says(task: Task, answer: Any = None, **changes: Any) -> AskStudent:
    async def realtime(miss: Miss) -> RealtimeReply:
        return reply(task, answer, **changes)

    return realtime


def breaks(error: BaseException) -> AskStudent:
    async def realtime(miss: Miss) -> RealtimeReply:
        raise error

    return realtime


async def sleeps(miss: Miss) -> RealtimeReply:
    await asyncio.sleep(60)
    raise AssertionError("was not cancelled")


def ask(front: Front, query: Any = "something rare", **more: Any) -> httpx.Response:
    return front.ask(query, **more)


def ms(seconds: float) -> int:
    return int(1000 * limit(seconds))


@pytest.fixture
def open_front(store: Storage, tmp_path: Path, segmentation: Task) -> Callable[..., Front]:
    published(store, tmp_path, segmentation)

    def make(realtime: AskStudent | None = None, **options: Any) -> Front:
        return Front(store, serve.Config(**{"realtime_timeout_ms": ms(0.2), **options}), tmp_path, realtime)

    return make


# ---- one answer


def test_a_head_query_never_reaches_the_student(open_front: Callable[..., Front]) -> None:
    front = open_front(breaks(AssertionError("the student was asked")))
    found = ask(front, " Pizza\u00a0NEAR me").json()
    assert {name: found[name] for name in ("normalised", "answer", "source", "cached", "degraded", "reason")} == {
        "normalised": "pizza near me",
        "answer": segments("pizza near me"),
        "source": "teacher",
        "cached": True,
        "degraded": False,
        "reason": "",
    }
    AnswerResponse.model_validate(found, strict=True)
    assert set(found) == set(AnswerResponse.model_fields)
    assert found["release"] == front.answerer.served.release.id
    assert len(bytes.fromhex(found["answer_key"])) == 16


def test_a_miss_is_answered_by_the_student(open_front: Callable[..., Front], segmentation: Task) -> None:
    found = ask(open_front(says(segmentation))).json()
    assert (found["source"], found["cached"], found["degraded"], found["reason"]) == ("realtime_student", False, False, "")
    assert found["answer"] == segments("from the student")
    assert (found["confidence"], found["answer_key"]) == (0.8, "ab" * 16)
    AnswerResponse.model_validate(found, strict=True)


FAULTS: dict[str, tuple[Callable[[Task], AskStudent | None], str]] = {
    "switched off": (lambda task: None, "off"),
    "late": (lambda task: sleeps, "timeout"),
    "raises": (lambda task: breaks(RuntimeError("boom")), "error"),
    "raises a timeout of its own": (lambda task: breaks(TimeoutError()), "timeout"),
    "is cancelled on its side": (lambda task: breaks(asyncio.CancelledError()), "unavailable"),
    "is gone": (lambda task: breaks(MissFailed("unavailable")), "unavailable"),
    "is full": (lambda task: breaks(MissFailed("overloaded")), "overloaded"),
    "is cut short": (lambda task: says(task, finish_reason="length"), "truncated"),
    "writes no JSON": (lambda task: says(task, '{"segments": ['), "invalid"),
    "writes nothing": (lambda task: says(task, ""), "invalid"),
    "writes other JSON": (lambda task: says(task, {"segments": [{"text": "x", "label": "planet"}]}), "invalid"),
    "writes half a character": (lambda task: says(task, '{"segments": [{"text": "\\ud800", "label": "topic"}]}'), "invalid"),
    "nests without end": (lambda task: says(task, "[" * 100_000), "invalid"),
    "is of another task": (lambda task: says(task, task_fingerprint="0" * 32), "outdated"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_student_degrades_and_never_fails(open_front: Callable[..., Front], segmentation: Task, fault: str) -> None:
    realtime, reason = FAULTS[fault]
    front = open_front(realtime(segmentation))
    response = ask(front, "Something rare")
    assert response.status_code == 200
    found = response.json()
    assert (found["source"], found["degraded"], found["cached"], found["reason"]) == ("fallback", True, False, reason)
    assert reason in REASONS
    assert found["answer"] == segmentation.fallback("something rare")
    assert found["confidence"] is None
    assert found["answer_key"] is None
    assert front.answerer.in_flight == 0
    AnswerResponse.model_validate(found, strict=True)


def test_a_release_without_student_says_so(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation, student="")
    found = ask(Front(store, serve.Config(), tmp_path)).json()
    assert (found["source"], found["degraded"], found["reason"]) == ("fallback", True, "no_student")


def test_waiting_for_the_student_never_takes_the_places_of_hits(open_front: Callable[..., Front], segmentation: Task) -> None:
    started = 0

    async def slow(miss: Miss) -> RealtimeReply:
        nonlocal started
        started += 1
        await asyncio.sleep(limit(0.3))
        return reply(segmentation)

    front = open_front(slow, max_misses=3, realtime_timeout_ms=ms(5))

    async def go() -> tuple[list[dict[str, Any]], float]:
        async with front.client() as http:
            misses = [asyncio.create_task(http.post("/v1/answer", json={"query": f"rare {i}"})) for i in range(20)]
            await asyncio.sleep(0.1)
            clock = time.perf_counter()
            hit = await http.post("/v1/answer", json={"query": "pizza near me"})
            took = time.perf_counter() - clock
            return [hit.json(), *[(await miss).json() for miss in misses]], took

    (hit, *misses), took = asyncio.run(go())
    assert hit["cached"]
    assert took < limit(0.15)
    assert started == 3
    assert sorted(m["reason"] for m in misses) == [""] * 3 + ["overloaded"] * 17


def test_a_caller_who_leaves_frees_his_place(open_front: Callable[..., Front]) -> None:
    front = open_front(sleeps, realtime_timeout_ms=ms(30))

    async def go() -> None:
        task = asyncio.create_task(front.answerer.answer("rare"))
        await asyncio.sleep(0.05)
        assert front.answerer.in_flight == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert front.answerer.in_flight == 0

    asyncio.run(go())


@pytest.mark.parametrize("redacted", ["uncached", "cached"])
def test_a_student_sees_of_a_redacted_query_what_the_teacher_saw_or_nothing(redacted: str, store: Storage, tmp_path: Path) -> None:
    """Where the number may decide, no model is asked, ahead of time or live. Else the live prompt is the one of precompute."""
    folder = shutil.copytree(load_task("query_segmentation").folder, tmp_path / "task")
    (folder / "task.yaml").write_text((folder / "task.yaml").read_text() + f"\nredacted: {redacted}\n")
    task, clean = load_task(folder), "mail <email> or <phone> about <card>"
    published(store, tmp_path, task)
    seen: list[Sequence[Mapping[str, str]]] = []

    async def realtime(miss: Miss) -> RealtimeReply:
        seen.append(DEFAULT.messages(miss.served.task, miss.clean, miss.side_inputs))
        return reply(task)

    front = Front(store, serve.Config(realtime_timeout_ms=ms(5)), tmp_path, realtime)
    found = ask(front, "mail Jane.Doe@example.com or +49 171 1234567 about 4111 1111 1111 1111").json()
    batch = shard_requests(pa.table({"query": [clean], "query_key": [query_key(clean)], "businesses": [[]]}), task, "settings").messages
    if redacted == "cached":
        assert seen == batch
        assert found["source"] == "realtime_student"
    else:
        assert seen == []
        assert (found["source"], found["degraded"], found["reason"]) == ("fallback", True, "redacted")
        assert task.parse(json.dumps(found["answer"]))[1] == ""
    assert (found["normalised"], "Jane" in json.dumps(seen)) == (clean, False)
    assert ask(front, "Someone@Example.com login").json()["cached"]  # and what ingest redacted is found


def test_two_numbers_are_never_answered_from_one_cached_answer(store: Storage, tmp_path: Path, intent: Task) -> None:
    """From the log to the reply: many callers' numbers are one query of the log, and nobody is served from what it was answered with."""
    path = tmp_path / "log.csv"
    path.write_text("query\n" + "call 5552345678\n" * 5 + "call 5552349999\n" * 5 + "pizza\n" * 5 + "part 4532349876\n" * 5)
    root = str(tmp_path / "store")
    ingest.run(ingest.Config(root=root, tracking=OFF, log=str(path), task="query_intent", holdout_share=0.0))
    limits = plan.Head(coverage=None)
    planned = output_table(store, plan.run(plan.Config(root=root, tracking=OFF, task="query_intent", head=limits)), "head")[
        "query"
    ].to_pylist()
    assert sorted(planned) == ["part 4532349876", "pizza"]
    asked = [*planned, "call <phone>"]  # as a plan of another task, or of an older version, may have it
    _, manifest = publish(store, tmp_path, answers(*(good(query, '{"intent":"browse"}') for query in asked)))
    release.promote(store, release.make_release(store, snapshot=manifest.id, task=intent, student=STUDENT).id)
    config = serve.Config(realtime_timeout_ms=ms(5))
    front = Front(store, config, tmp_path, says(intent, {"intent": "price"}))
    for query, source in (
        ("call 5552345678", "fallback"),
        ("call 5552349999", "fallback"),
        ("call <phone>", "fallback"),
        ("part 4532349876", "teacher"),
        ("part 4532349877", "realtime_student"),
        ("pizza", "teacher"),
    ):
        found = ask(front, query).json()
        assert (found["source"], found["cached"]) == (source, source == "teacher"), query


def test_side_inputs_go_to_the_student_and_only_known_ones(open_front: Callable[..., Front], segmentation: Task) -> None:
    seen: list[Mapping[str, Sequence[str]]] = []

    async def realtime(miss: Miss) -> RealtimeReply:
        seen.append(miss.side_inputs)
        return reply(segmentation)

    front = open_front(realtime)
    assert ask(front, "marios", side_inputs={"businesses": ["Mario's"]}).json()["source"] == "realtime_student"
    assert seen == [{"businesses": ["Mario's"]}]
    refused = ask(front, "marios", side_inputs={"weather": ["rain"]})
    assert refused.status_code == 422
    assert "businesses" in refused.json()["error"]["do"]
    assert ask(front, "marios", side_inputs={"businesses": "Mario's"}).status_code == 422


# ---- what callers send


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b'{"query": ""}', "query"),
    "blanks only": ('{"query": " \u00a0\u200b\\n"}'.encode(), "query"),
    "too long": (json.dumps({"query": "x" * 201}).encode(), "query"),
    "a megabyte": (json.dumps({"query": "x" * 2**20}).encode(), "body"),
    "too long once normalised": (json.dumps({"query": "\ufdfa" * 20}).encode(), "query"),  # one character becomes 18
    "half a character": (b'{"query": "\\ud800"}', "body"),
    "null": (b'{"query": null}', "query"),
    "a number": (b'{"query": 3}', "query"),
    "a list": (b'{"query": ["a"]}', "query"),
    "no query": (b"{}", "query"),
    "unknown field": (b'{"query": "a", "querry": "b"}', "querry"),
    "not an object": (b"[]", "body"),
    "not JSON": (b"{", "body"),
    "nothing": (b"", "body"),
    "not UTF-8": (b'{"query": "\xff\xfe"}', "body"),
    "deep": (b"[" * 100_000, "body"),
}

NO_JSON = {"deep", "not JSON", "nothing", "not UTF-8"}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_with_what_is_wrong(open_front: Callable[..., Front], case: str) -> None:
    body, field = BAD[case]
    status = 413 if case == "a megabyte" else 400 if case in NO_JSON else 422
    code = {400: "bad_request", 413: "too_large", 422: "invalid"}[status]
    front = open_front()

    async def go() -> httpx.Response:
        async with front.client() as http:
            return await http.post("/v1/answer", content=body)

    response = asyncio.run(go())
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["field"]) == (status, code, field)
    assert error["message"]
    assert error["do"]
    assert error["request_id"]
    assert len(response.content) < 1000  # the input is not sent back


class Connection:
    """ASGI's `receive` of a connection, as long as the app holds it. `parts` of the body; None: the caller sends nothing more. He waits
    for the response."""

    def __init__(self, parts: Sequence[bytes | None]) -> None:
        self._parts = list(parts)

    async def __call__(self) -> dict[str, Any]:
        part = self._parts.pop(0) if self._parts else None
        if part is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": part, "more_body": bool(self._parts)}


RELEASED: dict[str, tuple[str, str, Sequence[bytes | None]]] = {
    **{case: ("/v1/answer", "POST", [body]) for case, (body, _) in BAD.items()},
    "a hit": ("/v1/answer", "POST", [b'{"query": "pizza near me"}']),
    "a miss whose student fails": ("/v1/answer", "POST", [b'{"query": "rare"}']),
    "too large and without end": ("/v1/answer", "POST", [b"x" * 70_000, None]),
    "endless": ("/v1/answer", "POST", [*[b"x" * 70_000] * 40, None]),
    "cut off": ("/v1/answer", "POST", [b'{"query"', None]),
    "a list too large": ("/v1/answers", "POST", [b"x" * 70_000, None]),
    "a list with errors in it": ("/v1/answers", "POST", [b'{"queries": [3, "", "rare"]}']),
    "a chat that is none": ("/v1/chat/completions", "POST", [b"{}"]),
    "a method of no route": ("/v1/answer", "DELETE", [b""]),
    "no route": ("/nothing", "GET", [b""]),
}


@pytest.mark.parametrize("case", RELEASED)
def test_a_connection_is_let_go_with_its_response(open_front: Callable[..., Front], case: str) -> None:
    """An HTTP server closes a connection whose body was not read to its end when the app holds it no longer. A cycle through an error's
    traceback would hold it until the garbage collector runs."""
    front = open_front(breaks(RuntimeError("boom")), max_body_bytes=65536, body_timeout_s=0.05)
    path, method, parts = RELEASED[case]

    async def send(message: Any) -> None:
        sent.append(message)

    async def go() -> weakref.ref[Connection]:
        connection = Connection(parts)
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": []}
        await front.app(scope, connection, send)
        return weakref.ref(connection)

    sent: list[Any] = []
    gc.disable()
    try:
        assert asyncio.run(go())() is None
    finally:
        gc.enable()
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


def test_of_many_queries_each_that_cannot_be_taken_has_its_error_in_its_place(open_front: Callable[..., Front]) -> None:
    bodies = [b'{"queries": ["pizza near me", "\\ud800", null, 7, ""]}', b'{"queries": ["pizza near me", null, null, 7, ""]}']

    async def go() -> list[httpx.Response]:
        async with open_front().client() as http:
            return [
                await http.post("/v1/answers", content=body) for body in (*bodies, b'{"queries": "\\ud800"}', b'{"queries": ["\\ud800"')
            ]

    *many, other, cut = asyncio.run(go())
    for response in many:
        first, *refused = response.json()["answers"]
        assert first["cached"]
        assert [(one["error"]["code"], one["error"]["field"]) for one in refused] == [("invalid", "query")] * 4
    assert "surrogate" in many[0].json()["answers"][1]["error"]["message"]
    assert [response.status_code for response in (other, cut)] == [422, 400]


def test_a_body_that_is_cut_off_is_said_to_be(open_front: Callable[..., Front]) -> None:
    """As granian gives it: the parts that came, then http.disconnect."""
    front, sent = open_front(), []

    async def send(message: Any) -> None:
        sent.append(message)

    async def go(*parts: Any) -> dict[str, Any]:
        left = [*parts, *[{"type": "http.disconnect"}] * 3]

        async def receive() -> Any:
            return left.pop(0)

        sent.clear()
        scope = {"type": "http", "method": "POST", "path": "/v1/answer", "query_string": b"", "headers": []}
        await front.app(scope, receive, send)
        error: dict[str, Any] = json.loads(sent[-1]["body"])["error"]
        return error

    for parts in ([], [{"type": "http.request", "body": b'{"query": "pizza near me"}', "more_body": True}]):
        error = asyncio.run(go(*parts))
        assert (sent[0]["status"], error["code"], error["field"]) == (400, "bad_request", "body")
        assert "cut off" in error["message"]


def test_get_takes_the_same_and_refuses_the_same(open_front: Callable[..., Front]) -> None:
    async def go() -> list[httpx.Response]:
        async with open_front().client() as http:
            return [
                await http.get("/v1/answer", params={"query": "pizza near me"}),
                await http.get("/v1/answer"),
                await http.get("/v1/answer", params={"query": ""}),
                await http.get("/v1/answer?query=%ff%fe"),
                await http.post(
                    "/v1/answer", content=b'{"query":"pizza near me"}', headers={"content-type": "application/x-www-form-urlencoded"}
                ),
            ]

    good_one, missing, empty, undecodable, curl = asyncio.run(go())
    assert good_one.json()["cached"]
    assert missing.status_code == empty.status_code == 422
    assert missing.json()["error"]["field"] == "query"
    assert undecodable.status_code in (200, 422)
    assert curl.json()["cached"]  # `curl -d` without a content type


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=st.text(st.characters(), max_size=230))
def test_any_text_gets_a_valid_answer_or_a_refusal(open_front: Callable[..., Front], segmentation: Task, query: str) -> None:
    front = open_front()

    async def go() -> httpx.Response:
        async with front.client() as http:
            return await http.post("/v1/answer", content=json.dumps({"query": query}).encode())

    response = asyncio.run(go())
    if response.status_code in (400, 422):
        assert not normalise(query) or len(normalise(query)) > 200 or any("\ud800" <= c <= "\udfff" for c in query)
        return
    assert response.status_code == 200
    found = response.json()
    assert found["query"] == query
    jsonschema.validate(found["answer"], segmentation.schema)


# ---- what is served


def test_the_server_follows_current(store: Storage, tmp_path: Path, open_front: Callable[..., Front], segmentation: Task) -> None:
    front = open_front(says(segmentation), refresh_s=0.02)
    first = front.answerer.served.release.id
    assert ask(front, "new query").json()["source"] == "realtime_student"
    second = published(store, tmp_path, segmentation, ["new query"])

    async def until(wanted: str) -> dict[str, Any]:
        watch = asyncio.create_task(front.watch.follow())
        async with front.client() as http:
            for _ in range(200):
                found: dict[str, Any] = (await http.get("/v1/answer", params={"query": "new query"})).json()
                if found["release"] == wanted:
                    watch.cancel()
                    return found
                await asyncio.sleep(0.02)
        raise AssertionError(f"still not {wanted}")

    assert asyncio.run(until(second.id))["cached"]
    release.rollback(store)
    assert not asyncio.run(until(first))["cached"]
    assert front.count("release") == int(first, 16)


def test_no_request_sees_parts_of_two_releases(store: Storage, tmp_path: Path, segmentation: Task, intent: Task) -> None:
    """The release moves to another task while a miss waits for the student: that miss stays with the old one throughout."""
    old = published(store, tmp_path, segmentation)
    gate = asyncio.Event()

    async def realtime(miss: Miss) -> RealtimeReply:
        await gate.wait()
        return reply(segmentation)

    front = Front(store, serve.Config(realtime_timeout_ms=ms(5)), tmp_path, realtime)

    async def go() -> tuple[Any, Any]:
        waiting = asyncio.create_task(front.answerer.answer("rare"))
        await asyncio.sleep(0.02)
        published(store, tmp_path, intent, ["x"])
        assert await front.watch.refresh()
        gate.set()
        return await waiting, await front.answerer.answer("rare")

    before, after = asyncio.run(go())
    assert (before.release, before.source) == (old.id, "realtime_student")
    assert before.answer == segments("from the student")
    assert (after.reason, after.answer) == ("outdated", intent.fallback("rare"))  # the deployed student knows the other task


def test_an_earlier_student_goes_on_until_the_new_one_is_there_and_says_so(
    store: Storage, tmp_path: Path, open_front: Callable[..., Front], segmentation: Task
) -> None:
    front = open_front(says(segmentation))
    published(store, tmp_path, segmentation, student="distill/fedcba9876543210")
    assert asyncio.run(front.watch.refresh())
    assert ask(front, "pizza near me").json()["cached"]
    found = ask(front).json()
    assert (found["source"], found["degraded"], found["reason"]) == ("realtime_student", False, "previous_student")


def test_what_cannot_be_followed_leaves_the_old_release_in_place(
    store: Storage, tmp_path: Path, open_front: Callable[..., Front], segmentation: Task
) -> None:
    front = open_front(refresh_s=0.01)
    broken = published(store, tmp_path, segmentation, ["other"])
    Path(store.root, "snapshots", broken.snapshot, "lmdb", "data.mdb").unlink()

    async def go() -> None:
        watch = asyncio.create_task(front.watch.follow())
        await asyncio.sleep(0.2)
        assert not watch.done()
        watch.cancel()

    asyncio.run(go())
    assert ask(front, "pizza near me").json()["cached"]
    assert front.count("refresh_failures") >= 1


def test_copies_of_snapshots_are_removed_once_replaced(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation, ["a"])
    (copies := tmp_path / "copies").mkdir()
    front = Front(store, serve.Config(cache_dir=str(copies), keep_student_s=0.0), tmp_path)
    for query in ("b", "c"):
        published(store, tmp_path, segmentation, [query])
        assert asyncio.run(front.watch.refresh())
        assert ask(front, query).json()["cached"]
    assert [p.name for p in (copies / "snapshots").iterdir()] == [front.answerer.served.release.snapshot]


def test_metrics_and_the_other_pages(open_front: Callable[..., Front], segmentation: Task) -> None:
    front = open_front(says(segmentation, finish_reason="length"))

    async def go() -> dict[str, httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front.pages()), base_url="http://pages") as http:
            for query in ("pizza near me", "pizza near me", "rare", ""):
                await http.post("/v1/answer", json={"query": query})
            await http.get("/v1/answer", params={"query": "pizza near me"})
            paths = ("/metrics", "/v1/release", "/healthz", "/readyz", "/", "/docs", "/docs/swagger-ui-bundle.js", "/openapi.json")
            return {path: await http.get(path) for path in paths}

    found = asyncio.run(go())
    assert {path: response.status_code for path, response in found.items()} == dict.fromkeys(found, 200)
    for line in (
        'headtail_requests_total{path="cache",source="teacher",task="query_segmentation"} 3.0',
        'headtail_requests_total{path="fallback",source="fallback",task="query_segmentation"} 1.0',
        'headtail_degraded_total{reason="truncated",task="query_segmentation"} 1.0',
        'headtail_refused_total{code="invalid",status="422",task="query_segmentation"} 1.0',
        'headtail_request_seconds_count{path="cache",task="query_segmentation"} 3.0',
    ):
        assert line in found["/metrics"].text
    shown = found["/v1/release"].json()
    assert shown["id"] == front.answerer.served.release.id
    assert shown["rows"] == 2
    assert shown["examples"] == ["<email> login", "pizza near me"]
    assert "task_copy" not in shown
    paths = found["/openapi.json"].json()["paths"]
    assert set(paths) == {"/v1/answer", "/v1/answers", "/v1/feedback", "/v1/release", "/healthz", "/readyz", "/metrics"}
    assert "query" in paths["/v1/answer"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]


def test_pages_are_framed_by_nobody_and_run_no_script_of_others(open_front: Callable[..., Front]) -> None:
    async def go() -> dict[str, httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(open_front(None).pages()), base_url="http://pages") as http:
            return {path: await http.get(path) for path in ("/", "/docs")}

    for path, response in asyncio.run(go()).items():
        policy = response.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert "base-uri 'none'" in policy
        assert ("default-src 'none'" in policy) == (path == "/")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in response.headers


def test_the_docs_need_no_network_where_swagger_is_not_installed(open_front: Callable[..., Front], monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain page with every call; nothing of it comes from another host."""
    monkeypatch.setattr("headtail.stages.serve.admin._swagger", lambda: None)

    async def go() -> tuple[httpx.Response, dict[str, Any]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(open_front(None).pages()), base_url="http://pages") as http:
            return await http.get("/docs"), (await http.get("/openapi.json")).json()

    page, description = asyncio.run(go())
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.findall(r"(?:https?:)?//[a-z0-9]", page.text)
    assert "<script" not in page.text
    for path, methods in description["paths"].items():
        for method, call in methods.items():
            assert f"{method.upper()} {path}</code>" in page.text
            assert html.escape(call["summary"]) in page.text
    assert "timeout_ms" in page.text


def test_the_page_needs_no_network() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("https://example", "")
    assert "innerHTML" not in page  # answers are text, never markup


# ---- what people decided, and what guardrails refuse


def test_people_outrank_the_snapshot_and_the_student_within_one_look(
    store: Storage, open_front: Callable[..., Front], segmentation: Task
) -> None:
    front = open_front(says(segmentation))
    people: Any = {"who": "jane", "why": "denver is a place"}
    mended = json.dumps(segments("pizza near me", "name"))

    def look(query: str) -> tuple[str, bool, Any]:
        asyncio.run(front.watch.refresh())
        found = ask(front, query).json()
        return found["source"], found["cached"], found["answer"]

    set_override(store, "Pizza near me", mended, **people)
    set_override(store, "new place", json.dumps(segments("new place", "name")), until="2999-01-01", **people)
    assert look("pizza near me") == ("human_override", True, segments("pizza near me", "name"))
    assert look("new place") == ("human_override", True, segments("new place", "name"))
    assert look("something rare")[0] == "realtime_student"
    remove_override(store, "pizza near me", **people)
    assert look("pizza near me") == ("teacher", True, segments("pizza near me"))
    tombstone_query(store, query_key("pizza near me"), **people)
    assert look("pizza near me")[:2] == ("realtime_student", False)
    assert front.watch._answerer.served.release.id == release.current_id(store)


@pytest.mark.parametrize("query, said, reason", [("pizza place", "pizza price", "withheld"), ("pizza place", "pizza place", "")])
def test_a_wrong_text_is_withheld(store: Storage, tmp_path: Path, segmentation: Task, query: str, said: str, reason: str) -> None:
    published(store, tmp_path, segmentation)
    front = Front(store, serve.Config(), tmp_path, says(segmentation, segments(said)), checks=[guard_reply])
    found = ask(front, query).json()
    assert (found["reason"], found["degraded"]) == (reason, bool(reason))
    assert found["answer"] == (segmentation.fallback(query) if reason else segments(said))


# ---- starting


def config(root: str, **options: Any) -> serve.Config:
    return build_config(
        serve.Config,
        {"root": root, "port": free_port(), "admin_port": free_port(), "tracking": OFF, "refresh_s": 0.3, **options},
        where="test",
    )


def test_what_must_fail_fails_before_anything_heavy_starts(
    store: Storage, root: str, tmp_path: Path, segmentation: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headtail.adapters.cluster.start_cluster", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match="cannot have the port of the API"):
        serve.start_server(serve.Config(root=root, port=8700, admin_port=8700))
    with pytest.raises(InputError, match="no release yet"):
        serve.start_server(config(root))
    made = published(store, tmp_path, segmentation)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as told:
            serve.start_server(config(root, port=port))
        assert f"port {port}" in str(told.value)
        assert f"--set port={port + 1}" in str(told.value)
    with pytest.raises(InputError, match="no finished distill here"):
        serve.start_server(config(root))  # the release's student is not in this store
    with pytest.raises(ConfigError, match="model not found"):
        serve.start_server(config(root, model={"model": "./nowhere"}))
    with pytest.raises(ConfigError, match="must run in the server's own processes"):
        serve.start_server(config(root, model={"model": "x", "engine": "openai"}))
    with pytest.raises(InputError, match="no such release"):
        serve.start_server(config(root, release="feed"))
    with pytest.raises(ConfigError, match="did you mean max_misses"):
        config(root, max_mises=1)
    Path(root, "snapshots", made.snapshot, "manifest.json").unlink()
    with pytest.raises(Exception, match="not in the store"):
        serve.start_server(config(root))
