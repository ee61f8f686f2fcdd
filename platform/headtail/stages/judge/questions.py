"""What a judge is asked: which answers, and what it is shown of each. Pure: tables and rows in, tables out.

    answers (+ other answers to the same queries) + labelled keys -> drawn rows -> a table of questions for each round

Every labelled row is drawn, and so many others of each stratum by a hash of the key: an even draw, whatever their state, as the gate's
inference needs it. Round one asks of the answers; round two of the others, or of the same pair in the other order.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headtail.batch.prepare import INPUT
from headtail.core.rows import KEY, State, uniform_draw, with_side_inputs
from headtail.core.task import Task
from headtail.stages.judge.rubric import CANDIDATE, FIRST, PROMPT, SECOND

COLUMNS = ["query_key", "query", "answer_key", "state", "answer", "count", "stratum"]  # of an answer, that judging needs

# A drawn row: the answer to be judged, and the other answer to the same query where there is one.
DRAWN = pa.schema(
    [
        ("query_key", KEY),
        ("query", pa.string()),
        ("stratum", pa.string()),
        ("count", pa.int64()),
        ("labelled", pa.bool_()),
        ("answer_key", KEY),
        ("answer", pa.string()),  # canonical JSON; null unless answered
        ("other_key", KEY),
        ("other", pa.string()),
    ]
)


def draw_rows(tables: Iterable[pa.Table], labelled: pa.Array, learnt: pa.Array, rows: int, seed: int) -> list[dict[str, Any]]:
    """All answers to `labelled` queries and at most `rows` others of each stratum, in an order drawn from the keys; never of the others one
    that the model learnt from (`learnt`): its answer there says nothing of its answers elsewhere."""
    held: list[tuple[float, dict[str, Any]]] = []
    others: dict[str, list[tuple[float, bytes, dict[str, Any]]]] = {}
    for table in tables:
        chance = uniform_draw(table["query_key"], "judge", seed)
        mine = pc.is_in(table["query_key"], value_set=labelled).to_numpy()
        free = ~mine & ~pc.is_in(table["query_key"], value_set=learnt).to_numpy()
        held += zip(chance[mine].tolist(), table.filter(pa.array(mine)).to_pylist(), strict=True)
        strata = np.asarray(table["stratum"].fill_null("").to_pylist(), dtype=object)
        for stratum in sorted(set(strata[free])):
            place = np.flatnonzero(free & (strata == stratum))
            place = place[np.argsort(chance[place], kind="stable")[:rows]]
            found = table.take(pa.array(place)).to_pylist()
            more = [(value, row["query_key"], row) for value, row in zip(chance[place].tolist(), found, strict=True)]
            others[stratum] = heapq.nsmallest(rows, [*others.get(stratum, []), *more], key=lambda item: item[:2])
    drawn = [(chance, {**row, "labelled": True}) for chance, row in held]
    drawn += [(chance, {**row, "labelled": False}) for some in others.values() for chance, _, row in some]
    return [_plain(row) for _, row in sorted(drawn, key=lambda item: (item[0], item[1]["query_key"]))]


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    answered = row["state"] == State.ANSWERED
    kept = {name: row[name] for name in ("query_key", "query", "stratum", "count", "labelled", "answer_key")}
    return {**kept, "answer": row["answer"] if answered else None, "other_key": None, "other": None}


def pair_rows(drawn: Sequence[Mapping[str, Any]], tables: Iterable[pa.Table]) -> list[dict[str, Any]]:
    """`drawn` with the answer of `tables` to the same query beside it."""
    keys = pa.array([row["query_key"] for row in drawn], KEY)
    beside: dict[bytes, dict[str, Any]] = {}
    for table in tables:
        for row in table.filter(pc.is_in(table["query_key"], value_set=keys)).to_pylist():
            beside[row["query_key"]] = row
    paired = []
    for row in drawn:
        found = beside.get(row["query_key"])
        answer = found["answer"] if found and found["state"] == State.ANSWERED else None
        paired.append({**row, "other_key": found["answer_key"] if found else None, "other": answer})
    return paired


def question_table(
    judge: Task, task: Task, rows: Sequence[Mapping[str, Any]], side: Mapping[bytes, Mapping[str, list[str]]], second: bool
) -> pa.Table:
    """What `judge` is asked in a round, as an input table of precompute. Answers that are not there, or that are equal to the one
    that they are compared with, are not asked about."""
    shown: dict[str, Callable[[Mapping[str, Any]], str]] = {
        CANDIDATE: lambda row: row["other" if second else "answer"],
        FIRST: lambda row: row["other" if second else "answer"],
        SECOND: lambda row: row["answer" if second else "other"],
    }
    pairwise = FIRST in judge.side_inputs
    lines = []
    for row in rows:
        if pairwise and (row["answer"] is None or row["other"] is None or row["answer"] == row["other"]):
            continue
        if not pairwise and shown[CANDIDATE](row) is None:
            continue
        beside = side.get(row["query_key"], {})
        line = {name: row[name] for name in ("query_key", "query", "count", "stratum")} | {"eval_only": row["labelled"]}
        for name in judge.side_inputs:
            if name == PROMPT:
                line[name] = [message["content"] for message in task.messages(row["query"], beside)]
            else:
                line[name] = [shown[name](row)] if name in shown else beside.get(name)
        lines.append(line)
    return pa.Table.from_pylist(lines, schema=with_side_inputs(INPUT, judge.side_inputs))
