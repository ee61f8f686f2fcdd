"""How many labels a draw needs: for an interval of a width, or for a gate that passes with a chance.

In: the queries that may be drawn, with their events; how good the answers are expected to be. Out: the number of rows to draw by traffic.
It is found by making the draw, smaller and larger, and computing the interval or playing the gate on it: so unequal chances, strata, cells
and near-duplicates count as they will. Knows nothing of tables or people.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from headtail.core.bounds import Array
from headtail.core.label_design import LabelDraw, draw_by_traffic
from headtail.core.post_stratify import (
    Ints,
    LabelledTraffic,
    TrafficCells,
    labelled_traffic,
    share_traffic,
    traffic_cells,
    traffic_interval,
)
from headtail.core.traffic_proof import traffic_proof

GATES = 300  # that are played for a chance of passing: its standard error is at most 0.03
_STEPS = 24  # of halving


class DrawFrame(NamedTuple):
    """Queries that may be drawn: `counts` in the log, `events` in the traffic, stratum, an order by chance (`keys`). `clusters`: of places,
    the cluster of near-duplicates of each."""

    counts: Ints
    events: Array
    stratum: npt.NDArray[np.integer[Any]]
    keys: Array
    census: int
    seed: int
    clusters: Callable[[Ints], Ints] = lambda places: np.arange(len(places))

    def draw(self, rows: int) -> LabelDraw:
        """The census and `rows` others by traffic."""
        return draw_by_traffic(self.events, self.stratum, self.census, rows, self.seed, self.keys)

    def label(self, drawn: LabelDraw) -> LabelledTraffic:
        """Labels of a draw as the evaluation will see them."""
        at = drawn.places
        return labelled_traffic(self.counts[at], self.events[at], drawn.inclusion, self.clusters(at))

    @property
    def traffic(self) -> TrafficCells:
        return traffic_cells(self.counts, self.events.astype(np.int64))


class ExpectedQuality(NamedTuple):
    """Shares of right answers (0..1): of the queries in the census, and of the others."""

    census: float
    others: float


def width_of(frame: DrawFrame, rows: int, quality: float, confidence: float = 0.95) -> float:
    """The width of the traffic's interval with `rows` labels beside the census, where a share `quality` of the others is right."""
    labels = frame.label(frame.draw(rows))
    score = np.full(len(labels.cell), quality)
    found = traffic_interval(score, np.ones(len(score)), labels, frame.traffic, confidence)
    return found.high - found.low


def rows_for_width(frame: DrawFrame, width: float, quality: float, confidence: float = 0.95) -> int:
    """The least rows by traffic with which the interval is at most `width` wide."""
    return _least_rows(frame, lambda rows: width_of(frame, rows, quality, confidence) <= width)


def power_of(frame: DrawFrame, rows: int, least: float, quality: ExpectedQuality, level: float, kept: float = 1.0) -> float:
    """The chance that the gate's criterion on traffic passes `least` at `level`. `kept`: share of the labels that the gate reads."""
    rng = np.random.default_rng([frame.seed, rows])
    drawn = frame.draw(rows)
    mine = rng.permutation(len(drawn.places))[: max(1, round(kept * len(drawn.places)))]  # rows come in random order
    part = LabelDraw(drawn.places[mine], [drawn.designs[at] for at in mine.tolist()], drawn.inclusion[mine] * kept)
    labels = frame.label(part)
    shares = share_traffic(labels, frame.traffic)
    chance = np.where(drawn.inclusion[mine] >= 1, quality.census, quality.others)
    _, cluster = np.unique(labels.cluster, return_inverse=True)
    passed = 0
    for _ in range(GATES):
        right = (rng.random(int(cluster.max()) + 1)[cluster] < chance).astype(np.float64)  # near-duplicates are right or wrong together
        passed += traffic_proof(right, shares.certain, shares.drawn, shares.dark, cluster, level).p(least) <= level
    return passed / GATES


def rows_for_gate(frame: DrawFrame, least: float, quality: ExpectedQuality, level: float, power: float, kept: float = 1.0) -> int | None:
    """The least rows by traffic with which the gate passes with chance `power`; None when labels of all queries are not enough."""
    everything = len(frame.events)
    if power_of(frame, everything, least, quality, level, kept) < power:
        return None
    return _least_rows(frame, lambda rows: power_of(frame, rows, least, quality, level, kept) >= power)


def _least_rows(frame: DrawFrame, enough: Callable[[int], bool]) -> int:
    """By halving, between none and all queries: the first number found to be enough whose next smaller one that was tried is not."""
    low, high = 0, 64
    while high < len(frame.events) and not enough(high):
        low, high = high, 2 * high
    high = min(high, len(frame.events))
    for _ in range(_STEPS):
        if high - low <= max(1, high // 200):
            break
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
