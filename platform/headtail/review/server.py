"""The review page over HTTP, for people on this machine only.

In: a desk. Out: one page and a few JSON calls under http://127.0.0.1:<port>/<token>/. The token is made anew at each start;
without it everything is 404, so other pages in the browser and other users of the machine get nothing. A request that comes
from another site (Host, Origin, Sec-Fetch-Site) is refused, and no CORS header is ever sent. Knows nothing of decisions.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from headtail.errors import ConfigError, HeadtailError
from headtail.review.desk import Desk, Refused
from headtail.secrets import hide

PAGE = Path(__file__).parent / "page.html"
HOST = "127.0.0.1"
_NAMES = ("127.0.0.1", "localhost")  # a name that someone else pointed at this machine (DNS rebinding) is not taken
_BODY_BYTES = 1 << 20
_IDLE_S = 60.0
# The page runs no script but its own, talks to no host but this one, is shown in no other page, and tells nobody its address.
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class _Bad(Exception):
    def __init__(self, status: int, what: str) -> None:
        self.status, self.what = status, what


class Server:
    """A running server. Use it as a context manager; `wait` blocks until Ctrl-C or SIGTERM."""

    def __init__(self, desk: Desk, port: int = 0) -> None:
        self.token = secrets.token_urlsafe(24)
        try:
            self._http = _Http((HOST, port), _Handler)
        except OSError as error:
            raise ConfigError(f"cannot listen: {error.strerror}", where="port", value=port, fix="choose another, or 0 for any") from error
        self._http.desk, self._http.token, self._http.page = desk, self.token, PAGE.read_bytes()
        self.url = f"http://{HOST}:{self._http.server_address[1]}/{self.token}/"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        for connection in tuple(self._http.connections):  # nothing is answered after this
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def wait(self) -> None:
        """Until someone ends it."""
        ended = threading.Event()
        with _on_sigterm(ended.set), contextlib.suppress(KeyboardInterrupt):
            while not ended.wait(0.5):
                pass


@contextlib.contextmanager
def _on_sigterm(call: Callable[[], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Http(ThreadingHTTPServer):
    daemon_threads = True  # a browser keeps its connection open; that must not keep the process
    allow_reuse_address = True
    request_queue_size = 64
    desk: Desk
    token: str
    page: bytes

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a browser that goes away in the middle is no news
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "headtail", ""
    timeout = _IDLE_S
    server: _Http

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, *_: object) -> None:
        """Not printed: the address holds the token."""

    def _answer(self, make: Callable[[str, Mapping[str, list[str]]], Any]) -> None:
        try:
            path, query = self._allowed()
            found = make(path, query)
            if isinstance(found, bytes):
                self._send(200, found, "text/html; charset=utf-8")
            else:
                self._reply(200, found)
        except _Bad as error:
            self.close_connection = True  # its body may not have been read
            self._reply(error.status, {"problem": error.what})
        except Refused as error:
            self._reply(422, {"problem": str(error)})
        except HeadtailError as error:
            self._reply(500, {"problem": str(error)})
        except OSError:
            raise  # the browser has gone away
        except Exception as error:  # a bug of ours: told to the page, and on the terminal with its trace
            self._reply(500, {"problem": hide(f"{type(error).__name__}: {error}")})
            raise

    def _allowed(self) -> tuple[str, Mapping[str, list[str]]]:
        """(what is asked for below the token, its query), or _Bad."""
        host = self.headers.get("host", "")
        if host.rsplit(":", 1)[0] not in _NAMES:
            raise _Bad(403, "this server answers to 127.0.0.1 and localhost only")
        url = urlsplit(self.path)
        token, slash, path = url.path.removeprefix("/").partition("/")
        if not slash or not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise _Bad(404, "not here: use the whole address that `headtail review serve` printed")
        if self.headers.get("origin", f"http://{host}") != f"http://{host}":
            raise _Bad(403, "a page of another site asked for this")
        if path and self.headers.get("sec-fetch-site", "none") not in (
            "same-origin",
            "none",
        ):  # the page itself may be opened from anywhere
            raise _Bad(403, "a page of another site asked for this")
        return path, parse_qs(url.query)

    def _get(self, path: str, query: Mapping[str, list[str]]) -> Any:
        desk = self.server.desk
        if path == "":
            return self.server.page
        if path == "about":
            return desk.about()
        if path == "row":
            try:
                start, step = (int(query[name][0]) for name in ("start", "step"))
            except (KeyError, ValueError):
                raise _Bad(400, "start and step are whole numbers") from None
            return desk.row(start, step, query.get("show", ["open"])[0])
        raise _Bad(404, "not here")

    def _post(self, path: str, _: Mapping[str, list[str]]) -> Any:
        desk, body = self.server.desk, self._body()
        if path == "check":
            return desk.check(*_fields(body, answer=str))
        if path == "decide":
            return desk.decide(*_fields(body, rank=int, query_key=str, verdict=str, answer=str, who=str, why=str, seen=int))
        if path == "undo":
            return desk.undo(*_fields(body, who=str))
        raise _Bad(404, "not here")

    def _body(self) -> Any:
        if self.headers.get_content_type() != "application/json":  # a form of another site cannot send this
            raise _Bad(415, "send application/json")
        length = self.headers.get("content-length", "")
        if not length.isascii() or not length.isdigit():
            raise _Bad(411, "content-length is missing")
        if int(length) > _BODY_BYTES:
            raise _Bad(413, f"at most {_BODY_BYTES:,} bytes are taken")
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise _Bad(400, "not JSON") from None

    def _reply(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"), "application/json")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "content-type": kind, "content-length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _fields(body: Any, **kinds: type) -> list[Any]:
    """The named fields of a JSON object, each of its kind."""
    if not isinstance(body, dict) or any(type(body.get(name)) is not kind for name, kind in kinds.items()):
        raise _Bad(400, f"send {', '.join(f'{name} ({kind.__name__})' for name, kind in kinds.items())}")
    return [body[name] for name in kinds]
