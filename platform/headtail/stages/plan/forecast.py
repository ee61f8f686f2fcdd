"""What a head will cover of traffic that has not come yet: an estimate out of time, with a band that was earned on earlier days.

In: a History (counts by day of ingest, in cells). Out: Forecasts by horizon and head size, with the misses they rest on.

1. Stationary part: Good-Turing. Under unchanged traffic a query seen r times has the expected share r*/n of later events, with
   r* = (r + 1) N(r + 1) / N(r) (Good 1953), smoothed for large r (Gale and Sampson 1995). It removes the optimism of in-sample coverage.
2. Drift: the same estimate at every earlier origin, compared with what came (rolling origin). The recent misses correct the estimate.
3. Band: how far this corrected estimate missed, at each earlier origin with what was known then. Too few independent misses: no band.
All on the scale of `angle`, so that shares stay shares. Knows nothing of money or stores.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from headtail.core.intervals import Array
from headtail.stages.plan.history import History

CONFIDENCE = 0.90  # of a band
HALF_LIFE = 7.0  # days of the log after which a miss counts half
TREND_DAYS = 7.0  # days over which misses must be spread for half of their trend to be believed
LEAST_EARLIER = 2  # misses that were known before a miss may be corrected by them
LEAST_INDEPENDENT = 3  # misses whose horizons do not overlap, below which no band is shown
STEP = 0.5  # by which a band's log width grows when it failed on a whole horizon
SEASON = 7  # days of a week
LEAST_WEEKS = 3  # misses of one weekday that were known, before they correct the same weekday
SEASON_GAIN = 0.8  # of the misses without a season, at most, for a season to be believed


class Forecast(NamedTuple):
    """Share of the events of the next `horizon` days that a head of `rows` queries covers; low and high are None where no band is known."""

    horizon: int
    rows: int
    value: float
    low: float | None
    high: float | None
    stationary: float  # Good-Turing alone
    misses: int  # earlier misses that the band rests on
    independent: int  # of them, as many as do not overlap
    season: bool  # corrected by the misses of the same weekday

    @property
    def has_band(self) -> bool:
        """Whether there is a band."""
        return self.low is not None


class Misses(NamedTuple):
    """The angle of what came minus Good-Turing's, by origin: (origins, sizes); NaN where the horizon is not over."""

    origins: npt.NDArray[np.int64]  # places of the days
    values: Array
    events: Array  # events of each horizon, for the noise that counting alone makes


def angle(share: npt.ArrayLike) -> Array:
    """Shares (0..1) as angles (0..pi/2), asin(sqrt(share)): counting makes the same noise at any share, 1 / (2 sqrt(events))."""
    return np.asarray(np.arcsin(np.sqrt(np.clip(np.asarray(share, np.float64), 0, 1))))


def share_of(angles: npt.ArrayLike) -> Array:
    """Angles as shares; beyond the ends, the ends."""
    return np.asarray(np.sin(np.clip(np.asarray(angles, np.float64), 0, np.pi / 2)) ** 2)


def backtest(history: History, horizon: int, sizes: npt.NDArray[np.int64], until: int, ranking: str = "count") -> Misses:
    """Misses at every origin whose horizon had ended on day `until` (a place among the log's days).

    Shapes: sizes (k,). An origin without events in its horizon is left out.
    """
    origins, rows, events = [], [], []
    for curve in history.curves(ranking):
        if curve.origin + horizon > until:
            break
        came, total = curve.arrivals(sizes, horizon)
        if total > 0:
            origins.append(curve.origin)
            rows.append(angle(came / total) - angle(curve.stationary(sizes)))
            events.append(total)
    return Misses(np.array(origins, np.int64), np.array(rows).reshape(len(rows), len(sizes)), np.array(events))


def correction(misses: Misses, origin: int, horizon: int, weekly: bool = False) -> Array | None:
    """The mean of the misses that were known at `origin`, recent ones more; None when they are too few. Shape (sizes,)."""
    known = misses.origins + horizon <= origin
    if weekly:
        known &= (origin - misses.origins) % SEASON == 0
    if known.sum() < (LEAST_WEEKS if weekly else LEAST_EARLIER):
        return None
    weights = evidence(misses, known, origin, HALF_LIFE)
    back, values = misses.origins[known] - origin, misses.values[known]
    mean, centre = weights @ values / weights.sum(), float(weights @ back / weights.sum())
    slope = weights @ ((back - centre)[:, None] * (values - mean)) / (weights @ (back - centre) ** 2 + TREND_DAYS**2 * weights.sum())
    return np.asarray(mean if weekly else mean - slope * centre)


