"""A Redis server that may be away: short time limits, a circuit breaker, failures counted. Needs the extra `redis`.

In: a URL, commands. Out: their result, or None when the server gave none in time. A caller therefore always goes on: what a missing
server means is the caller's to say. Knows nothing of what is stored.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from headtail.core.breaker import CircuitBreaker
from headtail.core.errors import ConfigError
from headtail.core.secrets import hide

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger("headtail.redis")
T = TypeVar("T")


class RedisLink:
    """One server, from one event loop. `failures`: calls that failed or came too late; `skipped`: calls that the breaker held back.

    `timeout_s`: of a call, connecting included. At most `connections` are open; a call that finds none free waits within its time.
    """

    def __init__(self, url: str, timeout_s: float = 0.05, connections: int = 32, clock: Callable[[], float] = time.monotonic) -> None:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=connections,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),  # a second try would double the time limit
            )
        except ValueError as error:
            fix = "write redis://HOST:PORT/NUMBER, rediss:// for TLS, or unix://PATH"
            raise ConfigError(f"not the URL of a Redis server: {error}", value=url, fix=fix) from None
        self._redis: Redis = Redis(connection_pool=pool)
        self._timeout, self._clock, self._breaker = timeout_s, clock, CircuitBreaker()
        self.failures = self.skipped = 0

    async def call(self, command: Callable[[Redis], Awaitable[T]]) -> T | None:
        """What `command` gives, or None when the server is away, slow or in error."""
        from redis.exceptions import RedisError

        if not self._breaker.allows(self._clock()):
            self.skipped += 1
            return None
        try:
            async with asyncio.timeout(self._timeout):
                result = await command(self._redis)
        except (RedisError, OSError, TimeoutError) as error:
            self._fail(error)
            return None
        self._breaker.record_success()
        return result

    def _fail(self, error: Exception) -> None:
        was_open = self._breaker.is_open
        self._breaker.record_failure(self._clock())
        self.failures += 1
        if self._breaker.is_open and not was_open:  # one line an outage, not one a request
            log.warning("Redis is away, going on without it: %s: %s", type(error).__name__, hide(str(error))[:200])

    async def close(self) -> None:
        """Close the connections."""
        close: Any = self._redis.aclose
        await close(close_connection_pool=True)
