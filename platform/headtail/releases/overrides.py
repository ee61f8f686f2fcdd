"""People's answers that outrank every model's, and queries that no cache may answer any more.

In: a query, a person's answer, who, why and until when. Out: numbered entries in `overrides/`, and `Overrides`: what holds now, by
query_key, which servers lay over their snapshot. A look for news is one look at the store, so servers may look every few seconds.
The next publish writes overrides without an end into its snapshot. Knows nothing of servers or of how a snapshot is made.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from headtail.adapters import append_log
from headtail.adapters.storage import Storage, read_record
from headtail.cache.snapshot import StoredAnswer
from headtail.core.config import Config
from headtail.core.errors import ConfigError, InputError
from headtail.core.guardrails import GUARDRAIL_REASONS
from headtail.core.keys import fingerprint, query_key
from headtail.core.query import clean_text, redact_texts
from headtail.core.record import Moment
from headtail.core.redact import has_placeholder
from headtail.core.rows import Source
from headtail.core.task import Task
from headtail.releases.release import current_release, open_guard
from headtail.review.decision import canonical_answer, current_moment, person_of_options

FOLDER = "overrides"


class OverrideEntry(Config):
    """One change: an answer that a person gave, one that was taken back, or a query that was deleted."""

    number: int = Field(ge=1, description="1 for the first")
    action: Literal["set", "remove", "delete", "erased"] = Field(
        description="delete: no cache may answer; erased: an entry whose text a deletion took away"
    )
    task: str = Field(description="name of the task; empty for a deletion, which is of all tasks")
    query_key: str = Field(pattern=r"^[0-9a-f]{32}$", description="hex; of the normalised query without personal data")
    query: str = Field("", description="that query; empty for a deletion")
    answer: str = Field("", description="canonical JSON; empty unless action is set")
    who: str = Field("", description="who decided")
    why: str = Field("", description="why, in words")
    until: Moment | Literal[""] = Field("", description="UTC, ISO 8601: from then on it does not hold; empty: no end")
    outranks: str = Field("", description="reason code of the guardrail that a person overruled; empty: none refused the answer")
    at: Moment = Field(description="UTC, ISO 8601")

    @property
    def key(self) -> bytes:
        return bytes.fromhex(self.query_key)

    def holds(self, now: datetime.datetime) -> bool:
        """Whether it gives an answer at that time."""
        return self.action == "set" and (not self.until or now < datetime.datetime.fromisoformat(self.until))


@dataclass(frozen=True)
class Overrides:
    """What people decided for one task, as of entry `number`.

    `latest`: the last entry on each query. `given`: answer_keys of all overrides that a query ever had; a snapshot may still hold one
    that was taken back or has ended. `answers`: what is served. `deleted`: no cache may answer. All by query_key.
    """

    task: str = ""
    number: int = 0
    latest: Mapping[bytes, OverrideEntry] = field(default_factory=dict)
    given: Mapping[bytes, frozenset[bytes]] = field(default_factory=dict)
    answers: Mapping[bytes, StoredAnswer] = field(default_factory=dict)
    deleted: frozenset[bytes] = frozenset()

    def __len__(self) -> int:
        return len(self.latest)

    def resolve(self, key: bytes, stored: StoredAnswer | None, share_redacted: bool = False) -> StoredAnswer | None:
        """What is served to `key`, where a snapshot (or another cache) holds `stored`; None: no cache answers.

        `share_redacted`: the task says `redacted: cached`. Without it no override of a redacted query is served: it stands for many.
        """
        if (answer := self.answers.get(key)) is not None and (share_redacted or not has_placeholder(self.latest[key].query)):
            return answer
        if stored is None or key in self.deleted or stored.answer_key in self.given.get(key, ()):
            return None
        return stored


def load_overrides(
    store: Storage, task: str | None = None, known: Overrides | None = None, now: datetime.datetime | None = None
) -> Overrides:
    """What holds `now` for `task` (its name; None: the current release's). `known`: what an earlier call gave; then only news are read.

    Without news that is one look at the store. Call it again at least once a minute: overrides end.
    """
    name = current_release(store).task if task is None else task
    before = known if known is not None and known.task == name else Overrides(name)
    latest, given, number = dict(before.latest), dict(before.given), before.number
    for entry in _entries_after(store, number):
        number = entry.number
        if entry.task in ("", name) and entry.action != "erased":
            latest[entry.key] = entry
            if entry.action == "set":
                given[entry.key] = given.get(entry.key, frozenset()) | {_stored(entry).answer_key}
    moment = now or datetime.datetime.now(datetime.UTC)
    answers = {key: _stored(entry) for key, entry in latest.items() if entry.holds(moment)}
    deleted = frozenset(key for key, entry in latest.items() if entry.action == "delete")
    return Overrides(name, number, latest, given, answers, deleted)


def standing_overrides(store: Storage, task: str) -> list[OverrideEntry]:
    """The overrides that hold now, by query."""
    now = datetime.datetime.now(datetime.UTC)
    return sorted((entry for entry in load_overrides(store, task).latest.values() if entry.holds(now)), key=lambda entry: entry.query)


def set_override(
    store: Storage,
    query: str,
    answer: str,
    *,
    who: str,
    why: str,
    until: str = "",
    despite_guardrails: bool = False,
    allow_code: bool = False,
) -> OverrideEntry:
    """Record that `answer` (JSON, or a bare label) is served to `query` under the current release's task.

    ConfigError when the answer is not valid under the schema, a guardrail refuses it (unless `despite_guardrails`), the query or the
    answer has personal data, or a word is missing.
    """
    release = current_release(store)
    guard = open_guard(store, release, allow_code)
    text = plain_query(query)
    stored, problem = canonical_answer(guard.task, answer)
    if stored is None:
        fix = f"give an answer that the schema of task {guard.task.name} allows"
        raise ConfigError(f"this answer cannot be served: {problem}", where="ANSWER", value=answer[:200], fix=fix)
    _check_personal_data(guard.task, text, stored)
    reason = guard.reason(text, guard.task.parse(stored)[0])
    if reason and not despite_guardrails:
        fix = "correct the answer; or add --despite-guardrails if you are sure: a person outranks a guardrail"
        what = f"a guardrail refuses this answer: {reason} ({GUARDRAIL_REASONS[reason.split('.')[0]]})"
        raise ConfigError(what, where="ANSWER", value=stored, fix=fix)
    person, because = person_of_options(who, why, '--who "Ada" --why "wrong city"', "why: empty; every override has a reason")
    fields = {"task": guard.task.name, "answer": stored, "who": person, "why": because, "until": _end(until), "outranks": reason}
    return _append(store, text, "set", fields)


def remove_override(store: Storage, query: str, *, who: str, why: str) -> OverrideEntry:
    """Take an override back. InputError when none stands for this query."""
    task, text = current_release(store).task, plain_query(query)
    if (standing := load_overrides(store, task).latest.get(query_key(text))) is None or standing.action != "set":
        raise InputError("no override stands for this query", where=store.uri(FOLDER), value=text, fix="headtail override --list shows all")
    person, because = person_of_options(who, why, '--who "Ada"')
    return _append(store, text, "remove", {"task": task, "who": person, "why": because})


def tombstone_query(store: Storage, key: bytes, *, who: str, why: str) -> OverrideEntry:
    """Record that no cache may answer a query any more; the entry holds the key alone. Servers take it as they take overrides."""
    entry = {"action": "delete", "task": "", "query_key": key.hex(), "who": who, "why": why}
    return _write(store, entry)


def erase_overrides(store: Storage, keys: Iterable[bytes]) -> int:
    """Take the text of these queries out of all entries; how many entries had it. The tombstone of a query is not touched."""
    gone, erased = {key.hex() for key in keys}, 0
    for entry in append_log.read_entry_records(store, OverrideEntry, FOLDER):
        if entry.query_key in gone and entry.action in ("set", "remove"):
            blank = OverrideEntry(number=entry.number, action="erased", task=entry.task, query_key=entry.query_key, at=entry.at)
            store.replace(append_log.entry_path(FOLDER, entry.number), _bytes(blank))
            erased += 1
    return erased


def plain_query(query: str) -> str:
    """A query as keys are made of it: normalised, without personal data. ConfigError when nothing is left."""
    text = clean_text(query)
    if not text:
        raise ConfigError("the query is empty", where="QUERY", value=query, fix="give at least one visible character")
    return text


def override_key(task: str, query: str, answer: str, kind: str = "override") -> bytes:
    """The answer_key of an answer that a person gave: 16 bytes over all that it is. `kind`: override or review."""
    return bytes.fromhex(fingerprint([f"human_{kind}", task, query, answer]))


def _check_personal_data(task: Task, query: str, answer: str) -> None:
    """ConfigError for a query that stands for many, and for an answer with somebody's data. No flag outranks it."""
    if has_placeholder(query) and task.file.redacted != "cached":
        what = "this query had personal data (or a placeholder of it): its answer would be served to everybody who asks with other data"
        fix = f"say redacted: cached in the task file of {task.name} and publish, if that data does not matter for the answer"
        raise ConfigError(what, where="QUERY", value=query, fix=fix)
    parsed = task.parse(answer)[0]
    if (clean := redact_texts(parsed)) != parsed:
        what = "the answer has an e-mail address, card number or telephone number, which is not kept"
        raise ConfigError(what, where="ANSWER", value=task.dump(clean)[:200], fix="leave it out of the answer")


def _stored(entry: OverrideEntry) -> StoredAnswer:
    return StoredAnswer(str(Source.HUMAN_OVERRIDE), None, override_key(entry.task, entry.query, entry.answer), entry.answer.encode())


def _entries_after(store: Storage, number: int) -> Iterator[OverrideEntry]:
    if not number:
        yield from append_log.read_entry_records(store, OverrideEntry, FOLDER)
        return
    while store.exists(path := append_log.entry_path(FOLDER, number + 1)):
        number += 1
        yield read_record(store, OverrideEntry, path)


def _append(store: Storage, query: str, action: str, fields: Mapping[str, str]) -> OverrideEntry:
    return _write(store, {"action": action, "query": query, "query_key": query_key(query).hex(), **fields})


def _write(store: Storage, fields: Mapping[str, str]) -> OverrideEntry:
    entry = OverrideEntry.model_validate({**fields, "number": 1, "at": current_moment()})
    number = append_log.append_entry(store, FOLDER, lambda number: _bytes(entry.model_copy(update={"number": number})))
    return entry.model_copy(update={"number": number})


def _bytes(entry: OverrideEntry) -> bytes:
    return (entry.model_dump_json(indent=2) + "\n").encode()


def _end(until: str) -> str:
    """`until` as UTC; a day is its end. ConfigError when it is no time, or past."""
    if not until:
        return ""
    fix = "write 2031-01-31, or 2031-01-31T12:00:00+00:00"
    try:
        when = datetime.datetime.fromisoformat(until.strip())
    except ValueError:
        raise ConfigError("--until is not a time", where="--until", value=until, fix=fix) from None
    if len(until.strip()) <= len("2031-01-31"):
        when += datetime.timedelta(days=1)
    when = when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
    if when <= datetime.datetime.now(datetime.UTC):
        raise ConfigError("--until is past: this override would never be served", where="--until", value=until, fix=fix)
    return when.astimezone(datetime.UTC).isoformat(timespec="seconds")
