"""Score answers against human labels, row by row, then by answer source and slice. Pure: tables and dicts in, tables and numbers out.

    human labels + {answer source: {query_key: SourceAnswer}} -> SCORED rows -> QUALITY table, calibration, agreement, paired differences

Slices are the strata, `all` (every labelled row alike) and `traffic` (labelled rows weighted by their events).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.errors import InputError
from headtail.core.intervals import Bin, Interval, auroc, ece, f1_difference, f1_interval, reliability, share_interval
from headtail.core.keys import canonical
from headtail.core.rows import ALL, QUALITY, SCORED, SLICES, STRATA, TRAFFIC, Source, State
from headtail.core.task import Task

ABSENT = "absent"  # state of a labelled row that an answer source was never asked
COLUMNS = ["query_key", "answer_key", "state", "answer", "confidence"]  # of an answer, that scoring needs


class Sureness(NamedTuple):
    """How intervals are made: the chance with which they cover, bootstrap resamples and seed."""

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0


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
    """One SCORED row per labelled row and answer source, the fallback's last."""
    lines = []
    for row in labels.to_pylist():
        wanted = _expected(row)
        everyone = {source: answers.get(row["query_key"], SourceAnswer(None, ABSENT, None)) for source, answers in sources.items()}
        everyone[str(Source.FALLBACK)] = SourceAnswer(task.fallback(row["query"]), str(State.ANSWERED), None)
        base = {name: row[name] for name in ("query_key", "query", "stratum", "count")}
        for source, given in everyone.items():
            answered, counts = given.state == State.ANSWERED, task.score(wanted, given.answer)
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


class ScoredSource(NamedTuple):
    """One answer source's rows as arrays."""

    source: str
    stratum: npt.NDArray[np.object_]
    traffic: npt.NDArray[np.float64]
    tp: npt.NDArray[np.float64]
    fp: npt.NDArray[np.float64]
    fn: npt.NDArray[np.float64]
    exact: npt.NDArray[np.bool_]
    answered: npt.NDArray[np.bool_]
    confidence: npt.NDArray[np.float64]  # NaN when unknown
    given: list[str | None]

    def where(self, name: str) -> npt.NDArray[np.bool_]:
        """The rows of a slice."""
        if name == ALL:
            return np.ones(len(self.tp), dtype=bool)
        return self.traffic > 0 if name == TRAFFIC else self.stratum == name


def by_source(rows: pa.Table) -> list[ScoredSource]:
    """`rows` split by answer source, in order of first appearance."""
    found = []
    for source in rows["source"].unique().to_pylist():
        part = rows.filter(pc.equal(rows["source"], source))
        tp, fp, fn, count = (part[name].cast(pa.float64()).to_numpy() for name in ("tp", "fp", "fn", "count"))
        confidence = part["confidence"].cast(pa.float64()).fill_null(float("nan")).to_numpy()
        answered = pc.equal(part["state"], State.ANSWERED.value).to_numpy()
        stratum = np.asarray(part["stratum"].to_pylist(), dtype=object)
        traffic = np.nan_to_num(count, nan=0.0)
        found.append(
            ScoredSource(source, stratum, traffic, tp, fp, fn, part["exact"].to_numpy(), answered, confidence, part["given"].to_pylist())
        )
    return found


def quality_of(scored: ScoredSource, name: str, sure: Sureness) -> Interval:
    """Micro-F1 of one answer source on one slice. Rows in which nothing was wanted and nothing given carry no unit; a slice of
    such rows only has its share of answered rows as its quality, so that silence is not praised."""
    inside = scored.where(name)
    weights = scored.traffic[inside] if name == TRAFFIC else None
    tp, fp, fn = scored.tp[inside], scored.fp[inside], scored.fn[inside]
    found = f1_interval(tp, fp, fn, weights, **sure._asdict())
    return share_interval(scored.exact[inside], sure.confidence) if found.value != found.value else found


def quality_rows(rows: pa.Table, sure: Sureness) -> pa.Table:
    """The QUALITY table of scored rows: every answer source on every slice."""
    columns: dict[str, list[Any]] = {name: [] for name in QUALITY.names}
    for scored in by_source(rows):
        for name in SLICES:
            inside, found = scored.where(name), quality_of(scored, name, sure)
            weights = scored.traffic[inside] if name == TRAFFIC else np.ones(int(inside.sum()))
            values = found if inside.any() else Interval(*[None] * 6)  # type: ignore[arg-type]
            exact = float(np.average(scored.exact[inside], weights=weights)) if inside.any() else None
            line = (scored.source, name, int(inside.sum()), int(scored.answered[inside].sum()), values.value, values.low, values.high)
            for column, value in zip(QUALITY.names, (*line, exact, values.effective, values.method), strict=True):
                columns[column].append(value)
    return pa.table(columns, schema=QUALITY)


class Calibration(NamedTuple):
    """How far an answer source's confidences hold, over its answered rows that have one. NaN when there are none, or no mix."""

    n: int
    ece: float
    auroc: float
    bins: list[Bin]


def calibration_of(scored: ScoredSource, sure: Sureness) -> Calibration:
    """Confidence against the whole answer being right."""
    known = scored.answered & ~np.isnan(scored.confidence)
    confidence, right = scored.confidence[known], scored.exact[known]
    bins = reliability(confidence, right, 15, sure.confidence)
    return Calibration(int(known.sum()), ece(confidence, right), auroc(confidence, right), bins)


def agreement(task: Task, teacher: ScoredSource, student: ScoredSource) -> tuple[float, int]:
    """Micro-F1 of the student with the teacher's answers taken as wanted, and the rows both answered. Says nothing of quality."""
    tp = fp = fn = n = 0
    for theirs, ours in zip(teacher.given, student.given, strict=True):
        if theirs is None or ours is None:
            continue
        counts = task.score(json.loads(theirs), json.loads(ours))
        tp, fp, fn, n = tp + counts.tp, fp + counts.fp, fn + counts.fn, n + 1
    units = 2 * tp + fp + fn
    return (2 * tp / units if units else float(n > 0)), n


def source_differences(scored: Sequence[ScoredSource], sure: Sureness) -> Iterator[dict[str, Any]]:
    """Each other answer source minus the teacher (the first answer source when none has that name), on the same rows, by slice."""
    base = next((s for s in scored if s.source == Source.TEACHER), scored[0])
    for other in scored:
        for name in (*STRATA, ALL) if other is not base else ():
            if other.where(name).any():
                yield {"source": other.source, "minus": base.source, "split": name, **paired_difference(other, base, name, sure)}


def paired_difference(one: ScoredSource, other: ScoredSource, name: str, sure: Sureness) -> dict[str, Any]:
    """The paired difference of two answer sources on the rows of a slice, as JSON."""
    inside = one.where(name)
    a, b = ((s.tp[inside], s.fp[inside], s.fn[inside]) for s in (one, other))
    return interval_json(f1_difference(a, b, **sure._asdict()))


def interval_json(interval: Interval) -> dict[str, Any]:
    """An interval as JSON; null for a value that there is none of."""
    value = None if interval.value != interval.value else interval.value
    return {
        "value": value,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "effective_n": interval.effective,
        "method": interval.method,
    }
