"""How one query is answered: people's overrides and the snapshot, then each tier in order, else the task's fallback.

In: a query, optional side inputs. Out: a Reply. A query that is well-formed always gets one: whatever happens in a tier (late,
overloaded, dead, invalid output) ends in the next tier or in the fallback, marked degraded, with the reason. `look_up` never waits; only a
Miss does. Tiers are in files of their own; `front/tiers.py` lists them. Knows nothing of HTTP, Ray or vLLM.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from headtail.cache import Cache, StoredAnswer
from headtail.core.guardrails import AnswerGuard
from headtail.core.keys import query_key
from headtail.core.query import InvalidQuery, check_query
from headtail.core.redact import has_placeholder
from headtail.core.rows import Source
from headtail.core.secrets import hide
from headtail.core.task import Task
from headtail.releases.overrides import Overrides
from headtail.releases.release import Release
from headtail.stages.serve.errors import RequestError
from headtail.stages.serve.places import MissCall, MissPlace, MissPlaces

if TYPE_CHECKING:
    from headtail.stages.serve.config import Config

log = logging.getLogger("headtail.serve")

# Why a reply is degraded, or what to know about one that is not.
REASONS = {
    "off": "the realtime student is switched off",
    "no_student": "this release has no student",
    "outdated": "the student that runs has another task than this release",
    "unsure": "the student's confidence is below the release's threshold, and no bigger model answered (not degraded)",
    "previous_student": "answered by the student of an earlier release, while this release's is not there (not degraded)",
    "timeout": "the student did not answer within realtime_timeout_ms",
    "overloaded": "too many requests wait for the student",
    "unavailable": "the student's process is not there",
    "truncated": "the student's answer was cut at max_tokens",
    "invalid": "the student's answer does not fit the task's schema",
    "withheld": "the answer did not pass the output checks",
    "redacted": "the query had personal data, which may decide the answer and which no model sees (task.yaml: redacted: uncached)",
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
        """The way it took: cache, realtime, escalated or fallback."""
        return "cache" if self.cached else _PATHS.get(self.source, "realtime")


_PATHS = {str(Source.FALLBACK): "fallback", str(Source.ESCALATED): "escalated"}
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
        """What people or the snapshot answer to a clean text. ReleaseFailed when the snapshot cannot be read."""
        try:
            stored = self.cache.find_stored(clean)
            if not self.overrides:
                return stored
            return self.overrides.resolve(query_key(clean), stored, self.task.file.redacted == "cached")
        except Exception as error:
            raise ReleaseFailed(clean, self.release.id) from error


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


class ReleaseFailed(Exception):
    """A release that is open broke while it answered; the cause is what broke. The caller gets a 500.

    `clean`, `release`: the query and the id of the release, for the comparison of a canary.
    """

    def __init__(self, clean: str, release: str) -> None:
        self.clean, self.release = clean, release
        super().__init__(f"release {release} failed")


class Unsure(MissFailed):
    """A tier has an answer that is valid, and not sure enough: `reply` goes out when no later tier has another."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply._replace(reason="unsure")
        super().__init__("unsure")


class Tier(Protocol):
    """One place that may answer a miss, such as a student. The next one is asked after None, MissFailed or Unsure.

    It is cancelled when the caller leaves, and when `realtime_timeout_ms` is over unless it has limits of its own: of time, and of how
    many misses it takes at once.
    """

    own_limit: bool = False

    async def answer(self, miss: Miss, reason: str) -> Reply | None:
        """The reply to a miss. `reason`: why the tiers before have none, one of REASONS."""
        ...

    def keep(self, miss: Miss, reply: Reply) -> None:
        """Take note of what a later tier answered. Most tiers do nothing."""
        return


OutputCheck = Callable[[Miss, Reply], str]  # the reason why a reply is withheld, one of REASONS; empty: it may go out


class ReleaseSplit(Protocol):
    """Which of two releases answers a query, while a canary runs."""

    def choose(self, clean: str, champion: OpenRelease) -> OpenRelease: ...

    def count(self, clean: str, release: str, seconds: float, degraded: bool, failed: bool = False) -> None: ...


