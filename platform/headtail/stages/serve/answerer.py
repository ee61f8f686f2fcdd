"""How one query is answered: people's overrides and the snapshot, then each tier in order, else the task's fallback.

In: a query, optional side inputs. Out: a Reply. A query that is well-formed always gets one: whatever happens in a tier (late,
overloaded, dead, invalid output) ends in the fallback, marked degraded, with the reason. `look_up` never waits; only a Miss does.
Knows nothing of HTTP, Ray or vLLM.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from headtail.cache import Cache, StoredAnswer
from headtail.core.guardrails import AnswerGuard
from headtail.core.keys import query_key
from headtail.core.query import InvalidQuery, check_query
from headtail.core.rows import Source
from headtail.core.secrets import hide
from headtail.core.task import Task
from headtail.releases.overrides import Overrides
from headtail.releases.release import Release
from headtail.stages.serve.errors import RequestError

if TYPE_CHECKING:
    from headtail.stages.serve.config import Config

log = logging.getLogger("headtail.serve")

# Why a reply is degraded, or what to know about one that is not.
REASONS = {
    "off": "the realtime student is switched off",
    "no_student": "this release has no student",
    "outdated": "the student that runs has another task than this release",
    "previous_student": "answered by the student of an earlier release, while this release's is not there (not degraded)",
    "timeout": "the student did not answer within realtime_timeout_ms",
    "overloaded": "too many requests wait for the student",
    "unavailable": "the student's process is not there",
    "truncated": "the student's answer was cut at max_tokens",
    "invalid": "the student's answer does not fit the task's schema",
    "withheld": "the answer did not pass the output checks",
    "error": "the student failed",
}


class Reply(NamedTuple):
    """What goes back to the caller."""

    query: str
    normalised: str
    answer: Any
    source: str
    cached: bool
    degraded: bool
    confidence: float | None
    answer_key: str | None
    release: str
    snapshot: str
    latency_ms: float
    reason: str
    request_id: str = ""

    @property
    def path(self) -> str:
        """The way it took: cache, realtime or fallback."""
        return "cache" if self.cached else "fallback" if self.source == Source.FALLBACK else "realtime"


NO_OVERRIDES = Overrides()


@dataclass(frozen=True)
class OpenRelease:
    """A release that is open: swapped as a whole, so that no request sees parts of two.

    `borrows`: whether a student of another release may answer while its own is not there. Not after a rollback, which takes one back.
    `overrides`: what people decided, laid over the snapshot. `guard`: its guardrails for what students say; None: it has none.
    """

    release: Release
    cache: Cache
    task: Task
    since: str
    borrows: bool = True
    overrides: Overrides = NO_OVERRIDES
    guard: AnswerGuard | None = None

    def find(self, clean: str) -> StoredAnswer | None:
        """What people or the snapshot answer to a clean text."""
        stored = self.cache.stored(clean)
        return self.overrides.resolve(query_key(clean), stored) if self.overrides else stored


@dataclass(frozen=True, slots=True)
class Miss:
    """A query that neither an override nor the snapshot answers. It stays with `served` to its end, whatever is swapped meanwhile.

    `clean`: normalised and without personal data, what every tier sees. `started`: of time.perf_counter, in seconds.
    """

    query: str
    clean: str
    side_inputs: Mapping[str, Sequence[str]]
    served: OpenRelease
    request_id: str
    started: float


def guard_reply(miss: Miss, reply: Reply) -> str:
    """The output check of a release: "withheld" when its guardrails refuse the answer."""
    guard = miss.served.guard
    code = guard.reason(miss.clean, reply.answer) if guard is not None else ""
    if code:
        log.info("an answer of %s was withheld: %s", reply.source, code)
    return "withheld" if code else ""


class MissFailed(Exception):
    """A tier has no answer to a miss that it should have answered; `reason` is one of REASONS."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(REASONS[reason])


class Tier(Protocol):
    """One place that may answer a miss, such as a student. The next one is asked after None or MissFailed.

    It is cancelled when the caller leaves or `realtime_timeout_ms` is over.
    """

    async def answer(self, miss: Miss) -> Reply | None: ...


OutputCheck = Callable[[Miss, Reply], str]  # the reason why a reply is withheld, one of REASONS; empty: it may go out


class ReleaseSplit(Protocol):
    """Which of two releases answers a query, while a canary runs."""

    def choose(self, clean: str, champion: OpenRelease) -> OpenRelease: ...

    def count(self, clean: str, release: str, seconds: float, degraded: bool) -> None: ...


