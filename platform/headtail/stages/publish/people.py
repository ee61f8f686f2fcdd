"""Answers by people for a snapshot: overrides without an end, then corrections of the review queue; and answers that people dropped.

In: a store, a task. Out: rows that outrank every model's (in order of query_key), keys that may not be published, and a digest over
all of it. Answers are parsed again under today's schema; those that do not fit are counted. Knows nothing of how a snapshot is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import Storage, stream_table
from headtail.cache.builder import OFFERED
from headtail.core.keys import fingerprint
from headtail.core.receipt import Receipt
from headtail.core.rows import Source, State
from headtail.core.task import Task
from headtail.releases.overrides import load_overrides, override_key
from headtail.review import decisions
from headtail.review.decision import CORRECT, DROP


@dataclass(frozen=True)
class PeopleAnswers:
    """What people decided that a snapshot must follow. Answers are canonical JSON, `dropped` has the answer_key that was looked at."""

    task: str
    answers: Mapping[bytes, tuple[str, str, str]]  # query_key -> (query, answer, override | review)
    dropped: Mapping[bytes, bytes | None]
    deleted: frozenset[bytes]
    stale: int  # answers that the schema refuses now

    def __bool__(self) -> bool:
        return bool(self.answers or self.dropped or self.deleted)

    @property
    def digest(self) -> str:
        """Over all that changes a snapshot; empty when nothing does."""
        if not self:
            return ""
        answers = {key.hex(): list(parts) for key, parts in self.answers.items()}
        dropped = {key.hex(): (about or b"").hex() for key, about in self.dropped.items()}
        return fingerprint({"answers": answers, "dropped": dropped, "deleted": sorted(key.hex() for key in self.deleted)}, "people")

    def table(self, counts: Mapping[bytes, int]) -> pa.Table:
        """The answers as OFFERED rows, in order of key. `counts`: events by query_key."""
        rows = [
            {
                "query_key": key,
                "query": query,
                "answer": answer,
                "source": str(Source.HUMAN_OVERRIDE),
                "answer_key": override_key(self.task, query, answer, kind),
                "count": counts.get(key),
                "state": str(State.ANSWERED),
            }
            for key, (query, answer, kind) in sorted(self.answers.items())
        ]
        return pa.Table.from_pylist(rows, schema=OFFERED)


def people_answers(store: Storage, task: Task) -> PeopleAnswers:
    """What holds now for a task. An override outranks a correction of the review queue."""
    found: dict[bytes, tuple[str, str, str]] = {}
    dropped: dict[bytes, bytes | None] = {}
    overrides = load_overrides(store, task.name)
    for row in decisions(store, task.name).to_pylist():
        if row["verdict"] == CORRECT:
            found[row["query_key"]] = row["query"], row["answer"], "review"
        elif row["verdict"] == DROP:
            dropped[row["query_key"]] = row["answer_key"]
    for key in overrides.answers.keys() - {key for key, entry in overrides.latest.items() if entry.until}:
        found[key] = overrides.latest[key].query, overrides.latest[key].answer, "override"
    answers, stale = {}, 0
    for key, (query, text, kind) in found.items():
        answer, problem = task.parse(text)
        stale += bool(problem)
        if not problem and key not in overrides.deleted:
            answers[key] = query, task.dump(answer), kind
    held = {key: about for key, about in dropped.items() if key not in answers}
    return PeopleAnswers(task.name, answers, held, overrides.deleted, stale)


def count_events(store: Storage, log: Receipt | None, keys: Mapping[bytes, object]) -> dict[bytes, int]:
    """Events before the cut of some queries; without a log, none is known."""
    if log is None or not keys:
        return {}
    wanted, found = pa.array(list(keys), OFFERED.field("query_key").type), dict[bytes, int]()
    for batch in stream_table(store, log.output("queries"), ["query_key", "count"]):
        rows = batch.filter(pc.is_in(batch.column("query_key"), value_set=wanted))
        found.update(zip(rows.column("query_key").to_pylist(), rows.column("count").to_pylist(), strict=True))
    return found
