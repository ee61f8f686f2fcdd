"""The request log's near end: one line per request into a pipe that never makes a request wait.

In: what a request was and how it was answered; what callers say of answers. Out: a line (see `line_pipe`). One that finds the pipe full,
or is too long, is dropped and counted. `collector` reads the far end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from headtail.stages.serve.front.counters import Counters
from headtail.stages.serve.line_pipe import write_line

TAG = "feedback"  # first field of a line of feedback; a line of the request log begins with a number


class RequestLog:
    """Writes lines to `pipe`, a descriptor that does not block; None: there is no log."""

    def __init__(self, pipe: int | None, counters: Counters) -> None:
        self._pipe, self._counters = pipe, counters
        if pipe is not None:
            os.set_blocking(pipe, False)

    def write(
        self,
        request_id: str,
        query: str,
        release: str,
        source: str,
        cached: bool,
        degraded: bool,
        reason: str,
        confidence: float | None,
        seconds: float,
        caller: str,
    ) -> None:
        """One line: a row of rows.REQUEST_LOG. `query`: clean, never as it was sent; `seconds`: what the request took."""
        now, latency = int(time.time() * 1_000_000), round(seconds * 1000, 3)
        row = now, request_id, query, release, source, cached, degraded, reason, confidence, latency, caller
        self.send(row, "log_lines", "log_dropped")

    @property
    def is_on(self) -> bool:
        """Whether lines go anywhere."""
        return self._pipe is not None

    def send(self, row: Sequence[Any], written: str, dropped: str) -> bool:
        """Write `row` as a line; counted under one of the two names. False when it was dropped, or there is no log."""
        if self._pipe is None:
            return False
        done = write_line(self._pipe, row)
        self._counters.add(written if done else dropped)
        return done
