"""Several tasks in one server: real fronts, stub students. Answers, students, releases, counters and faults of each task are its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

import loopback
from fronts import Front
from headtail.adapters.storage import Storage, open_storage
from headtail.cli.fields import field_lines
from headtail.client import AsyncClient, Client, ClientConfig
from headtail.core.config import load_config
from headtail.core.errors import ConfigError, HeadtailError
from headtail.core.task import Task, load_task
from headtail.releases import canary, release
from headtail.releases.overrides import set_override
from headtail.stages import serve
from headtail.stages.serve.admission import KeyAdmission
from headtail.stages.serve.answerer import RealtimeReply, ReleaseFailed
from headtail.stages.serve.api_keys import add_key, parse_rate
from headtail.stages.serve.front.counters import read_counters
from headtail.stages.serve.front.dispatch import TaskDispatch
from headtail.stages.serve.run_folder import task_folder
from headtail.stages.serve.student_link import FrontAddress, FrontLinks
from headtail.stages.serve.students import Students, serve_applications
from ports import free_port
from test_cache import answers, good, publish
from test_serve import STUDENT, config, published, segments
from test_serve_link import Pupil
from test_serve_students import Labelled
from test_serve_supervisor import FRONTS, School
from timescale import eventually, limit

INTENT = "query_intent"
INTENTS = ["find_business", "browse", "near_me", "opening_hours", "price", "how_to", "delivery", "booking"]
HEAD = [f"head query {number}" for number in range(120)]  # of both tasks: a mixture of answers shows


def intent_of(query: str) -> dict[str, str]:
    return {"intent": INTENTS[sum(query.encode()) % len(INTENTS)]}


def publish_intents(store: Storage, scratch: Path, task: Task, queries: Sequence[str] = HEAD, student: str = STUDENT) -> str:
    """Id of a release of the intent task, made current."""
    rows = [good(query, json.dumps(intent_of(query))) for query in queries]
    _, manifest = publish(store, scratch, answers(*rows), share_redacted=True)
    return release.promote(store, release.make_release(store, snapshot=manifest.id, task=task, student=student).id).id


class IntentPupil(Pupil):
    """A student of the intent task."""

    async def answer(self, query: str, side_inputs: Mapping[str, Sequence[str]]) -> RealtimeReply:
        found = await super().answer(query, side_inputs)
        return found._replace(text=json.dumps(intent_of(query)))


class Pair:
    """Stores of two tasks with one release each, and a scratch folder."""

    def __init__(self, folder: Path) -> None:
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.segmentation, self.intent = load_task("query_segmentation"), load_task(INTENT)
        self.stores = open_storage(str(folder / "segmentation")), open_storage(str(folder / "intent"))
        self.first = published(self.stores[0], self.scratch, self.segmentation, HEAD).id
        self.second = publish_intents(self.stores[1], self.scratch, self.intent)

    def config(self, task: Mapping[str, Any] | None = None, **options: Any) -> serve.Config:
        fast = {
            "refresh_s": 0.2,
            "swap_wait_s": 0.5,
            "log_rotate_s": 0.5,
            "realtime_timeout_ms": int(limit(5000)),
            "dynamic": {"enabled": False},
        }
        mine = {"root": self.stores[1].root, **fast, **(task or {})}
        return config(self.stores[0].root, **{**fast, "tasks": {INTENT: mine}, **options})


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def counters(server: serve.Server, name: str = "") -> list[dict[str, float]]:
    return read_counters(task_folder(server._supervisor._folder.path, name) / "counters").rows[:FRONTS]


def url(server: serve.Server, name: str = "") -> str:
    return f"{server.url}/tasks/{name}" if name else server.url


def ask(server: serve.Server, query: str, name: str = "") -> dict[str, Any]:
    found = loopback.get(f"{url(server, name)}/v1/answer", params={"query": query})
    assert found.status_code == 200, found.text
    body: dict[str, Any] = found.json()
    return body


def chat(base: str, model: str, query: str) -> httpx.Response:
    return loopback.post(f"{base}/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": query}]})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[serve.Server, Pair]]:
    """One server of both tasks, whose students are in this process."""
    made = Pair(tmp_path_factory.mktemp("pair"))
    with serve.start_server(made.config(students="elsewhere", refresh_s=0.2)) as server:
        yield server, made


slow = pytest.mark.slow


# ---- answers


@slow
def test_hits_of_both_tasks_are_right_and_never_mixed(served: tuple[serve.Server, Pair]) -> None:
    """The same queries at the same time, by both paths, as a list and by the name of the model."""
    server, made = served
    wrong: list[Any] = []
    seen: list[str] = []

    def right(name: str, found: dict[str, Any], query: str) -> None:
        expected = (intent_of(query), made.second) if name else (segments(query), made.first)
        seen.append(name)
        if (found["answer"], found["release"]) != expected or not found["cached"]:
            wrong.append((name, query, found))

    def caller(start: int) -> None:
        with httpx.Client(timeout=limit(30), trust_env=False) as http:
            for number in range(start, len(HEAD), 2):
                query = HEAD[number]
                for name in ("", INTENT):
                    base, model = url(server, name), name or "query_segmentation"
                    right(name, http.get(f"{base}/v1/answer", params={"query": query}).json(), query)
                    right(name, http.post(f"{base}/v1/answer", json={"query": query.upper()}).json(), query)
                    sent = {"model": model, "messages": [{"role": "user", "content": query}]}
                    said = http.post(f"{server.url}/v1/chat/completions", json=sent).json()
                    content = json.loads(said["choices"][0]["message"]["content"])
                    assert said["model"] == model
                    right(name, {**said["headtail"], "answer": content}, query)

    threads = [threading.Thread(target=caller, args=(start,)) for start in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for name in ("", INTENT, "query_segmentation"):  # the first task has a path like the others, too
        many = loopback.post(f"{url(server, name)}/v1/answers", json={"queries": HEAD}).json()["answers"]
        for query, found in zip(HEAD, many, strict=True):
            right(name if name == INTENT else "", found, query)
    for thread in threads:
        thread.join()
    assert not wrong[:3]
    assert (seen.count(""), seen.count(INTENT)) == (2 * 3 * len(HEAD) + 2 * len(HEAD), 2 * 3 * len(HEAD) + len(HEAD))


@slow
def test_misses_reach_the_student_of_their_task(served: tuple[serve.Server, Pair]) -> None:
    server, made = served
    assert ask(server, "rare", INTENT)["reason"] == "unavailable"
    with School(server, made.segmentation) as first:
        assert ask(server, "rare")["answer"] == segments("rare", "name")
        late = ask(server, "rare", INTENT)  # the other task's student does not stand in
        assert (late["answer"], late["reason"]) == ({"intent": "browse"}, "unavailable")
        with School(server, made.intent, INTENT, IntentPupil) as second:
            for number in range(100):
                query = f"rare {number}"
                found = ask(server, query), ask(server, query, INTENT)
                assert [one["answer"] for one in found] == [segments(query, "name"), intent_of(query)]
                assert [one["source"] for one in found] == ["realtime_student"] * 2
            said = chat(server.url, INTENT, "by model").json()
            assert json.loads(said["choices"][0]["message"]["content"]) == intent_of("by model")
            assert "by model" in second.pupil.seen
            assert "by model" not in first.pupil.seen
            assert not {query for query in second.pupil.seen if query not in {f"rare {i}" for i in range(100)}} - {"by model"}


@slow
def test_one_task_that_is_overloaded_takes_no_place_of_the_other(pair: Pair) -> None:
    with (
        serve.start_server(pair.config({"max_misses": 1, "realtime_timeout_ms": int(limit(30_000))}, students="elsewhere")) as server,
        School(server, pair.segmentation),
        School(server, pair.intent, INTENT, IntentPupil) as stuck,
    ):
        stuck.gate(False)

        async def go() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
            async with httpx.AsyncClient(timeout=limit(60), trust_env=False) as http:

                async def one(name: str, query: str) -> dict[str, Any]:
                    found: dict[str, Any] = (await http.get(f"{url(server, name)}/v1/answer", params={"query": query})).json()
                    return found

                held = [asyncio.create_task(one(INTENT, f"held {i}")) for i in range(40)]
                while sum(task.done() for task in held) < 40 - FRONTS:
                    await asyncio.sleep(0.02)
                other = await asyncio.gather(*(one("", f"rare {i}") for i in range(40)))
                stuck.gate(True)
                return await asyncio.gather(*held), list(other)

        held, other = asyncio.run(go())
        assert {one["source"] for one in other} == {"realtime_student"}
        reasons = [one["reason"] for one in held]
        assert 40 - FRONTS <= reasons.count("overloaded") < 40
        assert reasons.count("") == 40 - reasons.count("overloaded")


@slow
def test_the_client_talks_to_one_task_of_a_server(served: tuple[serve.Server, Pair]) -> None:
    """Also with its own snapshot; in a URL, a character may be escaped that need not be."""
    server, made = served
    bases = [f"{server.url}/tasks/{INTENT}", f"{server.url}/tasks/{INTENT}/", f"{server.url}/tasks/query%5Fintent"]

    async def go(base: str) -> None:
        async with AsyncClient(ClientConfig(url=base, timeout_ms=int(limit(20_000)))) as http:
            found = [await http.answer(HEAD[0]), *(await http.answers(HEAD[:2]))]
            assert [one.answer for one in found] == [intent_of(query) for query in (HEAD[0], *HEAD[:2])]  # type: ignore[union-attr]

    for base in bases:
        asyncio.run(go(base))
        with Client(ClientConfig(url=base, timeout_ms=int(limit(20_000)))) as client:
            answer = client.answer(HEAD[3])
            assert (answer.answer, answer.release) == (intent_of(HEAD[3]), made.second)
            assert [one.answer for one in client.answers(HEAD[:5])] == [intent_of(query) for query in HEAD[:5]]  # type: ignore[union-attr]
            client.feedback(answer, "up")
    with School(server, made.intent, INTENT, IntentPupil):
        local = ClientConfig(url=bases[0], root=made.stores[1].root, report_s=0.05, timeout_ms=int(limit(20_000)))
        with Client(local) as client:
            assert client.answer(HEAD[7]).answer == intent_of(HEAD[7])
            assert client.answer("not in the head").answer == intent_of("not in the head")
            assert (client.counts.hits, client.counts.misses) == (1, 1)
    assert sum(row["client/current/teacher"] for row in counters(server, INTENT)) == 1  # the report went to the task
    assert sum(row["client/current/teacher"] for row in counters(server)) == 0


@slow
def test_students_elsewhere_reach_their_task_by_its_ports(pair: Pair, tmp_path: Path) -> None:
    """Over TCP, where the args of a Serve application would say: the task's root, and its first port."""
    (tmp_path / "token").write_text("a secret of both\n")
    ports = free_port(), free_port()
    fields = {"link_host": "127.0.0.1", "link_port": ports[0], "link_token_file": str(tmp_path / "token"), "fronts": 1}
    with serve.start_server(pair.config({"link_port": ports[1]}, students="elsewhere", **fields)) as server:

        async def go() -> list[dict[str, Any]]:
            pupils = Pupil(pair.segmentation), IntentPupil(pair.intent)
            links = [
                FrontLinks([FrontAddress("", "127.0.0.1", port)], pupil.hello(token="a secret of both"), pupil.answer)
                for port, pupil in zip(ports, pupils, strict=True)
            ]
            for link in links:
                link.start()
            while not all(link.connected for link in links):
                await asyncio.sleep(0.01)
            async with httpx.AsyncClient(timeout=limit(30), trust_env=False) as http:
                found = [(await http.get(f"{url(server, name)}/v1/answer", params={"query": "rare"})).json() for name in ("", INTENT)]
            for link in links:
                await link.close()
            return found

        eventually(lambda: counters(server, INTENT)[0]["release"])
        found = asyncio.run(go())
    assert [one["answer"] for one in found] == [segments("rare", "name"), intent_of("rare")]


