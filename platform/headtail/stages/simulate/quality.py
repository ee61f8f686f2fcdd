"""The quality of a design's answers, by stratum and over its traffic, from rows that were scored against people's labels.

In: scored rows (rows.SCORED), requests by stratum and answer source. Out: micro-F1 with intervals, and the difference from another design
on the same rows. The weight of each stratum is known from the requests; within it a labelled row counts as the events that it stands
for: its own, over the chance with which it was drawn. Rows of which nobody knows that chance are left out. Near-duplicates are resampled
as one. With rows that count as fewer than 30 equal ones there is no figure. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.intervals import Array, clopper_pearson, effective_rows
from headtail.core.rows import SMALL, STRATA

RESAMPLES = 1000
_FEW = 10  # effective rows right, or wrong, or on which two designs differ, below which a bootstrap is not believed


class ScoredCells(NamedTuple):
    """By source and stratum: for each labelled row (in one order for all sources) 2tp and 2tp + fp + fn."""

    by_source: Mapping[str, tuple[Array, ...]]  # of shape (rows, 2) for each of STRATA
    weights: tuple[Array, ...]  # by stratum: of each row
    draws: tuple[Array, ...]  # by stratum: how often each resample takes each row, shape (RESAMPLES, rows)
    clusters: tuple[npt.NDArray[np.int64], ...]  # by stratum: of each row, numbered from 0


class QualityEstimate(NamedTuple):
    """Micro-F1 with its 95 % interval."""

    value: float
    low: float
    high: float
    rows: int


def scored_cells(table: pa.Table, seed: int) -> ScoredCells:
    """The cells of an evaluation's rows."""
    table = table.filter(pc.is_valid(table["inclusion"])).sort_by("query_key")
    found: dict[str, tuple[Array, ...]] = {}
    for source in table["source"].unique().to_pylist():
        own = table.filter(pc.equal(table["source"], source))
        cells = []
        for stratum in STRATA:
            some = own.filter(pc.equal(own["stratum"], stratum))
            tp, fp, fn = (np.asarray(some[name], np.float64) for name in ("tp", "fp", "fn"))
            cells.append(np.column_stack([2 * tp, 2 * tp + fp + fn]))
        found[source] = tuple(cells)
    rng = np.random.default_rng(seed)
    first = table.filter(pc.equal(table["source"], next(iter(found), "")))
    parts = [first.filter(pc.equal(first["stratum"], stratum)) for stratum in STRATA]
    weights = tuple(np.maximum(np.asarray(part["count"].fill_null(0), np.float64), 1) / np.asarray(part["inclusion"]) for part in parts)
    clusters = tuple(_clusters(part) for part in parts)
    return ScoredCells(found, weights, tuple(_resamples(cluster, rng) for cluster in clusters), clusters)


def _clusters(rows: pa.Table) -> npt.NDArray[np.int64]:
    """The cluster of near-duplicates of each row; a row without one is a cluster of its own."""
    alone = pa.array(np.arange(-1, -1 - len(rows), -1))
    return np.unique(np.asarray(pc.coalesce(rows["cluster"].combine_chunks(), alone)), return_inverse=True)[1].astype(np.int64)


def _resamples(cluster: npt.NDArray[np.int64], rng: np.random.Generator) -> Array:
    """How often each resample takes each row."""
    if not len(cluster):
        return np.zeros((RESAMPLES, 0))
    number = int(cluster.max()) + 1
    return rng.multinomial(number, np.full(number, 1 / number), RESAMPLES)[:, cluster].astype(np.float64)


class MixtureSums(NamedTuple):
    """A design's answers over the traffic: 2tp and units per request."""

    value: Array  # by stratum, shape (strata, 2)
    drawn: Array  # by resample and stratum, shape (RESAMPLES, strata, 2)
    rows: Array  # what each cluster of near-duplicates adds, shape (clusters, 2)
    strata: tuple[Array, ...]  # the same of one stratum


def why_unknown(cells: ScoredCells, requests: Mapping[str, Array]) -> str:
    """Why these answers have no quality; empty: they have one. `requests`: by source, requests of each stratum."""
    for source, counts in requests.items():
        rows, who = cells.by_source.get(source), source or "a student"
        if rows is None:
            return f"{who} has no scored rows"
        if bare := [STRATA[place] for place in np.flatnonzero(counts) if not len(rows[place])]:
            return f"{who} has no scored rows in {bare[0]}"
    if not requests:
        return "nobody scores people's own answers"
    parts = _row_parts(cells, requests)
    effective = effective_rows(np.concatenate([part[:, 1] for part in parts]))
    return f"its labelled rows count as {effective:.0f} equal ones, fewer than {SMALL}" if effective < SMALL else ""


