"""The quality of a design's answers, by stratum and over its traffic, from rows that were scored against people's labels.

In: scored rows (rows.SCORED), requests by stratum and answer source. Out: micro-F1 with intervals, and the difference from another design
on the same rows. The weight of each stratum is known from the requests; within it a labelled row counts as the events that it stands
for: its own, over the chance with which it was drawn. Rows of which nobody knows that chance are left out. Near-duplicates are resampled
as one. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.intervals import Array
from headtail.core.rows import SMALL, STRATA

RESAMPLES = 1000


class ScoredCells(NamedTuple):
    """By source and stratum: for each labelled row (in one order for all sources) 2tp and 2tp + fp + fn."""

    by_source: Mapping[str, tuple[Array, ...]]  # of shape (rows, 2) for each of STRATA
    weights: tuple[Array, ...]  # by stratum: of each row
    draws: tuple[Array, ...]  # by stratum: how often each resample takes each row, shape (RESAMPLES, rows)


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
    draws = tuple(_resamples(part, rng) for part in parts)
    return ScoredCells(found, weights, draws)


def _resamples(rows: pa.Table, rng: np.random.Generator) -> Array:
    """How often each resample takes each row."""
    alone = pa.array(np.arange(-1, -1 - len(rows), -1))
    named, cluster = np.unique(np.asarray(pc.coalesce(rows["cluster"].combine_chunks(), alone)), return_inverse=True)
    if not len(named):
        return np.zeros((RESAMPLES, 0))
    return rng.multinomial(len(named), np.full(len(named), 1 / len(named)), RESAMPLES)[:, cluster].astype(np.float64)


def why_unknown(cells: ScoredCells, requests: Mapping[str, Array]) -> str:
    """Why these answers have no quality; empty: they have one. `requests`: by source, requests of each stratum."""
    for source, counts in requests.items():
        rows, who = cells.by_source.get(source), source or "a student"
        if rows is None:
            return f"{who} has no scored rows"
        if bare := [STRATA[place] for place in np.flatnonzero(counts) if not len(rows[place])]:
            return f"{who} has no scored rows in {bare[0]}"
    return "" if requests else "nobody scores people's own answers"


def mixture_sums(cells: ScoredCells, requests: Mapping[str, Array]) -> tuple[Array, Array] | None:
    """2tp and units per request, summed over traffic: by stratum (strata, 2), and by resample and stratum (RESAMPLES, strata, 2).

    `requests`: by source, requests of each stratum. None where `why_unknown` says why.
    """
    if why_unknown(cells, requests):
        return None
    total = np.sum(list(requests.values()), axis=0)
    value, drawn = np.zeros((len(STRATA), 2)), np.zeros((RESAMPLES, len(STRATA), 2))
    for source, counts in requests.items():
        for place in np.flatnonzero(counts):
            weight, own, rows = counts[place] / total.sum(), cells.weights[place], cells.by_source[source][place]
            value[place] += weight * (own @ rows) / own.sum()
            drawn[:, place] += weight * (cells.draws[place] @ (own[:, None] * rows)) / (cells.draws[place] @ own)[:, None]
    return value, drawn


def mixture_quality(cells: ScoredCells, sums: tuple[Array, Array], place: int | None = None) -> QualityEstimate | None:
    """F1 over all traffic, or of one stratum; None where the stratum has too few labelled rows for an interval, or no request."""
    value, drawn = sums
    if place is not None:
        value, drawn = value[place : place + 1], drawn[:, place : place + 1]
        if len(cells.draws[place][0]) < SMALL or not value[0, 1]:
            return None
    rows = sum(len(draws[0]) for draws in cells.draws) if place is None else len(cells.draws[place][0])
    low, high = np.quantile(_f1(drawn), [0.025, 0.975])
    return QualityEstimate(float(_f1(value)), float(low), float(high), rows)


def quality_difference(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[float, float, float]:
    """F1 over all traffic of the first design minus the second's, on the same resamples: value, low, high."""
    low, high = np.quantile(_f1(first[1]) - _f1(second[1]), [0.025, 0.975])
    return float(_f1(first[0]) - _f1(second[0])), float(low), float(high)


def _f1(sums: Array) -> Array:
    """Over the strata, the second axis from the end."""
    hits, units = sums[..., 0].sum(axis=-1), sums[..., 1].sum(axis=-1)
    return np.asarray(hits / np.where(units > 0, units, 1.0))
