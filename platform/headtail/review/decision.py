"""One decision of a person about one answer, and whether it may be recorded.

In: a verdict, the answer that was shown, perhaps a new one. Out: the answer that is valid from now on in canonical form,
or what is wrong with it. Knows nothing of files, of the log or of who asks.
"""

from __future__ import annotations

import datetime
from typing import NamedTuple

from headtail.core import typed_answer
from headtail.core.errors import ConfigError
from headtail.core.query import redact_texts
from headtail.core.task import Task

ACCEPT, CORRECT, DROP = "accept", "correct", "drop"
VERDICTS = (ACCEPT, CORRECT, DROP)
WHO_CHARS, WHY_CHARS, ANSWER_CHARS = 100, 2000, 100_000
_EARLY = datetime.timedelta(minutes=5)  # clocks differ; a decision from further ahead would win over all others until then


class Decision(NamedTuple):
    """A row of rows.REVIEWED. `answer` is what holds from now on, `before` what was looked at; both canonical JSON or None."""

    query_key: bytes
    query: str
    verdict: str
    answer: str | None
    before: str | None
    answer_key: bytes | None
    who: str
    at: str  # as `format_moment` writes it, so that the order of texts is the order of time
    why: str


def format_moment(when: datetime.datetime) -> str:
    """UTC, ISO 8601, always with milliseconds."""
    return when.astimezone(datetime.UTC).isoformat(timespec="milliseconds")


def current_moment() -> str:
    """This moment."""
    return format_moment(datetime.datetime.now(datetime.UTC))


def read_moment(text: str) -> tuple[str, str]:
    """(moment, "") or ("", what is wrong). A time without a zone is UTC."""
    try:
        when = datetime.datetime.fromisoformat(text.strip())
        found = when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
        if found > datetime.datetime.now(datetime.UTC) + _EARLY:
            return "", f"at: {text} is in the future"
        return format_moment(found), ""
    except (ValueError, OverflowError):
        return "", f"at: {text[:40]} is not a time; write 2026-01-31T12:00:00Z or leave it empty"


def canonical_answer(task: Task, text: str) -> tuple[str | None, str]:
    """(canonical answer, "") or (None, what is wrong). Read as `human.parse` reads people's labels."""
    if len(text) > ANSWER_CHARS:
        return None, f"{len(text):,} characters; at most {ANSWER_CHARS:,} are taken"
    answer, problem = typed_answer.parse_typed_answer(task, text)
    return (None, problem) if problem else (task.dump(answer), "")


def resolve_verdict(task: Task, verdict: str, answer: str | None, before: str | None) -> tuple[str | None, str]:
    """(the answer that holds from now on, "") or (None, what is wrong). Nothing is guessed: a contradiction is an error."""
    if verdict not in VERDICTS:
        return None, f"verdict: {verdict[:40]!r} is not one of {', '.join(VERDICTS)}" if verdict else "verdict: empty"
    if verdict == DROP:
        return None, "answer: a dropped row has none; empty it, or call it correct" if answer else ""
    looked_at, problem = canonical_answer(task, before) if before is not None else (None, "there is no answer")
    if verdict == ACCEPT:
        if looked_at is None:
            return None, f"this answer cannot be accepted: {problem}"
        if answer and canonical_answer(task, answer)[0] != looked_at:
            return None, "answer: it is not the one that was looked at; call it correct"
        return looked_at, ""
    if not answer:
        return None, "answer: empty; a correction needs one"
    stored, problem = canonical_answer(task, answer)
    if problem:
        return None, f"answer: {problem}"
    if stored == looked_at:
        return None, "answer: unchanged; accept it instead"
    return stored, ""


def person_of_options(who: str, why: str, fix: str, needs_why: str = "") -> tuple[str, str]:
    """Who and why as `--who` and `--why` give them. ConfigError when something is wrong. `needs_why`: said when there is no reason."""
    person, because, wrong = read_person(who, why)
    if wrong or (needs_why and not because):
        raise ConfigError(wrong or needs_why, where="--who, --why", value=who, fix=fix)
    return person, because


def read_person(who: str, why: str) -> tuple[str, str, str]:
    """(who, why, "") without blanks at the ends, `why` without personal data; or ("", "", what is wrong)."""
    who, why = who.strip(), why.strip()
    if not who:
        return "", "", "who: empty; every decision has a name"
    if len(who) > WHO_CHARS or not who.isprintable():
        return "", "", f"who: at most {WHO_CHARS} characters that can be printed"
    if len(why) > WHY_CHARS:
        return "", "", f"why: {len(why):,} characters; at most {WHY_CHARS:,} are taken"
    try:
        (who + why).encode("utf-8")
    except UnicodeEncodeError:
        return "", "", "who, why: half a surrogate pair cannot be stored"
    return who, str(redact_texts(why)), ""
