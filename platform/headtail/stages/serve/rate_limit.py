"""How fast a key may call: the generic cell rate algorithm (GCRA, ITU-T I.371), with a burst.

In: a place in an array, the seconds between requests, the burst. Out: the seconds to wait, 0 when the request is admitted. One number
per key is kept: the theoretical arrival time of its next request. `SharedLimiter` keeps them in a mapped file that all front processes
of a node share; `RedisLimiter` in Redis, for limits over several nodes. Knows nothing of keys' names or HTTP.

Front processes read and write the file without a lock. Two that decide at once may both admit: one request more for each other process.
When the system stops a process in the moment between its last read and its write, what others admitted during that pause is lost too: at
most a burst and the rate times the pause. Three processes that did nothing else on two cores admitted 8 to 16 % more than one would. A lock
would cost more than the check itself (0.3 us), and a process stopped while it holds one would stop all the others.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headtail.adapters.redis_link import RedisLink
from headtail.stages.serve.api_keys import MOST_KEYS, ApiKey
from headtail.stages.serve.errors import RequestError

_ROUNDING = 1e-9  # seconds; of a difference of two clock readings near 1e6 s


def gcra(arrival: float, now: float, interval: float, burst: int, cost: int = 1) -> tuple[float, float]:
    """(seconds to wait, new theoretical arrival time); 0 and a later time when `cost` requests are admitted at `now`.

    `interval`: seconds between requests in the long run. A request of more than `burst` can never be admitted: infinity.
    """
    if cost > burst:
        return math.inf, arrival
    room = burst * interval
    ahead = arrival - now
    if ahead < 0:
        ahead = 0.0
    elif ahead > room:  # the clock began anew with a reboot, or the limit was changed: never more than one burst is waited for
        ahead = room
    wait = ahead + cost * interval - room
    return (0.0, now + ahead + cost * interval) if wait <= _ROUNDING else (wait, arrival)


def limit_error(wait: float, burst: int) -> RequestError:
    """The refusal of a request that would have to wait so many seconds."""
    if math.isinf(wait):
        return RequestError("too_large", f"this API key may send {burst} queries at once", fix=f"send at most {burst} queries at once")
    return RequestError("rate_limited", retry_after_s=wait)


class SharedLimiter:
    """Limits of one node. `path`: the file that its processes share. The clock is the machine's, so all of them read the same time."""

    def __init__(self, path: Path, slots: int = MOST_KEYS, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, size = clock, slots * 8
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(held).st_size < size:
                os.ftruncate(held, size)  # of zeros: every key has its whole burst
            self._map = mmap.mmap(held, size)
        finally:
            os.close(held)
        self._arrivals = memoryview(self._map).cast("d")

    def wait(self, slot: int, interval: float, burst: int, cost: int = 1) -> float:
        """Seconds to wait before `cost` requests of a key are admitted; 0: they are, and are counted. `interval` 0 is no limit."""
        if not interval:
            return 0.0
        arrivals, now = self._arrivals, self._clock()
        before = arrivals[slot]
        wait, after = gcra(before, now, interval, burst, cost)
        if not wait:
            held = arrivals[slot]  # again: when another process wrote meanwhile, what it admitted must go on counting
            arrivals[slot] = after if held == before else max(held, now) + cost * interval
        return wait

    def admit(self, key: ApiKey, cost: int = 1) -> None:
        """Count `cost` requests of a key. RequestError 429 when it has to wait, 413 when so many are never admitted at once."""
        if wait := self.wait(key.slot, key.interval, key.burst, cost):
            raise limit_error(wait, key.burst)

    def close(self) -> None:
        """Unmap the file."""
        self._arrivals.release()
        self._map.close()


# The same as `gcra`, inside Redis and by its clock, so that nodes need not agree on the time. Numbers go as text: Redis cuts a
# script's number to an integer.
_SCRIPT = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local interval, burst, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local room = burst * interval
local ahead = tonumber(redis.call('GET', KEYS[1]) or '0') - now
if ahead < 0 then ahead = 0 elseif ahead > room then ahead = room end
local wait = ahead + cost * interval - room
if wait > 0.000002 then return string.format('%.6f', wait) end
redis.call('SET', KEYS[1], string.format('%.6f', now + ahead + cost * interval), 'PX', math.ceil((ahead + cost * interval) * 1000) + 1)
return '0'
"""


class RedisLimiter:
    """Limits over all nodes that use one Redis. While it is away every request is admitted, and `open_admissions` counts them."""

    def __init__(self, link: RedisLink, prefix: str = "headtail:limit:") -> None:
        self.link, self._prefix, self.open_admissions = link, prefix, 0

    async def wait(self, name: str, interval: float, burst: int, cost: int = 1) -> float:
        """As `SharedLimiter.wait`, for the key of this name."""
        if not interval:
            return 0.0
        if cost > burst:
            return math.inf
        key, numbers = self._prefix + name, (repr(interval), str(burst), str(cost))

        async def ask(server: Any) -> float:
            return float(await server.eval(_SCRIPT, 1, key, *numbers))

        found = await self.link.call(ask)
        if found is None:
            self.open_admissions += 1
            return 0.0
        return found

    async def close(self) -> None:
        """Close the connections."""
        await self.link.close()

    async def admit(self, key: ApiKey, cost: int = 1) -> None:
        """As `SharedLimiter.admit`."""
        if wait := await self.wait(key.name, key.interval, key.burst, cost):
            raise limit_error(wait, key.burst)
