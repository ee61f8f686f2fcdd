"""The pictures of a plan: the coverage curve, and one page with curve and band, cost of further coverage, ageing, and what was decided.

In: the plan's figures. Out: matplotlib Figures. Matplotlib is imported when a figure is drawn. Decides nothing.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from headtail.adapters import charts
from headtail.stages.plan.choice import HeadChoice
from headtail.stages.plan.forecast import CONFIDENCE, Forecast
from headtail.stages.plan.money import Costs
from headtail.stages.plan.outlook import Outlook
from headtail.stages.plan.words import Conclusion

FUTURE = charts.COLOURS["cache"]
SEEN, HELD_OUT = charts.COLOURS["teacher"], charts.COLOURS["batch_student"]
_POINTS: dict[str, Any] = {"textcoords": "offset points"}
_MIDDLE: dict[str, Any] = {"ha": "center", "va": "center", "color": charts.MUTED}
_LINE = 74  # characters of a line of text on the page


def coverage_figure(curve: dict[str, Any], outlook: Outlook) -> Any:
    """Queries by rank across (log), share of events up: expected of the days to come with its band, in holdout traffic, up to the cut."""
    drawn, axes = charts.blank(7.2, 3.8)
    _coverage(axes, curve, outlook)
    return drawn


def _coverage(axes: Any, curve: dict[str, Any], outlook: Outlook) -> None:
    head, points = curve["head"], curve["points"]
    ranks = [point["rank"] for point in points]
    end, expected = max(1, head["rows"]), outlook.head[-1]
    axes.axvspan(ranks[0], end, color=FUTURE, alpha=0.06, linewidth=0)
    axes.axvline(end, color=charts.MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
    lines: list[tuple[str, list[Any], list[Any], str, Any, float]] = [
        ("up to the cut", ranks, [point["share"] for point in points], SEEN, (0, (1, 2)), 1.6)
    ]
    if curve["holdout_events"]:
        lines.append(("holdout traffic", ranks, [point["share_holdout"] for point in points], HELD_OUT, (0, (5, 2)), 1.8))
    lines.append(("expected", [one.rows for one in outlook.curve], [one.value for one in outlook.curve], FUTURE, "-", 2.4))
    _band(axes, outlook.curve)
    for _, across, up, tint, dash, width in lines:
        axes.plot(across, up, color=tint, linewidth=width, linestyle=dash, solid_capstyle="round", clip_on=False)
    axes.plot(end, expected.value, "o", color=FUTURE, markersize=6.5, markeredgecolor=charts.PAPER, markeredgewidth=1.0, clip_on=False)
    places = _apart([up[-1] for _, _, up, _, _, _ in lines])
    for (label, across, up, tint, _, _), place in zip(lines, places, strict=True):
        axes.annotate(
            f"{label} {up[-1]:.0%}",
            (max(ranks[-1], across[-1]), place),
            (7, 0),
            **_POINTS,
            color=tint,
            fontsize=9,
            va="center",
        )
    axes.annotate("head ends", (end, 0), (4, 5), **_POINTS, color=charts.MUTED, fontsize=8.5)
    band = "" if expected.low is None or expected.high is None else f" ({expected.low:.1%} to {expected.high:.1%})"
    holdout = f", {head['share_holdout']:.1%} of holdout events" if curve["holdout_events"] else ""
    days = "the next day" if expected.horizon == 1 else f"the next {expected.horizon} days"
    axes.set_title(
        f"head: {head['rows']:,} of {curve['queries']:,} queries{holdout}\nof {days}' events {expected.value:.1%}{band}",
        loc="left",
        fontsize=10,
    )
    charts.log_across(axes, "queries in the head", "share of events covered")
    charts.percent_up(axes)
    axes.set_xlim(1, max(2, curve["queries"]))


def _band(axes: Any, curve: Sequence[Forecast]) -> None:
    banded = [(one.rows, one.low, one.high) for one in curve if one.low is not None and one.high is not None]
    if banded:
        rows, low, high = zip(*banded, strict=True)
        axes.fill_between(rows, low, high, color=FUTURE, alpha=0.18, linewidth=0)


def _apart(places: Sequence[float], least: float = 0.055) -> list[float]:
    """Heights of labels, moved apart where they are too near."""
    order, found = np.argsort(places)[::-1], list(places)
    for above, below in itertools.pairwise(order):
        found[below] = min(found[below], found[above] - least)
    return found


def plan_page(curve: dict[str, Any], choice: HeadChoice, costs: Costs, decision: Conclusion) -> Any:
    """The plan on one page."""
    drawn, panels = charts.blank(12.5, 10.4, nrows=3, ncols=2, height_ratios=(1.15, 0.9, 0.95))
    _coverage(panels[0, 0], curve, choice.outlook)
    _horizons(panels[0, 1], choice)
    _cost(panels[1, 0], choice, costs)
    _ages(panels[1, 1], choice)
    for axes in panels[2]:
        axes.set_axis_off()
    _conclusion(panels[2, 0], decision)
    drawn.suptitle("Plan", x=0.01, ha="left", fontsize=14, fontweight="bold")
    return drawn


def _horizons(axes: Any, choice: HeadChoice) -> None:
    """The head's expected coverage by horizon, with bands where the log is long enough, and what came of the held-out days."""
    checked = choice.outlook.checked
    shown = [*choice.outlook.head, *(() if checked is None else (checked[0],))]
    for place, one in enumerate(shown):
        if one.low is not None and one.high is not None:
            axes.plot([place] * 2, [one.low, one.high], color=FUTURE, linewidth=8, alpha=0.3, solid_capstyle="butt")
        axes.plot(place, one.value, "o", color=FUTURE, markersize=6, markerfacecolor=FUTURE if one.has_band else charts.PAPER)
        axes.annotate(f"{one.value:.1%}", (place, one.value), (9, 0), **_POINTS, fontsize=8.5, color=charts.INK, va="center")
    names = ["next day" if one.horizon == 1 else f"{one.horizon} days" for one in choice.outlook.head]
    if checked is not None:
        axes.plot(len(names), checked[1], "x", color=HELD_OUT, markersize=9, markeredgewidth=2)
        names.append(f"held out:\ncame {checked[1]:.1%}")
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.2)
    axes.set_ylabel("share of their events")
    axes.yaxis.grid(True)
    _percent(axes)
    text = f"The head by horizon: bar is the {CONFIDENCE:.0%} band, a hollow dot has none"
    axes.set_title(text if choice.dated else "The head, if traffic stays as it is: the log has no days", loc="left", fontsize=10)


