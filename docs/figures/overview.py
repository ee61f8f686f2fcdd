"""The figure on README's first screen: coverage of a real run, who answers which queries, and the two ways of a query.

    python docs/figures/overview.py STORE docs/figures/overview.svg

In: the root of a store that a pipeline filled (`make quickstart`). Out: an SVG. The curve and all figures are read from the
plan's coverage.json and from summary.json; only words are written here. Cost is shown as tokens: a price is a machine's time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

INK, MUTED, PAPER = "#1b1f24", "#5f6875", "#ffffff"
TEACHER, BATCH, REALTIME = "#0072b2", "#b35000", "#8b3a8b"  # dark enough for text on a tint of themselves
STYLE = {"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "headtail", "text.parse_math": False}
OFFLINE = (
    ("query log", MUTED),
    ("plan: head,\nteacher sample", MUTED),
    ("teacher\n(vLLM)", TEACHER),
    ("training set,\nreviewed", MUTED),
    ("students\n(DeepSpeed)", BATCH),
    ("gate on\nhuman labels", MUTED),
    ("release, with\nits evidence", INK),
)
ONLINE = (
    ("request", MUTED),
    ("snapshot\n(LMDB)", TEACHER),
    ("on a miss:\nrealtime student", REALTIME),
    ("late or invalid:\nfallback, degraded", MUTED),
    ("answer: JSON,\nsource, confidence", INK),
)


class Zone(NamedTuple):
    """Queries of one kind: the lines that say who answers them, at what cost and how well."""

    title: str
    who: str
    cost: str
    quality: str
    colour: str


def read(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(coverage.json of the latest plan, summary.json)"""
    plan = root / (root / "plan" / "LATEST").read_text(encoding="utf-8").strip()
    return json.loads((plan / "coverage.json").read_text("utf-8")), json.loads((root / "summary.json").read_text("utf-8"))


def zones(summary: dict[str, Any]) -> tuple[Zone, Zone, Zone]:
    """Head, seen and new queries. Where one student does both jobs it answers new queries too."""
    second = "realtime_student" if summary["model_realtime_student"] else "batch_student"

    def zone(title: str, source: str, who: str, stratum: str, colour: str) -> Zone:
        tokens, f1 = sum(summary[f"tokens_{way}_per_row_{source}"] for way in ("in", "out")), summary[f"quality_{source}_{stratum}"]
        return Zone(title, who, f"{tokens:.0f} tokens per query", f"F1 {f1:.2f} on {stratum}", colour)

    return (
        zone("head", "teacher", "teacher, ahead of time", "head", TEACHER),
        zone("seen", "batch_student", "batch student, ahead of time", "tail", BATCH),
        zone("new", second, "realtime student", "unseen", REALTIME),
    )


def curve(axes: Any, coverage: dict[str, Any], named: tuple[Zone, Zone, Zone]) -> None:
    """The share of a later day's searches that a cache of the most frequent queries answers, over three tinted zones."""
    points = coverage["points"]
    ranks, shares = [point["rank"] for point in points], [100 * point["share_holdout"] for point in points]
    head, last, end = coverage["head"]["rows"], ranks[-1], ranks[-1] * 40
    axes.set_xscale("log")
    for zone, left, right in zip(named, (1, head, last), (head, last, end), strict=True):
        axes.axvspan(left, right, color=zone.colour, alpha=0.09, lw=0)
        middle = (left * right) ** 0.5
        axes.text(middle, 108, zone.title, ha="center", va="center", color=zone.colour, fontsize=12, weight="bold")
        for line, text in enumerate((zone.who, zone.quality, zone.cost)):
            axes.text(middle, 24 - 8 * line, text, ha="center", va="center", color=INK if line else zone.colour, fontsize=9.5)
    axes.plot(ranks, shares, color=INK, lw=2)
    axes.plot([last, end], [shares[-1], 100], color=INK, lw=1.4, ls=(0, (2, 2)))
    for rank, share in ((head, 100 * coverage["head"]["share_holdout"]), (last, shares[-1])):
        axes.plot([rank], [share], "o", color=INK, ms=5)
        axes.annotate(
            f"{share:.0f} %", (rank, share), (-8, 5), textcoords="offset points", ha="right", color=INK, fontsize=11, weight="bold"
        )
    axes.set(xlim=(1, end), ylim=(0, 116), yticks=range(0, 101, 25), ylabel="share of a later day's searches, %")
    ticks = [10**power for power in range(8) if 10**power <= last]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("distinct queries in the cache, the most frequent first (log scale)", loc="left")
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)


def way(axes: Any, y: float, name: str, steps: tuple[tuple[str, str], ...]) -> None:
    """Boxes from left to right, joined by arrows."""
    axes.text(0, y, name, ha="left", va="center", color=INK, fontsize=10, weight="bold")
    start, end, gap = 0.85, 12.05, 0.22
    width = (end - start - gap * (len(steps) - 1)) / len(steps)
    for i, (text, colour) in enumerate(steps):
        x = start + i * (width + gap)
        shape = "round,pad=0.02,rounding_size=0.08"
        axes.add_patch(FancyBboxPatch((x, y - 0.36), width, 0.72, boxstyle=shape, fc=PAPER, ec=colour, lw=1.4))
        axes.text(x + width / 2, y, text, ha="center", va="center", color=INK, fontsize=8.6, linespacing=1.25)
        if i:
            axes.annotate("", (x - 0.02, y), (x - gap + 0.02, y), arrowprops={"arrowstyle": "-|>", "color": MUTED, "lw": 1.2, "fc": MUTED})


def draw(root: Path) -> Any:
    """The whole figure."""
    coverage, summary = read(root)
    with plt.rc_context(STYLE):
        figure, (top, below) = plt.subplots(2, 1, figsize=(10, 5.8), height_ratios=(3, 1.5), layout="constrained")
        figure.patch.set_facecolor(PAPER)  # readable on a dark page too
        curve(top, coverage, zones(summary))
        below.set(xlim=(0, 12.1), ylim=(-0.5, 1.7))
        below.axis("off")
        way(below, 1.2, "offline", OFFLINE)
        way(below, 0.05, "online", ONLINE)
    return figure


def main(root: str, out: str) -> None:
    draw(Path(root)).savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
