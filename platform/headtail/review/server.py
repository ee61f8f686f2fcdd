"""The review page over HTTP, for people on this machine only.

In: a desk. Out: one page and a few JSON calls under http://127.0.0.1:<port>/<token>/. There is a new token at each start;
without it every request is a 404, so other pages in the browser and other users of the machine get nothing. A request that comes
from another site (Host, Origin, Sec-Fetch-Site) is refused, and no CORS header is ever sent. Knows nothing of decisions.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from headtail.core.errors import ConfigError, HeadtailError
from headtail.core.secrets import hide
from headtail.review.desk import Desk, DeskRefusal

log = logging.getLogger("headtail.review")
PAGE = Path(__file__).parent / "page.html"
HOST = "127.0.0.1"
_NAMES = ("127.0.0.1", "localhost")  # a name that someone else pointed at this machine (DNS rebinding) is not taken
_BODY_BYTES = 1 << 20
# The page runs no script but its own, talks to no host but this one, is shown in no other page, and sends its address to nobody.
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


Text = Annotated[str, Body(embed=True, strict=True)]  # a field of the JSON body
Whole = Annotated[int, Body(embed=True, strict=True)]


class ReviewServer:
    """A running server. Use it as a context manager; `wait` blocks until Ctrl-C or SIGTERM."""

    def __init__(self, desk: Desk, port: int = 0) -> None:
        self.token = secrets.token_urlsafe(24)
        try:
            self._socket = socket.create_server((HOST, port), backlog=64)
        except OSError as error:
            raise ConfigError(f"cannot listen: {error.strerror}", where="port", value=port, fix="choose another, or 0 for any") from error
        self.url = f"http://{HOST}:{self._socket.getsockname()[1]}/{self.token}/"
        # no access log: the address holds the token
        app = make_review_app(desk, self.token)
        self._http = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, server_header=False, lifespan="off"))
        self._thread = threading.Thread(target=self._http.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> ReviewServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.should_exit = True  # what is being answered is finished, nothing is answered after this
        self._thread.join()

    def wait(self) -> None:
        """Until someone ends it. For the main thread, which is the one that gets signals."""
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def make_review_app(desk: Desk, token: str) -> FastAPI:
    """The page and its calls. Each call runs in a thread of its own: the desk may be shared by threads."""
    app, page = FastAPI(openapi_url=None), PAGE.read_text(encoding="utf-8")

    @app.middleware("http")
    async def guard(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            wrong = _wrong(request, token)
            response = _problem(*wrong) if wrong else await call(request)
        except Exception as error:  # a bug: shown on the page, and on the terminal with its trace
            log.exception("the review page got an error")
            response = _problem(500, hide(f"{type(error).__name__}: {error}"))
        response.headers.update(HEADERS)
        return response

    for kind, status in ((DeskRefusal, 422), (HeadtailError, 500)):
        app.add_exception_handler(kind, lambda _, error, status=status: _problem(status, str(error)))
    app.add_exception_handler(HTTPException, lambda _, error: _problem(error.status_code, error.detail))
    app.add_exception_handler(RequestValidationError, lambda _, error: _problem(400, _validation_text(error)))

    @app.get("/{token}/")
    def show() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/{token}/about")
    def page_facts() -> dict[str, Any]:
        return desk.page_facts()

    @app.get("/{token}/row")
    def row(start: int, step: int, show: str = "open") -> dict[str, Any]:
        return desk.row(start, step, show)

    @app.post("/{token}/check")
    def check(answer: Text) -> dict[str, str]:
        return desk.check(answer)

    @app.post("/{token}/decide")
    def decide(rank: Whole, query_key: Text, verdict: Text, answer: Text, who: Text, why: Text, seen: Whole) -> dict[str, Any]:
        return desk.decide(rank, query_key, verdict, answer, who, why, seen)

    @app.post("/{token}/undo")
    def undo(who: Text) -> dict[str, Any]:
        return desk.undo(who)

    return app


def _wrong(request: Request, token: str) -> tuple[int, str] | None:
    """Status and words for a request that is not the page's own; None when it is."""
    headers, host = request.headers, request.headers.get("host", "")
    if host.rsplit(":", 1)[0] not in _NAMES:
        return 403, "this server answers to 127.0.0.1 and localhost only"
    given, slash, path = request.url.path.removeprefix("/").partition("/")
    if not slash or not secrets.compare_digest(given.encode(), token.encode()):
        return 404, "not here: use the whole address that the command printed"
    # the page itself may be opened from anywhere
    if headers.get("origin", f"http://{host}") != f"http://{host}" or (
        path and headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
    ):
        return 403, "a page of another site asked for this"
    if request.method == "POST":
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, "send application/json"  # a form of another site cannot send this
        length = headers.get("content-length", "")
        if not length.isdigit():
            return 411, "content-length is missing"
        if int(length) > _BODY_BYTES:
            return 413, f"at most {_BODY_BYTES:,} bytes are taken"
    return None


def _validation_text(error: RequestValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'][1:])) or 'body'}: {first['msg']}"


def _problem(status: int, what: str) -> JSONResponse:
    return JSONResponse({"problem": what}, status)
