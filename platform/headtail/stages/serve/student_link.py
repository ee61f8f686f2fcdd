"""The student's side of the link: a kept-open connection to each front process, and the misses that come over it.

In: addresses of the fronts, a function that answers one query. Out: answers, as many in a frame as are ready together, each within
the time that its front still waits. A front that is away is tried again for as long as this replica lives.
Knows nothing of engines or Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from headtail.core.secrets import hide
from headtail.stages.serve.answerer import RealtimeReply
from headtail.stages.serve.frames import AnswerRow, Answers, AskMisses, AskRow, BadFrame, Cancel, FrameBuffer, Hello, encode_frame

log = logging.getLogger("headtail.serve")
RETRY_S = (0.02, 0.5)  # seconds before the first and the later attempts to reach a front
REPORT_S = 2.0  # seconds between reports of the queue's length

AnswerQuery = Callable[[str, Mapping[str, Sequence[str]]], Awaitable[RealtimeReply]]


class FrontAddress(NamedTuple):
    """Where a front listens for students: a Unix socket on its own node; host and port for students elsewhere, when there is one."""

    socket: str
    host: str = ""
    port: int = 0


class FrontLinks:
    """Connections of one replica to all fronts. `start` and `close` belong to one event loop."""

    def __init__(self, fronts: Sequence[FrontAddress], hello: Hello, answer: AnswerQuery) -> None:
        self._fronts, self.hello, self.answer = tuple(fronts), hello, answer
        self.queue = 0
        self._open: set[_FrontConnection] = set()
        self._last = time.monotonic()
        self._loops: list[asyncio.Task[None]] = []

    @property
    def fronts(self) -> int:
        """Fronts that there are."""
        return len(self._fronts)

    @property
    def connected(self) -> int:
        """Fronts that are reached now."""
        return len(self._open)

    def start(self) -> None:
        """Connect to every front, and again whenever one comes back."""
        self._loops = [asyncio.create_task(self._keep(front)) for front in self._fronts]

    async def close(self) -> None:
        """End all connections."""
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)

    def check(self, away_s: float) -> None:
        """ConnectionError when no front was reached for `away_s` seconds, or a loop has ended."""
        ended = [task for task in self._loops if task.done()]
        if ended or (not self._open and time.monotonic() - self._last > away_s):
            raise ConnectionError(f"no front process was reached for {away_s:.0f} s")

    async def _keep(self, front: FrontAddress) -> None:
        loop, pause = asyncio.get_running_loop(), RETRY_S[0]
        while True:
            try:
                connection = _FrontConnection(self)
                if front.socket and Path(front.socket).parent.is_dir():  # on this node
                    await loop.create_unix_connection(lambda made=connection: made, front.socket)  # type: ignore[misc]
                else:
                    await loop.create_connection(lambda made=connection: made, front.host, front.port)  # type: ignore[misc]
            except OSError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_S[1])
                continue
            self._open.add(connection)
            reports = asyncio.create_task(connection.report())
            try:
                await connection.ended
                pause = RETRY_S[0]
            finally:
                reports.cancel()
                self._open.discard(connection)
                self._last = time.monotonic()
                connection.abort()
            await asyncio.sleep(pause)


class _FrontConnection(asyncio.Protocol):
    """One front: its misses as tasks, their answers gathered into frames."""

    def __init__(self, links: FrontLinks) -> None:
        self._links, self._frames = links, FrameBuffer()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ready: list[AnswerRow] = []
        self._flushing = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def report(self) -> None:
        """Say every few seconds that this replica lives, and how long its queue is."""
        while True:
            await asyncio.sleep(REPORT_S)
            self._transport.write(encode_frame(Answers([], self._links.queue)))

    def abort(self) -> None:
        self._transport.abort()

    async def _answer(self, row: AskRow) -> None:
        links = self._links
        links.queue += 1
        reply, reason = None, "error"
        try:
            async with asyncio.timeout(row.seconds):
                reply = await links.answer(row.query, row.side_inputs)
        except TimeoutError:
            reason = "timeout"
        except Exception as error:
            log.warning("the student failed: %s: %s", type(error).__name__, hide(str(error))[:300])
        finally:
            links.queue -= 1
            self._tasks.pop(row.id, None)
        self._ready.append(AnswerRow(row.id, reply, "" if reply is not None else reason))
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        rows, self._ready = self._ready, []
        if rows and not self._transport.is_closing():
            self._transport.write(encode_frame(Answers(rows, self._links.queue)))

    # ---- of asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(encode_frame(self._links.hello))

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._frames.feed(data):
                if isinstance(message, AskMisses):
                    for row in message.rows:
                        self._tasks[row.id] = asyncio.create_task(self._answer(row))
                elif isinstance(message, Cancel):
                    for number in message.ids:
                        if task := self._tasks.pop(number, None):
                            task.cancel()
        except BadFrame as error:
            log.warning("a front sent what is no frame: %s", error)
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        for task in list(self._tasks.values()):
            task.cancel()  # nobody waits for it
        self._tasks.clear()
        with contextlib.suppress(asyncio.InvalidStateError):
            self.ended.set_result(None)
