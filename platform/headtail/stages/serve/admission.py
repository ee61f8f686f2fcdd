"""Whether a request is admitted: its API key, the scope that the call needs, and how fast the key may call.

In: the Authorization header of a request. Out: the Principal, or a RequestError (401, 403, 413, 429). Without a file of keys everyone is
let in as one caller without a name. Knows nothing of routes or bodies.
"""

from __future__ import annotations

from pathlib import Path

from headtail.adapters.redis_link import RedisLink
from headtail.stages.serve.api_keys import KeyRing
from headtail.stages.serve.principal import Admit, Principal, admit_all
from headtail.stages.serve.rate_limit import RedisLimiter, SharedLimiter


class KeyAdmission:
    """For one front process. `limits`: the file that the front processes of this node share."""

    def __init__(self, keys: Path, limits: Path) -> None:
        self._ring, self._limiter = KeyRing(keys), SharedLimiter(limits)

    def __call__(self, authorization: bytes | None, scope: str = "answer", cost: int = 1) -> Principal:
        """Check a request and count it as `cost` queries. A call of many queries is admitted whole or not at all."""
        key = self._ring.check(authorization, scope)
        if key.interval:
            self._limiter.admit(key, cost)
        return Principal(key.name)

    @property
    def reload_failures(self) -> int:
        """How many changes of the file could not be read; the keys from before stay valid."""
        return self._ring.reload_failures

    def close(self) -> None:
        """Close the shared file."""
        self._limiter.close()


class ClusterAdmission:
    """The same with limits over all nodes, kept in Redis: one round trip per request of a key that has a limit."""

    def __init__(self, keys: Path, limiter: RedisLimiter) -> None:
        self._ring, self.limiter = KeyRing(keys), limiter

    async def __call__(self, authorization: bytes | None, scope: str = "answer", cost: int = 1) -> Principal:
        """See KeyAdmission. While Redis is away no limit holds, and `limiter.open_admissions` counts those let in."""
        key = self._ring.check(authorization, scope)
        if key.interval:
            await self.limiter.admit(key, cost)
        return Principal(key.name)

    @property
    def reload_failures(self) -> int:
        """See KeyAdmission."""
        return self._ring.reload_failures

    async def close(self) -> None:
        """Close the connections to Redis."""
        await self.limiter.close()


def open_admission(keys: str, limits: Path, redis_url: str) -> Admit:
    """The admission of these settings. `keys`: the file of keys; None: no key is needed. Limits are in the file `limits` or in Redis."""
    if not keys:
        return admit_all
    path = Path(keys).expanduser()
    return ClusterAdmission(path, RedisLimiter(RedisLink(redis_url))) if redis_url else KeyAdmission(path, limits)
