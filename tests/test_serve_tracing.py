"""Traces: what leaves the front is OTLP that a real MLflow takes, it joins the caller's trace, an endpoint that is away costs nobody."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

import loopback
from fronts import Front
from headtail.adapters.storage import Storage
from headtail.core.task import Task
from headtail.stages import feedback, serve
from headtail.stages.serve.answerer import Miss, MissFailed, RealtimeReply
from headtail.stages.serve.front.trace_export import MOST_TRACES, Tracer, encode_spans
from headtail.stages.serve.tracing import CLIENT, INTERNAL, SERVER, Span, TraceConfig, TracedStudent
from ports import free_port
from test_serve import OFF, STUDENT, published, reply, segments
from test_serve import config as server_config
from timescale import limit

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Endpoint:
    """Takes OTLP over HTTP, and keeps spans and headers."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.headers: dict[str, str] = {}
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                endpoint.headers = dict(self.headers)
                for resource in request.resource_spans:
                    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "headtail"
                    endpoint.spans += [span for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def __enter__(self) -> Endpoint:
        self.thread = Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def values(span: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {attribute.key: plain(attribute.value) for attribute in span.attributes}


@contextmanager
def traced(store: Storage, folder: Path, task: Task, config: TraceConfig) -> Iterator[Front]:
    """A front whose requests are traced, as `front.program` puts it together; the student fails for one query."""
    published(store, folder, task)

    async def student(miss: Miss) -> RealtimeReply:
        if miss.clean == "broken":
            raise MissFailed("unavailable")
        started = time.time()
        await asyncio.sleep(0.02)
        return reply(task, segments(miss.clean), tokens_in=21, tokens_out=7, started=started, seconds=0.02)

    front = Front(store, serve.Config(), folder, TracedStudent(student, config.texts))
    front.app.tracer = Tracer(config, front.counters)
    yield front
    front.app.tracer.close()


def send(front: Front, *calls: tuple[str, dict[str, str]]) -> list[httpx.Response]:
    async def go() -> list[httpx.Response]:
        async with front.client() as http:
            return [await http.post("/v1/answer", json={"query": query}, headers=headers) for query, headers in calls]

    return asyncio.run(go())


def test_a_miss_is_three_spans_in_the_callers_trace(
    store: Storage, tmp_path: Path, segmentation: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer x, x-other=1")
    with Endpoint() as endpoint:
        with traced(
            store, tmp_path, segmentation, TraceConfig(endpoint=endpoint.url, sample=0, headers={"x-mine": "2"}, texts=True)
        ) as front:
            (found,) = send(front, ("something rare", {"traceparent": PARENT}))
        own, call, student = endpoint.spans
    assert [span.kind for span in (own, call, student)] == [SERVER, CLIENT, INTERNAL]
    assert {span.trace_id.hex() for span in endpoint.spans} == {PARENT.split("-")[1]}
    assert (own.parent_span_id.hex(), call.parent_span_id, student.parent_span_id) == (PARENT.split("-")[2], own.span_id, call.span_id)
    for inner, outer in ((call, own), (student, call)):
        assert outer.start_time_unix_nano <= inner.start_time_unix_nano < inner.end_time_unix_nano <= outer.end_time_unix_nano
    said = values(own)
    assert own.name == "POST /v1/answer"
    assert said["headtail.request_id"] == found.json()["request_id"]
    assert (said["headtail.source"], said["headtail.cached"], said["http.response.status_code"]) == ("realtime_student", False, 200)
    said = values(call)
    assert call.name == f"chat {STUDENT}"
    assert (said["gen_ai.operation.name"], said["gen_ai.request.model"]) == ("chat", STUDENT)
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (21, 7)
    assert said["gen_ai.response.finish_reasons"] == ["stop"]
    assert json.loads(said["gen_ai.input.messages"])[0]["parts"][0]["content"] == "something rare"
    assert {"authorization": "Bearer x", "x-other": "1", "x-mine": "2"}.items() <= {
        k.lower(): v for k, v in endpoint.headers.items()
    }.items()
    assert (front.count("trace_spans"), front.count("trace_dropped")) == (3, 0)


def test_hits_failures_and_refusals_are_traced_without_texts(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    with Endpoint() as endpoint, traced(store, tmp_path, segmentation, TraceConfig(endpoint=endpoint.url, sample=1)) as front:
        send(front, ("pizza near me", {}), ("broken", {}), ("", {}), ("pizza near me", {"traceparent": PARENT[:-1] + "0"}))
        front.app.tracer.close() if front.app.tracer else None
        hit, failed, call, refused = endpoint.spans
    assert (values(hit)["headtail.source"], values(hit)["headtail.cached"], hit.parent_span_id) == ("teacher", True, b"")
    assert values(failed)["headtail.reason"] == "unavailable"
    assert (values(call)["error.type"], call.status.code) == ("unavailable", 2)
    assert (values(refused)["http.response.status_code"], values(refused)["headtail.answers"]) == (422, 0)
    assert len({span.trace_id for span in (hit, failed, refused)}) == 3
    assert not [key for span in endpoint.spans for key in values(span) if "messages" in key]
    assert "pizza" not in str(endpoint.spans)


@pytest.mark.parametrize("parent", ["", "00-zz", "ff-" + PARENT[3:], f"00-{'0' * 32}-{'1' * 16}-01", PARENT + "-more"])
def test_a_traceparent_that_is_none_starts_no_trace_beyond_the_sample(
    store: Storage, tmp_path: Path, segmentation: Task, parent: str
) -> None:
    with Endpoint() as endpoint:
        with traced(store, tmp_path, segmentation, TraceConfig(endpoint=endpoint.url, sample=0)) as front:
            send(front, ("pizza near me", {"traceparent": parent}))
        assert not endpoint.spans


def test_an_endpoint_that_is_away_costs_nobody_and_what_is_lost_is_counted(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    config = TraceConfig(endpoint=f"http://127.0.0.1:{free_port()}/v1/traces", sample=1)
    with traced(store, tmp_path, segmentation, config) as front:
        assert all(found.json()["cached"] for found in send(front, *[("pizza near me", {})] * 20))
        assert front.app.tracer is not None
        for _ in range(MOST_TRACES + 50):  # more than may wait
            trace = front.app.tracer.begin("GET", "/v1/answer", [])
            assert trace is not None
            front.app.tracer.finish(trace, "id", 200)
    assert front.count("trace_spans") == 0
    assert 20 < front.count("trace_dropped") <= 20 + MOST_TRACES + 50


def eventually(check: Callable[[], Any]) -> Any:
    end = time.monotonic() + limit(90)
    while True:
        try:
            if found := check():
                return found
        except httpx.HTTPError:
            pass
        assert time.monotonic() < end
        time.sleep(0.3)


@pytest.mark.slow
def test_mlflow_shows_the_trace(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--workers", "1"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": ""}
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", url.rpartition(":")[2]], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        eventually(lambda: loopback.get(f"{url}/health").status_code == 200)
        headers = {"x-mlflow-experiment-id": "0", "content-type": "application/x-protobuf"}
        words = {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "x",
            "gen_ai.usage.input_tokens": 1,
            "gen_ai.usage.output_tokens": 1,
        }
        warm = encode_spans([Span(b"1" * 16, b"1" * 8, b"", "warm up", SERVER, time.time_ns(), time.time_ns() + 1, words)])
        post = partial(httpx.post, f"{url}/v1/traces", content=warm, headers=headers, trust_env=False, timeout=limit(30))
        eventually(lambda: post().status_code == 200)  # its first trace takes seconds
        config = TraceConfig(endpoint=f"{url}/v1/traces", sample=1, headers={"x-mlflow-experiment-id": "0"})
        with traced(store, tmp_path, segmentation, config) as front:
            send(front, ("something rare", {}))
        assert front.count("trace_spans") == 3
        where = {"locations": [{"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": "0"}}]}
        found = loopback.post(f"{url}/api/3.0/mlflow/traces/search", json=where).json()["traces"]
        usage = [json.loads(one["trace_metadata"].get("mlflow.trace.tokenUsage", "{}")) for one in found]
        assert [one["state"] for one in found] == ["OK", "OK"], found
        assert sorted(one["output_tokens"] for one in usage) == [1, 7], found
    finally:
        server.terminate()
        server.wait(limit(30))


@pytest.mark.slow
def test_a_whole_server_sends_traces_and_keeps_feedback(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)
    with Endpoint() as endpoint:
        traces = {"endpoint": endpoint.url, "sample": 0}
        server = serve.start_server(server_config(store.root, fronts=1, realtime_student=False, traces=traces))
        try:
            with httpx.Client(base_url=server.url, trust_env=False, timeout=limit(20)) as http:
                hit = http.post("/v1/answer", json={"query": "pizza near me"}, headers={"traceparent": PARENT}).json()
                said = {"request_id": hit["request_id"], "query": "pizza near me", "rating": "up", "answer_key": hit["answer_key"]}
                assert http.post("/v1/feedback", json=said).status_code == 202
                passed_on = loopback.post(f"{server.admin_url}/v1/feedback", json={**said, "rating": "sideways"})
                assert (passed_on.status_code, passed_on.json()["error"]["field"]) == (422, "rating")
        finally:
            server.stop()
    assert [(span.name, values(span)["headtail.source"]) for span in endpoint.spans] == [("POST /v1/answer", "teacher")]
    receipt = feedback.run(feedback.Config(root=store.root, tracking=OFF))
    assert (receipt.rows["in"], receipt.rows["used"], receipt.result.labels) == (1, 1, 1)
