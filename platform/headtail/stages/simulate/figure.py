"""The picture of a simulation: how latency is distributed, and cost beside quality, a colour per design.

In: names, latencies, figures. Out: a matplotlib Figure. Matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headtail.adapters import charts
from headtail.core.intervals import Array
from headtail.stages.simulate.result import DesignFigures

_TINTS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#7d7d7d", "#e69f00", "#56b4e9")  # Okabe and Ito's, as in charts


def designs_figure(seconds: Mapping[str, Array], designs: Sequence[DesignFigures]) -> Any:
    """Share of requests within a time, by design; USD per million requests across and micro-F1 up, with intervals."""
    figure, (left, right) = charts.blank(10.5, 4.2, ncols=2)
    for place, design in enumerate(designs):
        tint, values = _TINTS[place % len(_TINTS)], 1000 * np.sort(seconds[design.name])
        some = values[np.unique(np.linspace(0, len(values) - 1, 2000).astype(int))]
        left.step(some, np.linspace(0, 1, len(some)), where="post", color=tint, linewidth=1.8)
        label = f"{design.name}: 99 % within {design.latency.p99_ms:,.3g} ms"
        left.text(0.0, 1.04 + 0.07 * (len(designs) - 1 - place), label, color=tint, fontsize=9, transform=left.transAxes)
        quality, cost = design.quality, design.cost.total
        if quality.value is not None and cost is not None:
            right.plot([cost, cost], [quality.low, quality.high], color=tint, linewidth=2, alpha=0.5)
            right.plot(
                cost, quality.value, "o", color=tint, markersize=12 - place, markerfacecolor="none", markeredgewidth=2
            )  # equal ones show
    charts.log_across(left, "milliseconds", "share of requests answered by then")
    charts.percent_up(left)
    right.set_xlabel("USD per million requests")
    right.set_ylabel("micro-F1 against people, all requests")
    right.margins(x=0.25)
    right.set_ylim(0, 1.02)
    right.grid(True)
    if not right.lines:
        right.text(0.5, 0.5, "cost or quality is not known", ha="center", color=charts.MUTED, transform=right.transAxes)
    return figure
