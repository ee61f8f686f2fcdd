"""How many rows are enough: the error of a small student against the number of rows it learnt from.

In: points (rows, error) measured on held-out rows. Out: a power law error = a * rows ** -b + c (Hestness et al. 2017), and the size
from which doubling the rows gains less than a bound. The labels held out are the teacher's too, so c holds its noise.
"""

from __future__ import annotations

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


class Point(NamedTuple):
    """Error (0..1, share of labels missed) of a student of so many rows."""

    rows: int
    error: float


class Curve(NamedTuple):
    """The points, the law through them, and the size at which the next doubling gains less than `min_gain`."""

    points: list[Point]
    a: float
    b: float
    c: float
    min_gain: float
    enough: int

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
    return [Point(size, float(np.mean(errors_at[size]))) for size in sizes]


def _error(items: Items, inside: npt.NDArray[np.bool_], held: npt.NDArray[np.bool_], seed: int) -> float | None:
    test = np.flatnonzero(held[items.row])
    model = crossval.train_linear(items.features, items.label, np.flatnonzero(inside[items.row]), seed) if len(test) else None
    return None if model is None else float((model.predict(items.features[test]) != items.label[test]).mean())


def fit(points: Sequence[Point], min_gain: float) -> Curve | None:
    """The least-squares power law; None for fewer than four points or an error that does not fall."""
    if len(points) < _FEWEST_POINTS or points[-1].error >= points[0].error:
        return None
    rows, error = np.asarray([p.rows for p in points], float), np.asarray([p.error for p in points])
    best: tuple[float, float, float, float] | None = None
    for c in np.linspace(0.0, 0.99 * float(error.min()), 100):
        slope, level = np.polyfit(np.log(rows), np.log(error - c), 1, w=np.sqrt(rows))
        if slope < 0:
            miss = float((np.sqrt(rows) * (np.exp(level) * rows**slope + c - error) ** 2).sum())
            if best is None or miss < best[0]:
                best = miss, float(np.exp(level)), float(-slope), float(c)
    if best is None:
        return None
    _, a, b, c = best
    enough = (a * (1 - 2**-b) / min_gain) ** (1 / b) if min_gain > 0 else float("inf")
    return Curve(list(points), a, b, c, min_gain, int(min(enough, 2**53)))


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