# ---- what is not there


@slow
def test_a_task_that_is_not_there_is_refused_in_the_one_shape(served: tuple[serve.Server, Pair]) -> None:
    server, _ = served
    for path in (
        "nope",
        "nope/v1/answer",
        "caf%C3%A9/v1/answer",
        "a%2Fb/v1/answer",
        "%2E%2E/v1/answer",
        "",
        "%00/v1/answer",
        "%FF/v1/answer",
    ):
        found = loopback.get(f"{server.url}/tasks/{path}", params={"query": "x"})
        assert found.status_code == 404, path
        error = found.json()["error"]
        assert (error["code"], set(error)) == ("not_found", {"code", "message", "field", "do", "request_id"}), path
        assert error["message"] == "no task of this name is served", path
    nothing = loopback.get(f"{server.url}/tasks/{INTENT}/nothing").json()["error"]
    assert nothing["message"] == "there is nothing at this address"
    assert loopback.get(f"{server.url}/tasks/{INTENT}").status_code == 404
    assert loopback.delete(f"{server.url}/tasks/{INTENT}/v1/answer").status_code == 405
    told = chat(server.url, "nope", "pizza")
    assert told.status_code == 404
    assert "query_intent, query_segmentation" in told.json()["error"]["do"]
    own = chat(url(server, INTENT), "query_segmentation", "pizza")  # below a task's path there is that task
    assert (own.status_code, "set model to one of: query_intent" in own.json()["error"]["do"]) == (404, True)
    assert chat(url(server, INTENT), INTENT, HEAD[0]).json()["model"] == INTENT
    listed = loopback.get(f"{server.url}/v1/models").json()["data"]
    assert [one["id"] for one in listed] == ["query_intent", "query_segmentation"]
    assert loopback.get(f"{server.url}/v1/models/{INTENT}").json()["id"] == INTENT
    assert [one["id"] for one in loopback.get(f"{url(server, INTENT)}/v1/models").json()["data"]] == [INTENT]