class Answerer:
    """Answers queries under one release at a time, two while a canary runs. `served` and `split` may be swapped between any two awaits."""

    def __init__(self, served: OpenRelease, config: Config, tiers: Sequence[Tier] = (), checks: Sequence[OutputCheck] = ()) -> None:
        self.served, self.tiers, self._config, self._checks = served, tuple(tiers), config, tuple(checks)
        self.split: ReleaseSplit | None = None
        self.in_flight = 0
        self.last_failure = ""

    async def answer(self, query: str, side_inputs: Mapping[str, Sequence[str]] | None = None, request_id: str = "") -> Reply:
        """The reply to one query. RequestError when it cannot be taken."""
        found = self.look_up(query, side_inputs or {}, request_id)
        return found if isinstance(found, Reply) else await self.resolve(found)

    def look_up(self, query: str, side_inputs: Mapping[str, Sequence[str]], request_id: str = "") -> Reply | Miss:
        """The reply of an override or of the snapshot, else the Miss for `resolve`. RequestError when the query cannot be taken."""
        started, served = time.perf_counter(), self.served
        clean = self.clean(query, side_inputs, served)
        if self.split is not None:
            served = self.split.choose(clean, served)
        found = served.find(clean)
        if found is None:
            return Miss(query, clean, side_inputs, served, request_id, started)
        confidence = None if found.confidence is None else round(found.confidence, 4)
        return Reply(
            query, clean, found.decoded(), found.source, True, False, confidence, found.answer_key.hex(),
            served.release.id, served.release.snapshot, _ms(started), "", request_id,
        )  # fmt: skip

    def clean(self, query: str, side_inputs: Mapping[str, Sequence[str]], served: OpenRelease) -> str:
        """The query as ingest would have it: normalised, without personal data."""
        try:
            clean = check_query(query, self._config.max_query_chars)
        except InvalidQuery as error:
            raise _refusal("query", error.what, error.fix) from None
        if side_inputs:
            unknown = sorted(side_inputs.keys() - set(served.task.side_inputs))
            if unknown:
                known = ", ".join(served.task.side_inputs) or "none"
                raise _refusal("side_inputs", f"unknown side input {unknown[0][:40]!r}", f"side inputs of {served.task.name}: {known}")
        return clean

    async def resolve(self, miss: Miss) -> Reply:
        """The reply of the first tier that has one, else the fallback. Too many at once: the fallback without any wait."""
        if self.in_flight >= self._config.max_misses:
            return self._degrade(miss, "overloaded")
        self.in_flight += 1
        try:
            async with asyncio.timeout(self._config.realtime_timeout_ms / 1000):
                reply = await self._ask(miss)
        except TimeoutError:
            reply = self._degrade(miss, "timeout")
        finally:
            self.in_flight -= 1
        return reply

    async def _ask(self, miss: Miss) -> Reply:
        reason = "off" if miss.served.release.student else "no_student"
        for tier in self.tiers:
            try:
                reply = await tier.answer(miss)
            except MissFailed as failure:
                reason = failure.reason
                continue
            except TimeoutError:
                raise
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise  # the caller went away, or the time is over
                reason = "unavailable"  # the other side was cancelled
                continue
            except Exception as error:
                log.warning("a tier failed: %s: %s", type(error).__name__, hide(str(error))[:300])
                reason = "error"
                continue
            if reply is None:
                continue
            problem = next(filter(None, (check(miss, reply) for check in self._checks)), "")
            if not problem:
                return reply
            reason = problem
        return self._degrade(miss, reason)

    def _degrade(self, miss: Miss, reason: str) -> Reply:
        self.last_failure, served = reason, miss.served
        return Reply(
            miss.query, miss.clean, served.task.fallback(miss.clean), Source.FALLBACK, False, True, None, None,
            served.release.id, served.release.snapshot, _ms(miss.started), reason, miss.request_id,
        )  # fmt: skip


class RealtimeReply(NamedTuple):
    """What a student made of a query.

    `stands_for`: the release's student it was deployed as; `task_fingerprint`: the task it was asked under.
    `started`: seconds since 1970 by the student's clock, when the engine was asked; `seconds`: until it had answered.
    """

    text: str
    finish_reason: str
    confidence: float | None
    answer_key: str
    stands_for: str
    task_fingerprint: str
    tokens_in: int = 0
    tokens_out: int = 0
    started: float = 0.0
    seconds: float = 0.0


class AskStudent(Protocol):
    """How a student is asked. MissFailed when it cannot answer."""

    async def __call__(self, miss: Miss) -> RealtimeReply: ...


class StudentTier:
    """The realtime student: its text is parsed and checked against the task's schema here, in the front."""

    def __init__(self, ask: AskStudent) -> None:
        self._ask = ask

    async def answer(self, miss: Miss) -> Reply:
        """The student's reply, or MissFailed."""
        realtime, served = await self._ask(miss), miss.served
        if realtime.task_fingerprint != served.task.fingerprint:
            raise MissFailed("outdated")
        answer, problem = served.task.parse(realtime.text)
        if realtime.finish_reason == "length":
            raise MissFailed("truncated")
        if problem:
            raise MissFailed("invalid")
        note = "" if realtime.stands_for in (served.release.student, ANY_RELEASE) else "previous_student"
        return Reply(
            miss.query, miss.clean, answer, Source.REALTIME_STUDENT, False, False, realtime.confidence, realtime.answer_key or None,
            served.release.id, served.release.snapshot, _ms(miss.started), note, miss.request_id,
        )  # fmt: skip


ANY_RELEASE = "*"  # what a model that the config names stands for: every release of its task


def _refusal(field: str, what: str, fix: str) -> RequestError:
    return RequestError("invalid", what, field=field, fix=fix)


def _ms(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 3)
