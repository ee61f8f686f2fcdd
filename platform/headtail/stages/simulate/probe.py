"""How long the parts of a running server work, measured from outside with few requests.

In: its URL, queries that its snapshot answers and queries that nothing answers yet. Out: ServiceTimes. Hits, then misses, one at a time
after rests of several lengths, give the times of a request alone, and its metrics the processor time of the fronts; misses that are kept in
flight together give what each further row of a batch costs. The server should have nothing else to do meanwhile. HTTP is spoken over plain
connections: a client library's own time would be part of each figure.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote_plus, urlsplit

import httpx
import numpy as np
import numpy.typing as npt

from headtail.adapters.server_key import key_headers
from headtail.core.errors import InputError
from headtail.core.intervals import Array
from headtail.core.rows import Source
from headtail.stages.simulate.design import ServiceTimes

TOGETHER, CROWD = 16, 480  # misses in flight, and misses in all, that show what a further row costs
RESTS_MS = (0, 2, 5, 20)  # between a reply and the next request: caches and cores of a part that has rested are colder
CONNECTIONS = 8
COUNTED_S = 1.2  # a front process counts its processor time once a second
METRICS_FIX = "name the server's /metrics; its admin_host says from where they can be reached"
FRONT_METRIC = "headtail_front_cpu_seconds_total"


class ProbeReply(NamedTuple):
    """One answer. `sent`: by time.perf_counter; `seconds` from there to its last byte."""

    sent: float
    seconds: float
    cached: bool
    source: str
    reason: str


class ProbeExchange(NamedTuple):
    """One request and what came back. `status` 0: the connection was lost."""

    sent: float
    seconds: float
    status: int
    retry_after: bool
    body: bytes


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
        return probe_reply(await self.exchange(query))

    async def exchange(self, query: str) -> ProbeExchange:
        """Send one query and take what comes. OSError or IncompleteReadError when the connection is lost."""
        reader, writer = self._streams or await self.open()
        request = f"GET /v1/answer?query={quote_plus(query)} HTTP/1.1\r\n{self._head}".encode()
        sent = time.perf_counter()
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        body = await reader.readexactly(length)
        return ProbeExchange(sent, time.perf_counter() - sent, int(head.split(b" ", 2)[1]), b"\r\nretry-after:" in head, body)

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


def probe_reply(exchange: ProbeExchange) -> ProbeReply:
    """The answer in it. InputError when there is none."""
    if exchange.status != 200:
        raise InputError("the server refused a query", where="times_url", value=exchange.body[:200].decode(errors="replace"))
    answer = json.loads(exchange.body)
    return ProbeReply(exchange.sent, exchange.seconds, answer["cached"], answer["source"], answer["reason"])


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


class AloneTimes(NamedTuple):
    """Requests that were asked one at a time. `seconds` of each, `rest`: place in RESTS_MS; `front_s`: processor time of the fronts, per
    request."""

    seconds: Array
    rest: npt.NDArray[np.int64]
    front_s: float

    def medians(self) -> Array:
        """Seconds after each rest."""
        return np.array([np.median(self.seconds[self.rest == place]) for place in range(len(RESTS_MS))])


async def ask_alone(
    url: str, metrics_url: str, queries: Sequence[str], wanted: Callable[[ProbeReply], bool], seed: int
) -> AloneTimes | None:
    """Every query once, each after one of RESTS_MS. The times of those whose reply is `wanted`; None when these are too few.

    One connection after the other, so that the front process of each rests as long as the caller. The first query of each is not counted.
    """
    rng, began, found = random.Random(seed), await front_seconds(metrics_url), []
    for first in range(CONNECTIONS):
        connection = ProbeConnection(url)
        try:
            await connection.ask(queries[first])
            for query in queries[first + CONNECTIONS :: CONNECTIONS]:
                rest = rng.randrange(len(RESTS_MS))
                if RESTS_MS[rest]:
                    await asyncio.sleep(RESTS_MS[rest] / 1000)
                reply = await connection.ask(query)
                if wanted(reply):
                    found.append((reply.seconds, rest))
        finally:
            connection.close()
    seconds, rests = np.array([one for one, _ in found]), np.array([rest for _, rest in found], np.int64)
    front_s = (await front_seconds(metrics_url) - began) / len(queries)
    return AloneTimes(seconds, rests, front_s) if len(set(rests)) == len(RESTS_MS) else None


def metrics_of(url: str) -> str:
    """The metrics of the server that has its pages where `serve` has them unless told otherwise: on the next port."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{parts.scheme}://{(parts.netloc.rpartition(':')[0] if parts.port else parts.netloc)}:{port + 1}/metrics"


