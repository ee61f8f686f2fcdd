"""The front's side of the link to the students: kept-open connections that the students open, misses multiplexed over them.

In: misses. Out: what a student made of each, or MissFailed at once when none is connected. Misses that come in one turn of the loop go
in one frame. A miss whose student dies is sent once more when another replica of it is there. Knows nothing of HTTP or Ray.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from headtail.stages.serve.answerer import ANY_RELEASE, ESCALATION, Miss, MissFailed, OpenRelease, RealtimeReply
from headtail.stages.serve.frames import Answers, AskMisses, AskRow, BadFrame, Cancel, FrameBuffer, Hello, encode_frame
from headtail.stages.serve.front.counters import Counters

log = logging.getLogger("headtail.serve")
PER_TURN = 4  # answers of a student that go on in one turn of the loop: each takes the process some tenths of a millisecond
HELLO_S = 5.0  # seconds that a connection may take to say who it is
SILENT_S = 10.0  # seconds after which a connection over TCP that says nothing is taken for dead; a student reports every 2 s


class StudentLink:
    """All models that are connected to this process: students, and those of the escalation tier. `ask` is what StudentTier takes,
    `ask_bigger` what EscalationTier takes."""

    def __init__(self, timeout_s: float, counters: Counters | None = None, token: str = "") -> None:
        self._timeout_s, self._counters, self.token = timeout_s, counters, token
        self._ids = itertools.count(1)
        self.connections: list[Connection] = []  # students
        self.bigger: list[Connection] = []
        self.changed = asyncio.Event()  # set whenever a student comes or goes
        self._servers: list[asyncio.Server] = []

    async def listen(self, path: Path | None = None, host: str = "", port: int = 0) -> None:
        """Take connections at a Unix socket, and over TCP where `host` is given."""
        loop = asyncio.get_running_loop()
        if path is not None:
            path.unlink(missing_ok=True)  # of a process that was killed
            self._servers.append(await loop.create_unix_server(lambda: Connection(self, trusted=True), str(path)))
            os.chmod(path, 0o600)
        if host:
            self._servers.append(await loop.create_server(lambda: Connection(self, trusted=False), host, port))

    async def close(self) -> None:
        """Take no more connections, and end those that are open."""
        for server in self._servers:
            server.close()
        for connection in [*self.connections, *self.bigger]:
            connection.abort()
        await asyncio.sleep(0)

    async def ask(self, miss: Miss) -> RealtimeReply:
        """The reply of the least busy student for this miss. MissFailed: unavailable, no_student, outdated, overloaded, error."""
        end = miss.started + self._timeout_s
        return await self._ask(miss, end, self._choose)

    async def ask_bigger(self, miss: Miss, seconds: float) -> RealtimeReply:
        """The bigger model's reply, within `seconds`. MissFailed: unavailable, outdated, overloaded, error."""
        return await self._ask(miss, time.perf_counter() + seconds, self._choose_bigger)

    async def _ask(self, miss: Miss, end: float, choose: Callable[[OpenRelease], Connection]) -> RealtimeReply:
        for last in (False, True):
            connection = choose(miss.served)
            try:
                return await connection.ask(next(self._ids), miss, end - time.perf_counter())
            except _Lost:
                if last:
                    raise MissFailed("unavailable") from None
        raise AssertionError

    def has(self, served: OpenRelease) -> bool:
        """Whether a student of this very release is connected."""
        return any(c.fits(served) for c in self.connections)

    def model(self, served: OpenRelease) -> str:
        """Name of the model that answers misses of this release; empty when none is connected."""
        return next((c.model for c in self.connections if c.fits(served)), "")

    def bigger_model(self, served: OpenRelease) -> str:
        """Name of the model that answers what the student of this release is unsure of; empty when none is connected."""
        return next((c.model for c in self.bigger if c.task == served.task.fingerprint), "")

    def _choose(self, served: OpenRelease) -> Connection:
        release, task = served.release, served.task.fingerprint
        able = [c for c in self.connections if c.fits(served)]
        if not able:
            if not release.student:
                raise MissFailed("no_student")
            able = [c for c in self.connections if c.task == task and served.borrows]  # another release's, of the same task
        if not able:
            raise MissFailed("outdated" if self.connections and served.borrows else "unavailable")
        return _least_busy(able)

    def _choose_bigger(self, served: OpenRelease) -> Connection:
        able = [c for c in self.bigger if c.task == served.task.fingerprint]
        if not able:
            raise MissFailed("outdated" if self.bigger else "unavailable")
        return _least_busy(able)

    def note(self, moved: bool = False) -> None:
        """A model reported; `moved`: it came or went."""
        if moved:
            self.changed.set()
        if self._counters is not None:
            self._counters.set("students", len(self.connections))
            self._counters.set("bigger_models", len(self.bigger))
            self._counters.set("student_queue", sum(c.queue for c in self.connections))

    def count(self, rows: int) -> None:
        """A frame with so many misses was sent to a student."""
        if self._counters is not None:
            self._counters.add("student_frames")
            self._counters.add("student_misses", rows)

    def count_tokens(self, reply: RealtimeReply, bigger: bool) -> None:
        """A student, or the bigger model, answered."""
        if self._counters is not None:
            self._counters.add("escalation_tokens_in" if bigger else "tokens_in", reply.tokens_in)
            self._counters.add("escalation_tokens_out" if bigger else "tokens_out", reply.tokens_out)


