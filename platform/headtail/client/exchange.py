"""Requests to the server: time limits, retries, and the circuit breaker. Without any I/O.

In: a path and a body; then, for each Send, the response or None. Out: Send and Sleep, one after another, and at the end the response's
JSON. The two clients drive it, each in its own way of waiting. Asking for an answer changes nothing, so it may be asked again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from pydantic_core import from_json

from headtail.client.answer import ClientError
from headtail.client.config import ClientConfig
from headtail.core.breaker import CircuitBreaker

RETRIED = frozenset((429, 502, 503, 504))  # the server, or a proxy before it, refuses for the moment: another try may succeed
_REASONS = {0: "unreachable", 429: "rate_limited", 502: "unreachable", 503: "server_busy", 504: "unreachable"}


class Send(NamedTuple):
    """Send this request. The driver returns its HttpReply, or None when there was no connection or it broke."""

    path: str
    body: dict[str, Any]
    timeout_s: float


class Sleep(NamedTuple):
    """Wait. The driver returns None."""

    seconds: float


class HttpReply(NamedTuple):
    """A response."""

    status: int
    body: bytes
    retry_after: str = ""


class NoAnswer(Exception):
    """The server gave no answer in time; `reason`: one of CLIENT_REASONS. The caller may get the fallback."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


Exchange = Generator[Send | Sleep, HttpReply | None, Any]


class Exchanges:
    """Exchanges with one server; they share its circuit breaker. `retries`: tries beyond the first, of all of them."""

    def __init__(
        self,
        config: ClientConfig,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,  # of [0, 1)
    ) -> None:
        self._config, self._clock, self._jitter = config, clock, jitter
        self.breaker = CircuitBreaker(config.breaker_failures, config.breaker_pause_s)
        self.retries = 0

    def ask(self, path: str, body: dict[str, Any]) -> Exchange:
        """One question. Returns the JSON of the response; raises NoAnswer, or ClientError when the request itself is wrong."""
        end = self._clock() + self._config.timeout_ms / 1000
        status, tries = 0, 0
        while True:
            now = self._clock()
            if not self.breaker.allows(now):
                raise NoAnswer(_REASONS[status])
            if tries and now >= end:  # a pause may end a little late
                raise NoAnswer(_REASONS[status] if status else "client_timeout")
            got = yield Send(path, body, end - now)
            status = got.status if got is not None else 0
            self._count(status)
            if got is not None and status not in RETRIED:
                return _content(got)
            wait = self._pause(tries, got.retry_after if got is not None else "")
            tries += 1
            left = end - self._clock()
            if tries > self._config.retries or wait >= left:
                raise NoAnswer("client_timeout" if status == 0 and left <= 0 else _REASONS[status])
            self.retries += 1
            yield Sleep(wait)

    def _count(self, status: int) -> None:
        """429 says nothing about the server's health: it is about the key."""
        if status in (0, 500, 502, 503, 504):
            self.breaker.record_failure(self._clock())
        else:
            self.breaker.record_success()

    def _pause(self, tries: int, retry_after: str) -> float:
        """Seconds before the next try: full jitter (any time up to twice the last limit), after what Retry-After asks for."""
        told = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0
        return told + self._jitter() * self._config.backoff_ms / 1000 * float(2**tries)


def _content(got: HttpReply) -> Any:
    if got.status == 500:
        raise NoAnswer("server_error")
    if got.status >= 400:
        raise ClientError.parse(got.status, got.body)
    if got.status not in (200, 202):
        raise NoAnswer("server_error")
    try:
        return from_json(got.body)
    except ValueError:
        raise NoAnswer("server_error") from None