def residuals(misses: Misses, horizon: int, weekly: bool = False) -> Misses:
    """Each miss minus its correction by the misses that were known then, where they were enough."""
    fixed = [correction(misses, at, horizon, weekly) for at in misses.origins.tolist()]
    kept = [i for i, one in enumerate(fixed) if one is not None]
    values = np.array([misses.values[i] - fixed[i] for i in kept]).reshape(len(kept), misses.values.shape[1])
    return Misses(misses.origins[kept], values, misses.events[kept])


def evidence(misses: Misses, known: npt.NDArray[np.bool_], origin: int, half_life: float) -> Array:
    """Weights of the known misses: recent ones count more, and so do those with as much traffic as there is now."""
    events = misses.events[known]
    return np.asarray(0.5 ** ((origin - misses.origins[known]) / half_life) * events / (events + events[-1]))


def independent_misses(origins: npt.NDArray[np.int64], horizon: int) -> int:
    """How many of these horizons do not overlap, taken one after the other."""
    count, free = 0, -1
    for origin in origins:
        if origin >= free:
            count, free = count + 1, int(origin) + horizon
    return count


def forecasts(history: History, horizon: int, sizes: npt.NDArray[np.int64], origin: int, ranking: str = "count") -> list[Forecast]:
    """Forecasts for heads built at the end of day `origin`, from what was known then and nothing later."""
    stationary = history.curve(origin, ranking).stationary(sizes)
    misses = backtest(history, horizon, sizes, origin, ranking)
    weekly = believes_season(misses, horizon)
    fixed = correction(misses, origin, horizon, weekly)
    rest = residuals(misses, horizon, weekly)
    centre = angle(stationary) + (0.0 if fixed is None else fixed)
    half = None if fixed is None else half_width(rest, horizon, origin)
    if half is not None:
        daily = backtest(history, 1, sizes, origin, ranking)  # the next day's bands fail first where traffic begins to drift faster
        first = widening(residuals(daily, 1, believes_season(daily, 1)), 1, origin)
        half = half * max(first, widening(rest, horizon, origin))
    independent = independent_misses(rest.origins, horizon)
    found = []
    for i, rows in enumerate(sizes.tolist()):
        low, high = (None, None) if half is None else (float(share_of(centre[i] - half[i])), float(share_of(centre[i] + half[i])))
        value = float(share_of(centre[i]))
        found.append(Forecast(horizon, rows, value, low, high, float(stationary[i]), len(rest.origins), independent, weekly))
    return found


def half_width(rest: Misses, horizon: int, origin: int) -> Array | None:
    """Half of the band at `origin` on the scale of angles, before `widening`; None without enough independent misses known then.

    Student's t at as many degrees of freedom as there are independent misses, times their root mean square (they are out of sample,
    so their mean is not taken off), and never less than counting alone would do.
    """
    known = rest.origins + horizon <= origin
    independent = independent_misses(rest.origins[known], horizon)
    if independent < LEAST_INDEPENDENT:
        return None
    weights = evidence(rest, known, origin, 2 * HALF_LIFE)
    spread = np.sqrt(weights @ rest.values[known] ** 2 / weights.sum())
    least = 0.5 / np.sqrt(rest.events[known][-1])
    return np.asarray(special.stdtrit(independent, (1 + CONFIDENCE) / 2) * np.maximum(spread, least))


def widening(rest: Misses, horizon: int, origin: int) -> float:
    """A factor, at least 1, that grows where earlier bands failed more often than they may, and falls back where they held.

    Adaptive conformal inference (Gibbs and Candes 2021) on the log of the width: traffic that begins to drift faster has wider bands
    from the day on which the first miss is known. Only bands whose horizon had ended at `origin` count.
    """
    wider: list[tuple[int, float]] = [(-1, 0.0)]  # what is known from a day on
    for at, value in zip(rest.origins.tolist(), rest.values, strict=True):
        if at + horizon > origin:
            break
        half = half_width(rest, horizon, at)
        if half is not None:
            then = [level for day, level in wider if day <= at][-1]
            failed = float(np.mean(np.abs(value) > half * np.exp(then)))
            wider.append((at + horizon, max(0.0, wider[-1][1] + STEP / horizon * (failed - (1 - CONFIDENCE)))))
    return float(np.exp(wider[-1][1]))


def believes_season(misses: Misses, horizon: int) -> bool:
    """Whether the same weekday's misses foretold later ones clearly better than all recent misses did, over at least two weeks."""
    if horizon >= SEASON:
        return False
    plain, weekly = residuals(misses, horizon), residuals(misses, horizon, weekly=True)
    both = np.isin(plain.origins, weekly.origins)
    if len(weekly.origins) < 2 * SEASON:
        return False
    rms = [float(np.sqrt((values**2).mean())) for values in (plain.values[both], weekly.values)]
    return rms[1] < SEASON_GAIN * rms[0]