def _cost(axes: Any, choice: HeadChoice, costs: Costs) -> None:
    """USD of each further 1 % of future coverage, by coverage reached and answer source."""
    axes.set_title("Cost of a further 1 % of future coverage", loc="left", fontsize=10)
    drawn = 0
    for name, source in (
        ("teacher_per_point", "teacher"),
        ("batch_per_point", "batch_student"),
        ("realtime_per_point", "realtime_student"),
    ):
        points = [(step.coverage, getattr(step, name)) for step in choice.steps if getattr(step, name) is not None]
        points = [(share, usd) for share, usd in points if usd > 0]
        if points:
            across, up = zip(*points, strict=True)
            axes.plot(across, up, color=charts.COLOURS[source], linewidth=2)
            axes.annotate(source.replace("_", " "), (across[0], up[0]), (2, 5), **_POINTS, color=charts.COLOURS[source], fontsize=9)
            drawn += 1
    if not drawn:
        axes.text(
            0.5,
            0.5,
            "prices are not known: set prices.teacher and the others",
            ha="center",
            va="center",
            color=charts.MUTED,
            transform=axes.transAxes,
        )
        axes.set_xticks([])
        axes.set_yticks([])
        return
    if costs.saved and choice.events:
        worth = 0.01 * choice.events * costs.saved
        axes.axhline(worth, color=charts.MUTED, linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(
            "what its hits save",
            (1, worth),
            (0, 4),
            xycoords=("axes fraction", "data"),
            **_POINTS,
            ha="right",
            color=charts.MUTED,
            fontsize=8.5,
        )
    axes.axvline(choice.outlook.head[-1].value, color=charts.MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
    axes.annotate(
        "head ends",
        (choice.outlook.head[-1].value, 0.02),
        (4, 0),
        xycoords=("data", "axes fraction"),
        **_POINTS,
        color=charts.MUTED,
        fontsize=8.5,
    )
    axes.set_yscale("log")
    axes.set_ylabel("USD, log scale")
    axes.set_xlabel("share of the horizon's events covered")
    axes.grid(True)
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _ages(axes: Any, choice: HeadChoice) -> None:
    """Share of a day's events that an older head loses."""
    losses = choice.outlook.ages
    axes.set_title("What a head loses as it gets older, against one of the day before", loc="left", fontsize=10)
    if not losses:
        axes.text(0.5, 0.5, "the log is too short to see a head age", **_MIDDLE, transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.plot(
        [1, *(one.age for one in losses)], [0.0, *(one.loss for one in losses)], color=FUTURE, linewidth=2, marker="o", markersize=3.5
    )
    banded = [one for one in losses if one.low is not None]
    if banded:
        axes.fill_between(
            [one.age for one in banded], [one.low for one in banded], [one.high for one in banded], color=FUTURE, alpha=0.18, linewidth=0
        )
    if choice.outlook.replan.days is not None:
        axes.axvline(choice.outlook.replan.days, color=charts.MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
        axes.annotate(
            "plan anew",
            (choice.outlook.replan.days, 0.92),
            (4, 0),
            xycoords=("data", "axes fraction"),
            **_POINTS,
            color=charts.MUTED,
            fontsize=8.5,
        )
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(top=max(0.02, axes.get_ylim()[1]))  # a loss of no account looks like one
    axes.set_xlabel("age of the head, days")
    axes.set_ylabel("share of events lost")
    axes.yaxis.grid(True)
    _percent(axes)


def _percent(axes: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))


def _conclusion(axes: Any, decision: Conclusion) -> None:
    """The sentences, over both columns."""
    lines = [wrapped for line in decision.lines for wrapped in textwrap.wrap(line, 2 * _LINE, initial_indent="- ", subsequent_indent="  ")]
    axes.text(0.0, 1.0, "Decided", transform=axes.transAxes, fontsize=11, fontweight="bold", va="top")
    axes.text(0.0, 0.88, "\n".join(lines), in_layout=False, transform=axes.transAxes, fontsize=9, va="top", linespacing=1.4)