def _least_busy(able: Sequence[Connection]) -> Connection:
    free = [c for c in able if not c.full]
    if not free:
        raise MissFailed("overloaded")
    return min(free, key=lambda c: len(c.pending))


class _Lost(Exception):
    """The connection ended before the answer came."""


class Connection(asyncio.Protocol):
    """One student or bigger model. `pending`: misses that it works on for this process; `queue`: for all processes, as it reports."""

    def __init__(self, link: StudentLink, trusted: bool) -> None:
        self._link, self._trusted, self._frames = link, trusted, FrameBuffer()
        self.student = self.task = self.model = ""
        self.pending: dict[int, asyncio.Future[RealtimeReply]] = {}
        self._answered: deque[tuple[asyncio.Future[RealtimeReply], RealtimeReply | None, str]] = deque()
        self.queue, self.full = 0, False
        self._rows: list[AskRow] = []
        self._cancelled: list[int] = []
        self._known = self._flushing = False
        self._heard = time.monotonic()

    def fits(self, served: OpenRelease) -> bool:
        """Whether it stands for the student of this release, under its task."""
        return self.student in (served.release.student, ANY_RELEASE) and self.task == served.task.fingerprint

    @property
    def bigger(self) -> bool:
        """Whether it is a model of the escalation tier."""
        return self.student == ESCALATION

    async def ask(self, number: int, miss: Miss, seconds: float) -> RealtimeReply:
        """The reply to a miss. A cancelled call tells the student."""
        mine: asyncio.Future[RealtimeReply] = self._loop.create_future()
        self.pending[number] = mine
        self._rows.append(AskRow(number, miss.clean, {name: list(values) for name, values in miss.side_inputs.items()}, max(0.0, seconds)))
        self._flush_soon()
        try:
            return await mine
        finally:
            if self.pending.pop(number, None) is not None and not self._transport.is_closing():
                self._cancelled.append(number)
                self._flush_soon()

    def abort(self) -> None:
        """End it; whoever waits is told."""
        self._transport.abort()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._cancelled:
            gone = set(self._cancelled)
            self._rows = [row for row in self._rows if row.id not in gone]  # never sent
            self._transport.write(encode_frame(Cancel(self._cancelled)))
            self._cancelled = []
        if self._rows:
            if not self.bigger:
                self._link.count(len(self._rows))
            self._transport.write(encode_frame(AskMisses(self._rows)))
            self._rows = []

    # ---- of asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = cast(asyncio.Transport, transport)
        self._loop.call_later(HELLO_S, self._expect_hello)

    def data_received(self, data: bytes) -> None:
        self._heard = time.monotonic()
        try:
            for message in self._frames.feed(data):
                if isinstance(message, Answers) and self._known:
                    self._take(message)
                elif isinstance(message, Hello) and not self._known:
                    self._greet(message)
                else:
                    raise BadFrame(f"{type(message).__name__} was not expected")
        except BadFrame as error:
            log.warning("a connection to the students' link was closed: %s", error)
            self.abort()

    def pause_writing(self) -> None:  # it does not read: what waits in our memory is bounded
        self.full = True

    def resume_writing(self) -> None:
        self.full = False

    def connection_lost(self, error: Exception | None) -> None:
        for held in (self._link.connections, self._link.bigger):
            if self in held:
                held.remove(self)
        pending, self.pending = self.pending, {}
        for mine in pending.values():
            if not mine.done():
                mine.set_exception(_Lost())
        self._link.note(moved=True)

    def _greet(self, hello: Hello) -> None:
        if not self._trusted and not hmac.compare_digest(hello.token.encode(), self._link.token.encode()):
            raise BadFrame("the token is wrong")
        self.student, self.task, self.model, self._known = hello.student, hello.task, hello.model, True
        (self._link.bigger if self.bigger else self._link.connections).append(self)
        self._link.note(moved=True)
        if not self._trusted:
            self._loop.call_later(SILENT_S, self._expect_life)

    def _take(self, answers: Answers) -> None:
        going = bool(self._answered)
        self._answered += [(mine, reply, reason) for number, reply, reason in answers.rows if (mine := self.pending.pop(number, None))]
        if not going:
            self._pass_on()
        self.queue = answers.queue
        self._link.note()

    def _pass_on(self) -> None:
        """Some answers go on in this turn of the loop, the others in the next ones: hits that came meanwhile are answered between."""
        for mine, reply, reason in [self._answered.popleft() for _ in range(min(PER_TURN, len(self._answered)))]:
            if mine.done():
                continue
            if reply is not None:
                self._link.count_tokens(reply, self.bigger)
                mine.set_result(reply)
            else:
                mine.set_exception(MissFailed(reason))
        if self._answered:
            self._loop.call_soon(self._pass_on)

    def _expect_hello(self) -> None:
        if not self._known and not self._transport.is_closing():
            self.abort()

    def _expect_life(self) -> None:
        if self._transport.is_closing():
            return
        left = self._heard + SILENT_S - time.monotonic()
        if left <= 0:
            self.abort()
        else:
            self._loop.call_later(left, self._expect_life)
