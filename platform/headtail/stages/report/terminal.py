"""The closing table of a loop, for a terminal: coverage, quality, rows by state, latency, cost. In: the summary. Out: a rich Table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from headtail.core.rows import SLICES, State
from headtail.stages.report.summary import MODELS, SOURCES, TIERS

NONE = "-"
WIDE = 100  # columns that intervals of four tiers take
_STYLES = {"teacher": "blue", "student": "dark_orange3", "realtime": "magenta", "fallback": "bright_black"}


def table(summary: Mapping[str, Any], width: int = WIDE) -> Table:
    """The figures of `summary` (see docs/report.md) as one table; what was not run is a dash, and said below.

    On fewer than WIDE columns an interval is its longer half, in thousandths.
    """
    outer = Table(
        box=None, show_header=False, pad_edge=False, title=str(summary.get("title", "")), title_justify="left", title_style="bold"
    )
    outer.add_column()
    for heading, body in _sections(summary, width >= WIDE):
        outer.add_row(Text(heading, style="bold"))
        outer.add_row(body)
        outer.add_row("")
    for line in _closing(summary):
        outer.add_row(Text(line, style="dim"))
    return outer


def _sections(s: Mapping[str, Any], wide: bool) -> Iterator[tuple[str, Table]]:
    yield (
        "Coverage",
        _grid(
            ("", "share of events"),
            [
                ("later traffic answered from the cache (replayed)", _percent(s.get("coverage_later_traffic"))),
                ("later traffic, head alone (planned)", _percent(s.get("head_coverage_later"))),
                ("later traffic seen before (the most a cache can answer)", _percent(s.get("seen_coverage_later"))),
                ("log before the cut", _percent(s.get("coverage_log"))),
            ],
        ),
    )
    tiers = [tier for tier in TIERS if tier in s.get("tiers", TIERS)]
    models = [tier for tier in tiers if tier in MODELS]
    strata = [(name, _number(s.get(f"gold_rows_{name}")), *(_quality(s, tier, name, wide) for tier in tiers)) for name in SLICES]
    interval = "95 % interval" if wide else "95 % interval: ± in thousandths"
    yield f"Quality against people's answers (micro-F1, {interval})", _grid(("stratum", "n", *tiers), strata, _STYLES)
    states = [(str(state), *(_number(s.get(f"rows_{tier}_{state}")) for tier in models)) for state in State]
    states.insert(0, ("rows in", *(_number(s.get(f"rows_{tier}_in")) for tier in models)))
    states.append(("rows/s", *(_number(s.get(f"rows_per_s_{tier}"), 1) for tier in models)))
    yield "Rows by state", _grid(("", *models), states, _STYLES)
    latency = [
        (source, _number(s.get(f"requests_{source}")), *(_number(s.get(f"latency_{source}_{p}_ms"), 1) for p in ("p50", "p95", "p99")))
        for source in (*SOURCES, "all")
    ]
    yield "Latency in ms, by who answered", _grid(("", "requests", "p50", "p95", "p99"), latency)
    cost: list[tuple[str, ...]] = []
    for words, name in (("USD per million queries", "usd_per_million"), ("without the engine's start", "usd_per_million_running")):
        cost.append((words, *(_number(s.get(f"{name}_{tier}"), 2) for tier in tiers)))
        cost.append(("teacher's cost over the tier's", *(_over(s.get(f"{name}_teacher"), s.get(f"{name}_{tier}")) for tier in tiers)))
    yield "Cost in batch", _grid(("", *tiers), cost, _STYLES)


def _closing(s: Mapping[str, Any]) -> Iterator[str]:
    teacher = str(s.get("model_teacher") or "")
    if teacher.startswith(("example:", "distill/")):
        trained = ", trained here on gold's training split," if teacher.startswith("distill/") else ""
        yield f"The teacher ({teacher}){trained} is a stand-in for a strong LLM: these figures show the way, not what a real one reaches."
    for gate, who in (("gate", "student"), ("realtime_gate", "realtime student")):
        if s.get(f"{gate}_passed") is not None:
            claims, verdict = s[f"{gate}_claims"], "passed" if s[f"{gate}_passed"] else "REFUSED"
            yield f"Gate: the {who} {verdict}, {sum(claim['passed'] for claim in claims)} of {len(claims)} claims hold."
    if s.get("student_served") is False and s.get("model_student"):
        yield "The release serves no student: a miss ends in the fallback."
    if s.get("not_run"):
        yield f"Not run: {', '.join(s['not_run'])}."


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[str, str] | None = None) -> Table:
    made = Table(box=None, header_style="none", pad_edge=False, padding=(0, 2, 0, 0))
    for number, head in enumerate(heads):
        made.add_column(head, justify="left" if number == 0 else "right", style=(styles or {}).get(head, ""), no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def _quality(s: Mapping[str, Any], tier: str, name: str, wide: bool) -> str:
    value = s.get(f"quality_{tier}_{name}")
    if value is None:
        return NONE
    low, high = s[f"quality_low_{tier}_{name}"], s[f"quality_high_{tier}_{name}"]
    return f"{value:.3f} [{low:.3f}, {high:.3f}]" if wide else f"{value:.3f} ±{1000 * max(value - low, high - value):.0f}"


def _over(above: float | None, below: float | None) -> str:
    return f"{above / below:.1f}" if above and below else NONE


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, digits: int = 0) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"