def _row_parts(cells: ScoredCells, requests: Mapping[str, Array]) -> tuple[Array, ...]:
    """By stratum, what each cluster of near-duplicates adds to 2tp and units per request."""
    total = np.sum(list(requests.values()), axis=0).sum()
    parts = []
    for place, (own, cluster) in enumerate(zip(cells.weights, cells.clusters, strict=True)):
        part = np.zeros((int(cluster.max(initial=-1)) + 1, 2))
        for source, counts in requests.items():
            if counts[place]:
                np.add.at(part, cluster, counts[place] / total * (own / own.sum())[:, None] * cells.by_source[source][place])
        parts.append(part)
    return tuple(parts)


def mixture_sums(cells: ScoredCells, requests: Mapping[str, Array]) -> MixtureSums | None:
    """The sums of answers of several sources. `requests`: by source, requests of each stratum. None where `why_unknown` says why."""
    if why_unknown(cells, requests):
        return None
    total = np.sum(list(requests.values()), axis=0)
    value, drawn = np.zeros((len(STRATA), 2)), np.zeros((RESAMPLES, len(STRATA), 2))
    for source, counts in requests.items():
        for place in np.flatnonzero(counts):
            weight, own, rows = counts[place] / total.sum(), cells.weights[place], cells.by_source[source][place]
            value[place] += weight * (own @ rows) / own.sum()
            drawn[:, place] += weight * (cells.draws[place] @ (own[:, None] * rows)) / (cells.draws[place] @ own)[:, None]
    parts = _row_parts(cells, requests)
    return MixtureSums(value, drawn, np.concatenate(parts), parts)


def mixture_quality(cells: ScoredCells, sums: MixtureSums, place: int | None = None) -> QualityEstimate | None:
    """F1 over all traffic, or of one stratum; None where the stratum has too few labelled rows for an interval, or no request.

    The interval is the bootstrap's; with under 10 effective rows right, or wrong, it is that of Clopper and Pearson at the effective number
    of rows: rows that are all right have a bootstrap without a width.
    """
    value, drawn, parts = sums.value, sums.drawn, sums.rows
    if place is not None:
        value, drawn, parts = value[place : place + 1], drawn[:, place : place + 1], sums.strata[place]
        if len(cells.draws[place][0]) < SMALL or not value[0, 1]:
            return None
    rows = sum(len(draws[0]) for draws in cells.draws) if place is None else len(cells.draws[place][0])
    f1, effective = float(_f1(value)), effective_rows(parts[:, 1])
    if min(f1, 1 - f1) * effective < _FEW:
        return QualityEstimate(f1, *clopper_pearson(f1 * effective, effective), rows)
    low, high = np.quantile(_f1(drawn), [0.025, 0.975])
    return QualityEstimate(f1, float(low), float(high), rows)


def quality_difference(first: MixtureSums, second: MixtureSums) -> tuple[float, float, float]:
    """F1 over all traffic of the first design minus the second's, on the same resamples: value, low, high.

    Where the two differ on fewer than 10 clusters of rows, the bounds are those of the shares that one gains and loses, each by Clopper and
    Pearson: two designs that agree on 40 rows may differ on the forty-first.
    """
    value = float(_f1(first.value) - _f1(second.value))
    gaps = first.rows[:, 0] / first.rows[:, 1].sum() - second.rows[:, 0] / second.rows[:, 1].sum()
    if int(np.count_nonzero(np.abs(gaps) > 1e-12)) < _FEW:
        effective = min(effective_rows(one.rows[:, 1]) for one in (first, second))
        gained, lost = (clopper_pearson(float(part.sum()) * effective, effective) for part in (np.maximum(gaps, 0), np.maximum(-gaps, 0)))
        return value, min(value, gained[0] - lost[1]), max(value, gained[1] - lost[0])
    low, high = np.quantile(_f1(first.drawn) - _f1(second.drawn), [0.025, 0.975])
    return value, float(low), float(high)


def _f1(sums: Array) -> Array:
    """Over the strata, the second axis from the end."""
    hits, units = sums[..., 0].sum(axis=-1), sums[..., 1].sum(axis=-1)
    return np.asarray(hits / np.where(units > 0, units, 1.0))
