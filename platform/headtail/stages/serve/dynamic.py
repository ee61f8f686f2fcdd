"""The dynamic tier: answers of the student are kept, and given again when the same query comes again.

In: a miss. Out: the stored answer, if there is one. In: what a later tier answered. It is then stored, bound to the release, its student,
its task and the side inputs, for a time to live. A fallback, a degraded answer or one of another release's student is never stored; an
unsure one only where no bigger model could have another.
What is read is checked against the task's schema, as a student's text is. In Redis all front processes share answers; while it is
away each request is a miss. Without Redis each process has its own. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

from pydantic import Field

from headtail.adapters.redis_link import RedisLink
from headtail.core.config import Config, execution
from headtail.core.keys import canonical, query_key
from headtail.core.rows import Source
from headtail.stages.serve.answerer import Miss, Reply, Tier

_ENTRY_BYTES = 400  # of Python's objects around a stored answer
_VARIANTS = 64  # answers to one query that Redis keeps: side inputs and releases differ; a caller chooses side inputs
_WRITES = 1000  # that may wait; what comes beyond is not stored


class DynamicConfig(Config):
    """Which answers of the student are kept, and for how long."""

    enabled: bool = Field(True, description="give the student's answers again")
    ttl_s: float = Field(3600.0, gt=0, description="seconds that an answer is given again")
    max_mb: int = execution(64, "megabytes of answers per front process; not for Redis, which has `maxmemory`", ge=1)
    redis_url: str = execution("", "redis://HOST:PORT/NUMBER, shared by all servers; needs the extra `redis`; empty: in each process")
    redis_timeout_ms: int = execution(50, "milliseconds that a call of Redis may take", ge=1)


class AnswerStore(Protocol):
    """Where answers are kept: by the key of their query, then by what else they depend on. No call raises or takes long."""

    async def get(self, query: bytes, variant: bytes) -> bytes | None:
        """The stored value; None when its time is over or it was dropped."""
        ...

    async def put(self, query: bytes, variant: bytes, value: bytes, ttl_s: float) -> None:
        """Keep `value` for `ttl_s` seconds, if there is room."""
        ...

    async def drop(self, query: bytes) -> None:
        """Forget all answers to a query."""
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


class LocalAnswers:
    """Answers in this process. When there is no room, the least recently used ones are dropped."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock, self._bytes = max_bytes, clock, 0
        self._held: OrderedDict[tuple[bytes, bytes], tuple[float, bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    async def get(self, query: bytes, variant: bytes) -> bytes | None:
        """See AnswerStore."""
        found = self._held.get((query, variant))
        if found is None:
            return None
        if found[0] <= self._clock():
            self._remove((query, variant))
            return None
        self._held.move_to_end((query, variant))
        return found[1]

    async def put(self, query: bytes, variant: bytes, value: bytes, ttl_s: float) -> None:
        """See AnswerStore."""
        self._remove((query, variant))
        if len(value) + _ENTRY_BYTES > self._most:
            return  # it alone is larger than the store: it would replace all other answers
        self._held[query, variant] = self._clock() + ttl_s, value
        self._bytes += len(value) + _ENTRY_BYTES
        while self._bytes > self._most:
            self._remove(next(iter(self._held)))

    async def drop(self, query: bytes) -> None:
        """See AnswerStore. Looks at every entry: deletions are rare."""
        for key in [key for key in self._held if key[0] == query]:
            self._remove(key)

    async def close(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._bytes = 0

    def _remove(self, key: tuple[bytes, bytes]) -> None:
        if (found := self._held.pop(key, None)) is not None:
            self._bytes -= len(found[1]) + _ENTRY_BYTES


# A query's answers are the fields of one hash, so that one DEL forgets all of them. Its time to live is that of the newest.
_PUT = f"""
if redis.call('HLEN', KEYS[1]) >= {_VARIANTS} then redis.call('DEL', KEYS[1]) end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
"""


class RedisAnswers:
    """Answers in a Redis server, for all front processes that use it. While it is away there are none."""

    def __init__(self, link: RedisLink, prefix: str = "headtail:answer:") -> None:
        self.link, self._prefix = link, prefix

    async def get(self, query: bytes, variant: bytes) -> bytes | None:
        """See AnswerStore."""

        async def read(server: Any) -> bytes | None:
            found: bytes | None = await server.hget(self._key(query), variant.hex())
            return found

        return await self.link.call(read)

    async def put(self, query: bytes, variant: bytes, value: bytes, ttl_s: float) -> None:
        """See AnswerStore."""
        await self.link.call(lambda server: server.eval(_PUT, 1, self._key(query), variant.hex(), value, str(int(ttl_s * 1000) + 1)))

    async def drop(self, query: bytes) -> None:
        """See AnswerStore."""
        await self.link.call(lambda server: server.delete(self._key(query)))

    async def close(self) -> None:
        """Close the connections."""
        await self.link.close()

    def _key(self, query: bytes) -> str:
        return self._prefix + query.hex()


def open_answers(config: DynamicConfig) -> AnswerStore:
    """The store that the config asks for; to be used in one event loop."""
    if config.redis_url:
        return RedisAnswers(RedisLink(config.redis_url, config.redis_timeout_ms / 1000))
    return LocalAnswers(config.max_mb << 20)


class DynamicTier(Tier):
    """The tier before the student's.

    `hits`, `misses`, `spoiled`: answers given again, not there, there but not usable. `keeps_unsure`: whether answers that are unsure
    are given again.
    """

    def __init__(self, store: AnswerStore, ttl_s: float, clock: Callable[[], float] = time.time, keeps_unsure: bool = False) -> None:
        self.store, self._ttl, self._clock, self._keeps_unsure = store, ttl_s, clock, keeps_unsure
        self._deleted: frozenset[bytes] = frozenset()
        self.hits = self.misses = self.spoiled = 0
        self._writes: set[asyncio.Task[None]] = set()

    @property
    def deleted(self) -> frozenset[bytes]:
        """Keys of queries that no cache may answer. When more are set, what is stored for these is dropped."""
        return self._deleted

    @deleted.setter
    def deleted(self, keys: frozenset[bytes]) -> None:
        more, self._deleted = keys - self._deleted, keys
        if more:
            self._begin(self._drop(more))

    async def _drop(self, keys: Iterable[bytes]) -> None:
        for key in keys:  # one after another: at a start there may be thousands, and Redis has a time limit per call
            await self.store.drop(key)

    async def answer(self, miss: Miss, reason: str) -> Reply | None:
        """The stored answer."""
        query, bound = query_key(miss.clean), _binding(miss)
        if query in self.deleted:
            return None
        stored = await self.store.get(query, _variant(bound))
        if stored is not None and (reply := self._read(stored, bound, miss)) is not None:
            self.hits += 1
            return reply
        self.misses += 1
        return None

    def keep(self, miss: Miss, reply: Reply) -> None:
        """Store what may be given again."""
        query = query_key(miss.clean)
        if may_store(reply, self._keeps_unsure) and query not in self.deleted and len(self._writes) < _WRITES:
            bound = _binding(miss)
            value = _encode(reply, bound, self._clock() + self._ttl)
            self._begin(self.store.put(query, _variant(bound), value, self._ttl))

    def _begin(self, change: Coroutine[Any, Any, None]) -> None:
        """Start a change of the store. No caller waits for it."""
        write = asyncio.ensure_future(change)
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)

    def _read(self, stored: bytes, bound: str, miss: Miss) -> Reply | None:
        """A stored value as the reply to a miss. None when it was made for something else, is too old, or is no valid answer."""
        try:
            held = json.loads(stored)
            fits = held["for"] == bound and held["until"] > self._clock()
            answer, problem = miss.served.task.parse(held["answer"]) if fits else (None, "")
            confidence, key, reason = held["confidence"], held["answer_key"], held.get("reason", "")
            if not (isinstance(confidence, float | int | None) and isinstance(key, str | None) and reason in ("", "unsure")):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            fits, problem = True, "damaged"
        if problem:
            self.spoiled += 1
        if problem or not fits or (reason and not self._keeps_unsure):
            return None
        release, took = miss.served.release, round((time.perf_counter() - miss.started) * 1000, 3)
        return Reply(
            miss.query, miss.clean, answer, Source.DYNAMIC, False, False, confidence, key,
            release.id, release.snapshot, took, reason, miss.request_id,
        )  # fmt: skip

    async def close(self) -> None:
        """Finish what is being stored, then close the store."""
        if self._writes:
            await asyncio.wait(self._writes)
        await self.store.close()


def may_store(reply: Reply, unsure: bool = False) -> bool:
    """Whether an answer may be given again: this release's student or the bigger model gave it, and nothing is to be said against it, but
    that it is `unsure` where that is no matter."""
    fits = not reply.reason or (unsure and reply.reason == "unsure")
    return reply.source in (Source.REALTIME_STUDENT, Source.ESCALATED) and not reply.degraded and fits


def _variant(bound: str) -> bytes:
    return hashlib.blake2b(bound.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _binding(miss: Miss) -> str:
    """All that the answer depends on, as one text. It is stored and compared, so two questions with one digest are a miss."""
    release = miss.served.release
    inputs: dict[str, Any] = {name: list(values) for name, values in miss.side_inputs.items() if values}
    return canonical([release.id, release.student, miss.served.task.fingerprint, miss.clean, inputs])


def _encode(reply: Reply, bound: str, until: float) -> bytes:
    fields = {"confidence": reply.confidence, "answer_key": reply.answer_key, **({"reason": reply.reason} if reply.reason else {})}
    return json.dumps({"for": bound, "until": until, "answer": json.dumps(reply.answer, ensure_ascii=False), **fields}).encode()
