"""A server as its processes: fronts that share a port, die, drain and come back; the request log; one set of counters. No Ray here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

import loopback
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import output_table
from headtail.core.config import TrackingConfig
from headtail.core.rows import REQUEST_LOG
from headtail.core.task import Task, load_task
from headtail.releases import release
from headtail.stages import ingest, serve
from headtail.stages.serve.front.counters import read_counters
from headtail.stages.serve.front.task import release_to_open
from headtail.stages.serve.run_folder import RunPlan, read_plan, task_folder
from headtail.stages.serve.student_link import FrontAddress, FrontLinks
from ports import free_port
from test_serve import config, published, segments
from test_serve_link import Pupil
from timescale import eventually, limit

pytestmark = pytest.mark.slow
FRONTS = 2


class School:
    """Students in a thread of this process, linked to a server's fronts as replicas on Ray would be.

    `server`: or its folder; `name`: of a further task.
    """

    def __init__(self, server: serve.Server | Path, task: Task, name: str = "", kind: type[Pupil] = Pupil) -> None:
        folder = server if isinstance(server, Path) else server._supervisor._folder.path
        self.folder, self._kind = task_folder(folder, name), kind
        self._task, self._ready, self._loop = task, threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._teach())
        self._loop.close()

    async def _teach(self) -> None:
        self.pupil, self._end = self._kind(self._task), asyncio.Event()
        self.links = FrontLinks(
            [FrontAddress(str(self.folder / f"link-{row}.sock")) for row in range(FRONTS)], self.pupil.hello(), self.pupil.answer
        )
        self.links.start()
        self._ready.set()
        await self._end.wait()
        await self.links.close()

    def gate(self, is_open: bool) -> None:
        self._loop.call_soon_threadsafe(self.pupil.gate.set if is_open else self.pupil.gate.clear)

    def __enter__(self) -> School:
        self._thread.start()
        self._ready.wait()
        eventually(lambda: self.links.connected == FRONTS)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(limit(10))


def rows(server: serve.Server) -> list[dict[str, float]]:
    return read_counters(server._supervisor._folder.counters).rows[:FRONTS]


def get(server: serve.Server, query: str, **options: Any) -> httpx.Response:
    return httpx.get(f"{server.url}/v1/answer", params={"query": query}, timeout=limit(30), **options)


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("query_segmentation")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, task: Task) -> Iterator[tuple[serve.Server, Storage, Path]]:
    """Two fronts whose students are in this process."""
    scratch, store = tmp_path_factory.mktemp("scratch"), open_storage(str(tmp_path_factory.mktemp("store")))
    published(store, scratch, task)
    options = {
        "students": "elsewhere",
        "log_rotate_s": 0.5,
        "body_timeout_s": limit(1),
        "header_timeout_s": limit(2),
        "answers_timeout_ms": int(limit(60) * 1000),
        "max_body_bytes": 65536,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):  # nothing of a server goes through it
            patch.setenv(name, "http://127.0.0.1:1")
        with serve.start_server(config(store.root, realtime_timeout_ms=int(limit(5000)), **options)) as server:
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
                patch.delenv(name)
            yield server, store, scratch


# ---- one server


def test_all_fronts_answer_and_the_counters_speak_for_all(served: tuple[serve.Server, Storage, Path], task: Task) -> None:
    server, _, _ = served
    with School(server, task):
        for number in range(40):  # a connection each
            assert get(server, "pizza near me").json()["cached"]
            assert get(server, f"rare {number}").json()["source"] == "realtime_student"
    per_process = [sum(count for name, count in row.items() if name.startswith("requests/")) for row in rows(server)]
    assert all(per_process), per_process
    assert sum(per_process) == 80
    text = loopback.get(f"{server.admin_url}/metrics").text
    assert 'headtail_requests_total{path="cache",source="teacher",task="query_segmentation"} 40.0' in text
    assert 'headtail_requests_total{path="realtime",source="realtime_student",task="query_segmentation"} 40.0' in text
    assert 'headtail_fronts{task="query_segmentation"} 2.0' in text
    assert get(server, "rare").json()["reason"] == "unavailable"


def test_a_killed_front_is_unseen_by_callers_of_the_other_and_comes_back(served: tuple[serve.Server, Storage, Path]) -> None:
    server, _, _ = served
    clients = [httpx.Client(base_url=server.url, timeout=limit(10)) for _ in range(12)]
    try:
        owners = {}
        for client in clients:  # which process holds which connection
            before = [row["requests/cache/teacher"] for row in rows(server)]
            client.get("/v1/answer", params={"query": "pizza near me"})
            [owners[client]] = [row for row, was in enumerate(before) if rows(server)[row]["requests/cache/teacher"] > was]
        assert set(owners.values()) == {0, 1}
        pid = int(rows(server)[0]["pid"])
        os.kill(pid, signal.SIGKILL)
        for _ in range(20):
            for client, owner in owners.items():
                if owner == 1:
                    assert client.get("/v1/answer", params={"query": "pizza near me"}).json()["cached"]
        eventually(lambda: rows(server)[0]["release"] and rows(server)[0]["pid"] not in (0, pid))
        for client in clients:  # those of the dead one connect again
            with contextlib.suppress(httpx.TransportError):
                client.get("/v1/answer", params={"query": "pizza near me"})
            assert client.get("/v1/answer", params={"query": "pizza near me"}).json()["cached"]
    finally:
        for client in clients:
            client.close()


def raw(server: serve.Server, *pieces: bytes, pause: float = 0.0, port: int = 0) -> bytes:
    """What comes back to these bytes until the server closes."""
    with socket.create_connection(("127.0.0.1", port or server.config.port), timeout=limit(20)) as sent:
        for piece in pieces:
            sent.sendall(piece)
            time.sleep(pause)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while data := sent.recv(65536):
                found += data
        return found


POST = b"POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"


def test_what_callers_send_has_bounds(served: tuple[serve.Server, Storage, Path]) -> None:
    server, _, _ = served

    def error(response: bytes) -> tuple[bytes, str]:
        head, _, body = response.partition(b"\r\n\r\n")
        return head.split(b" ")[1], json.loads(body)["error"]["code"]

    assert error(raw(server, POST + b"Content-Length: 70000\r\n\r\n")) == (b"413", "too_large")  # before it is sent
    chunks = [b"%x\r\n%b\r\n" % (1 << 14, b"x" * (1 << 14)) for _ in range(8)]
    assert error(raw(server, POST + b"Transfer-Encoding: chunked\r\n\r\n", *chunks)) == (b"413", "too_large")
    assert error(raw(server, POST + b'Content-Length: 30\r\n\r\n{"query": ')) == (b"408", "request_timeout")
    assert error(raw(server, POST + b'Transfer-Encoding: chunked\r\n\r\n2\r\n{"\r\nZZ\r\n')) == (b"400", "bad_request")
    pages = server.config.admin  # the same bounds, before any login; its server has no time limit on headers
    assert error(raw(server, POST + b"Content-Length: 70000\r\n\r\n", port=pages)) == (b"413", "too_large")
    assert error(raw(server, POST + b'Content-Length: 30\r\n\r\n{"query": ', port=pages)) == (b"408", "request_timeout")
    assert raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 30_000, port=pages).startswith(b"HTTP/1.1 400 ")
    started = time.monotonic()
    assert raw(server, b"GET /v1/answer?query=pizza HTTP/1.1\r\nHost: ") == b""  # headers that do not come to an end
    assert time.monotonic() - started < limit(5)
    assert raw(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 30_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")
    head = loopback.head(f"{server.url}/v1/answer", params={"query": "pizza near me"})
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) > 200
    refused = loopback.delete(f"{server.url}/v1/answer")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD, POST")
    assert loopback.get(f"{server.url}/nothing").json()["error"]["code"] == "not_found"
    assert loopback.get(f"{server.url}/metrics").status_code == 404  # pages have a port of their own


def test_many_queries_at_once(served: tuple[serve.Server, Storage, Path], task: Task) -> None:
    server, _, _ = served
    queries = ["pizza near me", "", *(f"rare {i}" for i in range(998))]
    with School(server, task):
        found = httpx.post(f"{server.url}/v1/answers", json={"queries": queries}, timeout=limit(60)).json()["answers"]
    assert len(found) == 1000
    assert found[0]["cached"]
    assert found[1]["error"]["field"] == "query"
    assert {answer["reason"] for answer in found[2:]} == {""}  # none is overloaded: they wait for one another
    assert [answer["answer"] for answer in found[2:]] == [segments(query, "name") for query in queries[2:]]
    assert loopback.post(f"{server.url}/v1/answers", json={"queries": ["a"] * 1001}).status_code == 422


def test_a_crowd_of_misses_does_not_hold_up_hits(served: tuple[serve.Server, Storage, Path], task: Task) -> None:
    """150 callers of misses, and students that answer none of them."""
    server, _, _ = served

    async def go(school: School) -> tuple[list[float], list[dict[str, Any]]]:
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=200)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=limit(30)) as client:
            crowd = [asyncio.create_task(client.get("/v1/answer", params={"query": f"crowd {i}"})) for i in range(150)]
            while sum(row["in_flight"] for row in rows(server)) < 1 or len(school.pupil.seen) < 64:
                await asyncio.sleep(0.01)
            took = []
            for _ in range(30):
                started = time.perf_counter()
                assert (await client.get("/v1/answer", params={"query": "pizza near me"})).json()["cached"]
                took.append(time.perf_counter() - started)
            school.gate(True)
            return took, [(await caller).json() for caller in crowd]

    with School(server, task) as school:
        school.gate(False)
        took, answered = asyncio.run(go(school))
    assert max(took) < limit(1)
    assert {found["reason"] for found in answered} <= {"", "overloaded"}
    assert len(answered) == 150


def test_a_caller_who_leaves_frees_the_student(served: tuple[serve.Server, Storage, Path], task: Task) -> None:
    server, _, _ = served
    with School(server, task) as school:
        school.gate(False)
        left = sum(row["callers_left"] for row in rows(server))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/answer", json={"query": "leaving"}, timeout=limit(0.5))
        eventually(lambda: school.pupil.cancelled == ["leaving"])
        assert sum(row["callers_left"] for row in rows(server)) == left + 1


def test_the_request_log_is_the_next_query_log(served: tuple[serve.Server, Storage, Path], tmp_path: Path) -> None:
    server, store, _ = served
    answered = [get(server, query).json() for query in ("Pizza near me", "pizza near me", "mail jane@example.com now")]
    ids = {answer["request_id"] for answer in answered}
    folder = Path(store.root, "requests")

    def written() -> list[dict[str, Any]]:
        found = [row for file in folder.rglob("*.parquet") for row in pq.read_table(file, schema=REQUEST_LOG).to_pylist()]
        mine = [row for row in found if row["request_id"] in ids]
        return mine if len(mine) == 3 else []

    lines = eventually(written)
    assert sorted(line["query"] for line in lines) == ["mail <email> now", "pizza near me", "pizza near me"]
    assert {(line["source"], line["cached"], line["degraded"], line["reason"]) for line in lines} == {
        ("teacher", True, False, ""),
        ("fallback", False, True, "redacted"),
    }
    assert {line["release"] for line in lines} == {answered[0]["release"]}
    columns = ingest.stage.LogColumns(time="time")
    receipt = ingest.run(
        ingest.Config(root=str(tmp_path / "next"), tracking=TrackingConfig(enabled=False), log=str(folder), columns=columns, holdout_days=0)
    )
    counts = {row["query"]: row["count"] for row in output_table(open_storage(str(tmp_path / "next")), receipt, "queries").to_pylist()}
    assert counts["pizza near me"] >= 2
    assert "mail jane@example.com now" not in counts


def test_a_swap_under_load_is_seen_by_nobody(served: tuple[serve.Server, Storage, Path], task: Task) -> None:
    server, store, scratch = served
    first = release.current_id(store)
    second = published(store, scratch, task, ["pizza near me", "brand new"]).id
    seen: list[tuple[int, str, bool]] = []
    stop = threading.Event()

    def caller() -> None:
        with httpx.Client(base_url=server.url, timeout=limit(20)) as client:
            while not stop.is_set():
                found = client.get("/v1/answer", params={"query": "brand new"})
                seen.append((found.status_code, found.json()["release"], found.json()["cached"]))

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for thread in callers:
        thread.start()
    try:
        eventually(lambda: {row["release"] for row in rows(server)} == {int(second, 16)})
        release.rollback(store)
        eventually(lambda: {row["release"] for row in rows(server)} == {int(first, 16)}, 5)
    finally:
        stop.set()
        for thread in callers:
            thread.join()
    assert set(seen) == {(200, first, False), (200, second, True)}


# ---- ends and beginnings: servers in processes of their own


class Command:
    """`headtail serve` as a person runs it."""

    def __init__(self, root: str, port: int, **fields: Any) -> None:
        shown = {"root": root, "port": port, "admin_port": free_port(), "students": "elsewhere", **fields}
        code = f"from headtail.stages import serve; serve.run_forever(serve.Config(**{shown!r}))"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
        self.told = ""
        assert self.process.stderr is not None
        while "Ctrl-C ends it" not in self.told:
            line = self.process.stderr.readline()
            if not line:
                self.process.communicate()
                pytest.fail(self.told)
            self.told += line

    @property
    def children(self) -> list[int]:
        found = Path(f"/proc/{self.process.pid}/task")
        return [int(pid) for thread in found.iterdir() for pid in (thread / "children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_a_killed_server_leaves_nothing_and_the_next_one_starts_at_once(store: Storage, root: str, tmp_path: Path, task: Task) -> None:
    published(store, tmp_path, task)
    port = free_port()
    first = Command(root, port)
    children = first.children
    assert len(children) == FRONTS + 2  # and the log's collector, and the pages
    first.process.kill()
    first.process.communicate()
    second = Command(root, port)
    try:
        eventually(lambda: all(gone(pid) for pid in children), 5)
        assert loopback.get(f"{second.url}/v1/answer", params={"query": "pizza near me"}).json()["cached"]
    finally:
        second.process.terminate()
        _, err = second.process.communicate(timeout=limit(60))
    assert second.process.returncode == 0, err
    assert "Traceback" not in second.told + err


def test_sigterm_answers_what_is_in_flight(store: Storage, root: str, tmp_path: Path, task: Task) -> None:
    published(store, tmp_path, task)
    port = free_port()
    command = Command(root, port, realtime_timeout_ms=int(limit(2000)))
    folder = next(path for path in (Path(f"/proc/{pid}/cmdline") for pid in command.children) if b"front.program" in path.read_bytes())
    run = Path(folder.read_bytes().split(b"\0")[3].decode()).parent

    async def go() -> list[httpx.Response]:
        pupil = Pupil(task)
        pupil.gate.clear()
        links = FrontLinks([FrontAddress(str(run / f"link-{row}.sock")) for row in range(FRONTS)], pupil.hello(), pupil.answer)
        links.start()
        while links.connected < FRONTS:
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(base_url=command.url, timeout=limit(20)) as client:
            asked = [asyncio.create_task(client.get("/v1/answer", params={"query": f"rare {i}"})) for i in range(10)]
            while len(pupil.seen) < 10:
                await asyncio.sleep(0.01)
            command.process.terminate()
            await asyncio.sleep(0.5)
            pupil.gate.set()
            found = await asyncio.gather(*asked)
        await links.close()
        return list(found)

    try:
        found = asyncio.run(go())
        _, err = command.process.communicate(timeout=limit(60))
    finally:
        command.process.kill()
    assert {response.json()["source"] for response in found} == {"realtime_student"}
    assert command.process.returncode == 0, err
    assert "Traceback" not in command.told + err
    logged = [row for file in Path(root, "requests").rglob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len(logged) >= 10  # the log was written to its end


def test_a_process_of_other_code_than_the_supervisors_ends(tmp_path: Path) -> None:
    """As after an upgrade on disk while the server runs: a process that is started again would misread the shared counters."""
    plan = RunPlan(config=serve.Config(root="store"), release="ab" * 8, parent=os.getpid(), log_pipe=None)
    path = tmp_path / "plan.json"
    path.write_text(plan.model_dump_json(), encoding="utf-8")
    assert read_plan(path) == plan
    path.write_text(plan.model_copy(update={"layout": "0" * 16}).model_dump_json(), encoding="utf-8")
    with pytest.raises(SystemExit, match="changed on disk while this server ran"):
        read_plan(path)


def test_a_front_that_is_started_again_opens_what_is_current(store: Storage, root: str, tmp_path: Path, task: Task) -> None:
    """Not what the server began with: that may have been taken back, or its snapshot removed."""
    first = published(store, tmp_path, task).id
    second = published(store, tmp_path, task, ["brand new"]).id
    plan = RunPlan(config=serve.Config(root=root), release=second, parent=os.getpid(), log_pipe=None)
    assert release_to_open(plan, store) == second
    release.rollback(store)
    assert release_to_open(plan, store) == first
    fixed = plan.model_copy(update={"config": serve.Config(root=root, release=second)})
    assert release_to_open(fixed, store) == second
