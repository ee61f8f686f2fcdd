"""The history of a log as curves: for the head of each past day, what was expected of it and what came.

In: HISTORY rows of ingest. Out: per origin day an OriginCurve, which gives for a head of any size its events on each later day, and
its Good-Turing estimate. A head is the first cells in an order: by count, or by the events that queries of a cell went on to
have. Within a cell the queries are alike, so a head that ends inside one has a share of the cell. Knows nothing of stores.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headtail.core.count_classes import EXACT_COUNTS, IDLE_CLASSES, count_class, idle_class
from headtail.core.intervals import Array

Ints = npt.NDArray[np.int64]
_FEW = 20.0  # queries of one count below which the smooth estimate stands for Turing's
_PRIOR_QUERIES = 5.0  # queries' worth of Good-Turing in what a cell's queries are expected to go on with


@dataclass(frozen=True)
class Cells:
    """The cells of one origin, in order of class: queries, events up to the origin, and events on each day after it."""

    origin: int  # place of the day
    count_class: Ints
    idle_class: Ints
    cacheable: npt.NDArray[np.bool_]
    queries: Array
    events: Array
    later: Array  # (cells, days after the origin)
    totals: Array  # all events of each of these days, of queries never seen too

    @cached_property
    def shares(self) -> Array:
        """The share of later events that one query of each cell is expected to have under unchanged traffic, by Good-Turing."""
        return adjusted_counts(self.count_class, self.queries, self.events) / max(1.0, float(self.events.sum()))


@dataclass(frozen=True)
class OriginCurve:
    """A past day's queries from the most to the least wanted: cumulative queries, later events, expected shares; each begins with 0."""

    origin: int
    queries: Array
    later: Array  # (cells + 1, days after the origin)
    shares: Array
    totals: Array

    def _at(self, sizes: Ints, column: Array) -> Array:
        return np.asarray(np.interp(sizes, self.queries, column))

    def arrivals(self, sizes: Ints, horizon: int) -> tuple[Array, float]:
        """Events of heads of these sizes on the `horizon` days after the origin, and all events of these days."""
        return self._at(sizes, self.later[:, :horizon].sum(1)), float(self.totals[:horizon].sum())

    def arrivals_on(self, sizes: Ints, age: int) -> tuple[Array, float]:
        """The same of the one day that is `age` days after the origin."""
        return self._at(sizes, self.later[:, age - 1]), float(self.totals[age - 1])

    def stationary(self, sizes: Ints) -> Array:
        """Good-Turing's estimate of the share of later events."""
        return self._at(sizes, self.shares)


