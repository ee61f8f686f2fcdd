"""How one query is answered: the cache, else the realtime student, else the task's fallback.

In: a query, optional side inputs. Out: a Reply. A query that is well-formed always gets one: whatever happens to the
student (late, overloaded, dead, invalid output) ends in the fallback, marked degraded, with the reason.
Knows nothing of HTTP, Ray or vLLM: the student is a function argument.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from headtail.cache import Cache, CachedAnswer
from headtail.core.keys import normalise
from headtail.core.redact import redact
from headtail.core.rows import Source
from headtail.core.secrets import hide
from headtail.core.task import Task
from headtail.releases.release import Release

if TYPE_CHECKING:
    from headtail.stages.serve.stage import Config

log = logging.getLogger("headtail.serve")

# Why a reply is degraded, or what to know about one that is not.
REASONS = {
    "off": "the realtime student is switched off",
    "no_student": "this release has no student",
    "outdated": "this release has another task than the student that was deployed: deploy again",
    "previous_student": "answered by the student of an earlier release: deploy again (not degraded)",
    "timeout": "the student did not answer within realtime_timeout_ms",
    "overloaded": "too many requests wait for the student",
    "unavailable": "the student's process is not there",
    "truncated": "the student's answer was cut at max_tokens",
    "invalid": "the student's answer does not fit the task's schema",
    "error": "the student failed",
}


class RealtimeReply(NamedTuple):
    """What the student made of a query.

    `stands_for`: the release's student it was deployed as; `task_fingerprint`: the task it was asked under.
    """

    text: str
    finish_reason: str
    confidence: float | None
    answer_key: str
    stands_for: str
    task_fingerprint: str


AskStudent = Callable[[str, Mapping[str, Sequence[str]]], Awaitable[RealtimeReply]]


class RealtimeFailure(Exception):
    """The student gave no answer; `reason` is one of REASONS."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(REASONS[reason])


class BadQuery(Exception):
    """The query cannot be taken: which field, what is wrong, what to do."""

    def __init__(self, field: str, what: str, fix: str) -> None:
        self.field, self.what, self.fix = field, what, fix
        super().__init__(what)


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

    @property
    def path(self) -> str:
        """The way it took: cache, realtime or fallback."""
        return "cache" if self.cached else "fallback" if self.source == Source.FALLBACK else "realtime"


@dataclass(frozen=True)
class OpenRelease:
    """A release that is open: swapped as a whole, so that no request sees parts of two."""

    release: Release
    cache: Cache
    task: Task
    since: str


class Answerer:
    """Answers queries under one release at a time. `served` may be swapped between any two awaits."""

    def __init__(self, served: OpenRelease, config: Config, realtime: AskStudent | None) -> None:
        self.served, self._config, self._realtime = served, config, realtime
        self.in_flight = 0
        self.last_failure = ""

    async def answer(self, query: str, side_inputs: Mapping[str, Sequence[str]] | None = None) -> Reply:
        """The reply to one query. BadQuery when it cannot be taken."""
        started = time.perf_counter()
        served = self.served
        normalised = self._check(query, side_inputs or {}, served.task)
        clean = redact(normalised).text  # as ingest does: keys are of redacted text, and no model sees personal data
        found = served.cache.get(clean)
        if found is not None:
            return _cached(query, found, served, started)
        try:
            realtime = await self._ask(clean, side_inputs or {}, served)
        except RealtimeFailure as failure:
            self.last_failure = failure.reason
            return _fallback(query, clean, served, failure.reason, started)
        answer, problem = served.task.parse(realtime.text)
        if realtime.finish_reason == "length" or problem:
            self.last_failure = "truncated" if realtime.finish_reason == "length" else "invalid"
            return _fallback(query, clean, served, self.last_failure, started)
        note = "" if realtime.stands_for == served.release.student else "previous_student"
        return Reply(
            query, clean, answer, Source.REALTIME_STUDENT, False, False, realtime.confidence, realtime.answer_key or None,
            served.release.id, served.release.snapshot, _ms(started), note,
        )  # fmt: skip

    def _check(self, query: str, side_inputs: Mapping[str, Sequence[str]], task: Task) -> str:
        """The normalised query, within bounds."""
        limit = self._config.max_query_chars
        if len(query) > 4 * limit:  # far too long: refused before any work is done on it
            raise BadQuery("query", f"the query has {len(query)} characters, at most {limit} are taken", "shorten it")
        if any("\ud800" <= character <= "\udfff" for character in query):
            raise BadQuery("query", "the query holds half a surrogate pair, which is no character", "send valid Unicode")
        normalised = normalise(query)
        if not normalised:
            raise BadQuery("query", "the query is empty", "send at least one visible character")
        if len(normalised) > limit:
            raise BadQuery(
                "query", f"the query has {len(normalised)} characters after normalisation, at most {limit} are taken", "shorten it"
            )
        unknown = sorted(side_inputs.keys() - set(task.side_inputs))
        if unknown:
            known = ", ".join(task.side_inputs) or "none"
            raise BadQuery("side_inputs", f"unknown side input {unknown[0][:40]!r}", f"side inputs of {task.name}: {known}")
        return normalised

    async def _ask(self, query: str, side_inputs: Mapping[str, Sequence[str]], served: OpenRelease) -> RealtimeReply:
        """The student's reply within the time limit, else RealtimeFailure."""
        if self._realtime is None:
            raise RealtimeFailure("off" if served.release.student else "no_student")
        if self.in_flight >= self._config.max_realtime:  # so that waiting for the student never takes the places of cache hits
            raise RealtimeFailure("overloaded")
        self.in_flight += 1
        try:
            async with asyncio.timeout(self._config.realtime_timeout_ms / 1000):
                reply = await self._realtime(query, side_inputs)
        except RealtimeFailure:
            raise
        except TimeoutError:
            raise RealtimeFailure("timeout") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # the caller went away
            raise RealtimeFailure("unavailable") from None  # the student's side was cancelled
        except Exception as error:
            log.warning("realtime student failed: %s: %s", type(error).__name__, hide(str(error))[:300])
            raise RealtimeFailure("error") from error
        finally:
            self.in_flight -= 1
        if reply.task_fingerprint != served.task.fingerprint:
            raise RealtimeFailure("outdated")
        return reply


def _cached(query: str, cached: CachedAnswer, served: OpenRelease, started: float) -> Reply:
    confidence = None if cached.confidence is None else round(cached.confidence, 4)
    return Reply(
        query, cached.query, cached.decoded(), cached.source, True, False, confidence, cached.answer_key.hex(),
        served.release.id, served.release.snapshot, _ms(started), "",
    )  # fmt: skip


def _fallback(query: str, normalised: str, served: OpenRelease, reason: str, started: float) -> Reply:
    return Reply(
        query, normalised, served.task.fallback(normalised), Source.FALLBACK, False, True, None, None,
        served.release.id, served.release.snapshot, _ms(started), reason,
    )  # fmt: skip


def _ms(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 3)
