"""Feedback: what callers said of answers becomes a review queue and labels of a design of their own.

In: `feedback/` of the store (rows.FEEDBACK) and the request log. Out: tables suspects (rows.SUSPECT: answers that callers spoke against,
for `headtail review`), labels (rows.FEEDBACK_LABELS, design `feedback`) and set_aside, with a reason for each row that was not used.
Feedback counts when the log has its request, with that query. Who gives feedback is no random draw: these labels may train a model;
ingest and evaluate refuse them as human labels to judge by. Knows nothing of servers.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, open_storage, read_table, stream_table
from headtail.adapters.storage.day_files import FEEDBACK_FOLDER, REQUESTS, day_of, list_day_files
from headtail.core.config import StageConfig
from headtail.core.errors import InputError
from headtail.core.keys import fingerprint, query_key
from headtail.core.receipt import Receipt, StageResult
from headtail.core.rows import FEEDBACK, FEEDBACK_DESIGN, FEEDBACK_LABELS, SUSPECT, conform
from headtail.core.task import Task, load_task
from headtail.stages.base import Stage, run_once

STAGE, VERSION = "feedback", 1
# Why feedback was not used.
REASONS = {
    "no_request": "the request log has no request of this id",
    "other_query": "the request of this id had another query",
    "repeated": "the same caller said something else of this request later",
    "schema": "the correction is not valid under the task's schema",
}
SET_ASIDE_FEEDBACK = pa.schema([*FEEDBACK, ("reason", pa.string())])


class Config(StageConfig):
    """Which feedback is read."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example: what a correction must fit")
    days: int = Field(30, ge=0, description="days before the first feedback in which its request is looked for in the request log")


class Result(StageResult):
    """What came of it."""

    queries: int = Field(0, description="queries with feedback that counts")
    suspects: int = Field(0, description="answers for review")
    labels: int = Field(0, description="labels; of the design `feedback`, never a random draw")


class _Votes(NamedTuple):
    """What was said of one query. Answers are canonical JSON."""

    rights: Counter[str]  # by answer: how many called it right, by a thumb or as their correction
    wrongs: Counter[str]  # by answer: how many thumbs down or corrections to another
    corrections: Counter[str]
    kinds: Counter[str]  # up, down, corrected, used, unused
    shown: str | None  # the answer that was given last
    answer_key: bytes | None


def run(config: Config) -> Receipt[Result]:
    """Read feedback once for each state of the logs. InputError when there is none."""
    task, store = load_task(config.task, config.allow_task_code), open_storage(config.root)
    files = list_day_files(store, FEEDBACK_FOLDER)
    if not files:
        fix = "start the server with request_log=true and call POST /v1/feedback"
        raise InputError("the store has no feedback", where=store.uri(FEEDBACK_FOLDER), fix=fix)
    first, last = (datetime.date.fromisoformat(day_of(path)) for path in (min(files), max(files)))
    begin, end = first - datetime.timedelta(config.days), last + datetime.timedelta(1)
    logs = {path: size for path, size in list_day_files(store, REQUESTS).items() if str(begin) <= day_of(path) <= str(end)}
    return run_once(
        STAGE,
        Result,
        config,
        lambda stage: _work(stage, task, sorted(files), sorted(logs)),
        inputs={"feedback": fingerprint(files, "feedback"), "requests": fingerprint(logs, "requests")},
        task=task,
        version=VERSION,
        replaces={"task": task.name},
    )


def _work(stage: Stage, task: Task, files: Sequence[str], logs: Sequence[str]) -> Result:
    rows = pa.concat_tables([conform(read_table(stage.store, path), FEEDBACK, path) for path in files]).sort_by("time").to_pylist()
    requests, events = _requests(stage.store, logs, rows)
    reasons = _set_aside(rows, requests, task)
    used = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
    left = [{**row, "reason": reason} for row, reason in zip(rows, reasons, strict=True) if reason]
    votes = {query: _count(said) for query, said in _by_query(used).items()}
    suspects = sorted((_suspect(query, v, events[query]) for query, v in votes.items() if v.wrongs), key=lambda row: -row["gain"])
    labels = [label for query, v in sorted(votes.items()) if (label := _label(query, v)) is not None]
    stage.table("suspects", pa.Table.from_pylist(suspects, schema=SUSPECT))
    stage.table("labels", pa.Table.from_pylist(labels, schema=FEEDBACK_LABELS))
    stage.table("set_aside", pa.Table.from_pylist(left, schema=SET_ASIDE_FEEDBACK))
    counted = Counter(reasons)
    stage.rows = {"in": len(rows), "used": len(used), **{reason: counted[reason] for reason in REASONS}}
    stage.metrics = {kind: float(sum(v.kinds[kind] for v in votes.values())) for kind in ("up", "down", "corrected", "used", "unused")}
    stage.note("callers choose what they give feedback on: these labels are of the design `feedback`, not a random draw")
    say(f"feedback     {len(rows):,} rows, {len(used):,} used; {len(suspects):,} answers for review, {len(labels):,} labels")
    say(f"{'':<12} headtail review serve --set suspects={stage.path}:suspects")
    return Result(queries=len(votes), suspects=len(suspects), labels=len(labels))


