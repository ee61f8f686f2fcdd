"""Figures that several stages and the report share: one colour per answer source, direct labels, no chart junk.

In: plain numbers. Out: matplotlib Figures, or SVG text for an HTML page. Each answer source has its own colour and marker
(core.answer_source).
Matplotlib is imported when a figure is drawn. Knows nothing of receipts or stores.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from headtail.core.answer_source import SOURCES, source_named
from headtail.core.rows import Source

INK, MUTED, RULE, PAPER = "#1b1f24", "#5f6875", "#dfe3e8", "#ffffff"
COLOURS = {source.name: source.colour for source in SOURCES} | {
    "cache": "#009e73",  # a path a request takes, not an answer source
    "realtime": source_named(Source.BATCH_STUDENT).colour,  # a path too: the student that answers misses
    "all": INK,
}
_MARKERS = {source.name: source.marker for source in SOURCES}
_SPARE = ("#cc79a7", "#56b4e9", "#e69f00", "#a0522d")  # for answer sources of other names
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.0,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "figure.constrained_layout.use": True,
}
SVG: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "headtail"}  # text stays text; the same figure gives the same bytes


class QualityPoint(NamedTuple):
    """An answer source's quality on a stratum: value and interval, NaN when there is none."""

    source: str
    stratum: str
    value: float
    low: float
    high: float
    n: int


class ReliabilityBin(NamedTuple):
    """One bin of a reliability diagram."""

    n: int
    confidence: float
    right: float
    low: float
    high: float


def colour(source: str, sources: Sequence[str] = ()) -> str:
    """The colour of an answer source or path; sources of other names get spare colours by their order in `sources`."""
    if source in COLOURS:
        return COLOURS[source]
    others = [name for name in sources if name not in COLOURS]
    return _SPARE[others.index(source) % len(_SPARE)] if source in others else MUTED


def quality_chart(points: Sequence[QualityPoint], name: str = "micro-F1", confidence: float = 0.95) -> Any:
    """Dots with intervals: strata down, quality across, one colour and marker per answer source, answer sources named at the top row."""
    strata = list(dict.fromkeys(p.stratum for p in points))
    sources = list(dict.fromkeys(p.source for p in points))
    figure, axes = blank(7.2, 0.9 + 0.62 * len(strata))
    step = min(0.24, 0.66 / max(1, len(sources)))
    lowest = min([p.low for p in points if p.low == p.low] or [0.0])
    left = 0.0 if lowest < 0.55 else 0.5
    for p in points:
        if p.value != p.value:
            continue
        place = strata.index(p.stratum) + step * (sources.index(p.source) - (len(sources) - 1) / 2)
        tint = colour(p.source, sources)
        axes.plot([p.low, p.high], [place, place], color=tint, linewidth=2.0, solid_capstyle="round", alpha=0.55)
        axes.plot(p.value, place, _MARKERS.get(p.source, "^"), color=tint, markersize=6.5, markeredgecolor=PAPER, markeredgewidth=0.8)
        label = f"{p.source} {p.value:.2f}" if p.stratum == strata[0] else f"{p.value:.2f}"
        axes.text(p.high + 0.012 * (1 - left), place, label, color=tint, va="center", fontsize=8.5)
    sizes = {s: max(p.n for p in points if p.stratum == s) for s in strata}
    axes.set_yticks(range(len(strata)), [f"{s}\nn = {sizes[s]:,}" for s in strata], color=INK)
    axes.set_ylim(len(strata) - 0.45, -0.55)
    axes.set_xlim(left, 1.0)
    axes.set_xlabel(f"{name} against people's answers; bars are {confidence:.0%} intervals")
    axes.xaxis.grid(True)
    axes.spines["left"].set_visible(False)
    return figure


