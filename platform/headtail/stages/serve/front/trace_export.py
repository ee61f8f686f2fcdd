"""Sends spans by OTLP over HTTP, as protobuf, from a thread of its own.

In: the spans of traced requests. Out: POSTs to the endpoint. The queue is bounded; a request never waits for it. What finds it full, or
is not taken by the endpoint, is dropped and counted: traces are a sample. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import httpx

from headtail import __version__
from headtail.adapters.proxies import may_proxy
from headtail.core.secrets import hide
from headtail.stages.serve.front.counters import Counters
from headtail.stages.serve.tracing import Span, Trace, TraceConfig, begin_trace

log = logging.getLogger("headtail.serve")
MOST_TRACES = 2048  # that wait; some megabytes
_EVERY_S, _MOST_SPANS, _TIMEOUT_S, _COMPLAIN_S = 1.0, 512, 10.0, 60.0
_TYPE = {"content-type": "application/x-protobuf"}


class Tracer:
    """Begins traces, and exports their spans."""

    def __init__(self, config: TraceConfig, counters: Counters) -> None:
        self.config, self._counters = config, counters
        self._queue: queue.Queue[list[Span]] = queue.Queue(MOST_TRACES)
        self._overflow = 0  # spans; counted by the thread, so that each counter has one writer
        self._complained, self._failed = -_COMPLAIN_S, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headtail-traces", daemon=True)
        self._thread.start()

    def begin(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Trace | None:
        """A trace of this request, if it is one of the sample."""
        return begin_trace(method, path, headers, self.config.sample)

    def finish(self, trace: Trace, request_id: str, status: int) -> None:
        """The request has ended."""
        spans = trace.end(request_id, status)
        try:
            self._queue.put_nowait(spans)
        except queue.Full:
            self._overflow += len(spans)

    def close(self) -> None:
        """Send what waits, for a few seconds at most."""
        self._stop.set()
        self._thread.join(1.5 * _TIMEOUT_S)

    def _run(self) -> None:
        url, headers = self.config.endpoint, {**_TYPE, **self.config.all_headers}
        with httpx.Client(timeout=_TIMEOUT_S, trust_env=may_proxy(url), headers=headers) as http:
            while True:
                last = self._stop.wait(_EVERY_S)
                while spans := self._take():
                    self._send(http, url, spans)
                    if last and self._failed:
                        break
                overflow, self._overflow = self._overflow, 0
                self._counters.add("trace_dropped", overflow)
                if last:
                    return

    def _take(self) -> list[Span]:
        spans: list[Span] = []
        while len(spans) < _MOST_SPANS:
            try:
                spans += self._queue.get_nowait()
            except queue.Empty:
                break
        return spans

    def _send(self, http: httpx.Client, url: str, spans: Sequence[Span]) -> None:
        try:
            response = http.post(url, content=encode_spans(spans))
            response.raise_for_status()
        except Exception as error:
            self._failed = True
            self._counters.add("trace_dropped", len(spans))
            if time.monotonic() - self._complained > _COMPLAIN_S:
                self._complained = time.monotonic()
                log.warning("traces cannot be sent: %s", hide(str(error))[:300])
        else:
            self._failed = False
            self._counters.add("trace_spans", len(spans))


def encode_spans(spans: Iterable[Span]) -> bytes:
    """An ExportTraceServiceRequest."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    request = ExportTraceServiceRequest()
    resource = request.resource_spans.add()
    _put(resource.resource.attributes, {"service.name": "headtail", "service.version": __version__})
    scope = resource.scope_spans.add()
    scope.scope.name, scope.scope.version = "headtail.serve", __version__
    for span in spans:
        made = scope.spans.add(
            trace_id=span.trace_id,
            span_id=span.span_id,
            parent_span_id=span.parent_id,
            name=span.name,
            kind=span.kind,
            start_time_unix_nano=span.started,
            end_time_unix_nano=span.ended,
        )
        _put(made.attributes, span.attributes)
        if span.error:
            made.status.code, made.status.message = 2, span.error  # STATUS_CODE_ERROR
    data: bytes = request.SerializeToString()
    return data


def _put(attributes: Any, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        _put_value(attributes.add(key=key).value, value)


def _put_value(target: Any, value: Any) -> None:
    if isinstance(value, bool):
        target.bool_value = value
    elif isinstance(value, int):
        target.int_value = value
    elif isinstance(value, float):
        target.double_value = value
    elif isinstance(value, list):
        for item in value:
            _put_value(target.array_value.values.add(), item)
    else:
        target.string_value = str(value)