def test_the_dispatch_takes_a_request_whole_and_hands_it_on(pair: Pair, tmp_path: Path) -> None:
    """Paths and errors without a server; the callables see the scope as a server gives it."""
    first, second = (Front(store, serve.Config(), tmp_path) for store in pair.stores)
    app = TaskDispatch(first.app, {"intent": second.app, "closed": None})

    async def go() -> dict[str, httpx.Response]:
        paths = [
            f"{base}/v1/answer"
            for base in ("", "/tasks/intent", "/tasks/query_segmentation", "/tasks/closed", "/tasks/intent/tasks/intent")
        ]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            return {path: await http.get(path, params={"query": HEAD[0]}) for path in paths}

    found = asyncio.run(go())
    assert [response.status_code for response in found.values()] == [200, 200, 200, 503, 404]
    assert found["/tasks/intent/v1/answer"].json()["answer"] == intent_of(HEAD[0])
    assert found["/tasks/query_segmentation/v1/answer"].json()["answer"] == found["/v1/answer"].json()["answer"] == segments(HEAD[0])
    closed = found["/tasks/closed/v1/answer"]
    assert (closed.json()["error"]["code"], closed.headers["retry-after"]) == ("not_ready", "1")
    assert first.count("requests/cache/teacher") == 2
    assert second.count("requests/cache/teacher") == 1


