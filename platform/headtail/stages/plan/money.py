"""What further coverage costs, where it stops paying, and what a budget buys.

In: forecasts of coverage by head size, prices per query, events to come. Out: steps with the USD of each further 1 % of future coverage
for each answer source, the break-even, and a decision in sentences. Prices that are not known give None, never 0. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from headtail.core.intervals import Array
from headtail.stages.plan.forecast import Forecast

FLAT = 0.2  # share of future events that the first tenth of the queries covers, below which traffic has no head worth the name
LEAST_PAYING = 0.05  # future coverage at the break-even, below which answers ahead of time do not pay


class Costs(NamedTuple):
    """USD per answer; None where not known. `saved`: by a hit, against a miss."""

    teacher: float | None
    batch_student: float | None
    realtime_student: float | None
    hit_value: float = 0.0

    @property
    def saved(self) -> float | None:
        """What a hit saves: the realtime student's answer, and what it is worth beyond that; None where neither is known."""
        if self.realtime_student is None:
            return self.hit_value or None
        return self.realtime_student + self.hit_value


class CostStep(NamedTuple):
    """From one head to one that covers 1 % more of future events: where it starts, and what the further 1 % costs, in USD."""

    coverage: float  # future coverage of the smaller head
    rows: int  # its queries
    more_rows: float  # further queries for 1 % more
    teacher_usd: float | None  # the smaller head, by the teacher
    teacher_per_point: float | None
    batch_per_point: float | None
    realtime_per_point: float | None  # of the realtime student in its place, for one horizon


def steps(curve: Sequence[Forecast], costs: Costs, events: float | None, teacher_usd: Array | None) -> list[CostStep]:
    """One per whole per cent of future coverage that the curve reaches.

    `teacher_usd`: the teacher's USD for the first n queries at each size of the curve; None without a price. Queries are taken the best
    first, so the cost of a further 1 % can only rise: isotonic regression takes the forecast's noise off.
    """
    coverage = np.concatenate([[0.0], np.maximum.accumulate([one.value for one in curve])])
    sizes = np.concatenate([[0.0], [one.rows for one in curve]])
    new = np.append(True, np.diff(coverage) > 0)  # of sizes that cover the same, the smallest
    targets = np.arange(int(np.floor(100 * coverage[-1] + 1e-9)) + 1) / 100
    if len(targets) < 2:
        return []
    rows = np.interp(targets, coverage[new], sizes[new])
    usd = None if teacher_usd is None else np.interp(rows, sizes, np.concatenate([[0.0], teacher_usd]))
    more_rows = _rising(np.diff(rows))
    more_usd = None if usd is None else _rising(np.diff(usd))
    live = None if costs.realtime_student is None or events is None else 0.01 * events * costs.realtime_student
    return [
        CostStep(
            float(targets[i]),
            round(float(rows[i])),
            float(more_rows[i]),
            None if usd is None else float(usd[i]),
            None if more_usd is None else float(more_usd[i]),
            None if costs.batch_student is None else float(more_rows[i]) * costs.batch_student,
            live,
        )
        for i in range(len(targets) - 1)
    ]


def _rising(values: Array) -> Array:
    from scipy import optimize  # half a second, and only here

    return np.asarray(optimize.isotonic_regression(values).x, np.float64)


def break_even(found: Sequence[CostStep], costs: Costs, events: float | None) -> int | None:
    """The largest head whose last 1 % of future coverage by the teacher costs no more than its hits save in one horizon.

    0 when not even the first queries pay; None where a price or the number of events is not known.
    """
    if costs.saved is None or costs.teacher is None or events is None:
        return None
    worth = 0.01 * events * costs.saved
    paying = [step for step in found if step.teacher_per_point is not None and step.teacher_per_point <= worth]
    return round(paying[-1].rows + paying[-1].more_rows) if paying else 0


def student_break_even(costs: Costs, training_usd: float | None) -> int | None:
    """Queries from which training a batch student is cheaper than asking the teacher; None when never, or not known."""
    if training_usd is None or costs.teacher is None or costs.batch_student is None or costs.teacher <= costs.batch_student:
        return None
    return int(np.ceil(training_usd / (costs.teacher - costs.batch_student)))


def affordable(teacher_usd: Array, budget: float) -> int:
    """How many of the queries, in order, the budget pays for; `teacher_usd` is each query's USD."""
    return int(np.searchsorted(np.cumsum(teacher_usd), budget * (1 + 1e-12), side="right"))


def does_pay(first_tenth: float, all_seen: float, even: int | None, curve: Sequence[Forecast]) -> tuple[bool | None, str]:
    """Whether answering ahead of time pays on this traffic, and why; None where it is concentrated but prices are not known."""
    if first_tenth < FLAT:
        return False, (
            f"traffic is not power-law enough for this to pay: the first tenth of the queries is expected to cover {first_tenth:.1%} of "
            f"future events, all queries seen {all_seen:.1%}; let the realtime student answer instead"
        )
    if even is None:
        return None, f"traffic has a head: the first tenth of the queries is expected to cover {first_tenth:.1%} of future events"
    covered = float(np.interp(even, [0, *(one.rows for one in curve)], [0.0, *(one.value for one in curve)]))
    if covered < LEAST_PAYING:
        return False, (
            f"answers ahead of time do not pay at these prices: only {covered:.1%} of future events are in queries that come often "
            "enough to save what the teacher costs; let the realtime student answer instead, or plan for a longer horizon"
        )
    return True, f"up to {even:,} queries ({covered:.1%} of future events) save more in the horizon than the teacher costs"


def stop_words(limit: str, rows: int, found: Sequence[CostStep], costs: Costs, events: float | None) -> str:
    """`stop here` with the reason: the limit, and what the next 1 % of future coverage would cost each answer source."""
    reasons = {
        "coverage": "head.coverage is reached",
        "rows": "head.rows is reached",
        "min_count": "other queries have fewer than head.min_count events",
        "budget": "budget_usd is spent",
        "break_even": "a further query costs more than its hits save within horizon_days",
    }
    further = [step for step in found if step.rows <= rows]
    if not further:
        return f"stop here, at {rows:,} queries: {reasons[limit]}"
    step = further[-1]
    points = {"teacher": step.teacher_per_point, "batch student": step.batch_per_point, "realtime student": step.realtime_per_point}
    prices = [f"{name} {usd_words(value)}" for name, value in points.items() if value is not None]
    worth = "" if costs.saved is None or events is None else f"; its hits save {usd_words(0.01 * events * costs.saved)}"
    cost = f": the next 1 % of future coverage costs {', '.join(prices)}{worth}" if prices else ""
    return f"stop here, at {rows:,} queries: {reasons[limit]}{cost}"


def usd_words(value: float) -> str:
    """An amount, to the cent, or to two digits below ten cents."""
    return f"USD {value:,.2f}" if value >= 0.1 else f"USD {value:.2g}"
