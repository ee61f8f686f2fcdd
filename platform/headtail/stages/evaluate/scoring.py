"""Scored rows by answer source and slice. Pure: tables in, tables and numbers out.

    SCORED rows (batch.answer_scores) -> QUALITY table, calibration, agreement, paired differences

Slices are the strata, `all` (every labelled row alike) and `traffic` (post-stratified: labelled rows of a known design stand for the
traffic). Labelled rows that nearly repeat each other are resampled as one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.calibration import calibration_error
from headtail.core.intervals import Bin, Interval, auroc, f1_difference, f1_interval, share_interval
from headtail.core.post_stratify import Ints, LabelledTraffic, TrafficCells, traffic_columns, traffic_interval
from headtail.core.rows import ALL, QUALITY, SLICES, STRATA, TRAFFIC, Source, State
from headtail.core.task import Task


class Sureness(NamedTuple):
    """How intervals are made: the chance with which they cover, bootstrap resamples and seed."""

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0


class ScoredSource(NamedTuple):
    """One answer source's rows as arrays."""

    source: str
    stratum: npt.NDArray[np.object_]
    traffic: LabelledTraffic
    tp: npt.NDArray[np.float64]
    fp: npt.NDArray[np.float64]
    fn: npt.NDArray[np.float64]
    exact: npt.NDArray[np.bool_]
    answered: npt.NDArray[np.bool_]
    confidence: npt.NDArray[np.float64]  # NaN when unknown
    given: list[str | None]
    query: list[str]

    def where(self, name: str) -> npt.NDArray[np.bool_]:
        """The rows of a slice."""
        if name == ALL:
            return np.ones(len(self.tp), dtype=bool)
        return ~np.isnan(self.traffic.chance) if name == TRAFFIC else self.stratum == name

    def counts(self, name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """tp, fp, fn of a slice: of each cluster of near-duplicates together, which is one row to a bootstrap."""
        tp, fp, fn = (_by_cluster(values, self.traffic.cluster, self.where(name)) for values in (self.tp, self.fp, self.fn))
        return tp, fp, fn


def _by_cluster(values: npt.NDArray[np.float64], cluster: Ints, inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    _, place = np.unique(cluster[inside], return_inverse=True)
    return np.asarray(np.bincount(place, values[inside]), np.float64)


def by_source(rows: pa.Table) -> list[ScoredSource]:
    """`rows` split by answer source, in order of first appearance."""
    found = []
    for source in rows["source"].unique().to_pylist():
        part = rows.filter(pc.equal(rows["source"], source))
        tp, fp, fn = (part[name].cast(pa.float64()).to_numpy() for name in ("tp", "fp", "fn"))
        confidence = part["confidence"].cast(pa.float64()).fill_null(float("nan")).to_numpy()
        answered = pc.equal(part["state"], State.ANSWERED.value).to_numpy()
        stratum = np.asarray(part["stratum"].to_pylist(), dtype=object)
        traffic = traffic_columns(part)
        given, query = (part[name].to_pylist() for name in ("given", "query"))
        found.append(ScoredSource(source, stratum, traffic, tp, fp, fn, part["exact"].to_numpy(), answered, confidence, given, query))
    return found


def quality_of(scored: ScoredSource, name: str, sure: Sureness, cells: TrafficCells | None = None) -> Interval | None:
    """Micro-F1 of one answer source on one slice; None without a row, or without a right to a figure for traffic.

    Rows in which nothing was wanted and nothing given carry no unit; a slice of such rows only has its share of answered rows as its
    quality, so that silence is not praised.
    """
    inside = scored.where(name)
    if not inside.any() or (name == TRAFFIC and cells is None):
        return None
    if name == TRAFFIC and cells is not None:
        tp, fp, fn = scored.tp[inside], scored.fp[inside], scored.fn[inside]
        found = traffic_interval(2 * tp, 2 * tp + fp + fn, scored.traffic.take(inside), cells, sure.confidence)
    else:
        found = f1_interval(*scored.counts(name), **sure._asdict())._replace(n=int(inside.sum()))
    return share_interval(scored.exact[inside], sure.confidence) if found.value != found.value else found


def exact_of(scored: ScoredSource, name: str, sure: Sureness, cells: TrafficCells | None = None) -> Interval:
    """The share of rows of a slice that are wholly right, near-duplicates as one; the slice has rows."""
    inside, right = scored.where(name), scored.exact.astype(np.float64)
    if name == TRAFFIC and cells is not None:
        return traffic_interval(right[inside], np.ones(int(inside.sum())), scored.traffic.take(inside), cells, sure.confidence)
    tp, wrong = (_by_cluster(values, scored.traffic.cluster, inside) for values in (right, 1 - right))
    if len(tp) == inside.sum():
        return share_interval(scored.exact[inside], sure.confidence)
    return f1_interval(tp, wrong, wrong, **sure._asdict())._replace(n=int(inside.sum()))


def quality_rows(rows: pa.Table, sure: Sureness, cells: TrafficCells | None = None) -> pa.Table:
    """The QUALITY table of scored rows: every answer source on every slice. `cells`: the traffic; None: there is no figure for it."""
    columns: dict[str, list[Any]] = {name: [] for name in QUALITY.names}
    for scored in by_source(rows):
        for name in SLICES:
            found = quality_of(scored, name, sure, cells)
            inside = scored.where(name) & (found is not None)
            values = found or Interval(*[None] * 6)  # type: ignore[arg-type]
            exact = None if found is None else exact_of(scored, name, sure, cells).value
            line = (scored.source, name, int(inside.sum()), int(scored.answered[inside].sum()), values.value, values.low, values.high)
            for column, value in zip(QUALITY.names, (*line, exact, values.effective, values.method), strict=True):
                columns[column].append(value)
    return pa.table(columns, schema=QUALITY)


class Calibration(NamedTuple):
    """How far an answer source's confidences hold, over its answered rows that have one. NaN when there are none, or no mix.
    `floor`, `floor_high`: the ECE that perfectly calibrated confidences would show on so many rows, see `calibration_error`."""

    n: int
    ece: float
    auroc: float
    bins: list[Bin]
    floor: float
    floor_high: float


def calibration_of(scored: ScoredSource, sure: Sureness) -> Calibration:
    """Confidence against the whole answer being right."""
    known = scored.answered & ~np.isnan(scored.confidence)
    confidence, right = scored.confidence[known], scored.exact[known]
    found = calibration_error(confidence, right, sure.confidence, seed=sure.seed, bins=15)
    return Calibration(found.n, found.ece, auroc(confidence, right), found.bins, found.floor, found.floor_high)


def agreement(task: Task, teacher: ScoredSource, student: ScoredSource) -> tuple[float, int]:
    """Micro-F1 of the student with the teacher's answers taken as wanted, and the rows both answered. Says nothing of quality."""
    tp = fp = fn = n = 0
    for theirs, ours, query in zip(teacher.given, student.given, student.query, strict=True):
        if theirs is None or ours is None:
            continue
        counts = task.score(json.loads(theirs), json.loads(ours), query)
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
    found = f1_difference(one.counts(name), other.counts(name), **sure._asdict())
    return interval_json(found._replace(n=int(one.where(name).sum())))


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