def test_a_model_whose_release_fails_is_counted_against_its_own_task(pair: Pair, tmp_path: Path) -> None:
    from headtail.stages.serve.front.chat import ChatRoutes

    first, second = (Front(store, serve.Config(), tmp_path) for store in pair.stores)
    first.app.add_routes(ChatRoutes(first.app, "", {"intent": second.app, "closed": None}).routes)
    failed: list[tuple[Any, ...]] = []

    class Split:
        def choose(self, clean: str, champion: Any) -> Any:
            return champion

        def count(self, *outcome: Any) -> None:
            failed.append(outcome)

    def breaks(*_: object) -> Any:
        raise ReleaseFailed("pizza", pair.second)

    second.answerer.split = Split()
    second.answerer.look_up = breaks  # type: ignore[assignment, method-assign]

    async def go() -> list[httpx.Response]:
        async with first.client() as http:
            sent = [
                {"model": model, "messages": [{"role": "user", "content": "pizza"}]} for model in ("intent", "closed", "query_segmentation")
            ]
            return [await http.post("/v1/chat/completions", json=body) for body in sent]

    broken, closed, fine = asyncio.run(go())
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "internal")
    assert failed == [("pizza", pair.second, 0.0, False, True)]
    assert (closed.status_code, closed.json()["error"]["code"]) == (503, "not_ready")
    assert fine.status_code == 200


