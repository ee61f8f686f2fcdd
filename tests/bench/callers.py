"""Callers of a server: GETs over kept-open connections at a given rate, each answer checked, a lost connection tried once more.

In: a URL, what a hit must answer by release, rates. Out: one Outcome per request, in the order in which they ended. A request whose
connection is lost is sent again at once over a new one, as any proxy before several servers does. Knows nothing of what is done to the
server meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import quote_plus

Answers = Mapping[str, Mapping[str, Any]]  # release -> query -> answer
Result = Literal[
    "right", "wrong", "student", "withheld", "fallback", "refused", "failed"
]  # withheld: the student answered, a guardrail refused
TRIES = 2
_LONGEST_S = 20.0  # without an answer: failed


class Outcome(NamedTuple):
    """One request. `at`: when it ended, as time.monotonic; `seconds` since it was first sent; `lost`: connections lost on its way."""

    at: float
    hit: bool
    result: Result
    seconds: float
    lost: int
    detail: str  # what was wrong, or the reason of a fallback


class Callers:
    """Use as a context manager. `outcomes` grows while it runs. `rates`: hits and misses per second."""

    def __init__(self, port: int, key: str, answers: Answers, rates: tuple[float, float], connections: int = 8) -> None:
        self.outcomes: list[Outcome] = []
        self._port, self._key, self._answers, self._connections = port, key, answers, connections
        self._hits, self._misses = rates
        self._known = sorted(set.intersection(*(set(found) for found in answers.values())))
        self._held = set().union(*answers.values())
        self._words = sorted({word for query in self._known for word in query.split()})
        self._end = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="callers")

    def __enter__(self) -> Callers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self._connections):
                group.create_task(self._call(random.Random(number)))

    async def _call(self, rng: random.Random) -> None:
        connection = _Connection(self._port, self._key)
        rate = (self._hits + self._misses) / self._connections
        while not self._end.is_set():
            await asyncio.sleep(rng.expovariate(rate))
            hit = rng.random() < self._hits / (self._hits + self._misses)
            query = rng.choice(self._known) if hit else self._rare(rng)
            self.outcomes.append(await self._ask(connection, hit, query))
        connection.close()

    def _rare(self, rng: random.Random) -> str:
        """Words of the log that nobody has typed together."""
        while (query := " ".join(rng.sample(self._words, 4))) in self._held:
            pass
        return query

    async def _ask(self, connection: _Connection, hit: bool, query: str) -> Outcome:
        began, lost = time.monotonic(), 0
        while True:
            try:
                async with asyncio.timeout(_LONGEST_S):
                    status, retry_after, body = await connection.get(f"/v1/answer?query={quote_plus(query)}")
            except TimeoutError:
                connection.close()
                result: tuple[Result, str] = ("failed", "no answer in time")
                break
            except (OSError, asyncio.IncompleteReadError) as error:
                connection.close()
                lost += 1
                if lost == TRIES:
                    result = ("failed", type(error).__name__)
                    break
            else:
                result = self._judge(hit, query, status, retry_after, body)
                break
        now = time.monotonic()
        return Outcome(now, hit, result[0], now - began, lost, result[1])

    def _judge(self, hit: bool, query: str, status: int, retry_after: bool, body: bytes) -> tuple[Result, str]:
        if status in (429, 503) and retry_after:
            return "refused", str(status)
        if status != 200:
            return "wrong", f"status {status}"
        answer = json.loads(body)
        if not hit:
            if answer["reason"] == "withheld":
                return "withheld", ""
            return ("fallback", answer["reason"]) if answer["degraded"] else ("student", answer["source"])
        expected = self._answers.get(answer["release"], {}).get(query)
        right = answer["cached"] and answer["normalised"] == query and answer["answer"] == expected
        return ("right", "") if right else ("wrong", f"{answer['source']}, release {answer['release']}, {answer['reason']}")


class _Connection:
    """One kept-open connection; opened again after it was closed."""

    def __init__(self, port: int, key: str) -> None:
        self._port, self._headers = port, f"Host: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, path: str) -> tuple[int, bool, bytes]:
        """Status, whether Retry-After is there, body."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(f"GET {path} HTTP/1.1\r\n{self._headers}".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        fields = dict(line.split(": ", 1) for line in head[1:] if ": " in line)
        body = await reader.readexactly(int(fields["content-length"]))
        if fields.get("connection") == "close":
            self.close()
        return int(head[0].split(" ")[1]), "retry-after" in fields, body

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def share(outcomes: Sequence[Outcome], *results: Result) -> float:
    """Share of these results; 1 when there are no outcomes."""
    return sum(outcome.result in results for outcome in outcomes) / len(outcomes) if outcomes else 1.0


def percentile_ms(outcomes: Sequence[Outcome], rank: float) -> float:
    """Milliseconds; NaN when there are no outcomes."""
    ranked = sorted(outcome.seconds for outcome in outcomes)
    return 1000 * ranked[min(len(ranked) - 1, int(rank * len(ranked)))] if ranked else float("nan")
