"""Students on Ray Serve as releases come and go: the new one beside the old one, then the swap; and a killed server's students."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import loopback
from conftest import keep
from headtail.adapters.storage import Storage, open_storage
from headtail.core.errors import EngineError
from headtail.core.task import Task, load_task
from headtail.engines import ModelConfig
from headtail.releases import release
from headtail.stages import serve
from headtail.stages.serve import students
from headtail.stages.serve.answerer import ESCALATION, RealtimeReply
from headtail.stages.serve.front.counters import id_number, read_counters
from headtail.stages.serve.students import ServedStudent
from ports import free_port
from test_serve import config, published, segments
from timescale import limit

pytestmark = pytest.mark.slow
FIRST, SECOND = "distill/aaaaaaaaaaaaaaaa", "distill/bbbbbbbbbbbbbbbb"
LABELS = {FIRST: "name", SECOND: "topic", "*": "location", ESCALATION: "time"}


class Labelled:
    """A student whose answers say which one it is."""

    def __init__(self, model: Any, root: str, task: Task, stands_for: str, digest: str) -> None:
        self.task, self.stands_for = task, stands_for

    async def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    async def answer(self, query: str, side_inputs: Mapping[str, Sequence[str]]) -> RealtimeReply:
        answer = json.dumps({"segments": [{"label": LABELS[self.stands_for], "text": query}]})
        return RealtimeReply(answer, "stop", 0.5, "cd" * 16, self.stands_for, self.task.fingerprint)


def eventually(check: Callable[[], Any], seconds: float = 60) -> float:
    """Seconds until it came about."""
    started = time.monotonic()
    while not check():
        assert time.monotonic() < started + limit(seconds), "it did not come about"
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.fixture(scope="module")
def served(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[serve.Server, Storage, Path]]:
    scratch, store = tmp_path_factory.mktemp("scratch"), open_storage(str(tmp_path_factory.mktemp("store")))
    for student in (FIRST, SECOND):
        keep(store, "distill", student.removeprefix("distill/"), {})
    published(store, scratch, load_task("query_segmentation"), student=FIRST)
    made = config(store.root, model={"cpus": 0.1}, realtime_timeout_ms=int(limit(5000)))
    with serve.start_server(made, student=Labelled) as server:
        yield server, store, scratch


class Callers:
    """Callers of misses and hits, as long as the block lasts. `seen`: status, release, path, label of each answer."""

    def __init__(self, url: str) -> None:
        self.seen: list[tuple[int, str, bool, str, str]] = []
        self._url, self._stop = url, threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(4)]

    def _call(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=limit(20)) as client:
            while not self._stop.is_set():
                for query in (f"rare {number}", "pizza near me"):
                    found = client.get("/v1/answer", params={"query": query})
                    body = found.json()
                    label = body["answer"]["segments"][0]["label"]
                    self.seen.append((found.status_code, body["release"], body["cached"], body["reason"], label))

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def serving(server: serve.Server) -> set[float]:
    return {row["release"] for row in read_counters(server._supervisor._folder.counters).rows[: server.config.fronts]}


def miss(server: serve.Server) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/v1/answer", params={"query": "something rare"}, timeout=limit(20)).json()
    return found


def test_cache_and_student_move_together_and_back(served: tuple[serve.Server, Storage, Path]) -> None:
    server, store, scratch = served
    first = release.current_id(store)
    assert miss(server)["answer"] == segments("something rare", "name")
    with Callers(server.url) as callers:
        second = published(store, scratch, load_task("query_segmentation"), ["pizza near me", "new"], student=SECOND).id
        eventually(lambda: serving(server) == {id_number(second)})
        time.sleep(0.5)
        release.rollback(store)
        took = eventually(lambda: serving(server) == {id_number(first)}, 5)
        time.sleep(0.5)
    assert took < limit(5)
    students = {first: "name", second: "topic"}
    assert {seen[1] for seen in callers.seen} == {first, second}
    for status, found, cached, reason, label in callers.seen:
        assert (status, reason) == (200, "")
        assert cached or label == students[found]  # never the student of another release


def test_a_release_without_a_student_leaves_none_answering(served: tuple[serve.Server, Storage, Path]) -> None:
    server, store, scratch = served
    task = load_task("query_segmentation")
    bare = published(store, scratch, task, ["bare"], student="").id
    eventually(lambda: serving(server) == {id_number(bare)})
    assert (miss(server)["reason"], miss(server)["degraded"]) == ("no_student", True)
    published(store, scratch, task, ["again"], student=SECOND)
    eventually(lambda: miss(server)["source"] == "realtime_student")
    assert miss(server)["answer"] == segments("something rare", "topic")
    release.rollback(store)
    eventually(lambda: serving(server) == {id_number(bare)}, 5)
    assert miss(server)["reason"] == "no_student"


def test_students_of_a_server_that_was_killed_end_or_are_taken_over(cluster: None, store: Storage, root: str, tmp_path: Path) -> None:
    """On a cluster that goes on, as after a killed job."""
    import ray

    published(store, tmp_path, load_task("query_segmentation"))
    port = free_port()
    first = command(root, port, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    first.send_signal(signal.SIGKILL)
    first.communicate()

    def left() -> list[str]:
        return [name for name in students.serve_applications() if f"-{port}-" in name]

    assert len(left()) == 1  # Serve does not know that its owner is gone
    made = config(root, port=port, model={"model": "example:teacher", "cpus": 0.1})
    with serve.start_server(made, student=Labelled) as server:
        assert miss(server)["answer"] == segments("something rare", "location")
        assert len(left()) == 1
        for row in read_counters(server._supervisor._folder.counters).rows[: server.config.fronts]:
            assert row["students"] == 1
    assert left() == []
    second = command(root, port, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    eventually(lambda: not left())  # nobody comes: it waits for `away_s`


def test_a_cluster_that_does_not_answer_is_an_error_in_time() -> None:
    end, turn = threading.Event(), threading.Lock()
    asked: list[bool] = []

    def ask() -> bool:
        asked.append(True)
        return end.wait()

    for _ in range(3):  # the second and third wait for the first, which Ray never answers: no thread of theirs is left behind
        with pytest.raises(EngineError, match=r"the Ray cluster did not answer for 0.2 s"):
            students._ask_serve(ask, turn, 0.2)
    assert len(asked) == 1
    end.set()
    eventually(lambda: not turn.locked())
    with pytest.raises(ZeroDivisionError):
        students._ask_serve(lambda: 1 // 0, turn)
    assert students._ask_serve(lambda: "there", turn) == "there"


def test_a_bigger_model_runs_beside_the_student_and_answers_what_is_unsure(
    cluster: None, store: Storage, root: str, tmp_path: Path
) -> None:
    """With real fronts and replicas; one of them is killed, and the student goes on alone until it is back."""
    published(store, tmp_path, load_task("query_segmentation"))
    small = {"model": "example:teacher", "cpus": 0.1}
    escalation = {"model": small, "threshold": 0.9, "per_minute": 0}  # `Labelled` has a confidence of 0.5
    with serve.start_server(config(root, model=small, escalation=escalation, dynamic={"enabled": False}), student=Labelled) as server:
        found = miss(server)
        assert (found["source"], found["answer"], found["reason"]) == ("escalated", segments("something rare", "time"), "")
        text = loopback.get(f"{server.admin_url}/metrics").text
        assert 'headtail_escalations_total{result="answered",task="query_segmentation"} 1.0' in text
        assert f'headtail_bigger_models_connected{{task="query_segmentation"}} {float(server.config.fronts)}' in text
        titles = [(process, " ".join(process.info["cmdline"] or [])) for process in psutil.process_iter(["cmdline"])]
        replicas = [process for process, title in titles if f"-{server.config.port}-" in title and "escalation" in title]
        assert len(replicas) == 1
        replicas[0].kill()
        eventually(lambda: miss(server)["reason"] == "unsure")
        assert (miss(server)["source"], miss(server)["degraded"]) == ("realtime_student", False)
        eventually(lambda: miss(server)["source"] == "escalated")
        served = ServedStudent(ModelConfig(model="example:teacher"), "", "*", load_task("query_segmentation"))

        def ask_serve(row: int) -> object:
            return students.serve_applications() if row % 2 else students.student_application(server.config, served, ())

        with ThreadPoolExecutor(4) as pool:  # what Ray does for both is not safe in threads: with no lock this fails
            assert all(pool.map(ask_serve, range(60)))


CODE = """
import sys
import ray.cloudpickle
import test_serve_students
ray.cloudpickle.register_pickle_by_value(test_serve_students)  # a cluster that is joined has no tests
from headtail.core.config import build_config
from headtail.stages import serve
model = {"model": "example:teacher", "cpus": 0.1}
fields = {"root": sys.argv[1], "port": int(sys.argv[2]), "admin_port": int(sys.argv[3]), "away_s": 5, "model": model}
with serve.start_server(build_config(serve.Config, fields, where="test"), student=test_serve_students.Labelled) as server:
    print("up", flush=True)
    sys.stdin.read()
