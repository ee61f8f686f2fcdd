"""The server as it runs: front processes, a student on Ray Serve that misbehaves on request, and the real vLLM student."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

import loopback
from headtail.adapters.storage import Storage, open_storage
from headtail.batch.job import answer_settings
from headtail.core.errors import ConfigError, EngineError
from headtail.core.guardrails import GuardrailConfig
from headtail.core.keys import answer_key, fingerprint
from headtail.core.task import Task, load_task
from headtail.engines.device import resolve_dtype
from headtail.engines.models import resolve_weights
from headtail.releases import release
from headtail.stages import serve
from headtail.stages.serve.answerer import RealtimeReply
from ports import free_port
from test_serve import config, published, segments
from timescale import eventually, limit, read_banner

pytestmark = pytest.mark.slow


def over_http(server: serve.Server, query: str) -> dict[str, Any]:
    response = httpx.get(f"{server.url}/v1/answer", params={"query": query}, timeout=limit(30))
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


# These two start servers of their own: they stand before the first that asks for the shared one.


class Broken:
    """A student that does not start."""

    def __init__(self, model: Any, root: str, task: Task, stands_for: str, digest: str) -> None:
        raise EngineError("no memory left for the student", where=model.model)


def test_an_engine_that_cannot_start_is_told_and_leaves_nothing_behind(cluster: None, store: Storage, root: str, tmp_path: Path) -> None:
    published(store, tmp_path, load_task("query_segmentation"))
    asked = config(root, model={"model": "example:teacher", "cpus": 0.1}, start_timeout_s=limit(120))
    with pytest.raises(EngineError, match="no memory left for the student") as told:
        serve.start_server(asked, student=Broken)
    assert told.value.where == "example:teacher"
    with serve.start_server(config(root, realtime_student=False, port=asked.port)) as server:  # the port and the cluster are free again
        assert over_http(server, "rare")["reason"] == "off"
    server.stop()  # twice is harmless


@pytest.mark.vllm
def test_the_real_student_answers_misses(cluster: None, store: Storage, root: str, tmp_path: Path, teacher_path: Path) -> None:
    task = load_task("query_segmentation")
    task = dataclasses.replace(
        task, file=task.file.model_copy(update={"guardrails": GuardrailConfig(enabled=False)})
    )  # it is a small model
    published(store, tmp_path, task)
    asked = config(root, model={"model": str(teacher_path), "kv_cache_gib": 0.1, "max_num_seqs": 8}, realtime_timeout_ms=int(limit(60_000)))
    with serve.start_server(asked) as server:
        first = httpx.post(
            f"{server.url}/v1/answer",
            json={"query": "Best  sushi in berlin", "side_inputs": {"businesses": ["Sushi Bar"]}},
            timeout=limit(90),
        )
        found = first.json()
        assert found["source"] == "realtime_student", found
        jsonschema.validate(found["answer"], task.schema)
        assert 0 < found["confidence"] <= 1
        digest = resolve_weights(str(teacher_path), "", store).digest
        settings = fingerprint(answer_settings(task, resolve_dtype(asked.model), digest))
        messages = task.messages("best sushi in berlin", {"businesses": ["Sushi Bar"]})
        assert found["answer_key"] == answer_key(messages, settings).hex()  # the key that precompute would give this row
        assert over_http(server, "pizza near me")["cached"]
        many = [over_http(server, f"{word} near the stage") for word in ("ramen", "coffee", "shoes")]
        assert {m["source"] for m in many} <= {"realtime_student", "fallback"}
        long = over_http(server, "x y " * 50)  # whatever it makes of this, it is an answer
        jsonschema.validate(long["answer"], task.schema)
        shown = loopback.get(f"{server.url}/v1/release").json()
        assert shown["realtime"]["student"] == str(teacher_path)


class Fake:
    """A student that does what the query says, in a Serve replica of its own."""

    def __init__(self, model: Any, root: str, task: Task, stands_for: str, digest: str) -> None:
        self.task, self.stands_for = task, stands_for

    async def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    async def answer(self, query: str, side_inputs: Mapping[str, Sequence[str]]) -> RealtimeReply:
        if query == "be slow":
            await asyncio.sleep(60)
        if query == "be broken":
            raise ValueError("boom")
        if query == "be dead":
            os._exit(1)
        return RealtimeReply(json.dumps(segments(query, "name")), "stop", 0.5, "cd" * 16, self.stands_for, self.task.fingerprint)


@pytest.fixture(scope="module")
def served(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[serve.Server, Storage, Path]]:
    """Ray Serve with a cache, an ingress and the fake student."""
    scratch = tmp_path_factory.mktemp("scratch")
    store = open_storage(str(tmp_path_factory.mktemp("store")))
    published(store, scratch, load_task("query_segmentation"))
    made = config(store.root, model={"model": "example:teacher", "cpus": 0.1}, realtime_timeout_ms=int(limit(700)))
    with serve.start_server(made, student=Fake) as server:
        yield server, store, scratch


def test_serve_answers_hits_misses_and_faults(served: tuple[serve.Server, Storage, Path]) -> None:
    server = served[0]
    assert over_http(server, "Pizza near me")["source"] == "teacher"
    realtime = over_http(server, "something rare")
    assert (realtime["source"], realtime["answer"], realtime["degraded"]) == ("realtime_student", segments("something rare", "name"), False)
    late = over_http(server, "be slow")
    assert (late["source"], late["reason"]) == ("fallback", "timeout")
    assert limit(690) < late["latency_ms"] < limit(2000)
    assert over_http(server, "be broken")["reason"] == "error"
    assert loopback.get(f"{server.url}/v1/answer", params={"query": "x" * 201}).status_code == 422
    assert 'headtail_degraded_total{reason="timeout",task="query_segmentation"} 1.0' in loopback.get(f"{server.admin_url}/metrics").text


def test_serve_outlives_its_student(served: tuple[serve.Server, Storage, Path]) -> None:
    server = served[0]
    first = over_http(server, "be dead")
    assert (first["source"], first["degraded"]) == ("fallback", True)
    assert first["reason"] == "unavailable"
    for number in range(5):  # while Serve starts another: nobody waits for one that is gone
        found = over_http(server, f"rare {number}")
        assert found["reason"] in ("unavailable", "")
        assert found["reason"] == "" or found["latency_ms"] < limit(100)
        assert over_http(server, "pizza near me")["cached"]
    eventually(lambda: over_http(server, "rare again")["source"] == "realtime_student", 60)


def test_serve_follows_current_while_it_is_asked(served: tuple[serve.Server, Storage, Path]) -> None:
    server, store, scratch = served
    before = release.current_release(store)
    after = published(store, scratch, load_task("query_segmentation"), ["brand new", "pizza near me"])
    seen: list[tuple[str, bool]] = []

    def moved() -> bool:
        found = over_http(server, "brand new")
        seen.append((found["release"], found["cached"]))
        return bool(found["release"] == after.id)

    eventually(moved)
    assert set(seen) <= {(before.id, False), (after.id, True)}  # each answer belongs to one release, whole
    release.rollback(store)
    eventually(lambda: not over_http(server, "brand new")["cached"])


def test_a_second_server_runs_beside_the_first_on_a_port_of_its_own(served: tuple[serve.Server, Storage, Path]) -> None:
    server, store, _ = served
    with pytest.raises(ConfigError, match=f"port {server.config.port}"):
        serve.start_server(config(store.root, port=server.config.port))
    with serve.start_server(config(store.root, model={"model": "example:teacher", "cpus": 0.1}), student=Fake) as second:
        assert over_http(second, "something rare")["source"] == "realtime_student"
    assert over_http(server, "pizza near me")["cached"]  # the first one was left alone, and so was its student
    assert over_http(server, "something else that is rare")["source"] == "realtime_student"


def test_ctrl_c_ends_it_and_frees_the_port(store: Storage, root: str, tmp_path: Path) -> None:
    """As a person runs it: a process of its own with a Ray cluster of its own."""
    published(store, tmp_path, load_task("query_segmentation"))
    port = free_port()
    fields = f"root={root!r}, port={port}, admin_port={free_port()}, realtime_student=False"
    code = f"from headtail.stages import serve; serve.run_forever(serve.Config({fields}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    told = ""
    try:
        told = read_banner(process)
        assert _answers(port)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=limit(60))
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert f"http://127.0.0.1:{port}" in told
    assert "Traceback" not in told + err
    assert out == ""  # stdout is for receipts
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def _answers(port: int) -> bool:
    return httpx.get(f"http://127.0.0.1:{port}/v1/answer", params={"query": "pizza near me"}, timeout=limit(5)).status_code == 200
