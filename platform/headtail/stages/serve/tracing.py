"""Traces of requests through front and student, in OpenTelemetry's format; off unless an endpoint is set.

In: a request's headers, the answers given to it, what the student reports of its work. Out: spans with the names of OpenTelemetry's
conventions (`gen_ai.*`), sent by OTLP/HTTP from a thread of their own. A request only leaves a few values in a bounded queue; what finds
it full, or cannot be sent, is counted. The names are strings of ours: the package that has them moves them about.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from pydantic import Field

from headtail.core.config import Config
from headtail.stages.serve.answerer import AskStudent, Miss, MissFailed, RealtimeReply

SERVER, CLIENT, INTERNAL = 2, 3, 1  # span kinds of the protocol
HEADERS_VARIABLE = "OTEL_EXPORTER_OTLP_HEADERS"
_PARENT = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


class TraceConfig(Config):
    """Where traces go, and of how many requests."""

    endpoint: str = Field(
        "", description="address that takes OTLP over HTTP, such as MLflow's http://127.0.0.1:5000/v1/traces; empty: no traces"
    )
    sample: float = Field(
        0.01, ge=0, le=1, description="share of the requests that are traced; one with the header `traceparent` does as that says"
    )
    headers: dict[str, str] = Field(
        {},
        description="sent with each export, such as x-mlflow-experiment-id; secrets go into OTEL_EXPORTER_OTLP_HEADERS (a=b,c=d)",
    )
    texts: bool = Field(False, description="put queries (without personal data) and answers into the spans")

    @property
    def all_headers(self) -> dict[str, str]:
        """Those of the config and of the environment."""
        pairs = (pair.partition("=") for pair in os.environ.get(HEADERS_VARIABLE, "").split(",") if "=" in pair)
        return {**{name.strip(): value.strip() for name, _, value in pairs}, **self.headers}


class Span(NamedTuple):
    """One span. Times are ns since 1970; `error`: its type, empty when there was none."""

    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    name: str
    kind: int
    started: int
    ended: int
    attributes: Mapping[str, Any]
    error: str = ""


class Trace:
    """A request that is traced, while it is answered."""

    def __init__(self, trace_id: bytes, parent_id: bytes, method: str, path: str) -> None:
        self.trace_id, self.parent_id, self.span_id = trace_id, parent_id, secrets.token_bytes(8)
        self.name, self.started = f"{method} {path}", time.time_ns()
        self.attributes: dict[str, Any] = {"http.request.method": method, "url.path": path}
        self.spans: list[Span] = []
        self.answers = 0

    def note(self, release: str, source: str, cached: bool, reason: str, confidence: float | None) -> None:
        """An answer was given; of a call with many queries the first is described."""
        self.answers += 1
        if self.answers == 1:
            told = {"source": source, "cached": cached, "reason": reason or None, "release": release, "confidence": confidence}
            self.attributes |= {f"headtail.{name}": value for name, value in told.items() if value is not None}

    def end(self, request_id: str, status: int) -> list[Span]:
        """All its spans, the request's own first."""
        self.attributes |= {"headtail.request_id": request_id, "headtail.answers": self.answers, "http.response.status_code": status}
        error = str(status) if status >= 500 else ""
        own = Span(
            self.trace_id, self.span_id, self.parent_id, self.name, SERVER, self.started, time.time_ns(), self.attributes, error
        )  # fmt: skip
        return [own, *self.spans]


CURRENT_TRACE: ContextVar[Trace | None] = ContextVar("headtail_trace", default=None)


def begin_trace(method: str, path: str, headers: Iterable[tuple[bytes, bytes]], sample: float) -> Trace | None:
    """A trace of this request, or None when it is not one of the sample. A `traceparent` header (W3C Trace Context) decides first."""
    for name, value in headers:
        if name == b"traceparent" and (found := _PARENT.fullmatch(value)) and found[1].strip(b"0") and found[2].strip(b"0"):
            if not int(found[3], 16) & 1:
                return None
            return Trace(bytes.fromhex(found[1].decode()), bytes.fromhex(found[2].decode()), method, path)
    return Trace(secrets.token_bytes(16), b"", method, path) if random.random() < sample else None


class TracedStudent:
    """Asks a student, and leaves spans of the call and of the student's own work in the request's trace."""

    def __init__(self, ask: AskStudent, texts: bool) -> None:
        self._ask, self._texts = ask, texts

    async def __call__(self, miss: Miss) -> RealtimeReply:
        """As the wrapped function."""
        trace = CURRENT_TRACE.get()
        if trace is None:
            return await self._ask(miss)
        started, reply, error = time.time_ns(), None, "cancelled"
        try:
            reply = await self._ask(miss)
            error = ""
            return reply
        except MissFailed as failure:
            error = failure.reason
            raise
        finally:
            trace.spans += self._spans(trace, miss, reply, started, error)

    def _spans(self, trace: Trace, miss: Miss, reply: RealtimeReply | None, started: int, error: str) -> list[Span]:
        ended, call = time.time_ns(), secrets.token_bytes(8)
        model = miss.served.release.student if reply is None else reply.stands_for
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "headtail",
            "gen_ai.request.model": model,
            "headtail.release": miss.served.release.id,
        }
        if error:
            attributes["error.type"] = error
        if reply is not None:
            attributes |= {
                "gen_ai.response.finish_reasons": [reply.finish_reason],
                "gen_ai.usage.input_tokens": reply.tokens_in,
                "gen_ai.usage.output_tokens": reply.tokens_out,
            }
        if self._texts:
            attributes["gen_ai.input.messages"] = _message("user", miss.clean)
            if reply is not None:
                attributes["gen_ai.output.messages"] = _message("assistant", reply.text)
        spans = [Span(trace.trace_id, call, trace.span_id, f"chat {model}", CLIENT, started, ended, attributes, error)]
        if reply is not None and reply.seconds > 0:
            begin = min(max(int(reply.started * 1e9), started), ended)  # the student's clock may be another machine's
            end = min(begin + int(reply.seconds * 1e9), ended)
            spans.append(
                Span(trace.trace_id, secrets.token_bytes(8), call, "student", INTERNAL, begin, end, {"gen_ai.request.model": model})
            )
        return spans


def _message(role: str, text: str) -> str:
    return json.dumps([{"role": role, "parts": [{"type": "text", "content": text}]}], ensure_ascii=False)