def test_a_key_and_its_limit_are_the_services(pair: Pair, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = add_key(keys, "search", ["answer"], parse_rate("0.01/s"), 3)
    admit = KeyAdmission(keys, tmp_path / "limits")
    first, second = (Front(store, serve.Config(), tmp_path, admit=admit) for store in pair.stores)
    app = TaskDispatch(first.app, {"intent": second.app})

    calls = [("", key), ("/tasks/intent", key), ("/tasks/intent", "wrong"), ("/tasks/nope", "wrong")]
    calls += [("", key), ("", key), ("/tasks/intent", key)]

    async def go() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            statuses = []
            for path, sent in calls:
                found = await http.get(f"{path}/v1/answer", params={"query": HEAD[0]}, headers={"authorization": f"Bearer {sent}"})
                statuses.append(found.status_code)
            return statuses

    assert asyncio.run(go()) == [200, 200, 401, 401, 200, 429, 429]  # who has no key learns no names


# ---- releases, counters, pages


@slow
def test_releases_overrides_and_canaries_are_the_tasks_own(served: tuple[serve.Server, Pair]) -> None:
    server, made = served
    store = made.stores[1]
    before = release.current_id(store)
    newer = publish_intents(store, made.scratch, made.intent, ["brand new", *HEAD])
    eventually(lambda: {row["release"] for row in counters(server, INTENT)} == {int(newer, 16)})
    assert ask(server, "brand new", INTENT)["release"] == newer
    assert {row["release"] for row in counters(server)} == {int(made.first, 16)}
    release.rollback(store)
    eventually(lambda: {row["release"] for row in counters(server, INTENT)} == {int(before, 16)}, 5)
    assert ask(server, HEAD[0])["release"] == made.first
    set_override(store, HEAD[1], "booking", who="ada", why="a test")
    eventually(lambda: {ask(server, HEAD[1], INTENT)["source"] for _ in range(8)} == {"human_override"})
    assert ask(server, HEAD[1])["answer"] == segments(HEAD[1])
    canary.start_canary(store, newer, 0.5, who="ada")
    eventually(lambda: all(row["canary"] == int(newer, 16) for row in counters(server, INTENT)))
    assert {ask(server, query, INTENT)["release"] for query in HEAD[10:40]} == {newer, before}
    assert {ask(server, query)["release"] for query in HEAD[10:40]} == {made.first}
    canary.stop_canary(store, who="ada")
    eventually(lambda: all(row["canary"] == 0 for row in counters(server, INTENT)))


@slow
def test_metrics_and_logs_speak_of_each_task_and_pages_have_a_place_for_each(served: tuple[serve.Server, Pair]) -> None:
    server, made = served
    mine = [ask(server, HEAD[0], name) for name in ("", INTENT)]
    text = loopback.get(f"{server.admin_url}/metrics").text
    for name, shown in (("", "query_segmentation"), (INTENT, INTENT)):
        expected = float(sum(row["requests/cache/teacher"] for row in counters(server, name)))
        assert expected
        assert f'headtail_requests_total{{path="cache",source="teacher",task="{shown}"}} {expected}' in text
        assert f'headtail_fronts{{task="{shown}"}} 2.0' in text
        assert f'headtail_release_info{{release="{release.current_id(made.stores[bool(name)])}"' in text
    assert len(re.findall(r"^# TYPE headtail_requests_total ", text, re.M)) == 1  # one family, not one for each task
    assert "headtail_process_starts_total 4.0" in text  # two fronts, and a log's collector for each task
    ids = [one["request_id"] for one in mine]

    def logged(store: Storage) -> set[str]:
        return {row["request_id"] for file in Path(store.root, "requests").rglob("*.parquet") for row in pq.read_table(file).to_pylist()}

    for store, own, other in zip(made.stores, ids, reversed(ids), strict=True):
        eventually(lambda store=store, own=own: own in logged(store))  # type: ignore[misc]
        assert other not in logged(store)
    page = loopback.get(f"{server.admin_url}/tasks/{INTENT}/").text
    assert 'href="../../tasks/query_intent/" aria-current=page' in page
    assert 'href="tasks/query_intent/"' in loopback.get(f"{server.admin_url}/").text.replace('href="./tasks', 'href="tasks')
    assert loopback.get(f"{server.admin_url}/tasks/{INTENT}/v1/release").json()["task"] == INTENT
    assert loopback.get(f"{server.admin_url}/v1/release").json()["task"] == "query_segmentation"
    told = loopback.post(f"{server.admin_url}/tasks/{INTENT}/v1/answer", json={"query": HEAD[5]}).json()
    assert told["answer"] == intent_of(HEAD[5])
    assert loopback.get(f"{server.admin_url}/tasks/{INTENT}/docs").status_code == 200
    refused = loopback.get(f"{server.admin_url}/tasks/{INTENT}/v1/answer", headers={"host": "evil.example"})
    assert refused.json()["error"]["code"] == "forbidden"  # the check of the host holds below a task's path too
    assert loopback.get(f"{server.admin_url}/tasks/nope/").json()["error"]["code"] == "not_found"
    wrong = loopback.delete(f"{server.admin_url}/tasks/{INTENT}/v1/answer")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, POST")


@slow
def test_admin_calls_below_a_tasks_path_change_that_task(pair: Pair, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = add_key(keys, "ada", ["admin", "answer"])
    head = {"authorization": f"Bearer {key}"}
    newer = publish_intents(pair.stores[1], pair.scratch, pair.intent, ["brand new"])
    with serve.start_server(pair.config(students="elsewhere", api_keys=str(keys), admin_calls=True)) as server:
        path = f"{server.admin_url}/tasks/{INTENT}/admin/release"
        assert loopback.get(path, headers=head).json()["current"] == newer
        assert loopback.post(f"{path}/rollback").status_code == 401
        assert loopback.post(f"{path}/rollback", headers=head).status_code == 200
        assert release.current_id(pair.stores[1]) == pair.second
        assert release.current_id(pair.stores[0]) == pair.first
        eventually(lambda: {row["release"] for row in counters(server, INTENT)} == {int(pair.second, 16)})
        assert loopback.get(f"{server.url}/tasks/{INTENT}/v1/answer", params={"query": "x"}).status_code == 401


# ---- faults


@slow
def test_a_killed_front_comes_back_with_all_tasks_and_without_one_whose_store_is_away(pair: Pair) -> None:
    with serve.start_server(pair.config(students="elsewhere", fronts=1)) as server:

        def kill() -> None:
            pid = int(counters(server)[0]["pid"])
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: counters(server)[0]["release"] and counters(server)[0]["pid"] not in (0, pid))

        def status(path: str) -> int:
            try:
                return loopback.get(f"{server.url}{path}", params={"query": HEAD[0]}).status_code
            except httpx.TransportError:
                return 0

        kill()
        eventually(lambda: status("/readyz") == 200)
        assert ask(server, HEAD[0], INTENT)["answer"] == intent_of(HEAD[0])
        releases = Path(pair.stores[1].root, "releases")
        releases.rename(releases.with_name("away"))
        kill()
        eventually(lambda: status("/v1/answer") == 200)
        assert ask(server, HEAD[0])["cached"]
        gone = loopback.get(f"{server.url}/tasks/{INTENT}/v1/answer", params={"query": HEAD[0]})
        assert (gone.status_code, gone.json()["error"]["code"]) == (503, "not_ready")
        assert chat(server.url, INTENT, HEAD[0]).status_code == 503
        assert chat(server.url, "query_segmentation", HEAD[0]).status_code == 200
        ready = loopback.get(f"{server.url}/readyz")
        assert (ready.status_code, INTENT in ready.json()["error"]["message"]) == (503, True)
        assert 'headtail_fronts{task="query_intent"} 0.0' in loopback.get(f"{server.admin_url}/metrics").text
        releases.with_name("away").rename(releases)
        eventually(lambda: status("/readyz") == 200)
        assert ask(server, HEAD[0], INTENT)["answer"] == intent_of(HEAD[0])
        assert loopback.get(f"{server.url}/readyz").json()["tasks"][INTENT]["release"] == pair.second


@slow
def test_sigterm_answers_what_is_in_flight_of_all_tasks(pair: Pair) -> None:
    options = pair.config(students="elsewhere").model_dump(mode="json")
    code = f"from headtail.stages import serve; serve.run_forever(serve.Config(**{options!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    told = ""
    assert process.stderr is not None
    while "Ctrl-C ends it" not in told:
        line = process.stderr.readline()
        assert line, told
        told += line
    assert f"serving task {INTENT}, release {pair.second}" in told

    children = [int(pid) for thread in Path(f"/proc/{process.pid}/task").iterdir() for pid in (thread / "children").read_text().split()]
    plan = next(
        parts[3] for parts in (Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in children) if b"program" in parts[2]
    )
    folder = Path(plan.decode()).parent
    base = f"http://127.0.0.1:{options['port']}"

    async def go(first: School, second: School) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=base, timeout=limit(30), trust_env=False) as http:
            asked = [
                asyncio.create_task(http.get(f"{path}/v1/answer", params={"query": f"rare {i}"}))
                for i in range(8)
                for path in ("", f"/tasks/{INTENT}")
            ]
            while len(first.pupil.seen) + len(second.pupil.seen) < 16:
                await asyncio.sleep(0.01)
            process.terminate()
            await asyncio.sleep(0.5)
            first.gate(True)
            second.gate(True)
            return await asyncio.gather(*asked)

    try:
        with School(folder, pair.segmentation) as first, School(folder, pair.intent, INTENT, IntentPupil) as second:
            first.gate(False)
            second.gate(False)
            found = asyncio.run(go(first, second))
        _, err = process.communicate(timeout=limit(60))
    finally:
        process.kill()
    assert {response.json()["source"] for response in found} == {"realtime_student"}
    assert process.returncode == 0, err
    assert "Traceback" not in told + err
    for store in pair.stores:
        assert len([row for file in Path(store.root, "requests").rglob("*.parquet") for row in pq.read_table(file).to_pylist()]) >= 8