def _requests(store: Storage, logs: Iterable[str], rows: Sequence[dict[str, Any]]) -> tuple[dict[str, str], Counter[str]]:
    """Query by request id, for the requests that feedback names; events by query, for the queries that it names."""
    ids, queries = pa.array({row["request_id"] for row in rows}, pa.string()), pa.array({row["query"] for row in rows}, pa.string())
    found: dict[str, str] = {}
    events: Counter[str] = Counter()
    for path in logs:
        for batch in stream_table(store, path, ["request_id", "query"]):
            hits = batch.filter(pc.is_in(batch["request_id"], value_set=ids))
            found |= zip(hits["request_id"].to_pylist(), hits["query"].to_pylist(), strict=True)
            events.update(batch["query"].filter(pc.is_in(batch["query"], value_set=queries)).to_pylist())
    return found, events


def _set_aside(rows: Sequence[dict[str, Any]], requests: dict[str, str], task: Task) -> list[str]:
    """A reason of REASONS for each row; empty: it counts.

    `rows` are in order of time. What a caller says of a request replaces what the same caller said of it before: a verdict (thumb or
    correction) a verdict, `used` a `used`; the earlier row loses that field. A row without a request id was checked by the front against
    the snapshot: only a client with a snapshot of its own sends it, and such rows do not replace one another.
    """
    later: dict[tuple[str, str], set[str]] = {}
    reasons = [""] * len(rows)
    for at in reversed(range(len(rows))):
        row, about = rows[at], rows[at]["request_id"]
        if about and about not in requests:
            reasons[at] = "no_request"
        elif about and requests[about] != row["query"]:
            reasons[at] = "other_query"
        elif row["answer"] is not None and task.parse(row["answer"])[1]:
            reasons[at] = "schema"  # the task has changed since
        elif about:
            fields = {"verdict": ("rating", "answer"), "use": ("used",)}
            given = {kind for kind, names in fields.items() if any(row[name] is not None for name in names)}
            replaced = later.setdefault((about, row["caller"]), set())
            if given <= replaced:
                reasons[at] = "repeated"
            row.update({name: None for kind in given & replaced if not given <= replaced for name in fields[kind]})
            replaced |= given
    return reasons


def _by_query(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["query"], []).append(row)
    return found


def _count(rows: Sequence[dict[str, Any]]) -> _Votes:
    """Thumbs and corrections are votes; whether an answer was used is counted beside them, since it says little of whether it is right."""
    votes = _Votes(Counter(), Counter(), Counter(), Counter(), None, None)
    for row in rows:
        shown, rating, answer = row["shown"], row["rating"], row["answer"]
        votes.kinds.update(filter(None, (rating, "corrected" if answer is not None else "")))
        if row["used"] is not None:
            votes.kinds["used" if row["used"] else "unused"] += 1
        if answer is not None:
            votes.corrections[answer] += 1
            votes.rights[answer] += 1
        if shown is not None:
            votes = votes._replace(shown=shown, answer_key=bytes.fromhex(row["answer_key"]) if row["answer_key"] else None)
        if answer is not None or rating == "down":
            votes.wrongs[shown or ""] += 1
        elif rating == "up" and shown is not None:
            votes.rights[shown] += 1
    return votes


def _suspect(query: str, votes: _Votes, events: int) -> dict[str, Any]:
    """A row of the review queue. The score is the share of votes against the answer, by Laplace's rule of succession."""
    against, pro = sum(votes.wrongs.values()), votes.rights[votes.shown or ""]
    score = (against + 1) / (against + pro + 2)
    reasons = [text for kind, text in (("corrected", "corrected by callers"), ("down", "rated down by callers")) if votes.kinds[kind]]
    return {
        "query_key": query_key(query),
        "query": query,
        "answer": votes.shown,
        "answer_key": votes.answer_key,
        "stratum": None,
        "count": events,
        "score": score,
        "gain": score * max(events, 1),
        "reasons": reasons,
        "alternatives": [answer for answer, _ in votes.corrections.most_common()],
        "confidence": None,
        "agreement": None,
    }


def _label(query: str, votes: _Votes) -> dict[str, Any] | None:
    """The answer that most callers call right; None when there is none, two have as many, or as many call it wrong."""
    ranked = votes.rights.most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    answer, pro = ranked[0]
    if pro <= votes.wrongs[answer]:
        return None
    said = sum(votes.kinds.values())
    kinds = {kind: votes.kinds[kind] for kind in ("up", "down", "corrected", "used", "unused")}
    return {
        "query_key": query_key(query),
        "query": query,
        "answer": answer,
        "count": said,
        "stratum": None,
        "design": FEEDBACK_DESIGN,
        "inclusion": None,
        **kinds,
    }
