"""How requests to the pages' port are refused: errors of one shape with a request id; names that are not this machine's.

In: an exception, a request. Out: a response of `errors`' shape, and a line of the log. Knows nothing of the pages.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Route

from headtail.adapters.proxies import is_loopback
from headtail.stages.serve.errors import RequestError, method_error
from headtail.stages.serve.front.hot import RequestIds

log = logging.getLogger("headtail.serve")


def add_errors(app: FastAPI, here_alone: bool) -> None:
    """Let each refusal of the app have the shape of `errors`, also where there is no such path or method.

    `here_alone`: requests under a name that is not this machine's are refused.
    """
    ids = RequestIds()

    def refuse(request: Request, error: RequestError) -> Response:
        request_id = ids.next()
        admin = _path(request).startswith("/admin/") and error.code not in ("not_found", "method_not_allowed", "rate_limited")
        if admin or error.status >= 500:  # others anyone may cause as often as they like, and so fill the log
            log.warning("request %s to %.80r of the pages was refused: %s", request_id, request.url.path, error.code)
        return Response(error.body(request_id), error.status, dict(error.headers), "application/json")

    async def answer_refusal(request: Request, error: Exception) -> Response:
        return refuse(request, error if isinstance(error, RequestError) else RequestError("internal"))

    async def answer_no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            here = [route for route in request.app.routes if isinstance(route, Route) and route.path == _path(request)]
            return refuse(request, method_error(*sorted({method for route in here for method in route.methods or ()})))
        return refuse(request, RequestError("not_found" if error.status_code == 404 else "bad_request"))

    async def check_host(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        if _is_own_name(request.headers.get("host", "")):
            return await call(request)
        what = "these pages answer to 127.0.0.1 and localhost only"
        return refuse(request, RequestError("forbidden", what, field="Host", fix="set admin_host to serve them to other machines"))

    if here_alone:
        app.middleware("http")(check_host)
    app.add_exception_handler(RequestError, answer_refusal)
    app.add_exception_handler(HTTPException, answer_no_route)
    app.add_exception_handler(Exception, answer_refusal)


def _path(request: Request) -> str:
    """The path within the app, which may be mounted below another one's."""
    path: str = request.scope["path"]
    return path.removeprefix(request.scope.get("root_path", ""))


def _is_own_name(host: str) -> bool:
    """Whether a Host header names this machine: 127.0.0.1, [::1], localhost, each with a port or without."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return is_loopback(name)