@dataclass(frozen=True)
class History:
    """All origins of a log. `days`: the log's days; places count from the first of them that is in the table."""

    days: tuple[datetime.date, ...]
    cells: tuple[Cells, ...]  # one per origin, the last days of the log
    min_class: int = 1  # class of the count from which a query may be in a head; others come after all that may

    epoch: ClassVar[datetime.date] = datetime.date(1970, 1, 1)

    @property
    def last(self) -> int:
        """Place of the log's last day."""
        return len(self.days) - 1

    def place(self, day: datetime.date) -> int:
        """Place of the last day up to and with this one; -1 for a day before the first."""
        return int(np.searchsorted(np.array(self.days), day, side="right")) - 1  # type: ignore[call-overload]

    @cached_property
    def daily(self) -> Array:
        """Events of each day of `days`; of the first one, all events up to it."""
        first = float(self.cells[0].events.sum()) if self.cells else 0.0
        return np.array([first, *(float(cells.totals[0]) for cells in self.cells if len(cells.totals))])

    @cached_property
    def by_count(self) -> tuple[OriginCurve, ...]:
        """Each origin's curve, the most frequent queries first."""
        return tuple(self._curve(cells, cells.count_class.astype(np.float64)) for cells in self.cells)

    @cached_property
    def by_value(self) -> tuple[OriginCurve, ...]:
        """Each origin's curve, first the queries that are expected to come most often."""
        return tuple(self._curve(cells, self.worth(cells)) for cells in self.cells)

    def curves(self, ranking: str = "count") -> tuple[OriginCurve, ...]:
        """By count or by value."""
        return self.by_value if ranking == "value" else self.by_count

    def at(self, origin: int) -> Cells:
        """The cells of the day at this place."""
        return next(cells for cells in self.cells if cells.origin == origin)

    def curve(self, origin: int, ranking: str = "count") -> OriginCurve:
        """The curve of the day at this place."""
        return next(curve for curve in self.curves(ranking) if curve.origin == origin)

    def _curve(self, cells: Cells, worth: Array) -> OriginCurve:
        """Cells by falling worth; those of equal worth are one, since queries that are equal are taken in no order of theirs."""
        late = cells.count_class < self.min_class
        order = np.lexsort((-worth, late))
        order = order[cells.cacheable[order]]
        worth, late = worth[order], late[order]
        starts = np.flatnonzero(np.append(True, (worth[1:] != worth[:-1]) | (late[1:] != late[:-1]))) if len(order) else order

        def running(values: Array) -> Array:
            sums = np.add.reduceat(values[order], starts, axis=0) if len(starts) else values[order]
            return np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(sums, 0)])

        queries = running(cells.queries)
        return OriginCurve(cells.origin, queries, running(cells.later), running(cells.queries * cells.shares), cells.totals)

    def worth(self, cells: Cells, horizon: int = 7) -> Array:
        """Share of later events that one query of each cell is expected to have: what queries of such cells had at earlier origins
        whose horizon was over then, drawn towards Good-Turing where those were few. Nothing later than the origin is used."""
        width = (int(cells.count_class.max()) + 1 if len(cells.count_class) else 1) * IDLE_CLASSES
        events, exposure = np.zeros(width), np.zeros(width)
        for earlier in self.cells:
            ended = cells.origin - earlier.origin
            if ended < 1:
                continue
            days = min(ended, horizon, len(earlier.totals))
            total = float(earlier.totals[:days].sum())
            names = earlier.count_class * IDLE_CLASSES + earlier.idle_class
            inside = (names < width) & earlier.cacheable
            if total > 0 and days:
                weight = 0.5 ** (ended / horizon)
                growth = float(earlier.events.sum()) / max(1.0, float(cells.events.sum()))  # a count means less in a longer log
                events += weight * np.bincount(names[inside], earlier.later[inside, :days].sum(1) / total * growth, width)
                exposure += weight * np.bincount(names[inside], earlier.queries[inside], width)
        mine = cells.count_class * IDLE_CLASSES + cells.idle_class
        return np.asarray((events[mine] + _PRIOR_QUERIES * cells.shares) / (exposure[mine] + _PRIOR_QUERIES))


def worth_of_queries(history: History, origin: int, counts: Ints, idle: Ints) -> Array:
    """Share of the events to come that each query is expected to have, from its count and the log's days since it last came.

    Cells of which the history has no query (light ones may be sampled) get the value between those of like count.
    """
    cells = history.at(origin)
    worth, classes = history.worth(cells), count_class(counts)
    table = np.zeros((int(classes.max(initial=0)) + 1, IDLE_CLASSES))
    by_class = [
        np.average(worth[cells.count_class == c], weights=cells.queries[cells.count_class == c]) for c in np.unique(cells.count_class)
    ]
    for idle_one in range(IDLE_CLASSES):
        mine = cells.idle_class == idle_one
        known = (cells.count_class[mine], worth[mine]) if mine.any() else (np.unique(cells.count_class), np.array(by_class))
        table[:, idle_one] = np.interp(np.arange(len(table)), *known)
    return np.asarray(table[classes, idle_class(idle)])


