"""Answers against human labels, row by row: what evaluate shows and what a gate tests. Pure.

    human labels + {answer source: {query_key: SourceAnswer}} -> SCORED rows, one per labelled row and answer source

A labelled row without a valid answer counts as missed. The fallback is computed from the task. Knows nothing of slices or criteria.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.errors import InputError
from headtail.core.keys import canonical
from headtail.core.rows import SCORED, Source, State
from headtail.core.task import Task

ABSENT = "absent"  # state of a labelled row that an answer source was never asked
COLUMNS = ["query_key", "answer_key", "state", "answer", "confidence"]  # of an answer, that scoring needs


class SourceAnswer(NamedTuple):
    """What an answer source gave for a query: parsed answer (None unless answered), state, confidence (None when unknown)."""

    answer: Any
    state: str
    confidence: float | None


def find_answers(task: Task, tables: Iterable[pa.Table], keys: pa.Array, where: str) -> dict[bytes, SourceAnswer]:
    """The answers to `keys` among `tables`. Of several answers to one query an answered one wins, then the smaller answer_key.

    InputError when an answer is not valid under `task`: it belongs to another task, and its score would mean nothing.
    """
    best: dict[bytes, tuple[bool, bytes, dict[str, Any]]] = {}
    for table in tables:
        for row in table.filter(pc.is_in(table["query_key"], value_set=keys)).to_pylist():
            order = (row["state"] != State.ANSWERED, row["answer_key"] or b"")
            held = best.get(row["query_key"])
            if held is None or order < held[:2]:
                best[row["query_key"]] = (*order, row)
    return {key: _source_answer(task, row, where) for key, (_, _, row) in best.items()}


def _source_answer(task: Task, row: Mapping[str, Any], where: str) -> SourceAnswer:
    if row["state"] != State.ANSWERED:
        return SourceAnswer(None, row["state"], None)
    answer, problem = task.parse(row["answer"])
    if problem:
        fix = "name a precompute of this task, or run precompute again"
        raise InputError(f"an answer is not valid under task {task.name}: {problem}", where=where, value=row["answer"], fix=fix)
    return SourceAnswer(answer, row["state"], row["confidence"])


def score_rows(task: Task, labels: pa.Table, sources: Mapping[str, Mapping[bytes, SourceAnswer]]) -> pa.Table:
    """One SCORED row per labelled row (HUMAN_LABELS, and what evaluate adds of the traffic) and answer source, the fallback's last."""
    lines = []
    for row in labels.to_pylist():
        wanted = _expected(row)
        everyone = {source: answers.get(row["query_key"], SourceAnswer(None, ABSENT, None)) for source, answers in sources.items()}
        everyone[str(Source.FALLBACK)] = SourceAnswer(task.fallback(row["query"]), str(State.ANSWERED), None)
        base = {name: row.get(name) for name in ("query_key", "query", "stratum", "count", "design", "inclusion", "events", "cluster")}
        for source, given in everyone.items():
            answered, counts = given.state == State.ANSWERED, task.score(wanted, given.answer, row["query"])
            text = canonical(given.answer, source) if answered else None
            line = {**base, "source": source, "wanted": row["answer"], "given": text, "state": given.state, "confidence": given.confidence}
            lines.append({**line, **counts._asdict(), "exact": answered and counts.right})
    return pa.Table.from_pylist(lines, schema=SCORED)


def _expected(row: Mapping[str, Any]) -> Any:
    try:
        return json.loads(row["answer"])
    except (TypeError, json.JSONDecodeError) as error:
        where = f"query {row['query']!r}"
        raise InputError(f"a human label is not JSON: {error}", where=where, value=row["answer"], fix="run ingest again") from None
