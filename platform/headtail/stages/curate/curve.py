"""How many rows are enough: the error of a small student against the number of rows it learnt from.

In: points (rows, error) measured on held-out rows. Out: a power law error = a * rows ** -b + c (Hestness et al. 2017), and the size
from which doubling the rows gains less than a bound, with an 80 % interval. Held-out labels are the teacher's too, so c holds its noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from headtail.adapters import charts
from headtail.stages.curate import crossval
from headtail.stages.curate.crossval import Items

SMALLEST = 125
_MOST = 32_000  # rows of the largest measured point
_HELD_OUT, _TURNS = 0.2, 3
_FEWEST_POINTS = 4
_REFITS = 200  # laws through points moved by their errors, of which the interval is made
Floats = npt.NDArray[np.float64]
Law = tuple[float, float, float]
_UNLIKE = 6.63  # chi-square with one degree of freedom, 99 %
_SEPARATE = 100  # values of c that are tried


class Point(NamedTuple):
    """Error (0..1, share of labels missed) of a student of so many rows, and its standard error."""

    rows: int
    error: float
    doubt: float = 0.0


class Curve(NamedTuple):
    """The points, the law through them, and the size at which the next doubling gains less than `min_gain`."""

    points: list[Point]
    a: float
    b: float
    c: float
    min_gain: float
    enough: int
    enough_low: int  # an 80 % interval of `enough`
    enough_high: int

    def error(self, rows: float) -> float:
        """The law's error at so many rows."""
        return float(self.a * rows**-self.b + self.c)

    def gain(self, rows: float) -> float:
        """What doubling so many rows gains."""
        return self.error(rows) - self.error(2 * rows)


def measure(sets: Sequence[Items], lot: npt.NDArray[np.float64], seed: int) -> list[Point]:
    """Errors at 125, 250, 500, ... rows, as means over fields and over three fifths of the rows held out in turn, drawn by lot."""
    errors_at: dict[int, list[float]] = {}
    for turn in range(_TURNS):
        shifted = (lot + turn / _TURNS) % 1.0
        held = shifted < _HELD_OUT
        order = np.argsort(shifted, kind="stable")
        order = order[~held[order]]
        most = min(int(0.75 * len(lot)), len(order), _MOST)  # the same in every turn
        for size in [*(n for n in (SMALLEST * 2**k for k in range(20)) if n < 0.75 * most), *([most] if most >= SMALLEST else [])]:
            inside = np.zeros(len(lot), dtype=bool)
            inside[order[:size]] = True
            errors = [error for items in sets if (error := _error(items, inside, held, seed)) is not None]
            if errors:
                errors_at.setdefault(size, []).append(float(np.mean(errors)))
    sizes = [size for size in sorted(errors_at) if len(errors_at[size]) == _TURNS or size == max(errors_at)]
    tested = round(_HELD_OUT * len(lot) * _TURNS)
    return [Point(size, float(np.mean(errors_at[size])), _doubt(errors_at[size], tested)) for size in sizes]


def _doubt(errors: Sequence[float], tested: int) -> float:
    """The standard error of a mean error: from the turns' spread, at least what counting `tested` labels leaves."""
    mean = float(np.mean(errors))
    spread = float(np.std(errors, ddof=1)) / math.sqrt(len(errors)) if len(errors) > 1 else 0.0
    return max(spread, math.sqrt(mean * (1 - mean) / max(1, tested)))


def _error(items: Items, inside: npt.NDArray[np.bool_], held: npt.NDArray[np.bool_], seed: int) -> float | None:
    test = np.flatnonzero(held[items.row])
    model = crossval.train_linear(items.features, items.label, np.flatnonzero(inside[items.row]), seed) if len(test) else None
    return None if model is None else float((model.predict(items.features[test]) != items.label[test]).mean())