async def front_seconds(metrics_url: str) -> float:
    """Processor time of all front processes, once their last request is in it. InputError when the server does not say it."""
    await asyncio.sleep(COUNTED_S)
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
            body = (await client.get(metrics_url, headers=key_headers(metrics_url))).text
    except httpx.HTTPError as error:
        raise InputError(f"no metrics: {error}", where="metrics_url", value=metrics_url, fix=METRICS_FIX) from error
    if (found := re.search(rf"^{FRONT_METRIC} (\S+)$", body, re.MULTILINE)) is None:
        raise InputError(f"the metrics have no {FRONT_METRIC}", where="metrics_url", value=metrics_url, fix=METRICS_FIX)
    return float(found[1])


async def measure_times(url: str, metrics_url: str, hits: Sequence[str], misses: Sequence[str], seed: int) -> ServiceTimes:
    """The times of a running server. `misses`: CROWD more than are asked alone. Without a student the defaults of its parts stay.
    InputError when no query of `hits` is one."""
    crowd, alone = misses[:CROWD], misses[CROWD:]
    await ask_in_turn(url, hits[:50], CONNECTIONS)  # warm
    hit = await ask_alone(url, metrics_url, hits, _is_hit, seed)
    if hit is None:
        raise InputError(
            "the server answers nothing from its cache", where="times_url", value=url, fix="measure one that serves `snapshot`"
        )
    miss = await ask_alone(url, metrics_url, alone, _is_miss, seed)
    if miss is None:
        return service_times(hit, None, 0.0)
    began = time.perf_counter()
    await ask_in_turn(url, crowd, TOGETHER)
    return service_times(hit, miss, (time.perf_counter() - began) / len(crowd))


def service_times(hit: AloneTimes, miss: AloneTimes | None, together_s: float) -> ServiceTimes:
    """How long each part works. `together_s`: per miss while TOGETHER are in flight.

    Fronts work as long as their processor time says: for a hit, and for what a miss takes more, after a rest while the student works.
    What is left of a hit is on the way, as long after any rest; what is left of a miss is the student's.
    """
    hits = hit.medians()
    wire = max(0.0, float(hits.mean()) - hit.front_s)
    front = np.maximum(hits - wire, 1e-6)
    found: dict[str, Any] = {
        "wire_ms": tuple((1000 * np.maximum(hit.seconds - front[hit.rest], 0.0)).tolist()),
        "front_ms": (1000 * float(front[-1]),),
        "rest_ms": RESTS_MS,
        "front_rest": tuple((front / front[-1]).tolist()),
    }
    if miss is None:
        return ServiceTimes(**found, student_rest=(1.0,) * len(RESTS_MS))
    further = np.maximum(miss.medians() - hits, 1e-6)
    reply = min(max(0.0, miss.front_s - hit.front_s), float(further.min()))
    paces = np.interp(1000 * (further - reply), RESTS_MS, front / front[-1])
    replies = reply / paces.mean() * paces
    student = np.maximum(further - replies, 1e-6)
    rested = np.asarray(RESTS_MS) + 1000 * (hits + replies)  # a student rests while the front works, too
    at_rests = np.interp(RESTS_MS, rested, student)
    each = np.maximum(miss.seconds - (hits + replies)[miss.rest], 1e-6) / student[miss.rest] * at_rests[-1]
    return ServiceTimes(
        **found,
        miss_ms=(1000 * reply / float(paces.mean()),),
        student_ms=tuple((1000 * each).tolist()),
        student_rest=tuple((at_rests / at_rests[-1]).tolist()),
        row_share=row_share(together_s, float(at_rests[0]), TOGETHER),
    )


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
