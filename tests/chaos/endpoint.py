"""An OpenAI-compatible endpoint that fails on purpose, with a real HTTP server on a port of this machine.

In: how large a share of requests is to fail. Out: for the others the smallest answer valid under the schema they bring,
echoing their prompt. Failures: 429 with Retry-After, 500, 200 with an error body, a page that is not JSON, a connection
that breaks, an answer that never comes; and 401 for everything from a chosen request on.
"""

from __future__ import annotations

import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_STALL_S = 0.8  # longer than the client's limit


class Endpoint:
    """Use as a context manager; answers at `url` meanwhile. `faults` counts what was done on purpose, by name."""

    def __init__(self, seed: float) -> None:
        self.rng, self.share, self.refuse_after = random.Random(seed), 0.0, -1
        self.asked = 0
        self.faults: dict[str, int] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Endpoint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def fault(self) -> str:
        """What is to go wrong with the next request; empty: nothing."""
        with self._lock:
            self.asked += 1
            if 0 <= self.refuse_after < self.asked:
                name = "401"
            elif self.rng.random() < self.share:
                name = self.rng.choice(("429", "429", "500", "500", "error body", "not JSON", "broken", "stall"))
            else:
                return ""
            self.faults[name] = self.faults.get(name, 0) + 1
            return name


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed or tired of waiting leave broken connections: nothing to tell."""


def _handler(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fault = endpoint.fault()
            if fault == "broken":
                self.close_connection = True
                return
            if fault == "stall":
                time.sleep(_STALL_S)
            status, text = said(fault, body)
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                if fault == "429":
                    self.send_header("Retry-After", "0.02")
                self.end_headers()
                self.wfile.write(text)
            except OSError:
                self.close_connection = True  # the client has gone: that is the test

    return Handler


def said(fault: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """Status and body of an answer."""
    if fault in ("401", "429", "500"):
        return int(fault), json.dumps({"error": {"message": f"told to answer {fault}", "type": "on purpose"}}).encode()
    if fault == "error body":
        return 200, b'{"error": {"message": "overloaded", "type": "on purpose"}}'
    if fault == "not JSON":
        return 200, b"<html>a proxy's page</html>"
    from headtail.engines.null import answerer

    schema = body["response_format"]["json_schema"]["schema"]
    text = answerer(schema)(body["messages"][-1]["content"])
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return 200, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 5}}).encode()
