"""What is expected of a plan: coverage of the days to come by head size, by horizon and by age, and what will be new.

In: a History, the day on which heads are built, the plan's horizon. Out: an Outlook of plain numbers. What the log is too short for is
None, with a sentence that says so. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from headtail.core.count_classes import EXACT_COUNTS
from headtail.stages.plan.ageing import AgeLoss, Replan, age_losses, replan_after
from headtail.stages.plan.forecast import CONFIDENCE, LEAST_EARLIER, LEAST_INDEPENDENT, Forecast, forecasts, independent_misses
from headtail.stages.plan.history import History, Ints
from headtail.stages.plan.unseen import farthest, new_queries

HORIZONS = (1, 2, 3, 7, 14, 28)
GRID = 80  # head sizes of the curve, even on a log scale
LEAST_GAIN = 0.005  # share of later events by which the order by value must be better, to be taken
DAYS_OF_TRAFFIC = 7  # last days whose mean stands for a day to come


class Outlook(NamedTuple):
    """What is expected of heads built at the end of one day."""

    horizon: int
    ranking: str
    curve: tuple[Forecast, ...]  # by head size, for the horizon
    head: tuple[Forecast, ...]  # of the head, by horizon, the last one `horizon`
    all_seen: Forecast  # of a cache of every query seen
    ages: tuple[AgeLoss, ...]
    replan: Replan
    events: float  # of the horizon
    new_queries: float | None  # distinct ones, never seen before, of the horizon; None beyond what the log's length allows
    checked: tuple[Forecast, float] | None  # a forecast for the days after the heads were built that the log has, and what came


def days_needed(horizon: int) -> int:
    """Days of log below which there is no band for this horizon: misses whose horizons do not overlap, after those that correct them."""
    return LEAST_EARLIER - 1 + horizon + LEAST_INDEPENDENT * horizon + 1


def head_sizes(most: int, head: int) -> Ints:
    """Sizes from 1 to `most`, about 80 even on a log scale, with the head's."""
    return np.unique(np.concatenate([np.geomspace(1, max(1, most), GRID).round().astype(np.int64), [min(max(1, head), most)]]))


def expected_events(history: History, origin: int, horizon: int) -> float:
    """Events of the next `horizon` days if days stay as the last seven were on average."""
    known = history.daily[max(0, origin + 1 - DAYS_OF_TRAFFIC) : origin + 1]
    return horizon * float(known.mean())


def better_order(history: History, origin: int, horizon: int, rows: int) -> tuple[str, float | None]:
    """value where heads of `rows` queries by value covered more of the log's later days than heads by count, else count; and the gain.

    Taken when it is at least half a point and above 0 with 95 % confidence over independent horizons; None with fewer than three.
    """
    places, gains = [], []
    for count, value in zip(history.curves("count"), history.curves("value"), strict=True):
        if count.origin + horizon <= origin and rows <= count.queries[-1]:
            (by_count,), total = count.arrivals(np.array([rows]), horizon)
            (by_value,), _ = value.arrivals(np.array([rows]), horizon)
            if total > 0:
                places.append(count.origin)
                gains.append((by_value - by_count) / total)
    independent = independent_misses(np.array(places, np.int64), horizon)
    if independent < LEAST_INDEPENDENT:
        return "count", None
    gain = float(np.mean(gains))
    low = gain - float(special.stdtrit(independent - 1, 0.95) * np.std(gains, ddof=1) / np.sqrt(independent))
    return ("value" if gain >= LEAST_GAIN and low > 0 else "count"), gain


def make_outlook(history: History, origin: int, horizon: int, rows: int, ranking: str, replan_loss: float) -> Outlook:
    """The outlook of heads in this order, built at the end of the day at place `origin`; `rows` is the head's size."""
    curve = history.curve(origin, ranking)
    most = max(1, int(curve.queries[-1]))
    rows = min(rows, most)
    sizes = head_sizes(most, rows)
    shown = forecasts(history, horizon, sizes, origin, ranking)
    shorter = [h for h in HORIZONS if h < horizon]
    head = [forecasts(history, h, np.array([rows]), origin, ranking)[0] for h in shorter]
    losses = age_losses(history, rows, origin, ranking)
    events = expected_events(history, origin, horizon)
    seen = history.at(origin)
    once = np.asarray(np.bincount(seen.count_class, seen.queries, EXACT_COUNTS)[1:EXACT_COUNTS], np.float64)
    total = float(seen.events.sum())
    times = events / max(1.0, total)
    return Outlook(
        horizon,
        ranking,
        tuple(shown),
        (*head, next(one for one in shown if one.rows == rows)),
        shown[-1],
        tuple(losses),
        replan_after(losses, replan_loss),
        events,
        new_queries(once, times) if times <= farthest(total) else None,
        _check(history, origin, rows, ranking),
    )


def _check(history: History, origin: int, rows: int, ranking: str) -> tuple[Forecast, float] | None:
    """A forecast for the log's days after `origin`, and the share that came: neither used the other."""
    curve = history.curve(origin, ranking)
    days = min(history.last - origin, curve.later.shape[1])
    if days < 1:
        return None
    (came,), total = curve.arrivals(np.array([rows]), days)
    return (forecasts(history, days, np.array([rows]), origin, ranking)[0], float(came / total)) if total > 0 else None


def concentration(curve: Sequence[Forecast]) -> tuple[float, float]:
    """Share of the events to come that the first tenth of the queries covers, and all queries seen."""
    sizes, values = (np.array([getattr(one, name) for one in curve], np.float64) for name in ("rows", "value"))
    return float(np.interp(sizes[-1] / 10, sizes, values)), float(values[-1])


def band_words(low: float | None, high: float | None) -> str:
    """A band in words, or that there is none."""
    return "no band" if low is None or high is None else f"{CONFIDENCE:.0%} band {low:.1%} to {high:.1%}"
