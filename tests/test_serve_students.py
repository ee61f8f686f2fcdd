"""Students on Ray Serve as releases come and go: the new one beside the old one, then the swap; and a killed server's students."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from conftest import keep
from headtail.adapters.storage import Storage, open_storage
from headtail.core.task import Task, load_task
from headtail.releases import release
from headtail.stages import serve
from headtail.stages.serve.answerer import RealtimeReply
from headtail.stages.serve.front.counters import id_number, read_counters
from ports import free_port
from test_serve import config, published, segments
from timescale import limit

pytestmark = pytest.mark.slow
FIRST, SECOND = "distill/aaaaaaaaaaaaaaaa", "distill/bbbbbbbbbbbbbbbb"
LABELS = {FIRST: "name", SECOND: "topic", "*": "location"}


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
    from ray import serve as ray_serve

    published(store, tmp_path, load_task("query_segmentation"))
    port = free_port()
    first = command(root, port, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    first.send_signal(signal.SIGKILL)
    first.communicate()

    def left() -> list[str]:
        return [name for name in ray_serve.status().applications if f"-{port}-" in name]

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
