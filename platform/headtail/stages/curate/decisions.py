"""People's decisions about answers, ready to replace the teacher's.

In: rows.REVIEWED, the task. Out: per query the person's answer in canonical form, or which answer is not to be learnt.
Answers are parsed again under the task's present schema: a decision that does not fit is not used, and is counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headtail.core.rows import key_words
from headtail.core.task import Task
from headtail.stages.curate.columns import AnswerColumns, Bools, Objects

DROP = "drop"


class ReviewDecisions(NamedTuple):
    """Decisions by query key (as two numbers)."""

    answers: dict[tuple[int, int], str]  # accepted or corrected: this holds, whatever the teacher says
    dropped: dict[tuple[int, int], tuple[int, int] | None]  # the answer_key that is not to be learnt; None: any
    stale: int  # answers that the schema refuses now


class RowDecisions(NamedTuple):
    """Decisions on each row: a person's answer or None, and whether a person dropped the row."""

    answer: Objects
    dropped: Bools
    notes: list[str]


NOBODY = ReviewDecisions({}, {}, 0)


def read_decisions(table: pa.Table, task: Task) -> ReviewDecisions:
    """The decisions of a table of rows.REVIEWED."""
    answers: dict[tuple[int, int], str] = {}
    dropped: dict[tuple[int, int], tuple[int, int] | None] = {}
    stale = 0
    for row in table.select(["query_key", "verdict", "answer", "answer_key"]).to_pylist():
        key = _words(row["query_key"])
        if row["verdict"] == DROP:
            dropped[key] = _words(row["answer_key"]) if row["answer_key"] is not None else None
            continue
        answer, problem = task.parse(row["answer"] or "")
        if problem:
            stale += 1
        else:
            answers[key] = task.dump(answer)
    return ReviewDecisions(answers, dropped, stale)


def match_decisions(decided: ReviewDecisions, rows: AnswerColumns) -> RowDecisions:
    """`decided` row by row. A drop is about one answer: another answer to the same query stays."""
    answer: Any = np.full(len(rows.state), None, dtype=object)
    gone = np.zeros(len(rows.state), dtype=bool)
    met: set[tuple[int, int]] = set()
    other = 0
    for row in _places(rows.key, [*decided.answers, *decided.dropped]):
        key = (int(rows.key[row, 0]), int(rows.key[row, 1]))
        met.add(key)
        if key in decided.answers:
            answer[row] = decided.answers[key]
            continue
        about = decided.dropped[key]
        gone[row] = about is None or about == (int(rows.answer_key[row, 0]), int(rows.answer_key[row, 1]))
        other += not gone[row]
    return RowDecisions(answer, gone, _notes(decided, len(met), other))


def _notes(decided: ReviewDecisions, matched: int, other: int) -> list[str]:
    away = len(decided.answers.keys() | decided.dropped.keys()) - matched
    counts = [
        (decided.stale, "reviewed answers are not valid under the task's schema any more: they do not hold, review those queries again"),
        (away, "reviewed queries are not among these answers"),
        (other, "answers were dropped by people, but the teacher has given another answer since: it stays, to be reviewed anew"),
    ]
    return [f"{count:,} {text}" for count, text in counts if count]


def _places(keys: npt.NDArray[np.uint64], targets: list[tuple[int, int]]) -> list[int]:
    if not targets:
        return []
    low = np.asarray([key[1] for key in targets], dtype=np.uint64)
    known = set(targets)
    near = np.flatnonzero(np.isin(keys[:, 1], low)).tolist()
    return [row for row in near if (int(keys[row, 0]), int(keys[row, 1])) in known]


def _words(key: bytes) -> tuple[int, int]:
    high, low = key_words(pa.array([key], pa.binary(16)))
    return int(high[0]), int(low[0])
