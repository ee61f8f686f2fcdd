"""Which days belong to a log, and where its holdout traffic begins.

In: rows by day since 1970. Out: the span of days that are the log's own, and the day of the cut. A wrong clock, or
milliseconds read as seconds, puts a few rows years away: such rows must not decide what a model is evaluated on. Adding a few
rows of any dates and counts moves the cut by a day at most: days are weighed by rows, since one row may count a million events.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Days = npt.NDArray[np.int64]

_RARE = 0.1  # most that days beyond a gap may hold of all rows, to be set aside
_STRAY = 0.02  # of a typical day's rows: a day with no more, after the last whole one, is not the day to evaluate on
_STRAY_ROWS = 5  # nor is one with no more than these rows, where a typical day has more than twice as many
_GAPS = 0.05  # share of rows that must come after gaps of a length, for such gaps to be this log's way


class DaySpan(NamedTuple):
    """First and last day that are used, and the day after which a date cannot be right."""

    first: int
    last: int
    today: int


EVER = DaySpan(-(2**31), 2**31, 2**31)


def typical_rows(days: Mapping[int, int]) -> float:
    """Rows on the day of the median row: a few rows on days of their own hardly move it."""
    sizes = np.sort(np.fromiter(days.values(), np.int64, len(days)))
    total = np.cumsum(sizes)
    return float(sizes[np.searchsorted(total, total[-1] / 2)])


def day_span(days: Mapping[int, int], today: int) -> DaySpan:
    """The span of the log's own days. Set aside at either end: what is after today, unless most is; and few rows beyond a gap.

    Tomorrow passes for today, since clocks have zones. A gap is longer than those that this log has anyway. Few are rows that are
    at most a typical day's and a tenth of all.
    """
    total = sum(days.values())
    past = {day: count for day, count in days.items() if day <= today + 1}
    limit = today + 1 if 2 * sum(past.values()) > total else EVER.today
    kept = past if limit != EVER.today else dict(days)
    order = sorted(kept)
    if not order:
        return EVER
    day, rows = np.array(order), np.array([kept[d] for d in order])
    breaks = np.flatnonzero(np.diff(day) > usual_gap(day, rows)) + 1
    pieces = np.split(np.arange(len(day)), breaks)
    few = [int(rows[piece].sum()) <= min(typical_rows(kept), _RARE * total) for piece in pieces]
    own = [i for i, rare in enumerate(few) if not rare] or [int(np.argmax([rows[piece].sum() for piece in pieces]))]
    first, last = int(day[pieces[own[0]][0]]), int(day[pieces[own[-1]][-1]])
    return DaySpan(first if first > order[0] else EVER.first, last if last < order[-1] else EVER.last, limit)


def usual_gap(day: Days, rows: Days) -> int:
    """The longest step between days with rows that is this log's way: such steps stand between _GAPS of the rows; at least 1.

    A step counts for as many rows as the smaller of the days beside it has, so that a few stray rows make no step usual.
    """
    steps, weights = np.diff(day), np.minimum(rows[1:], rows[:-1])
    order = np.argsort(-steps, kind="stable")
    weight = np.cumsum(weights[order])
    return int(steps[order][np.searchsorted(weight, _GAPS * weight[-1])]) if len(steps) else 1


def cut_day(days: Mapping[int, int], holdout_days: int) -> int:
    """The first day of holdout traffic: `holdout_days` days up to the last one. Not after the log's first day: there is none.

    The last day is at most one after the last whole day (from which on there are more than half a typical day's rows), and that one
    only when it has more than stray rows (_STRAY, _STRAY_ROWS): what comes after is held out with it, but does not make the evaluation.
    Where that would leave nothing before it, the very last day counts, if more than stray rows are held out then.
    """
    order, usual = sorted(days), typical_rows(days)
    rest = np.cumsum(np.array([days[day] for day in order])[::-1])[::-1]  # rows from each day on
    stray = max(_STRAY * usual, _STRAY_ROWS if usual > 2 * _STRAY_ROWS else 0)
    whole = int(np.flatnonzero(rest > usual / 2)[-1])
    part = whole + 1 < len(order) and rest[whole + 1] > stray
    cut = order[whole + part] - holdout_days + 1
    if cut <= order[0]:
        late = order[-1] - holdout_days + 1
        cut = late if sum(rows for day, rows in days.items() if day >= late) > stray else cut
    return cut
