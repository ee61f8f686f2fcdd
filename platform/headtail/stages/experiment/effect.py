"""The effect of a treatment on an outcome per request, from sums per unit. Pure.

In: outcome and requests of each unit of both arms, and of each unit before the experiment. Out: an Effect: the difference of the arms'
means, its interval at a fixed end, and one that may be looked at after every unit. Knows nothing of strata, tables or releases.

    sample_ratio_p   are there as many units in each arm as were planned: exact binomial test
    unit_effect      a unit's requests depend on one another: delta method over units; Welch's t; with a covariate CUPED
    combine_effects  a weighted sum of effects on overlapping units
    look_factor      half width of a confidence sequence in standard errors (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2024)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class UnitSums(NamedTuple):
    """One row per unit, (n,) each. A unit without requests is in no mean."""

    treated: Mask
    outcome: Array  # sum over its requests
    requests: Array
    before: Array | None = None  # sum of the covariate: the outcome before the experiment, or a column of the log
    before_requests: Array | None = None  # over so many rows; 0: nothing is known of the unit


class Levels(NamedTuple):
    """How sure, and where the confidence sequence is narrowest."""

    confidence: float = 0.95
    tight_units: int = 10_000


class ArmStats(NamedTuple):
    """One arm of a comparison."""

    units: int
    mean: float  # outcome per request; with a covariate adjusted by it
    effective: float  # units that the variance rests on: (sum e^2)^2 / sum e^4; few where few units have nearly all requests or events


class Effect(NamedTuple):
    """Treatment minus control. NaN where an arm has fewer than two units."""

    control: ArmStats
    treatment: ArmStats
    value: float
    se: float
    low: float  # Welch's interval, for one look
    high: float
    p: float
    look_low: float  # confidence sequence, for any number of looks
    look_high: float
    variance_left: float  # share of the variance that the covariate leaves; 1 without one
    errors: Array  # (n,) each unit's part of the error of `value`; 0 for units without requests

    @property
    def units(self) -> int:
        return self.control.units + self.treatment.units


def sample_ratio_p(control: int, treatment: int, share: float) -> float:
    """The chance of a split as uneven as this one if each unit were treated with chance `share`; 1 without units."""
    if control + treatment == 0:
        return 1.0
    from scipy import stats

    return float(stats.binomtest(treatment, control + treatment, share).pvalue)


def look_factor(units: float, levels: Levels) -> float:
    """Half width of the confidence sequence, in standard errors, after so many units.

    sqrt(2 (n r^2 + 1) / (n r^2) log(sqrt(n r^2 + 1) / alpha)), with r^2 such that it is narrowest at `tight_units`. The coverage at all
    looks together is asymptotic in the units at the first look.
    """
    alpha = 1 - levels.confidence
    a = -2 * math.log(alpha)
    x = units * (a + math.log(a) + 1) / levels.tight_units
    return math.sqrt(2 * (x + 1) / x * math.log(math.sqrt(x + 1) / alpha))


def unit_effect(units: UnitSums, levels: Levels) -> Effect:
    """The difference of outcome per request between treated and other units.

    Variance by the delta method: e = (outcome - mean x requests) / mean requests of the arm (Deng, Knoblich and Lu 2018). CUPED (Deng, Xu,
    Kohavi and Walker 2013): the covariate's own difference times one slope for both arms is taken off. With one request per unit this is
    Welch's test.
    """
    there = units.requests > 0
    arms = [there & ~units.treated, there & units.treated]
    if min(int(arm.sum()) for arm in arms) < 2:
        control, treatment = (ArmStats(int(arm.sum()), _ratio(units.outcome[arm], units.requests[arm]), 0.0) for arm in arms)
        nan = math.nan
        return Effect(control, treatment, nan, nan, nan, nan, nan, nan, nan, 1.0, np.zeros(len(there)))
    raw = [_deviations(units.outcome, units.requests, arm) for arm in arms]
    slope, base, pulls = _covariate(units, there, arms)
    parts = [e - slope * pull for e, pull in zip(raw, pulls, strict=True)]
    means = [
        _ratio(units.outcome[arm], units.requests[arm]) - slope * (centre - base[0]) for arm, centre in zip(arms, base[1:], strict=True)
    ]
    errors = np.zeros(len(there))
    for arm, part in zip(arms, parts, strict=True):
        errors[arm] = part / len(part)
    plain = sum(float(e @ e) / len(e) / (len(e) - 1) for e in raw)
    effect = _conclude(means[1] - means[0], errors, arms, means, levels)
    return effect._replace(variance_left=effect.se**2 / plain) if slope else effect


def single_arm(units: UnitSums) -> tuple[ArmStats, float, float]:
    """All units as one arm: its figures, the variance of one unit's part of the mean, and the share of it that the covariate leaves."""
    there = units.requests > 0
    n = int(there.sum())
    if n < 2:
        return ArmStats(n, _ratio(units.outcome, units.requests), 0.0), 0.0, 1.0
    raw = _deviations(units.outcome, units.requests, there)
    slope, _, pulls = _covariate(units, there, [there])
    part = raw - slope * pulls[0]
    plain, left, fourth = float(raw @ raw), float(part @ part), float((part**4).sum())
    stats = ArmStats(n, _ratio(units.outcome, units.requests), left**2 / fourth if fourth > 0 else 0.0)
    return stats, left / (n - 1), left / plain if slope else 1.0


