"""A canary: a new release answers a share of the queries, beside the current one, until it is proven worse, or a person decides.

In: releases, a share, counts of outcomes of both. Out: `releases/canary/<n>.json`, the whole state in its last entry: servers read it
and CURRENT, nothing else. `assign` says which release answers a query: always the same one for a query and a canary. Each query counts
once in the comparison, at its first request: which release it meets is a coin of its own, so that a few frequent queries cannot make
two equal releases look different. Knows nothing of servers; the mathematics is `core.sequential`.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from pydantic import Field

from headtail.adapters import append_log
from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, read_record
from headtail.cache.manifest import require_snapshot
from headtail.core.config import Config
from headtail.core.errors import ConfigError, GateRejected, InputError
from headtail.core.paths import StoreId
from headtail.core.record import Moment
from headtail.core.sequential import Array, Margins, Watch, paired_differences, spread_outcomes, watch_differences
from headtail.releases import release as releases
from headtail.releases.promotion import promote_release, require_proof
from headtail.review.decision import current_moment, person_of_options

FOLDER = "releases/canary"
KINDS = ("errors", "degraded", "slow", "judged")
SAVE_SECONDS = 300.0  # between two entries of a watch that proves nothing


class CanaryPolicy(Config):
    """When a canary is taken back, and when it may be promoted."""

    margins: Margins = Field(Margins(), description="what counts as worse; a false return has a chance of 4 x worse_level")
    min_queries: int = Field(500, ge=1, description="queries that the canary must have answered before anything is decided")
    slow_ms: float = Field(100.0, gt=0, description="an answer that takes longer, in ms, counts as slow")
    judged: bool = Field(False, description="whether judged quality must be proven too before the canary may be promoted")


class ArmCounts(Config):
    """Outcomes of one release in one window, each query once (see SeenQueries)."""

    queries: int = Field(0, ge=0, description="queries")
    errors: int = Field(0, ge=0, description="of them: ended in a 5xx, or the student raised")
    degraded: int = Field(0, ge=0, description="of them: degraded")
    slow: int = Field(0, ge=0, description="of them: slower than the policy's slow_ms")
    judged: tuple[float, ...] = Field((), description="1 minus a judge's score (0..1) of some answers")

    def outcomes(self, kind: str, rng: np.random.Generator) -> Array:
        """Outcomes of a kind, 0 good to 1 bad, in random order."""
        if kind == "judged":
            return rng.permutation(np.asarray(self.judged, np.float64))
        return spread_outcomes(getattr(self, kind), self.queries, rng)


class CanaryRecord(Config):
    """A canary as it stands. The last entry of the log is what holds."""

    number: int = Field(ge=1, description="1 for the first entry of the store")
    action: Literal["start", "share", "watch", "return", "promote", "stop"] = Field(description="why this entry was written")
    state: Literal["running", "returned", "promoted", "stopped"] = Field(description="running: the share is in force")
    champion: StoreId = Field(description="the release that is compared with: the current one when it began")
    canary: StoreId = Field(description="the release on trial")
    share: float = Field(gt=0, lt=1, description="share of queries (0..1) that the canary answers")
    salt: str = Field(pattern=r"^[0-9a-f]{16}$", description="of the split: another canary splits otherwise")
    policy: CanaryPolicy = Field(description="when it ends")
    queries: tuple[int, int] = Field((0, 0), description="queries compared so far: champion's, canary's")
    watches: dict[str, Watch] = Field({}, description="what is known by kind of outcome")
    who: str = Field(description="who began it, or changed it last")
    why: str = Field("", description="why, in words")
    started: Moment = Field(description="UTC, ISO 8601")
    at: Moment = Field(description="UTC, ISO 8601")

    @property
    def worse(self) -> tuple[str, ...]:
        """Kinds of outcomes of which the canary has provably more."""
        return tuple(kind for kind, watch in self.watches.items() if watch.is_worse)


class CanaryVerdict(Config):
    """What is proven about a canary, in one word and in sentences."""

    word: Literal["worse", "fine", "undecided"] = Field(description="undecided: the share is held")
    reasons: tuple[str, ...] = Field(description="why")


class SeenQueries:
    """Which queries were counted in a watch: one bit a query. Processes may share `buffer` (zeros at the start, a power of two long).

    When it fills up, some new queries are not counted, whichever release they meet; nothing is counted twice by a process.
    """

    def __init__(self, buffer: bytearray | memoryview | None = None) -> None:
        self._bits = buffer if buffer is not None else bytearray(1 << 20)
        self._mask = 8 * len(self._bits) - 1
        if self._mask & (self._mask + 1):
            raise ValueError("the length of the buffer must be a power of two")

    def add(self, key: bytes) -> bool:
        """Whether `key`, a query_key, is new."""
        place = int.from_bytes(key[:8], "little") & self._mask
        byte, bit = place >> 3, 1 << (place & 7)
        if self._bits[byte] & bit:
            return False
        self._bits[byte] |= bit
        return True


def assign(record: CanaryRecord | None, query_key: bytes, current: str = "") -> str:
    """The id of the release that answers a query: the canary's for a share of the keys, else the champion's.

    `current`: the id in CURRENT, where the caller knows it: a canary against another champion is over. Without a record: `current`.
    """
    if record is None or (current and record.champion != current):
        return current
    if record.state != "running":
        return current or record.champion
    drawn = int.from_bytes(hashlib.blake2b(query_key, digest_size=8, salt=bytes.fromhex(record.salt)).digest(), "little")
    return record.canary if drawn < int(record.share * 2**64) else record.champion


def read_canary(store: Storage, known: CanaryRecord | None = None) -> CanaryRecord | None:
    """The canary that ran last; None when there never was one. `known`: what an earlier call gave; without news one look at the store."""
    number = known.number if known else append_log.last_number(store, FOLDER)
    if known is None and not number:
        return None
    record = known or read_record(store, CanaryRecord, append_log.entry_path(FOLDER, number))
    while store.exists(path := append_log.entry_path(FOLDER, record.number + 1)):
        record = read_record(store, CanaryRecord, path)
    return record


def start_canary(
    store: Storage, release: str, share: float, *, who: str, why: str = "", policy: CanaryPolicy | None = None
) -> CanaryRecord:
    """Let `release` answer `share` of the queries, or change the share of the canary that runs: queries that it had, it keeps.

    InputError, ConfigError when there is no current release, another canary runs, or the release is of another task.
    """
    if not 0 < share < 1:
        raise ConfigError("a canary's share is above 0 % and below 100 %", where="SHARE", value=f"{share:.4g}", fix="for example 5%")
    champion, canary = releases.current_release(store), releases.load_release(store, release)
    if canary.id == champion.id:
        fix = "name another release: headtail release create makes one, headtail publish --set promote=false too"
        raise ConfigError("this release is the current one: it has nothing to be compared with", where="--release", value=release, fix=fix)
    if canary.task != champion.task:
        what = f"this release is of task {canary.task}, the current one of task {champion.task}"
        raise ConfigError(what, where="--release", value=release, fix="a canary must answer the same task")
    require_snapshot(store, canary.snapshot)
    require_proof(store, canary)
    who, why = person_of_options(who, why, '--who "Ada" --why "new words"')

    def change(last: CanaryRecord | None) -> CanaryRecord:
        if last is not None and is_running(store, last):
            if last.canary != canary.id:
                raise ConfigError("another canary runs", where="headtail release canary", value=last.canary, fix="end it: canary 0%")
            changed = {"action": "share", "share": share, "who": who, "why": why, "policy": policy or last.policy}
            return last.model_copy(update=changed)
        fields = {"champion": champion.id, "canary": canary.id, "share": share, "who": who, "why": why, "started": current_moment()}
        salt = secrets.token_hex(8)
        return CanaryRecord(
            number=1, action="start", state="running", salt=salt, policy=policy or CanaryPolicy(), at=current_moment(), **fields
        )

    return _append(store, change)


def stop_canary(store: Storage, *, who: str, why: str = "") -> CanaryRecord:
    """End the canary that runs: the champion answers every query. InputError when none runs."""
    who, why = person_of_options(who, why, '--who "Ada" --why "new words"')

    def change(last: CanaryRecord | None) -> CanaryRecord:
        return _running(store, last).model_copy(update={"action": "stop", "state": "stopped", "who": who, "why": why})

    return _append(store, change)


def promote_canary(store: Storage, *, who: str, accept_undecided: bool = False) -> CanaryRecord:
    """Make the canary that runs the current release. GateRejected unless proven fine, or `accept_undecided`; or by its evidence."""
    record = _running(store, read_canary(store))
    verdict = canary_verdict(record)
    if verdict.word != "fine" and not (accept_undecided and verdict.word == "undecided"):
        fix = "wait; or add --accept-undecided if you are sure" if verdict.word == "undecided" else "end it: headtail release canary 0%"
        raise GateRejected(f"this canary is {verdict.word}: {'; '.join(verdict.reasons)}", where=record.canary, fix=fix)
    promote_release(store, record.canary)
    done = {"action": "promote", "state": "promoted", "who": who, "why": f"{verdict.word}: {verdict.reasons[0]}"}
    return _append(store, lambda last: (last or record).model_copy(update=done))


def is_running(store: Storage, record: CanaryRecord | None) -> bool:
    """Whether a canary answers queries: it was not ended, and its champion is still the current release."""
    return record is not None and record.state == "running" and record.champion == releases.current_id(store)


def fold_counts(record: CanaryRecord, champion: ArmCounts, canary: ArmCounts, rng: np.random.Generator) -> CanaryRecord:
    """`record` after the counts of one window of both releases; taken back when the canary is proven worse. Pure."""
    watches = dict(record.watches)
    for kind in KINDS:
        found = paired_differences(canary.outcomes(kind, rng), champion.outcomes(kind, rng))
        if len(found):
            watches[kind] = watch_differences(watches.get(kind, Watch()), found, record.policy.margins)
    queries = (record.queries[0] + champion.queries, record.queries[1] + canary.queries)
    folded = record.model_copy(update={"action": "watch", "watches": watches, "queries": queries})
    if folded.worse and queries[1] >= record.policy.min_queries:
        why = f"proven worse: {', '.join(folded.worse)}"
        return folded.model_copy(update={"action": "return", "state": "returned", "who": "headtail", "why": why})
    return folded


def canary_verdict(record: CanaryRecord) -> CanaryVerdict:
    """What is proven, and what is missing. Pure. No data is no proof."""
    policy, seen = record.policy, record.queries[1]
    if record.worse:
        return CanaryVerdict(word="worse", reasons=tuple(f"{kind}: {_words(record.watches[kind], policy)}" for kind in record.worse))
    missing = [f"{seen:,} of at least {policy.min_queries:,} queries"] if seen < policy.min_queries else []
    for kind in KINDS if policy.judged else KINDS[:-1]:
        watch = record.watches.get(kind, Watch())
        if not watch.pairs:
            missing.append(f"{kind}: no data")
        elif not watch.is_fine:
            missing.append(f"{kind}: {_words(watch, policy)}; {policy.margins.harm:.2%} more are not ruled out")
    if missing:
        return CanaryVerdict(word="undecided", reasons=tuple(missing))
    return CanaryVerdict(word="fine", reasons=tuple(f"{kind}: {_words(watch, policy)}" for kind, watch in record.watches.items()))


def _words(watch: Watch, policy: CanaryPolicy) -> str:
    low, high = watch.interval(policy.margins.fine_level)
    return f"difference {watch.difference:+.2%} ({low:+.2%} to {high:+.2%}) over {watch.pairs:,} comparisons"


class CanaryWatcher:
    """Takes counts of windows into the canary's record. Several may run at once: each window is added to the state that all share."""

    def __init__(self, store: Storage, save_seconds: float = SAVE_SECONDS, rng: np.random.Generator | None = None) -> None:
        self._store, self._save_seconds = store, save_seconds
        self._rng = rng or np.random.default_rng()
        self._pending: list[tuple[ArmCounts, ArmCounts]] = []
        self._saved = time.monotonic()
        self._local: CanaryRecord | None = None  # an entry of the store with the pending windows folded in

    def add(self, record: CanaryRecord, champion: ArmCounts, canary: ArmCounts) -> CanaryRecord:
        """Take the counts of the window since the last call, made under `record` (what the servers had read). Returns what holds now.

        It is written at once when the canary is proven worse, else every `save_seconds`.
        """
        local = self._local
        if local is None or local.salt != record.salt:
            self._pending, local = [], record
        elif record.number > local.number:  # the share was changed, or another watcher wrote
            local = self._fold(record)
        self._pending.append((champion, canary))
        self._local = fold_counts(local, champion, canary, self._rng)
        if self._local.state == "running" and time.monotonic() - self._saved < self._save_seconds:
            return self._local
        return self.save()

    def save(self) -> CanaryRecord:
        """Write what was added. A canary that ended meanwhile stays as it is."""
        mine = self._local
        if mine is None:
            raise ValueError("no window was added yet")

        def change(last: CanaryRecord | None) -> CanaryRecord | None:
            if last is None or last.salt != mine.salt or last.state != "running" or not self._pending:
                return None
            return mine if last.number == mine.number else self._fold(last)

        self._local = held = _append(self._store, change)
        self._pending, self._saved = [], time.monotonic()
        if held.action == "return":
            say(f"canary       release {held.canary} was taken back, {held.why}; {held.champion} answers all queries")
        return held

    def _fold(self, record: CanaryRecord) -> CanaryRecord:
        for window in self._pending:
            record = fold_counts(record, *window, self._rng)
        return record


def _append(store: Storage, change: Callable[[CanaryRecord | None], CanaryRecord | None]) -> CanaryRecord:
    """Write what `change` makes of the last entry, as the next; again when another was first. None: nothing is written."""
    while True:
        last = read_canary(store)
        made = change(last)
        if made is None:
            assert last is not None  # a change of nothing is of something that is there
            return last
        record = made.model_copy(update={"number": (last.number if last else 0) + 1, "at": current_moment()})
        if store.create(append_log.entry_path(FOLDER, record.number), (record.model_dump_json(indent=2) + "\n").encode()):
            return record


def _running(store: Storage, record: CanaryRecord | None) -> CanaryRecord:
    if record is None or not is_running(store, record):
        fix = "begin one: headtail release canary 5% --release ID"
        raise InputError("no canary runs", where=store.uri(FOLDER), value=record.state if record else "none was ever begun", fix=fix)
    return record
