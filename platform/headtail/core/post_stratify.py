"""Figures for traffic from labelled rows: post-stratified by frequency, with intervals.

    share of the traffic of each cell (known exactly)  x  mean of the cell (its labelled rows)

In: labelled rows with the events of their query, what each stands for, its cell and cluster; the traffic of every cell. Out: values with
intervals. A cell is a doubling of a query's events in the log; queries that the log had not seen are a cell of their own. What a labelled
query gets is known, so only the traffic of the others is uncertain (finite-population correction). Knows nothing of tasks, files or gates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.intervals import NONE, Array, Interval

Ints = npt.NDArray[np.int64]

POST_STRATIFIED = "post-stratified"
UNSEEN_CELL = 0
CELLS = 64  # 0: never seen; 1 + k: 2^k to 2^(k+1) - 1 events
_CELL_ROWS, _BET_ROWS = 8.0, 32.0  # effective rows below which a cell is joined with its neighbour; more, so that bets are of like size
_MISSED = 1e-3  # chance that any of the rows that count as certain would not have been drawn


def cell_of(counts: Ints) -> Ints:
    """The cell of queries by their events in the log."""
    return np.where(counts > 0, 1 + np.floor(np.log2(np.maximum(counts, 1)) + 1e-12), UNSEEN_CELL).astype(np.int64)


class TrafficCells(NamedTuple):
    """The traffic that a figure speaks for, by cell (CELLS entries): queries, events, and the sum of squared events."""

    queries: Array
    events: Array
    squares: Array


def traffic_cells(counts: Ints, events: Ints) -> TrafficCells:
    """Cells of queries that had `counts` events in the log and have `events` in the traffic."""
    cell, size = cell_of(counts), events.astype(np.float64)
    sums = [np.bincount(cell, weights, CELLS) for weights in ((size > 0).astype(np.float64), size, size * size)]
    return TrafficCells(*(np.asarray(found, np.float64) for found in sums))


class LabelledTraffic(NamedTuple):
    """Labelled rows as traffic: cell, events of the query in the traffic, events in the log (at least 1: what like queries are expected
    to have), chance of being drawn (NaN: unknown), cluster of near-duplicates."""

    cell: Ints
    events: Array
    counts: Array
    chance: Array
    cluster: Ints

    def take(self, keep: npt.NDArray[np.bool_]) -> LabelledTraffic:
        """Some of the rows."""
        return LabelledTraffic(self.cell[keep], self.events[keep], self.counts[keep], self.chance[keep], self.cluster[keep])

    @property
    def stands_for(self) -> Array:
        """Events of unlabelled queries that each row stands for, up to a factor per cell."""
        return self.counts * (1 - self.chance) / self.chance


def labelled_traffic(counts: Ints, events: Array, chance: Array, cluster: Ints) -> LabelledTraffic:
    """Rows from the columns of a table."""
    return LabelledTraffic(cell_of(counts), events, np.maximum(counts, 1).astype(np.float64), chance, cluster)


def traffic_columns(rows: pa.Table) -> LabelledTraffic:
    """The same from rows of one answer source (rows.SCORED). A row without a cluster is one of its own."""
    count, events = (rows[name].fill_null(0).to_numpy() for name in ("count", "events"))
    alone = pa.array(np.arange(-1, -1 - len(rows), -1))
    cluster = pc.coalesce(rows["cluster"].combine_chunks(), alone).to_numpy(zero_copy_only=False)
    chance = rows["inclusion"].fill_null(float("nan")).to_numpy()
    return labelled_traffic(count, events.astype(np.float64), chance, np.unique(cluster, return_inverse=True)[1])


class _Parts(NamedTuple):
    """What an estimate is made of, by joined cell: unlabelled events, their number as equal queries, whether a row stands for them."""

    place: Ints  # joined cell of each row
    share: Array  # of each row in the estimate of its joined cell; sums to 1
    open: Array
    equals: Array
    lit: npt.NDArray[np.bool_]


def _join_cells(rows: LabelledTraffic, stands_for: Array, traffic: TrafficCells, least: float = _CELL_ROWS) -> _Parts:
    """Neighbouring cells of seen queries joined, from the rarest on, until each has enough effective rows; unseen ones stay apart."""
    weight = np.asarray(np.bincount(rows.cell, stands_for, CELLS), np.float64)
    square = np.bincount(rows.cell, stands_for**2, CELLS)
    group, last, total, squared = np.zeros(CELLS, np.int64), 1, 0.0, 0.0
    for cell in range(1, CELLS):
        group[cell] = last
        total, squared = total + weight[cell], squared + square[cell]
        if squared > 0 and total * total / squared >= least:
            last, total, squared = last + 1, 0.0, 0.0
    group = np.minimum(group, max(1, last - 1))  # what is left at the top joins the last cell that is full
    groups = int(group.max()) + 1

    def by_group(values: Array) -> Array:
        return np.asarray(np.bincount(group, values, groups), np.float64)

    opened = by_group(np.maximum(traffic.events - np.bincount(rows.cell, rows.events, CELLS), 0.0))
    squares = by_group(np.maximum(traffic.squares - np.bincount(rows.cell, rows.events**2, CELLS), 0.0))
    weights, place = by_group(weight), group[rows.cell]
    share = stands_for / np.where(weights > 0, weights, 1.0)[place]
    equals = np.maximum(opened**2 / np.where(squares > 0, squares, 1.0), 1.0)
    return _Parts(place, share, opened, equals, weights > 0)


def traffic_interval(hits: Array, units: Array, rows: LabelledTraffic, traffic: TrafficCells, confidence: float = 0.95) -> Interval:
    """sum hits / sum units over all events of the traffic (micro-F1: 2tp and 2tp + fp + fn), with its interval.

    The interval of Jeffreys for the unlabelled part, at the effective number of rows (Korn and Graubard 1998): that of their weights,
    clusters as one. Never less spread than the rows have, since no scores in 0..1 spread more than right and wrong ones of that mean.
    Cells without a labelled row may be all wrong or all right: they widen the interval and are not in the value.
    """
    parts = _join_cells(rows, rows.stands_for, traffic)
    coefficient = parts.open[parts.place] * parts.share
    known, rest = (np.array([by @ hits, by @ units]) for by in (rows.events, coefficient))
    n, total = len(hits), known + rest
    if total[1] <= 0:
        return Interval(float("nan"), 0.0, 1.0, n, 0.0, NONE)
    value, low, high, effective = float(total[0] / total[1]), 0.0, 0.0, float(n)
    if rest[1] > 0:
        effective = _effective(coefficient * units, rows.cluster, parts)
        low, high = jeffreys(float(rest[0] / rest[1]) * effective, effective, confidence)
    dark = float(parts.open[~parts.lit].sum()) * float(units.mean())
    low, high = (float((known[0] + end * rest[1]) / (total[1] + dark)) for end in (low, high))
    return Interval(value, min(low, value), max(value, high + dark / (total[1] + dark)), n, min(effective, float(n)), POST_STRATIFIED)


def jeffreys(right: float, n: float, confidence: float) -> tuple[float, float]:
    """The equal-tailed interval of Jeffreys for a share; from 0, or up to 1, where all rows are of a kind (Brown, Cai, DasGupta 2001)."""
    from scipy import special

    miss, right = (1 - confidence) / 2, min(max(right, 0.0), n)
    low = float(special.betaincinv(right + 0.5, n - right + 0.5, miss)) if right > 1e-12 else 0.0
    high = float(special.betaincinv(right + 0.5, n - right + 0.5, 1 - miss)) if n - right > 1e-12 else 1.0
    return low, high


def _effective(units: Array, cluster: Ints, parts: _Parts) -> float:
    """Kish's number of equal rows, clusters as one; a cell of few unlabelled queries varies as those few do."""
    lumps = float((parts.open**2 / parts.equals).sum()) / float(parts.open.sum()) ** 2
    return 1 / (float((np.bincount(cluster, units) ** 2).sum()) / float(units.sum()) ** 2 + lumps)


class TrafficShares(NamedTuple):
    """Rows as a test needs them, that may not use what is known of the rows that it tests with."""

    certain: Array  # share of the traffic that each row is, of rows that were certain to be drawn; 0 for others
    drawn: Array  # share of the traffic that each other row stands for
    dark: float  # share of the traffic that no row stands for


def share_traffic(rows: LabelledTraffic, traffic: TrafficCells) -> TrafficShares:
    """How the traffic is shared out among labelled rows: sum(certain) + sum(drawn) + dark = 1."""
    order = np.argsort(-rows.chance, kind="stable")
    sure = np.zeros(len(order), bool)
    sure[order] = np.cumsum(1 - rows.chance[order]) <= _MISSED
    certain = np.where(sure, rows.events, 0.0)
    parts = _join_cells(rows._replace(events=certain), np.where(sure, 0.0, rows.counts / rows.chance), traffic, _BET_ROWS)
    drawn, total = parts.open[parts.place] * parts.share, float(traffic.events.sum())
    return TrafficShares(certain / total, drawn / total, float(parts.open[~parts.lit].sum()) / total)