def combine_effects(effects: Sequence[Effect], weights: Sequence[float], treated: Mask, levels: Levels) -> Effect:
    """sum of weight x effect, of effects on the same (n,) units: a unit that is in several of them is one unit."""
    errors = np.asarray(sum(w * effect.errors for w, effect in zip(weights, effects, strict=True)), np.float64)
    value = sum(w * effect.value for w, effect in zip(weights, effects, strict=True))
    means = [sum(w * getattr(e, arm).mean for w, e in zip(weights, effects, strict=True)) for arm in ("control", "treatment")]
    inside = np.logical_or.reduce([effect.errors != 0 for effect in effects])
    return _conclude(value, errors, [inside & ~treated, inside & treated], means, levels)


def _conclude(value: float, errors: Array, arms: Sequence[Mask], means: Sequence[float], levels: Levels) -> Effect:
    """Intervals from each unit's part of the error, whose variance is over units, arm by arm."""
    from scipy import special

    sizes = [int(arm.sum()) for arm in arms]
    squares = [errors[arm] ** 2 for arm in arms]
    variances = [float(square.sum()) * n / max(1, n - 1) for square, n in zip(squares, sizes, strict=True)]
    fourth = [float((square**2).sum()) for square in squares]
    control, treatment = [
        ArmStats(n, mean, float(square.sum()) ** 2 / four if four > 0 else 0.0)
        for n, mean, square, four in zip(sizes, means, squares, fourth, strict=True)
    ]
    se = math.sqrt(sum(variances))
    if se == 0:
        return Effect(control, treatment, value, 0.0, value, value, 1.0 if value == 0 else 0.0, value, value, 1.0, errors)
    df = se**4 / sum(v**2 / max(1, n - 1) for v, n in zip(variances, sizes, strict=True))
    half = float(special.stdtrit(df, (1 + levels.confidence) / 2)) * se
    p = 2 * float(special.stdtr(df, -abs(value) / se))
    look = look_factor(sum(sizes), levels) * se
    return Effect(control, treatment, value, se, value - half, value + half, p, value - look, value + look, 1.0, errors)


def _covariate(units: UnitSums, there: Mask, arms: Sequence[Mask]) -> tuple[float, list[float], list[Array]]:
    """Slope; the covariate's mean over both arms and in each; its deviations by arm. The slope is 0 without a covariate that varies."""
    nothing = 0.0, [0.0, 0.0, 0.0], [np.zeros(int(arm.sum())) for arm in arms]
    if units.before is None or units.before_requests is None:
        return nothing
    if min(float(units.before_requests[arm].sum()) for arm in arms) <= 0:
        return nothing
    pulled = _deviations(units.before, units.before_requests, there)
    spread = float(pulled @ pulled)
    if spread <= 0:
        return nothing
    slope = float(_deviations(units.outcome, units.requests, there) @ pulled) / spread
    base = [_ratio(units.before[arm], units.before_requests[arm]) for arm in (there, *arms)]
    return slope, base, [_deviations(units.before, units.before_requests, arm) for arm in arms]


def _deviations(total: Array, count: Array, arm: Mask) -> Array:
    """What each unit of an arm adds to the error of the arm's ratio, times the units."""
    value = _ratio(total[arm], count[arm])
    return np.asarray((total[arm] - value * count[arm]) / count[arm].mean(), np.float64)


def _ratio(total: Array, count: Array) -> float:
    n = float(count.sum())
    return float(total.sum()) / n if n > 0 else math.nan