def test_what_must_fail_fails_before_anything_starts(pair: Pair, tmp_path: Path) -> None:
    def refused(asked: serve.Config) -> HeadtailError:
        with pytest.raises(HeadtailError) as told:
            serve.start_server(asked)
        return told.value

    def tasks(**fields: Any) -> serve.Config:
        return pair.config(students="elsewhere", tasks=fields)

    twice = refused(tasks(query_segmentation={"root": pair.stores[1].root}))
    assert (twice.what, twice.where) == ("the first task has this name", "tasks.query_segmentation")
    same = refused(tasks(other={"root": f"{pair.stores[0].root}/"}))
    assert "two tasks have one store: root is the same" in str(same)
    empty = refused(tasks(other={"root": str(tmp_path / "empty")}))
    assert empty.where.startswith("tasks.other: ")
    other = refused(tasks(other={"root": pair.stores[1].root, "release": "ab" * 8}))
    assert other.where.startswith("tasks.other: ")
    ports = {"root": pair.stores[1].root, "link_port": 8101}
    crossed = refused(pair.config(students="elsewhere", tasks={"other": ports}, link_host="127.0.0.1", link_port=8100, fronts=2))
    assert crossed.where == "tasks.other.link_port"
    assert "port 8101 cannot be listened on: link_port has it" in str(crossed)
    with pytest.raises(ConfigError, match="an application has the students of one task"):
        serve.from_args({"root": pair.stores[0].root, "tasks": {"other": {"root": pair.stores[1].root}}})


