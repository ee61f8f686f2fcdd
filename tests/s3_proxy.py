"""An HTTP proxy before an S3 server that breaks calls on purpose: each kind of fault at any call, chosen by its number or kind.

In: the address of a server that speaks S3. Out: an address of our own, a list of the calls that came by, and faults as they
were asked for. What the server behind did is real: after `reset after` the object is there.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

ANSWERS = {
    "409": (409, "ConditionalRequestConflict"),
    "412": (412, "PreconditionFailed"),
    "403": (403, "AccessDenied"),
    "301": (301, "PermanentRedirect"),
    "501": (501, "NotImplemented"),
    "429": (429, "TooManyRequests"),
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
}
TRANSIENT = ("409", "429", "500", "503", "reset before", "reset after", "silence after", "truncated")
_EMPTY = b'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>'


class Proxy:
    """The proxy, serving from a thread. `choose(call, nth)` names the fault for a call, or none; `nth` counts equal requests from 0."""

    def __init__(self, upstream: str, silence_s: float) -> None:
        self.upstream, self.silence_s = urlparse(upstream).netloc, silence_s
        self.calls: list[str] = []
        self.choose: Callable[[str, int], str] = lambda call, nth: ""
        self.ignores_conditions = self.refuses_checksums = False
        self.seen: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def reset(self, choose: Callable[[str, int], str] | None = None) -> None:
        """Forget the calls; from now on `choose` decides."""
        with self._lock:
            self.seen.clear()
            self.calls, self.choose = [], choose or (lambda call, nth: "")
            self.ignores_conditions = self.refuses_checksums = False

    def fault(self, call: str, address: str) -> str:
        """Note a call; the fault that it is to meet."""
        with self._lock:
            self.calls.append(call)
            self.seen[call, address] += 1
            return self.choose(call, self.seen[call, address] - 1)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def name(method: str, path: str, headers: Any) -> str:
    """What S3 calls a request, in short."""
    query = parse_qs(urlparse(path).query, keep_blank_values=True)
    if method == "PUT":
        return "upload part" if "partNumber" in query else "create" if headers.get("If-None-Match") else "put"
    if method == "POST":
        return "start upload" if "uploads" in query else "complete upload" if "uploadId" in query else "delete many"
    if method == "GET":
        return "list" if "list-type" in query or "uploads" in query else "get"
    bucket = "head" if urlparse(path).path.strip("/").count("/") else "head bucket"
    return {"HEAD": bucket, "DELETE": "abort upload" if "uploadId" in query else "delete"}.get(method, method)


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        call = name(self.command, self.path, self.headers)
        fault = self.proxy.fault(call, self.path)
        if self.proxy.refuses_checksums and any(
            key.lower().startswith(("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer")) for key in self.headers
        ):
            return self._refuse(501, "NotImplemented")
        if fault in ANSWERS:
            return self._refuse(*ANSWERS[fault])
        if fault == "reset before":
            return self._reset()
        status, headers, answer = self._forward(body)
        if fault == "reset after":
            return self._reset()
        if fault == "silence after":
            threading.Event().wait(self.proxy.silence_s)
            return self._reset()
        if fault == "409 for 412" and status == 412:
            return self._refuse(*ANSWERS["409"])
        if fault == "stale listing" and call == "list":
            answer = _EMPTY
        self._answer(status, headers, answer, len(answer) // 2 if fault == "truncated" and call == "get" else None)
        return None

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815 - the standard library's names

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("expect", "connection")}
        if self.proxy.ignores_conditions:
            headers.pop("If-None-Match", None)
        link = http.client.HTTPConnection(self.proxy.upstream)
        link.request(self.command, self.path, body or None, headers)
        answer = link.getresponse()
        found = answer.read()
        link.close()
        return answer.status, answer.getheaders(), found

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: int | None = None) -> None:
        self.send_response_only(status)
        length = str(len(body))
        for key, value in headers:
            if key.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif key.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(key, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        self.wfile.flush()
        if cut is not None:
            self._reset()

    def _refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode() if self.command != "HEAD" else b""
        self._answer(status, [("Content-Type", "application/xml")], body)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Quiet."""
