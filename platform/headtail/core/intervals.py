"""The uncertainty of a figure: intervals for micro-F1 and proportions, and the calibration of confidences.

In: numpy arrays with one entry per row. Out: values with intervals, and calibration statistics. Deterministic in `seed`.
Large samples get a row-level percentile bootstrap; small or lopsided ones the Clopper-Pearson interval at the
effective number of rows (Korn and Graubard 1998), which is never too narrow. Knows nothing of answer sources, tasks or tables.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

BOOTSTRAP = "bootstrap"  # percentile, over rows
EXACT = "clopper-pearson"  # finite-sample; for weighted rows at Kish's effective number of rows
NONE = "none"  # no rows
_FEW_ROWS = 30.0  # effective rows below which a bootstrap is not believed
_FEW_OF_A_KIND = 10.0  # effective rows right, or wrong, below which its ends are too narrow (tests/test_intervals.py)


class Interval(NamedTuple):
    """A value, its interval, the rows and effective rows it rests on, and how the interval was made."""

    value: float
    low: float
    high: float
    n: int
    effective: float
    method: str


class Bin(NamedTuple):
    """Rows of like confidence: their number, mean confidence, and share that is right with its interval."""

    n: int
    confidence: float
    right: float
    low: float
    high: float


def clopper_pearson(right: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval for a proportion; `right` and `n` may be fractions (effective rows)."""
    if n <= 0:
        return 0.0, 1.0
    from scipy import special

    miss = (1 - confidence) / 2
    right = min(max(right, 0.0), n)
    low = float(special.betaincinv(right, n - right + 1, miss)) if right > 1e-12 else 0.0
    high = float(special.betaincinv(right + 1, n - right, 1 - miss)) if n - right > 1e-12 else 1.0
    return low, high


def effective_rows(weights: Array) -> float:
    """Kish's (sum w)^2 / sum w^2: how many equal rows carry as much as these."""
    total = float(weights.sum())
    return total * total / float((weights * weights).sum()) if total > 0 else 0.0


def f1_interval(
    tp: Array, fp: Array, fn: Array, weights: Array | None = None, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Micro-F1 of rows, 2tp / (2tp + fp + fn), with its interval; rows are the unit that is resampled.

    F1 is the mean of the rows' own F1 weighted by their units (times `weights`), which is what the exact interval uses.
    NaN when no row has a unit.
    """
    weights = np.ones(len(tp)) if weights is None else weights
    hits, units = 2 * tp * weights, (2 * tp + fp + fn) * weights
    n, total = int(np.count_nonzero(weights > 0)), float(units.sum())
    if total <= 0:
        return Interval(float("nan"), 0.0, 1.0, n, 0.0, NONE)
    value, effective = float(hits.sum()) / total, effective_rows(units)
    if effective < _FEW_ROWS or min(value, 1 - value) * effective < _FEW_OF_A_KIND:
        low, high = clopper_pearson(value * effective, effective, confidence)
        return Interval(value, low, high, n, effective, EXACT)
    sums = _bootstrap_sums(np.column_stack([hits, units]), resamples, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = sums[:, 0] / sums[:, 1]
    low, high = _percentiles(draws, confidence)
    return Interval(value, low, high, n, effective, BOOTSTRAP)


def f1_difference(
    first: tuple[Array, Array, Array], second: tuple[Array, Array, Array], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Micro-F1 of `first` minus `second` (tp, fp, fn of the same rows), resampled together: a paired interval.

    With under 30 effective rows, or under 10 rows on which the two differ, it spans the two exact intervals instead.
    """
    a, b = (f1_interval(*side, confidence=confidence, resamples=resamples, seed=seed) for side in (first, second))
    value, n, effective = a.value - b.value, len(first[0]), min(a.effective, b.effective)
    columns = [2 * first[0], 2 * first[0] + first[1] + first[2], 2 * second[0], 2 * second[0] + second[1] + second[2]]
    differ = int(np.count_nonzero((columns[0] != columns[2]) | (columns[1] != columns[3])))
    if effective < _FEW_ROWS or differ < _FEW_OF_A_KIND:
        return Interval(value, a.low - b.high, a.high - b.low, n, effective, EXACT)
    sums = _bootstrap_sums(np.column_stack(columns), resamples, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
    low, high = _percentiles(draws, confidence)
    return Interval(value, low, high, n, effective, BOOTSTRAP)


def share_interval(right: npt.NDArray[np.bool_], confidence: float = 0.95) -> Interval:
    """The share of rows that are right, with its Clopper-Pearson interval."""
    n = len(right)
    if n == 0:
        return Interval(float("nan"), 0.0, 1.0, 0, 0.0, NONE)
    count = int(right.sum())
    low, high = clopper_pearson(count, n, confidence)
    return Interval(count / n, low, high, n, float(n), EXACT)


def reliability(scores: Array, right: npt.NDArray[np.bool_], bins: int = 15, confidence: float = 0.95) -> list[Bin]:
    """Rows in at most `bins` bins of equal mass by score. Equal scores share a bin, so row order does not matter."""
    if len(scores) == 0:
        return []
    edges = np.unique(np.quantile(scores, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, scores, side="left")
    found = []
    for number in np.unique(place):
        inside = place == number
        n, count = int(inside.sum()), int(right[inside].sum())
        low, high = clopper_pearson(count, n, confidence)
        found.append(Bin(n, float(scores[inside].mean()), count / n, low, high))
    return found


def ece(scores: Array, right: npt.NDArray[np.bool_], bins: int = 15) -> float:
    """Expected calibration error over bins of equal mass: the mean of |share right - mean confidence|. NaN without rows."""
    if len(scores) == 0:
        return float("nan")
    return float(sum(b.n * abs(b.right - b.confidence) for b in reliability(scores, right, bins)) / len(scores))


def auroc(scores: Array, right: npt.NDArray[np.bool_]) -> float:
    """Chance that a right row scores above a wrong one (ties count half). NaN when all rows are right, or all wrong."""
    from scipy import stats

    if not right.any() or right.all():
        return float("nan")
    above = stats.mannwhitneyu(scores[right], scores[~right], method="asymptotic").statistic
    return float(above / right.sum() / (~right).sum())


def _bootstrap_sums(rows: Array, resamples: int, seed: int) -> Array:
    """Column sums of `resamples` bootstrap samples of the rows.

    Equal rows are drawn together: their multinomial counts have the same distribution as row-by-row drawing, and a few
    dozen distinct rows stand for thousands.
    """
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(rows), counts / len(rows), size=resamples)
    return np.asarray(drawn @ distinct, dtype=np.float64)


def _percentiles(draws: Array, confidence: float) -> tuple[float, float]:
    miss = (1 - confidence) / 2
    low, high = np.nanquantile(draws, [miss, 1 - miss])
    return float(low), float(high)