class Answerer:
    """Answers queries under one release at a time, two while a canary runs. `served` and `split` may be swapped between any two awaits."""

    def __init__(self, served: OpenRelease, config: Config, tiers: Sequence[Tier] = (), checks: Sequence[OutputCheck] = ()) -> None:
        self.served, self.tiers, self._config, self._checks = served, tuple(tiers), config, tuple(checks)
        self.split: ReleaseSplit | None = None
        self.places = MissPlaces(config.max_misses)
        self.in_flight = 0
        self.note_in_flight: Callable[[int], None] = lambda misses: None  # told of every change
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
            query, clean, found.plain_answer(), found.source, True, False, confidence, found.answer_key.hex(),
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
        """The reply of the first tier that has one, else the fallback. The fallback at once: too many wait, or redacted data decides."""
        if miss.served.task.file.redacted == "uncached" and has_placeholder(miss.clean):
            return self.degrade(miss, "redacted")
        place = self.places.take(miss.served.release.id)
        if place is None:
            return self.degrade(miss, "overloaded")
        self._fly(1)
        try:
            return await self._ask(miss, place)
        except Exception as error:  # not even its fallback
            raise ReleaseFailed(miss.clean, miss.served.release.id) from error
        finally:
            place.give()
            self._fly(-1)

    async def resolve_of_many(self, miss: Miss, call: MissCall, end: float) -> Reply:
        """The same for a miss of a call with many queries: it waits for its turn, and its clock starts when it has one. `end` of the
        call, by the loop's clock: a miss that had no turn by then is `overloaded`, one that is asked still is a `timeout`."""
        async with call.turn(miss.served.release.id, end) as mine:
            if not mine:
                return self.degrade(miss, "overloaded")
            miss = dataclasses.replace(miss, started=time.perf_counter())
            try:
                async with asyncio.timeout_at(end):
                    return await self.resolve(miss)
            except TimeoutError:
                return self.degrade(miss, "timeout")

    def _fly(self, by: int) -> None:
        self.in_flight += by
        self.note_in_flight(self.in_flight)

    async def _ask(self, miss: Miss, place: MissPlace) -> Reply:
        reason, unsure = "off" if miss.served.release.student else "no_student", None
        end = asyncio.get_running_loop().time() + self._config.realtime_timeout_ms / 1000
        for at, tier in enumerate(self.tiers):
            if tier.own_limit:
                place.give()  # the student has done its part
            outcome = await self._try(tier, miss, reason, end)
            if isinstance(outcome, Reply):
                return self._keep(miss, outcome, at)
            if outcome is not None:
                reason = outcome.reason
            if isinstance(outcome, Unsure):
                unsure = outcome.reply
        if unsure is None:
            return self.degrade(miss, reason)
        return self._keep(miss, unsure._replace(latency_ms=_ms(miss.started)), len(self.tiers))

    def _keep(self, miss: Miss, reply: Reply, at: int) -> Reply:
        for earlier in self.tiers[:at]:
            earlier.keep(miss, reply)
        return reply

    async def _try(self, tier: Tier, miss: Miss, reason: str, end: float) -> Reply | MissFailed | None:
        """What became of a miss in one tier; a reply that fails an output check is a failure. `end`: by the loop's clock."""
        try:
            async with asyncio.timeout_at(None if tier.own_limit else end):
                reply = await tier.answer(miss, reason)
        except Unsure as unsure:
            return self._check(miss, unsure.reply) or unsure
        except MissFailed as failure:
            return failure
        except TimeoutError:
            return MissFailed("timeout")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # the caller went away
            return MissFailed("unavailable")  # the other side was cancelled
        except Exception as error:
            log.warning("a tier failed: %s: %s", type(error).__name__, hide(str(error))[:300])
            return MissFailed("error")
        return reply if reply is None else self._check(miss, reply) or reply

    def _check(self, miss: Miss, reply: Reply) -> MissFailed | None:
        problem = next(filter(None, (check(miss, reply) for check in self._checks)), "")
        return MissFailed(problem) if problem else None

    def degrade(self, miss: Miss, reason: str) -> Reply:
        """The task's fallback. `reason`: one of REASONS."""
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


ANY_RELEASE = "*"  # what a model that the config names stands for: every release of its task
ESCALATION = "escalation"  # what the bigger model stands for


def read_answer(miss: Miss, realtime: RealtimeReply) -> Any:
    """The answer in a model's text, valid under the task's schema. MissFailed: outdated, truncated, invalid."""
    task = miss.served.task
    if realtime.task_fingerprint != task.fingerprint:
        raise MissFailed("outdated")
    answer, problem = task.parse(realtime.text)
    if realtime.finish_reason == "length":
        raise MissFailed("truncated")
    if problem:
        raise MissFailed("invalid")
    return answer


def model_reply(miss: Miss, realtime: RealtimeReply, answer: Any, source: str, confidence: float | None, note: str = "") -> Reply:
    """A model's answer as a Reply."""
    release = miss.served.release
    return Reply(
        miss.query, miss.clean, answer, source, False, False, confidence, realtime.answer_key or None,
        release.id, release.snapshot, _ms(miss.started), note, miss.request_id,
    )  # fmt: skip


def _refusal(field: str, what: str, fix: str) -> RequestError:
    return RequestError("invalid", what, field=field, fix=fix)


def _ms(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 3)