@pytest.mark.parametrize(
    "setting, said",
    [
        ("tasks.intent.port=8001", "port holds for the whole server: set it beside `tasks`, not in a task"),
        ("tasks.intent.api_keys=keys.json", "api_keys holds for the whole server"),
        ("tasks.intent.tasks={}", "tasks holds for the whole server"),
        ("tasks.a b.root=x", "'a b' cannot be part of a URL as it is"),
        ("tasks.a/b.root=x", "'a/b' cannot be part of a URL as it is"),
        ("tasks.intent.max_mises=3", "did you mean max_misses?"),
        ("tasks.intent.max_misses=3", "field tasks.intent.root is required"),
    ],
)
def test_settings_of_a_task_are_its_own_alone(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as told:
        load_config(serve.Config, None, [setting], name="serve")
    fix = told.value.fix.removeprefix("run: headtail fields serve").strip()
    assert [line for line in field_lines("serve") if fix in line.path]  # it leads somewhere


def test_a_task_has_its_own_settings_and_the_servers(tmp_path: Path) -> None:
    made = load_config(
        serve.Config,
        None,
        ["root=a", "fronts=3", "max_misses=7", "tasks.intent.root=b", "tasks.other.root=c", "tasks.other.link_port=9000"],
    )
    task = made.of_task("intent")
    assert (task.root, task.fronts, task.max_misses, task.link_port, task.tasks) == ("b", 3, 64, 8103, {})
    assert made.of_task("other").link_port == 9000
    names = {line.path for line in field_lines("serve")}
    assert {"tasks", "tasks.NAME.root", "tasks.NAME.escalation.timeout_ms"} <= names
    assert "tasks.NAME.port" not in names


def test_names_of_students_do_not_collide(tmp_path: Path) -> None:
    prefixes = [Students(serve.Config(port=port), (), None, mark).prefix for port in (80, 8000) for mark in ("", "aa", "ab")]
    assert not [(one, other) for one in prefixes for other in prefixes if one is not other and other.startswith(one)]


# ---- on Ray


class Either(Labelled):
    """A student of whichever task, in a Serve replica of its own."""

    async def answer(self, query: str, side_inputs: Mapping[str, Sequence[str]]) -> RealtimeReply:
        if query == "be dead":
            os._exit(1)
        text = json.dumps(segments(query, "name") if self.task.name == "query_segmentation" else intent_of(query))
        return RealtimeReply(text, "stop", 0.5, "cd" * 16, self.stands_for, self.task.fingerprint)


@slow
def test_students_of_both_tasks_run_on_ray_and_one_that_dies_leaves_the_other(cluster: None, pair: Pair) -> None:
    small = {"model": {"model": "example:teacher", "cpus": 0.1}, "swap_wait_s": 300.0}
    with serve.start_server(pair.config(small, **small), student=Either) as server:
        for number in range(20):
            query = f"rare {number}"
            found = ask(server, query), ask(server, query, INTENT)
            assert [one["answer"] for one in found] == [segments(query, "name"), intent_of(query)]
            assert [one["source"] for one in found] == ["realtime_student"] * 2
        running = [name for name in serve_applications() if f"-{server.config.port}" in name]
        assert len(running) == 2
        assert ask(server, "be dead", INTENT)["reason"] == "unavailable"
        for number in range(20):
            assert ask(server, f"other {number}")["source"] == "realtime_student"
        eventually(lambda: ask(server, "rare", INTENT)["source"] == "realtime_student", 60)
        newer = publish_intents(pair.stores[1], pair.scratch, pair.intent, ["brand new"], student="distill/fedcba9876543210")
        eventually(lambda: {row["release"] for row in counters(server, INTENT)} == {int(newer, 16)}, 60)
        after = ask(server, "still rare", INTENT)
        assert (after["source"], after["release"], after["reason"]) == ("realtime_student", newer, "")
        assert ask(server, "still rare")["source"] == "realtime_student"
        port = server.config.port
    assert not [name for name in serve_applications() if f"-{port}" in name]
