"""The watch list: queries with traffic whose new answer is worse than today's, and the groups of queries for which that is no chance.

In: SCORED rows and the status quo's answers (what users get today). Out: WORSE_QUERY rows, a person's label deciding each, by the events
they cost; WORSE_GROUP rows, an exact sign test over the rows on which the two differ (McNemar), corrected over the groups (Holm).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt, load_ref, output_table
from headtail.adapters.storage.user_tables import read_user_table
from headtail.batch import read_answers
from headtail.core.bounds import holm, share_p
from headtail.core.errors import InputError
from headtail.core.intervals import clopper_pearson
from headtail.core.keys import canonical, fingerprint, query_key
from headtail.core.receipt import Receipt
from headtail.core.rows import ALL, KEY, Source
from headtail.core.score import Counts, f1
from headtail.core.task import Task
from headtail.core.text import normalise
from headtail.stages.base import Stage
from headtail.stages.evaluate.confusion import spans_of

WORSE_QUERY = pa.schema(
    [
        ("source", pa.string()),
        ("query_key", KEY),
        ("query", pa.string()),
        ("stratum", pa.string()),
        ("count", pa.int64()),
        ("wanted", pa.string()),
        ("given", pa.string()),
        ("status_quo", pa.string()),  # canonical JSON; null: no valid answer
        ("score", pa.float64()),  # the row's own F1, 0..1
        ("score_status_quo", pa.float64()),
        ("cost", pa.float64()),  # events times what is lost: the order
    ]
)
WORSE_GROUP = pa.schema(
    [
        ("source", pa.string()),
        ("kind", pa.string()),  # all | stratum | label (that people gave)
        ("group", pa.string()),
        ("n", pa.int64()),  # labelled rows
        ("worse", pa.int64()),
        ("better", pa.int64()),
        ("worse_share", pa.float64()),  # of the rows that differ, with its interval
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("events", pa.int64()),  # of the rows that are worse
        ("p", pa.float64()),  # of: worse no more often than better
        ("clear", pa.bool_()),  # proven, over all groups of the source together
    ]
)


WATCH_LIST = "watch list:"  # how a note of it begins


class StatusQuo(NamedTuple):
    """Where today's answers come from, and what proves which they are."""

    where: str
    digest: Receipt | str
    table: pa.Table  # query_key, answer; of a precompute answer_key too


def read_status_quo(store: Storage, ref: str, column: str) -> StatusQuo:
    """`ref`: a CSV, JSONL or Parquet file with columns `query` and `column`, a table ref with `query_key` and `column`, or precompute's."""
    path = Path(ref)
    if path.is_file():
        table, data = read_user_table(ref, "status_quo")
        _check_columns(table, ("query", column), ref)
        keys = pa.array([query_key(normalise(str(query))) for query in table["query"].to_pylist()], KEY)
        made = pa.table({"query_key": keys, "query": table["query"].cast(pa.string()), "answer": table[column].cast(pa.string())})
        return StatusQuo(path.name, fingerprint({"file": data, "column": column}), made)
    if ":" in ref:
        receipt, name = load_ref(store, ref)
        table = output_table(store, receipt, name)
        _check_columns(table, ("query_key", column), ref)
        return StatusQuo(f"{receipt.path}:{name}", receipt, table.select(["query_key", column]).rename_columns(["query_key", "answer"]))
    if path.suffix:
        fix = "check the path; other answers are named as stage:output, or as precompute/<fingerprint>"
        raise InputError("the status quo's file is not there", where="status_quo", value=ref, fix=fix)
    receipt = load_receipt(store, "precompute", ref)
    tables = list(read_answers(store, receipt, ["query_key", "answer", "answer_key"]))
    return StatusQuo(receipt.path, receipt, pa.concat_tables(tables))


def _check_columns(table: pa.Table, names: Sequence[str], where: str) -> None:
    if missing := [name for name in names if name not in table.column_names]:
        fix = "set status_quo_column to the column that holds the status quo's answers as JSON"
        raise InputError(f"the status quo's table lacks {missing[0]}", where=where, value=", ".join(table.column_names), fix=fix)


