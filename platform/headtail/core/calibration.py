"""Calibration: from a model's own confidence to the chance that its answer is right, and how far that holds. Pure.

In: confidences (0..1), and whether each answer was right by people's labels. Out: a ConfidenceMap, which never falls as confidence rises;
on other rows the expected calibration error beside its noise floor, with a reliability diagram. What a release keeps of it is
`StudentCalibration`. Knows nothing of strata or answer sources, and chooses no threshold: `threshold.py` does.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, FiniteFloat

from headtail.core.config import Config
from headtail.core.intervals import Array, Bin, ece, reliability
from headtail.core.paths import StorePath

ISOTONIC_ROWS = 200  # fewer rows, or fewer of a kind than the next number, get the two numbers of Platt's curve: steps would be noise
ISOTONIC_OF_A_KIND = 20
BINS = 10  # of equal mass
_EDGE = 1e-6  # a confidence is this far from 0 and 1 before its log odds are taken, and a chance of them ever


class ConfidenceMap(Config):
    """A rising function from confidence to the chance of being right. `apply` costs a microsecond: the front calls it for each miss."""

    method: Literal["isotonic", "platt"] = Field(
        description="isotonic: lines between knots; platt: 1 / (1 + exp(-slope logit(x) - intercept))"
    )
    knots: tuple[tuple[FiniteFloat, FiniteFloat], ...] = Field((), description="isotonic: confidence, chance of being right; ascending")
    slope: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="platt: 0 when confidence says nothing, or the opposite of what it should"
    )
    intercept: FiniteFloat = Field(0.0, description="platt: log odds at a confidence of one half")

    def apply(self, confidence: float) -> float:
        """The chance (0..1) that an answer of this confidence is right."""
        if self.method == "platt":
            x = min(max(confidence, _EDGE), 1 - _EDGE)
            chance = 1 / (1 + math.exp(-self.slope * math.log(x / (1 - x)) - self.intercept))
            return min(max(chance, _EDGE), 1 - _EDGE)  # two rows that a steep slope tells apart show nothing for certain
        place = bisect_right(self.knots, confidence, key=lambda knot: knot[0])
        if place == 0 or place == len(self.knots):
            return self.knots[max(0, place - 1)][1]
        (x0, y0), (x1, y1) = self.knots[place - 1], self.knots[place]
        return y0 + (y1 - y0) * (confidence - x0) / (x1 - x0)

    def apply_all(self, confidences: Array) -> Array:
        """`apply` to each."""
        return np.array([self.apply(x) for x in confidences.tolist()], dtype=np.float64)


class StudentCalibration(Config):
    """What a release knows of its student's confidence.

    The promise: of the answers whose own confidence is at least `threshold`, a share of at least `target` is right, except with chance
    `delta` over the draw of the labelled rows.
    """

    receipt: StorePath = Field(description="the calibrate run that this is from")
    map: ConfidenceMap | None = Field(None, description="from the student's own confidence to the chance of being right; null: no labels")
    target: float = Field(gt=0, lt=1, description="share of right answers that was to be shown")
    delta: float = Field(gt=0, lt=1, description="chance that the promise is false")
    threshold: float | None = Field(None, ge=0, le=1, description="on the student's own confidence; null: nothing is promised")

    def is_sure(self, confidence: float | None) -> bool:
        """Whether the promise covers an answer. Confidences are compared as evaluate stores them: as 32-bit numbers."""
        return self.threshold is not None and confidence is not None and bool(np.float32(confidence) >= np.float32(self.threshold))


def fit_map(confidence: Array, right: npt.NDArray[np.bool_]) -> ConfidenceMap | None:
    """The map that fits these rows; None without rows."""
    n, k = len(right), int(right.sum())
    if n == 0:
        return None
    if n < ISOTONIC_ROWS or min(k, n - k) < ISOTONIC_OF_A_KIND:
        return _fit_platt(confidence, right)
    return _fit_isotonic(confidence, right)


def _fit_isotonic(confidence: Array, right: npt.NDArray[np.bool_]) -> ConfidenceMap:
    """Least squares among rising functions (pool adjacent violators; Zadrozny and Elkan 2002), lines between the middles of its steps. No
    chance is nearer to 0 or 1 than n rows can tell: 1 / (n + 2), Laplace's rule."""
    from scipy import optimize  # half a second, which every process of a server would pay

    values, place, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    shares = np.bincount(place, weights=right.astype(np.float64)) / counts
    steps = optimize.isotonic_regression(shares, weights=counts).blocks
    least = 1 / (len(right) + 2)
    knots = []
    for start, end in itertools.pairwise(steps):
        weights = counts[start:end]
        middle, share = (float(np.average(x[start:end], weights=weights)) for x in (values, shares))
        knots.append((middle, min(max(share, least), 1 - least)))
    return ConfidenceMap(method="isotonic", knots=tuple(knots))


def _fit_platt(confidence: Array, right: npt.NDArray[np.bool_]) -> ConfidenceMap:
    """Logistic regression on the log odds of the confidence, with Platt's targets (1999), which keep it finite when all rows are right."""
    from scipy import optimize

    k, n = int(right.sum()), len(right)
    wanted = np.where(right, (k + 1) / (k + 2), 1 / (n - k + 2))
    x = np.clip(confidence, _EDGE, 1 - _EDGE)
    odds = np.log(x) - np.log1p(-x)

    def loss(at: Array) -> tuple[float, Array]:
        z = at[0] * odds + at[1]
        gap = 1 / (1 + np.exp(-z)) - wanted
        return float(np.sum(np.logaddexp(0, z) - wanted * z)), np.array([gap @ odds, gap.sum()])

    found = optimize.minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(0.0, 20.0), (-20.0, 20.0)]).x
    return ConfidenceMap(method="platt", slope=float(found[0]), intercept=float(found[1]))


class CalibrationError(NamedTuple):
    """How far chances hold on rows that they were not fitted on. `floor`: what perfectly calibrated chances would show on so many rows, on
    average, by luck; `floor_high`: what they would exceed in one of 20 draws. Bins have Clopper-Pearson intervals."""

    n: int
    ece: float
    floor: float
    floor_high: float
    bins: list[Bin]


def calibration_error(
    chance: Array, right: npt.NDArray[np.bool_], confidence: float = 0.95, resamples: int = 1000, seed: int = 0, bins: int = BINS
) -> CalibrationError:
    """ECE over `bins` bins of equal mass, and its noise floor by drawing answers that are right with exactly these chances."""
    n = len(right)
    if n == 0:
        return CalibrationError(0, math.nan, math.nan, math.nan, [])
    edges = np.unique(np.quantile(chance, np.linspace(0, 1, bins + 1)[1:-1]))
    order = np.argsort(np.searchsorted(edges, chance, side="left"), kind="stable")
    place = np.searchsorted(edges, chance[order], side="left")
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    drawn = np.random.default_rng(seed).random((resamples, n)) < chance[order]
    gaps = np.abs(np.add.reduceat(drawn - chance[order], starts, axis=1)).sum(1) / n
    found = reliability(chance, right, bins, confidence)
    return CalibrationError(n, ece(chance, right, bins), float(gaps.mean()), float(np.quantile(gaps, 0.95)), found)
