"""How a head loses coverage as it gets older, and when a plan is to be made anew.

In: a History. Out: losses by age, with intervals where there are enough independent days. A head that is `age` days old is compared
with the head of the day before, on the same day's traffic, so that a good or bad day does not pass for age. Pure.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import special

from headtail.core.intervals import Array
from headtail.stages.plan.forecast import CONFIDENCE, LEAST_INDEPENDENT, independent_misses
from headtail.stages.plan.history import History, Ints

TARGETS = 28  # last days on which old and new heads are compared


class AgeLoss(NamedTuple):
    """Share of a day's events that a head of this age lost against a head of the day before; low and high None with too few days."""

    age: int
    loss: float
    low: float | None
    high: float | None
    days: int


class Replan(NamedTuple):
    """A plan is due after so many days: the estimate, and its range where the losses have intervals; None: not within the ages seen."""

    days: int | None
    soonest: int | None
    latest: int | None
    oldest: int  # greatest age that was seen


def age_losses(history: History, rows: int, origin: int, ranking: str = "count") -> list[AgeLoss]:
    """Losses of a head of `rows` queries at each age, on the days up to `origin`; age 1 loses nothing by definition.

    Old heads that were built on fewer than half of the days are left out: they lack counts, which is not their age.
    """
    curves = {curve.origin: curve for curve in history.curves(ranking) if curve.origin < origin}
    sizes, found = np.array([rows]), []
    for age in range(2, origin + 1):
        targets, losses = [], []
        for target in range(max(age + origin // 2, origin - TARGETS + 1), origin + 1):
            old, new = curves.get(target - age), curves.get(target - 1)
            if old is None or new is None or age > old.later.shape[1]:
                continue
            (came,), total = old.arrivals_on(sizes, age)
            (fresh,), _ = new.arrivals_on(sizes, 1)
            if total > 0:
                targets.append(target)
                losses.append((fresh - came) / total)
        if losses:
            found.append(_age_loss(age, np.array(targets), np.array(losses)))
    return found


def _age_loss(age: int, targets: Ints, losses: Array) -> AgeLoss:
    """Mean loss, and Student's interval over as many days as share no day of the heads' ages."""
    independent = independent_misses(targets, age - 1)
    mean = float(losses.mean())
    if independent < LEAST_INDEPENDENT or len(losses) < 2:
        return AgeLoss(age, mean, None, None, len(losses))
    half = float(special.stdtrit(independent - 1, (1 + CONFIDENCE) / 2) * losses.std(ddof=1) / np.sqrt(independent))
    return AgeLoss(age, mean, mean - half, mean + half, len(losses))


def replan_after(losses: list[AgeLoss], most: float) -> Replan:
    """The greatest age up to which no more than `most` is lost; losses are made to rise with age first."""
    oldest = max((loss.age for loss in losses), default=1)

    def last_age(values: list[tuple[int, float]]) -> int | None:
        worst = 0.0
        for age, value in values:
            worst = max(worst, value)
            if worst > most:
                return age - 1
        return None

    banded = [loss for loss in losses if loss.high is not None and loss.low is not None]
    return Replan(
        last_age([(loss.age, loss.loss) for loss in losses]),
        last_age([(loss.age, loss.high) for loss in banded if loss.high is not None]),
        last_age([(loss.age, loss.low) for loss in banded if loss.low is not None]),
        oldest,
    )
