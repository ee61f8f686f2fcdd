"""How long the parts of a running server work, measured from outside with few requests.

In: its URL, queries that its snapshot answers and queries that nothing answers yet. Out: ServiceTimes. Hits and misses one at a time, at
random with pauses between, give the times of a request alone; misses that are kept in flight together give what each further row of a
batch costs. The server should have nothing else to do meanwhile. HTTP is spoken over plain connections: a client library's own time would
be part of each figure.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import quote_plus, urlsplit

import numpy as np

from headtail.adapters.server_key import key_headers
from headtail.core.errors import InputError
from headtail.core.rows import Source
from headtail.stages.simulate.design import ServiceTimes

TOGETHER, CROWD = 16, 480  # misses in flight, and misses in all, that show what a further row costs
PAUSE_S, CONNECTIONS = 0.01, 8  # mean pause between requests alone: without one, caches and cores are warmer than those of a server
# A front process works this share of a hit's time, and of what a miss takes beyond it; the rest is on the way, and the student's. Of a hit
# alone it works 0.7 of 0.8 ms by processor time, under load 0.14 to 0.28 ms; of what a miss takes more 1.25 of 5.4 ms alone.
HIT_WORK, MISS_WORK = 0.5, 0.23


class ProbeReply(NamedTuple):
    """One answer. `sent`: by time.perf_counter; `seconds` from there to its last byte."""

    sent: float
    seconds: float
    cached: bool
    source: str
    reason: str


class ProbeConnection:
    """One kept-open connection to a server."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._tls = parts.hostname or "", ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        fields = {"Host": parts.netloc, **key_headers(url)}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, query: str) -> ProbeReply:
        """Send one query and take its answer. InputError when the server refuses it."""
        reader, writer = self._streams or await self.open()
        request = f"GET /v1/answer?query={quote_plus(query)} HTTP/1.1\r\n{self._head}".encode()
        sent = time.perf_counter()
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        body = await reader.readexactly(length)
        seconds = time.perf_counter() - sent
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise InputError("the server refused a query", where="times_url", value=body[:200].decode(errors="replace"))
        answer = json.loads(body)
        return ProbeReply(sent, seconds, answer["cached"], answer["source"], answer["reason"])

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect. InputError when nothing listens."""
        try:
            self._streams = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        except OSError as error:
            raise InputError(f"no server answers: {error}", where="times_url", value=self._host, fix="start one: headtail serve") from error
        return self._streams

    def close(self) -> None:
        """End it."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def ask_in_turn(url: str, queries: Sequence[str], connections: int) -> list[ProbeReply]:
    """Every query once, with so many in flight."""
    source = iter(queries)  # shared: each caller takes the next one that is left

    async def call() -> list[ProbeReply]:
        connection = ProbeConnection(url)
        try:
            return [await connection.ask(query) for query in source]
        finally:
            connection.close()

    return [reply for some in await asyncio.gather(*(call() for _ in range(connections))) for reply in some]


async def ask_alone(url: str, queries: Sequence[str], seed: int) -> list[ProbeReply]:
    """Every query once, one at a time, with random pauses, over connections in turn: the front processes all get some."""
    rng, connections = random.Random(seed), [ProbeConnection(url) for _ in range(CONNECTIONS)]
    replies = []
    try:
        for query in queries:
            await asyncio.sleep(rng.expovariate(1 / PAUSE_S))
            replies.append(await rng.choice(connections).ask(query))
    finally:
        for connection in connections:
            connection.close()
    return replies


async def measure_times(url: str, hits: Sequence[str], misses: Sequence[str], seed: int) -> ServiceTimes:
    """The times of a running server. `misses`: CROWD more than are asked alone. Without a student the defaults of its parts stay.
    InputError when no query of `hits` is one."""
    crowd, mixed = misses[:CROWD], [*hits, *misses[CROWD:]]
    random.Random(seed).shuffle(mixed)
    await ask_in_turn(url, hits[:50], CONNECTIONS)  # warm
    alone = await ask_alone(url, mixed, seed)
    hit, miss = (np.array([one.seconds for one in alone if kind(one)]) for kind in (_is_hit, _is_miss))
    if not len(hit):
        raise InputError(
            "the server answers nothing from its cache", where="times_url", value=url, fix="measure one that serves `snapshot`"
        )
    work = HIT_WORK * float(np.median(hit))
    times = ServiceTimes(front_ms=(1000 * work,), wire_ms=tuple(np.maximum(1000 * (hit - work), 0.0).tolist()))
    if not len(miss):
        return times
    further = np.maximum(miss - np.median(hit), 1e-6)
    front = MISS_WORK * float(np.median(further))
    student = np.maximum(further - front, 1e-6)
    began = time.perf_counter()
    await ask_in_turn(url, crowd, TOGETHER)
    share = row_share((time.perf_counter() - began) / len(crowd), float(np.median(student)), TOGETHER)
    return times.model_copy(update={"miss_ms": (1000 * front,), "student_ms": tuple((1000 * student).tolist()), "row_share": share})


def row_share(seconds: float, alone: float, together: int) -> float:
    """What a further row of a batch costs, as a share of one alone, 0 to 1.

    `seconds`: per miss while `together` are in flight. Two batches take turns then, and hold them all: together x seconds =
    alone x (2 + (together - 2) x share).
    """
    return min(1.0, max(0.0, (together * seconds / alone - 2) / (together - 2)))


def _is_hit(reply: ProbeReply) -> bool:
    return reply.cached


def _is_miss(reply: ProbeReply) -> bool:
    return reply.source == Source.REALTIME_STUDENT