"""


def command(root: str, port: int, **variables: str) -> subprocess.Popen[str]:
    """A server with a Ray cluster of its own, unless RAY_ADDRESS is among the variables."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("RAY_ADDRESS", None)
    environment |= variables
    arguments = [sys.executable, "-c", CODE, root, str(port), str(free_port())]
    process = subprocess.Popen(arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "up\n":
        process.kill()
        process.communicate()
        pytest.fail("the server did not start")
    return process


def test_a_killed_server_leaves_no_process_and_its_successor_starts_at_once(store: Storage, root: str, tmp_path: Path) -> None:
    published(store, tmp_path, load_task("query_segmentation"))
    port = free_port()
    first = command(root, port)
    own = psutil.Process(first.pid)
    family = [process for process in own.children(recursive=True) if not process.cmdline()[0].endswith("Agent")]  # Ray's two end after 60 s
    assert len(family) > 6  # fronts, log, pages; Ray's own, Serve's controller, the student
    first.send_signal(signal.SIGKILL)
    first.wait()  # for it alone: Ray's processes may take seconds to see that it is gone
    for stream in (first.stdin, first.stdout):
        assert stream is not None
        stream.close()
    second = command(root, port)
    try:
        found = httpx.get(f"http://127.0.0.1:{port}/v1/answer", params={"query": "rare"}, timeout=limit(20)).json()
        assert found["answer"] == segments("rare", "location")
        _, alive = psutil.wait_procs(family, timeout=limit(20))
        assert [process.name() for process in alive] == []
    finally:
        second.communicate("", timeout=limit(60))
    assert second.returncode == 0


class Busy(Labelled):
    """A student that needs a quarter of a second for an answer, one at a time."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._turn = asyncio.Lock()

    async def answer(self, query: str, side_inputs: Mapping[str, Sequence[str]]) -> RealtimeReply:
        async with self._turn:
            await asyncio.sleep(0.25)
        return await super().answer(query, side_inputs)


def test_engines_are_added_under_load_and_ended_after_it(cluster: None, store: Storage, root: str, tmp_path: Path) -> None:
    """Callers see none of it: every miss is answered by a student, also by those of an engine that is ended."""
    published(store, tmp_path, load_task("query_segmentation"))
    replicas = {"min": 1, "max": 2, "queue": 2, "average_s": 3, "up_after_s": 1, "down_after_s": 2}
    options = {"realtime_replicas": replicas, "dynamic": {"enabled": False}, "realtime_timeout_ms": int(limit(10_000))}
    made = config(root, model={"model": "example:teacher", "cpus": 0.1}, **options)
    seen: list[str] = []
    stop, load = threading.Event(), threading.Event()
    load.set()

    def call(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=limit(20)) as client:
            while not stop.is_set():
                if load.is_set() or number == 0:  # one goes on all the time
                    found = client.get("/v1/answer", params={"query": f"rare {number} {len(seen)}"}).json()
                    seen.append(found["reason"] or found["source"])
                else:
                    time.sleep(0.05)

    def engines() -> set[float]:
        return {row["students"] for row in read_counters(server._supervisor._folder.counters).rows[: server.config.fronts]}

    with serve.start_server(made, student=Busy) as server:
        assert engines() == {1}
        callers = [threading.Thread(target=call, args=(number,)) for number in range(8)]
        for caller in callers:
            caller.start()
        try:
            eventually(lambda: engines() == {2})
            load.clear()
            eventually(lambda: engines() == {1})
            time.sleep(1)
        finally:
            stop.set()
            for caller in callers:
                caller.join()
    assert set(seen) == {"realtime_student"}
