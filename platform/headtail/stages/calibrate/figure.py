"""The picture of a calibration: whether confidence holds, and what is right among the answers that are kept.

In: an Assessment, the rows that tested it. Out: a figure of two panels. Decides nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headtail.adapters import charts
from headtail.core.intervals import clopper_pearson
from headtail.core.threshold import LabelledRows, threshold_levels
from headtail.stages.calibrate.assessment import Assessment

_POINTS = 60  # of the curve


def promise_figure(found: Assessment, rows: LabelledRows, source: str, target: float) -> Any:
    """Left: the reliability diagram, before and after the map, with intervals. Right: the share right among kept answers, by how many
    misses are escalated; the target; the threshold that was chosen."""
    drawn, (left, right) = charts.blank(7.6, 3.5, ncols=2)
    _reliability(left, found, source)
    _curve(right, found, rows, source, target)
    return drawn


def _reliability(axes: Any, found: Assessment, source: str) -> None:
    tint = charts.colour(source)
    axes.plot([0, 1], [0, 1], color=charts.MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    for error, colour, marker, size in ((found.own, charts.MUTED, "s", 4.0), (found.mapped, tint, "o", 5.5)):
        across = [b.confidence for b in error.bins]
        axes.vlines(across, [b.low for b in error.bins], [b.high for b in error.bins], color=colour, linewidth=1.6, alpha=0.45)
        axes.plot(
            across, [b.right for b in error.bins], marker, color=colour, markersize=size, markeredgecolor=charts.PAPER, markeredgewidth=0.7
        )
    if found.own.n:
        axes.text(0.0, 1.1, f"own: ECE {found.own.ece:.3f}", color=charts.MUTED, fontsize=9, transform=axes.transAxes)
        text = f"calibrated: ECE {found.mapped.ece:.3f}, floor {found.mapped.floor:.3f}"
        axes.text(0.0, 1.03, text, color=tint, fontsize=9, transform=axes.transAxes)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share of answers right")
    axes.grid(True)


def _curve(axes: Any, found: Assessment, rows: LabelledRows, source: str, target: float) -> None:
    tint, n = charts.colour(source), len(rows.right)
    confidence = np.nan_to_num(rows.confidence, nan=-1.0)
    levels = np.unique(rows.confidence[~np.isnan(rows.confidence)])
    if len(levels) > _POINTS:
        levels = np.unique(np.concatenate([levels[:: len(levels) // _POINTS], threshold_levels(rows.confidence)]))
    counts = [(int((confidence >= level).sum()), int(rows.right[confidence >= level].sum())) for level in levels.tolist()]
    if counts:
        escalated = [1 - kept / n for kept, _ in counts]
        ends = [clopper_pearson(right, kept) for kept, right in counts]
        axes.fill_between(escalated, [low for low, _ in ends], [high for _, high in ends], color=tint, alpha=0.15, linewidth=0)
        axes.plot(escalated, [right / kept for kept, right in counts], color=tint, linewidth=2.0)
    axes.axhline(target, color=charts.INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.text(1.0, target, f"target {target:.0%} ", color=charts.INK, fontsize=9, ha="right", va="bottom")
    at, precision = found.figures.escalated.value, found.figures.precision.value
    if found.figures.threshold is not None and at is not None and precision is not None:
        axes.plot(at, precision, "o", color=tint, markersize=7, markeredgecolor=charts.PAPER)
        axes.annotate(
            f"from {found.figures.threshold:.3f} on", (at, precision), (8, -14), textcoords="offset points", color=tint, fontsize=9
        )
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(min([target, *(right / kept for kept, right in counts)]) - 0.1, 1.02)
    axes.set_xlabel("share of misses escalated")
    axes.set_ylabel("right among answers kept")
    axes.grid(True)