def calibration_chart(bins: Mapping[str, Sequence[ReliabilityBin]], labels: Mapping[str, str]) -> Any:
    """Reliability diagram: confidence across, share of right answers up, one panel per answer source."""
    sources = [source for source in bins if bins[source]]
    count = max(1, len(sources))
    figure, panels = blank(3.6 * count, 3.5, ncols=count, sharey=count > 1)
    for axes, source in zip(np.atleast_1d(panels), sources, strict=False):
        tint = colour(source, sources)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        across, up = [b.confidence for b in bins[source]], [b.right for b in bins[source]]
        axes.vlines(across, [b.low for b in bins[source]], [b.high for b in bins[source]], color=tint, linewidth=1.6, alpha=0.45)
        axes.plot(across, up, _MARKERS.get(source, "^"), color=tint, markersize=5.5, markeredgecolor=PAPER, markeredgewidth=0.7)
        axes.set_title(labels.get(source, source), color=tint, loc="left", fontsize=10)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("confidence")
        axes.grid(True)
    np.atleast_1d(panels)[0].set_ylabel("share of answers right")
    if not sources:
        _empty(np.atleast_1d(panels)[0], "no answer came with a confidence")
    return figure


def latency_chart(paths: Mapping[str, Sequence[float]]) -> Any:
    """ECDF of latency in ms by path, log scale, each curve named with its median and 99th percentile."""
    samples = {name: np.sort(np.asarray(values, dtype=float)) for name, values in paths.items() if len(values)}
    figure, axes = blank(7.2, 3.4)
    if not samples:
        _empty(axes, "no request was answered")
        return figure
    for number, (name, values) in enumerate(samples.items()):
        tint = colour(name, list(samples))
        up = np.arange(1, len(values) + 1) / len(values)
        axes.step(np.concatenate([values[:1], values]), np.concatenate([[0.0], up]), where="post", color=tint, linewidth=2.0)
        p50, p99 = np.quantile(values, [0.5, 0.99])
        label = f"{name}: half within {_ms(p50)}, 99 % within {_ms(p99)}"
        axes.text(0.0, 1.05 + 0.085 * (len(samples) - 1 - number), label, color=tint, fontsize=9, transform=axes.transAxes)
    log_across(axes, "milliseconds", "share of requests answered by then")
    percent_up(axes)
    return figure


def svg(figure: Any) -> str:
    """The figure as SVG text: text as text, the same bytes for the same figure."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(SVG):
        figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def inline(text: str, name: str, label: str) -> str:
    """SVG text made fit for an HTML page: no prologue, ids of its own, colours that follow the page's theme.

    Theme colours become CSS variables (`--ink`, `--teacher`, ...) with the drawn colour as the default.
    """
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    names = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper", "#000000": "ink"}
    names |= {tint: source for source, tint in COLOURS.items() if source not in ("realtime", "all")}
    for tint, variable in names.items():
        body = re.sub(rf"(?<=[:\s]){tint}\b", f"var(--{variable}, {tint})", body, flags=re.I)
        body = re.sub(rf'(fill|stroke)="{tint}"', rf'style="\1: var(--{variable}, {tint})"', body, flags=re.I)
    head = f'<svg role="img" aria-label="{_attribute(label)}"'
    return head + re.sub(r'\s(width|height)="[^"]*"', "", body[4 : body.index(">")]) + body[body.index(">") :]


def blank(width: float, height: float, **panels: Any) -> tuple[Any, Any]:
    """An empty figure in this style, and its axes; `panels`: of matplotlib's `subplots`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        return figure, figure.subplots(**panels)


def log_across(axes: Any, across: str, up: str) -> None:
    """A log scale across, in plain numbers; both axes labelled; a grid."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel(f"{across}, log scale")
    axes.set_ylabel(up)
    axes.grid(True)


def percent_up(axes: Any) -> None:
    """Shares up, from none to all."""
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(0, 1.02)


def _empty(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color=MUTED, transform=axes.transAxes)
    axes.set_axis_off()


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.2g} ms"


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
