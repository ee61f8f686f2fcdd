"""An ASGI app behind a real HTTP server in a thread of the test's process."""

from __future__ import annotations

import threading
import time
from typing import Any

import uvicorn

from ports import free_port
from timescale import limit


class Running:
    """Use as a context manager; `url` answers inside it."""

    def __init__(self, app: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error", loop="asyncio", ws="none"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> Running:
        self.thread.start()
        end = time.monotonic() + limit(10)
        while not self.server.started:
            assert time.monotonic() < end
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(limit(10))