def read_history(table: pa.Table, redacted: bool, min_count: int = 1) -> History:
    """A History of HISTORY rows. `redacted`: redacted queries may be in a head too; `min_count`: events from which a query may be."""
    columns = {name: table[name].combine_chunks() for name in table.schema.names}
    origins, days = (np.asarray(columns[name].cast(pa.int32())) for name in ("origin", "day"))
    calendar = np.unique(np.concatenate([origins, days]))
    at, on = np.searchsorted(calendar, origins), np.searchsorted(calendar, days)
    name = (np.asarray(columns["count_class"]) * IDLE_CLASSES + np.asarray(columns["idle_class"])) * 2 + np.asarray(columns["redacted"])
    queries, events = np.asarray(columns["queries"]), np.asarray(columns["events"])
    found = []
    for origin in np.unique(at):
        mine = at == origin
        found.append(_cells(int(origin), name[mine], on[mine] - origin, queries[mine], events[mine], redacted))
    return History(
        tuple(History.epoch + datetime.timedelta(int(day)) for day in calendar), tuple(found), int(count_class(np.array([min_count]))[0])
    )


def _cells(origin: int, name: Ints, age: Ints, queries: Array, events: Array, redacted: bool) -> Cells:
    ages = int(age.max(initial=0))
    known = np.unique(name[age == 0])
    later, totals = np.zeros((len(known), ages)), np.zeros(ages)
    after = age > 0
    np.add.at(totals, age[after] - 1, events[after])
    seen = after & np.isin(name, known)
    np.add.at(later, (np.searchsorted(known, name[seen]), age[seen] - 1), events[seen])
    now = np.flatnonzero(age == 0)
    now = now[np.argsort(name[now])]
    classes = known // 2
    may = np.ones(len(known), bool) if redacted else known % 2 == 0
    return Cells(origin, classes // IDLE_CLASSES, classes % IDLE_CLASSES, may, queries[now], events[now], later, totals)


def adjusted_counts(classes: Ints, queries: Array, events: Array) -> Array:
    """r* per cell: how often one of its queries would be expected to come in another log of the same length.

    Turing's (r + 1) N(r + 1) / N(r) for counts of which there are at least 20 queries, else r (1 + 1/r)^(b + 1) with b the slope of
    log N over log r (simple Good-Turing, Gale and Sampson 1995); made to add up with the share never seen, N(1) / n.
    """
    if not len(queries) or not events.sum():
        return np.zeros(len(queries))
    width = max(EXACT_COUNTS, int(classes.max())) + 2
    counts = np.asarray(np.bincount(classes, queries, width), np.float64)
    mean = np.divide(np.bincount(classes, events, width), counts, out=np.zeros(len(counts)), where=counts > 0)
    adjusted = np.zeros(len(counts))
    slope = spectrum_slope(counts, mean)
    for r in np.flatnonzero(counts):
        smooth = mean[r] * (1 + 1 / mean[r]) ** (slope + 1)
        turing = r < EXACT_COUNTS - 1 and min(counts[r], counts[r + 1]) >= _FEW
        adjusted[r] = (r + 1) * counts[r + 1] / counts[r] if turing else smooth
    total, never = float(events.sum()), float(counts[1])
    scale = (total - min(never, 0.999 * total)) / max(1e-9, float((counts * adjusted).sum()))
    return np.asarray(adjusted[classes] * scale)


def spectrum_slope(counts: Array, mean: Array) -> float:
    """Slope of log N(r) over log r, at most -1.0001: least squares over classes, each by the square root of its queries.

    A class of several counts has its queries per count.
    """
    used = np.flatnonzero(counts)
    if len(used) < 2:
        return -2.0
    width = np.where(used < EXACT_COUNTS, 1.0, mean[used] * (2 ** (1 / 16) - 1))
    across, up = np.log(mean[used]), np.log(counts[used] / np.maximum(width, 1.0))
    if np.ptp(across) == 0:
        return -2.0
    return min(-1.0001, float(np.polyfit(across, up, 1, w=np.sqrt(np.sqrt(counts[used])))[0]))