def write_watch_list(stage: Stage, task: Task, rows: pa.Table, today: StatusQuo, confidence: float) -> None:
    """Both tables, and a note for each source. InputError when no labelled query has a valid answer of the status quo."""
    wanted = {row["query_key"] for row in rows.select(["query_key"]).to_pylist()}
    part = today.table.filter(pc.is_in(today.table["query_key"], value_set=pa.array(list(wanted), KEY))).to_pylist()
    given = _answers_given(task, part, today.where)
    valid = {key: answer for key, answer in given.items() if not task.parse(answer)[1]}
    if not valid:
        fix = "give its answers as JSON under the task's schema, for the labelled queries"
        raise InputError(
            "the status quo has no valid answer to a labelled query", where=today.where, value=f"{len(given):,} given", fix=fix
        )
    compared = [row for row in compare_rows(task, rows.to_pylist(), given, valid) if row["source"] != Source.FALLBACK]
    queries = sorted((row for row in compared if row["cost"] > 0), key=lambda row: (row["source"], -row["cost"], row["query"]))
    groups = [line for source in dict.fromkeys(row["source"] for row in compared) for line in group_rows(compared, source, confidence)]
    stage.table("watch_list", pa.Table.from_pylist(queries, schema=WORSE_QUERY))
    stage.table("watch_groups", pa.Table.from_pylist(groups, schema=WORSE_GROUP))
    stage.rows |= {"status_quo": len(given), "status_quo_invalid": len(given) - len(valid)}
    for source in dict.fromkeys(line["source"] for line in groups):
        stage.note(_words([line for line in groups if line["source"] == source], [row for row in queries if row["source"] == source]))


def _answers_given(task: Task, rows: Sequence[Mapping[str, Any]], where: str) -> dict[bytes, str]:
    """The one answer to each query. InputError where two differ; of a precompute that of the smaller answer_key."""
    found: dict[bytes, Mapping[str, Any]] = {}
    for row in sorted((row for row in rows if row["answer"]), key=lambda row: row.get("answer_key") or b""):
        first = found.setdefault(row["query_key"], row)
        if "answer_key" not in row and _meaning(task, first["answer"]) != _meaning(task, row["answer"]):
            name = f"{row['query']!r}: " if row.get("query") else ""
            raise InputError(
                "the status quo has two different answers to one query",
                where=where,
                value=f"{name}{first['answer']} and {row['answer']}",
                fix="keep the one that users get",
            )
    return {key: row["answer"] for key, row in found.items()}


def _meaning(task: Task, text: str) -> str:
    answer, problem = task.parse(text)
    return text if problem else canonical(answer)


def compare_rows(
    task: Task, rows: Sequence[Mapping[str, Any]], given: Mapping[bytes, str], valid: Mapping[bytes, str]
) -> Iterator[dict[str, Any]]:
    """SCORED rows that the status quo was asked, with its answer and score beside. An answer of it that is not valid scores 0."""
    for row in rows:
        if (key := row["query_key"]) not in given:
            continue
        wanted, answer = json.loads(row["wanted"]), valid.get(key)
        ours = f1([Counts(row["tp"], row["fp"], row["fn"])]) if row["given"] is not None else 0.0
        theirs = f1([task.score(wanted, json.loads(answer), row["query"])]) if answer is not None else 0.0
        cost = max(0.0, theirs - ours) * (row["count"] or 0)
        labels = sorted({label for label, _ in spans_of(task.file.score, wanted)})
        yield {**row, "status_quo": answer, "score": ours, "score_status_quo": theirs, "cost": cost, "labels": labels}


def group_rows(compared: Sequence[Mapping[str, Any]], source: str, confidence: float) -> list[dict[str, Any]]:
    """WORSE_GROUP rows of a source: all, each stratum, each label that people gave."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in compared:
        if row["source"] == source:
            for each in (("all", ALL), ("stratum", row["stratum"]), *(("label", label) for label in row["labels"])):
                groups[each].append(row)
    lines, ps = [], list[float]()
    for (kind, group), some in groups.items():
        differences = np.asarray([row["score"] - row["score_status_quo"] for row in some])
        worse, better = int((differences < -1e-9).sum()), int((differences > 1e-9).sum())
        low, high = clopper_pearson(worse, worse + better, confidence)
        events = sum(row["count"] or 0 for row, difference in zip(some, differences, strict=True) if difference < -1e-9)
        line = {"source": source, "kind": kind, "group": group, "n": len(some), "worse": worse, "better": better, "events": events}
        share = {"worse_share": worse / (worse + better) if worse + better else None, "low": low, "high": high}
        ps.append(float(share_p(worse, worse + better, 0.5)))
        lines.append({**line, **share, "p": ps[-1]})
    clear, _ = holm(ps, 1 - confidence)
    return [{**line, "clear": bool(proven)} for line, proven in zip(lines, clear, strict=True)]


def _words(groups: Sequence[Mapping[str, Any]], queries: Sequence[Mapping[str, Any]]) -> str:
    whole = next(line for line in groups if line["kind"] == "all")
    clear = [f"{line['group']} ({line['worse']:,} worse, {line['better']:,} better)" for line in groups if line["clear"]]
    text = f"{WATCH_LIST} {whole['source']} is worse than the status quo on {whole['worse']:,} of {whole['n']:,} labelled queries, better "
    text += f"on {whole['better']:,}; those with traffic lose most on {', '.join(repr(row['query']) for row in queries[:3]) or 'none'}"
    return f"{text}; clearly worse: {', '.join(clear) or 'no group'}"
