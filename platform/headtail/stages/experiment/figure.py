"""The picture of an experiment: the effect on changed requests by stratum, and on all traffic, each with two intervals.

In: a Result. Out: a figure. Decides nothing.
"""

from __future__ import annotations

from typing import Any

from headtail.adapters import charts
from headtail.stages.experiment.result import Result


def effect_figure(result: Result, outcome: str, confidence: float) -> Any:
    """A row per effect. Thick: the interval for one look. Thin: the one that holds at every look. A refused figure says so."""
    rows = [*result.effects, *([result.full.estimate] if result.full and result.full.estimate else [])]
    thin = [one.stratum for one in result.full.thin] if result.full else []
    figure, axes = charts.blank(7.2, 1.2 + 0.5 * (len(rows) + bool(thin)))
    axes.axvline(0, color=charts.MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    for place, row in enumerate(rows):
        tint = charts.INK if row.stratum in ("all", "changed") else charts.COLOURS["teacher"]
        if row.value is None:
            axes.text(0.5, place, "too few units", color=charts.MUTED, ha="center", va="center", transform=axes.get_yaxis_transform())
            continue
        axes.plot([row.always_low, row.always_high], [place, place], color=tint, linewidth=1.0)
        axes.plot([row.low, row.high], [place, place], color=tint, linewidth=4.0, alpha=0.45, solid_capstyle="butt")
        axes.plot(row.value, place, "o", color=tint, markersize=6, markeredgecolor=charts.PAPER, markeredgewidth=0.8)
        axes.text(row.value, place - 0.2, f"{row.value:+.4g}", color=tint, ha="center", va="bottom", fontsize=8.5)
    names = [f"{row.stratum}\nn = {row.units_control + row.units_treatment:,}" for row in rows]
    if thin:
        text = f"refused: too few units in {', '.join(thin)}"
        axes.text(
            0.5, len(rows), text, color=charts.COLOURS["batch_student"], ha="center", va="center", transform=axes.get_yaxis_transform()
        )
        names.append("full coverage")
    axes.set_yticks(range(len(names)), names, color=charts.INK)
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.set_xlabel(f"{outcome} per request, treatment minus control; {confidence:.0%}: thick for one look, thin for every look")
    axes.xaxis.grid(True)
    axes.spines["left"].set_visible(False)
    return figure
