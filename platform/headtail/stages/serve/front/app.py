"""The front as an ASGI callable: routes, limits on what callers send, and the way from a request to its answer.

In: HTTP requests, as an ASGI server gives them. Out: JSON. A hit is answered within one turn of the event loop; a miss waits for the
answerer's tiers, and is given up when its caller leaves. Every refusal has one shape (`errors`). Knows nothing of granian or students.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, TypeVar

from headtail.core.secrets import hide
from headtail.stages.serve.answerer import Answerer, Miss, ReleaseFailed, Reply
from headtail.stages.serve.api import parse_query_list
from headtail.stages.serve.body import Receive, read_body
from headtail.stages.serve.config import Config
from headtail.stages.serve.errors import RequestError, method_error
from headtail.stages.serve.front.counters import Counters
from headtail.stages.serve.front.hot import Hit, HotPath, RequestIds, reply_bytes
from headtail.stages.serve.front.log_pipe import RequestLog
from headtail.stages.serve.front.shadow_pipe import ShadowPipe
from headtail.stages.serve.front.trace_export import Tracer
from headtail.stages.serve.places import MissCall
from headtail.stages.serve.principal import Admit, Principal, admit_all
from headtail.stages.serve.tracing import CURRENT_TRACE, Trace

log = logging.getLogger("headtail.serve")
T = TypeVar("T")
Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_JSON = (b"content-type", b"application/json")
SideInputs = Mapping[str, Sequence[str]]
_NO_SIDE_INPUTS: SideInputs = {}
_QUERIES_A_TURN = 32  # of a call with many: other requests have their turns in between (some 0.5 ms)
_NO_MORE = (b"x-content-type-options", b"nosniff")


class FrontRequest(NamedTuple):
    """A request for a route that was added from outside. Its body is within bounds, its caller admitted."""

    path: str
    query_string: bytes
    headers: Iterable[tuple[bytes, bytes]]
    body: bytes
    caller: Principal
    request_id: str


class FrontResponse(NamedTuple):
    """What such a route gives back."""

    body: bytes
    status: int = 200
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)


class Route(NamedTuple):
    """A path that is served besides /v1/answer and /v1/answers. It may raise RequestError; `errors` writes one in another shape."""

    methods: tuple[str, ...]
    handle: Callable[[FrontRequest], Coroutine[Any, Any, FrontResponse]]
    scope: str = ""  # that a key needs; empty: the path is open
    errors: Callable[[RequestError, str], bytes] = RequestError.body
    cost: int = 1  # queries that a call counts as; 0: the handler counts
    waits: bool = False  # for models: it is given up when its caller leaves. Others, such as feedback, are finished all the same


class FrontApp:
    """The ASGI callable. `admit` says who may ask; `routes`: by path, what else is served; one that ends in `/` has all below it."""

    def __init__(
        self,
        answerer: Answerer,
        config: Config,
        counters: Counters,
        request_log: RequestLog,
        admit: Admit = admit_all,
        routes: Mapping[str, Route] | None = None,
    ) -> None:
        self.answerer, self._hot, self._ids = answerer, HotPath(answerer), RequestIds()
        self._config, self._counters, self._log, self._admit = config, counters, request_log, admit
        self.tracer: Tracer | None = None
        self.shadow: ShadowPipe | None = None
        self._routes = {"/v1/answers": Route(("POST",), self._answers, "answer", cost=0, waits=True), **(routes or {})}
        answerer.note_in_flight = lambda misses: counters.set("in_flight", misses)

    def add_routes(self, routes: Mapping[str, Route]) -> None:
        """Serve these paths too."""
        self._routes |= routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _lifespan(scope, receive, send)
            return
        if self.tracer is not None and (trace := self.tracer.begin(scope["method"], scope["path"], scope["headers"])) is not None:
            await self._traced(self.tracer, trace, scope, receive, send)
        else:
            await self._handle(scope, receive, send, self._ids.next())

    async def _traced(self, tracer: Tracer, trace: Trace, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request that is traced."""
        request_id, status = self._ids.next(), 499  # its caller left, unless a response begins

        async def send_on(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        token = CURRENT_TRACE.set(trace)
        try:
            await self._handle(scope, receive, send_on, request_id)
        finally:
            CURRENT_TRACE.reset(token)
            tracer.finish(trace, request_id, status)

    async def _handle(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        path = scope["path"]
        route = None if path == "/v1/answer" else self._routes.get(path) or self._subtree(path)
        try:
            if path == "/v1/answer":
                body = await self._answer(scope, receive, request_id)
                if body is None:
                    return  # its caller left
                headers = [_JSON, (b"content-length", b"%d" % len(body))]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": body})
                return
            if route is None:
                raise RequestError("not_found")
            response = await self._route(route, scope, receive, request_id)
            if response is not None:
                await _respond(send, response)
        except RequestError as error:
            await self._refuse(error, request_id, send, route)
        except Exception as error:
            await self._refuse(self.note_failure(error, request_id), request_id, send, route)

    def _subtree(self, path: str) -> Route | None:
        """The route of all paths below one that ends in a slash."""
        return next((route for above, route in self._routes.items() if above.endswith("/") and path.startswith(above)), None)

    # ---- one answer

    async def _answer(self, scope: Scope, receive: Receive, request_id: str) -> bytes | None:
        """The body of the response; None when the caller left."""
        caller = self._admit(_authorization(scope["headers"]), "answer", 1)
        if not isinstance(caller, Principal):
            caller = await caller
        method = scope["method"]
        if method == "POST":
            found = self._hot.post(await self._body(scope, receive), request_id)
        elif method in ("GET", "HEAD"):
            found = self._hot.get(scope["query_string"], request_id)
        else:
            raise method_error("GET", "HEAD", "POST")
        if type(found) is Hit:
            self.note_hit(found, request_id, caller)
            return found.body
        assert isinstance(found, Miss)
        reply = await self._unless_left(self.answerer.resolve(found), receive)
        if reply is None:
            return None
        self.note_reply(reply, caller, found.side_inputs)
        return reply_bytes(reply)

    async def _unless_left(self, work: Coroutine[Any, Any, T], receive: Receive) -> T | None:
        """What `work` gives, or None when the caller left before: it is cancelled then, and students are told to stop."""
        answering = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_leaves(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            self._counters.add("callers_left")
            return None
        finally:
            answering.cancel()
            leaving.cancel()
            del answering, leaving  # else an error and this frame hold one another, and with them the connection

    def note_hit(self, hit: Hit, request_id: str, caller: Principal) -> None:
        """Count and log an answer of the snapshot."""
        found = hit.found
        if (split := self.answerer.split) is not None:
            split.count(hit.clean, hit.served.release.id, hit.seconds, False)
        self._counters.count_reply("cache", found.source, hit.seconds)
        release = hit.served.release.id
        if self.tracer is not None and (trace := CURRENT_TRACE.get()) is not None:
            trace.note(release, found.source, True, "", found.confidence)
        self._log.write(
            request_id, hit.clean, release, found.source, True, False, "", found.confidence, hit.seconds, caller.name
        )  # fmt: skip
        if self.shadow is not None:
            self.shadow.offer_hit(request_id, hit)

    def note_reply(self, reply: Reply, caller: Principal, side_inputs: SideInputs = _NO_SIDE_INPUTS) -> None:
        """Count and log an answer that was not ready."""
        seconds = reply.latency_ms / 1000
        if self.tracer is not None and (trace := CURRENT_TRACE.get()) is not None:
            trace.note(reply.release, reply.source, reply.cached, reply.reason, reply.confidence)
        if (split := self.answerer.split) is not None:
            split.count(reply.normalised, reply.release, seconds, reply.degraded, reply.reason == "error")
        self._counters.count_reply(reply.path, reply.source, seconds, reply.reason if reply.degraded else "")
        self._log.write(
            reply.request_id, reply.normalised, reply.release, reply.source, reply.cached, reply.degraded, reply.reason, reply.confidence,
            seconds, caller.name,
        )  # fmt: skip
        if self.shadow is not None:
            self.shadow.offer_reply(reply, side_inputs)

    def note_failure(self, error: Exception, request_id: str) -> RequestError:
        """Log what nobody foresaw, and count it against the release that was asked; what the caller is told."""
        cause = (error.__cause__ or error) if isinstance(error, ReleaseFailed) else error
        log.error("request %s failed: %s", request_id, hide(str(cause))[:300], exc_info=error)
        if isinstance(error, ReleaseFailed) and (split := self.answerer.split) is not None:
            split.count(error.clean, error.release, 0.0, False, True)
        return RequestError("internal")

    # ---- the other paths

    async def _route(self, route: Route, scope: Scope, receive: Receive, request_id: str) -> FrontResponse | None:
        """The response; None when the caller left."""
        if scope["method"] not in route.methods:
            raise method_error(*route.methods)
        authorization = _authorization(scope["headers"])
        caller = await self._admitted(authorization, route.scope, route.cost) if route.scope else Principal()
        body = await self._body(scope, receive) if scope["method"] == "POST" else b""
        handling = route.handle(FrontRequest(scope["path"], scope["query_string"], scope["headers"], body, caller, request_id))
        return await (self._unless_left(handling, receive) if route.waits else handling)

    async def _admitted(self, authorization: bytes | None, scope: str, queries: int) -> Principal:
        caller = self._admit(authorization, scope, queries)
        return caller if isinstance(caller, Principal) else await caller

    async def _answers(self, request: FrontRequest) -> FrontResponse:
        """POST /v1/answers: each query as /v1/answer would have it; one that cannot be taken has its error in its place."""
        sent = parse_query_list(request.body)
        await self._admitted(_authorization(request.headers), "answer", len(sent.queries))  # all of them are admitted, or none
        limit_ms = min(sent.timeout_ms or self._config.answers_timeout_ms, self._config.answers_timeout_ms)
        call, end = self.answerer.places.call(), asyncio.get_running_loop().time() + limit_ms / 1000
        answering: list[asyncio.Task[bytes]] = []
        async with asyncio.TaskGroup() as group:
            for row, query in enumerate(sent.queries):
                if row % _QUERIES_A_TURN == _QUERIES_A_TURN - 1:
                    await asyncio.sleep(0)
                answering.append(group.create_task(self._one_of(query, f"{request.request_id}-{row}", request.caller, call, end)))
        return FrontResponse(b'{"answers": [' + b", ".join(one.result() for one in answering) + b"]}")

    async def _one_of(self, query: Any, request_id: str, caller: Principal, call: MissCall, end: float) -> bytes:
        try:
            if not isinstance(query, str):
                raise RequestError("invalid", "the query is not a string", field="query", fix="send each query as a string")
            found = self._hot.look_up(query, {}, request_id)
            if isinstance(found, Hit):
                self.note_hit(found, request_id, caller)
                return found.body
            reply = await self.answerer.resolve_of_many(found, call, end)
        except (RequestError, ReleaseFailed) as error:
            refused = error if isinstance(error, RequestError) else self.note_failure(error, request_id)
            self._counters.add(f"refused/{refused.code}")
            return refused.body(request_id)
        self.note_reply(reply, caller)
        return reply_bytes(reply)

    async def _refuse(self, error: RequestError, request_id: str, send: Send, route: Route | None) -> None:
        self._counters.add(f"refused/{error.code}")
        body = route.errors(error, request_id) if route else error.body(request_id)
        headers = (("content-type", "application/json"), *error.headers)
        with contextlib.suppress(Exception):  # the response may have begun, or its caller be gone
            await _respond(send, FrontResponse(body, error.status, headers))

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        return await read_body(scope["headers"], receive, self._config.max_body_bytes, self._config.body_timeout_s)


def json_response(value: Any, status: int = 200) -> FrontResponse:
    """A response of plain values."""
    return FrontResponse(json.dumps(value, ensure_ascii=False).encode(), status)


def _authorization(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    for name, value in headers:
        if name == b"authorization":
            return value
    return None


async def _leaves(receive: Receive) -> None:
    """Returns when the caller closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _respond(send: Send, response: FrontResponse) -> None:
    named = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in response.headers]
    headers = [*named, _NO_MORE, (b"content-length", b"%d" % len(response.body))]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})


async def _lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    """The server's own start and end: the process has done its part before, and does it after."""
    if scope["type"] != "lifespan":
        return
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