def fit(points: Sequence[Point], min_gain: float, seed: int = 0) -> Curve | None:
    """The least-squares power law; None for fewer than four points or an error that does not fall. `enough` has an 80 % interval: laws
    through points that are moved by their standard errors. Where a law that falls to no error at all (c = 0) fits them as well, its sizes
    count for the upper end too: a fit finds c above 0 whatever the truth is, and then the size that is enough looks too small."""
    if len(points) < _FEWEST_POINTS or points[-1].error >= points[0].error:
        return None
    rows, error = np.asarray([p.rows for p in points], float), np.asarray([p.error for p in points])
    best = _law(rows, error)
    if best is None:
        return None
    doubt, rng = np.asarray([p.doubt for p in points]), np.random.default_rng(seed)
    sizes: list[float] = []
    to_none: list[float] = []
    for _ in range(_REFITS if doubt.any() else 0):
        moved = np.maximum(error + rng.normal(0, 1, len(points)) * doubt, 1e-6)
        law = _law(rows, moved) if moved[-1] < moved[0] else None
        sizes.append(_enough(*law, min_gain) if law else math.inf)  # points that do not fall: no size is enough
        bare = _law(rows, moved, 1) if law else None
        to_none.append(_enough(*bare, min_gain) if bare else math.inf)
    here = _enough(*best, min_gain)
    low, high = (float(x) for x in np.quantile(sizes, [0.1, 0.9], method="nearest")) if sizes else (here, here)
    if sizes and _fits_as_well(rows, error, doubt, _law(rows, error, 1), best):
        high = max(high, float(np.quantile(to_none, 0.9, method="nearest")))
    return Curve(list(points), *best, min_gain, *(int(min(size, 2**53)) for size in (here, min(low, here), max(high, here))))


def _fits_as_well(rows: Floats, error: Floats, doubt: Floats, one: Law | None, best: Law) -> bool:
    """Whether the points say nothing against `one`: its squared misses, in standard errors, are at most _UNLIKE above those of `best`."""
    if one is None:
        return False
    misses = [float((((a * rows**-b + c - error) / np.maximum(doubt, 1e-9)) ** 2).sum()) for a, b, c in (one, best)]
    return misses[0] - misses[1] <= _UNLIKE


def _enough(a: float, b: float, c: float, min_gain: float) -> float:
    return float((a * (1 - 2**-b) / min_gain) ** (1 / b)) if min_gain > 0 else math.inf


def _law(rows: Floats, error: Floats, separate: int = _SEPARATE) -> Law | None:
    """(a, b, c) of the nearest law, points weighted by their rows: a line through the logs for each of `separate` values of c from 0 on."""
    c = np.linspace(0.0, 0.99 * float(error.min()), separate)[:, None]
    x, y, weight = np.log(rows), np.log(error - c), rows / rows.sum()
    mean_x, mean_y = float(weight @ x), y @ weight
    slope = ((y - mean_y[:, None]) * (x - mean_x)) @ weight / float(weight @ (x - mean_x) ** 2)
    level = mean_y - slope * mean_x
    with np.errstate(over="ignore"):
        misses = (rows * (np.exp(level[:, None] + slope[:, None] * x) + c - error) ** 2).sum(1)
    misses = np.where(slope < 0, misses, np.inf)
    at = int(misses.argmin())
    return (float(np.exp(level[at])), float(-slope[at]), float(c[at, 0])) if misses[at] < np.inf else None


def curve_figure(curve: Curve, taken: int) -> Any:
    """Error against rows, both measured and as the law has it; where the training set ends."""
    rows, error = [p.rows for p in curve.points], [p.error for p in curve.points]
    along = np.geomspace(rows[0], max(2 * taken, rows[-1]), 100)
    drawn, axes = charts.blank(7.2, 3.2)
    axes.plot(along, [curve.error(n) for n in along], color=charts.COLOURS["batch_student"], linewidth=1.8, linestyle=(0, (5, 2)))
    axes.plot(rows, error, "o", color=charts.COLOURS["batch_student"], markersize=5)
    axes.axvline(taken, color=charts.MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
    axes.annotate(f"{taken:,} rows", (taken, axes.get_ylim()[1]), (4, -10), textcoords="offset points", color=charts.MUTED, fontsize=8.5)
    axes.set_title(
        f"a small student's error; the next doubling would gain {curve.gain(taken):.4f} (bound {curve.min_gain:g})",
        loc="left",
        fontsize=10.5,
    )
    charts.log_across(axes, "rows learnt from", "share of labels missed")
    axes.set_ylim(bottom=0)
    return drawn
