"""The closing table of a pipeline, for a terminal: coverage, quality, rows by state, latency, cost. In: the summary. Out: a rich Table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from headtail.core.rows import SLICES, State
from headtail.stages.report.tree import PATHS, QualityFigure, SourceSummary, Summary

NONE = "-"
WIDE = 100  # columns that intervals of four answer sources take


def summary_table(summary: Summary, width: int = WIDE) -> Table:
    """The figures of `summary` (see docs/report.md) as one table; what was not run is a dash, and said below.

    On fewer than WIDE columns the ends of an interval are hundredths, rounded outwards.
    """
    outer = Table(box=None, show_header=False, pad_edge=False, title=summary.title, title_justify="left", title_style="bold")
    outer.add_column()
    for heading, body in _sections(summary, width >= WIDE):
        outer.add_row(Text(heading, style="bold"))
        outer.add_row(body)
        outer.add_row("")
    for line in _closing(summary):
        outer.add_row(Text(line, style="dim"))
    return outer


def _sections(s: Summary, wide: bool) -> Iterator[tuple[str, Table]]:
    yield (
        "Coverage",
        _grid(
            ("", "share of events"),
            [
                ("holdout traffic answered from the cache (replayed)", _percent(s.figures.coverage_holdout_traffic)),
                ("holdout traffic, head alone (planned)", _percent(s.figures.head_coverage_holdout)),
                ("holdout traffic seen before (the most a cache can answer)", _percent(s.figures.seen_coverage_holdout)),
                ("log before the cut", _percent(s.figures.coverage_log)),
            ],
        ),
    )
    sources, styles = s.columns, {_head(source): source.source.terminal for source in s.columns}
    models, heads = [source for source in sources if source.source.model], list(map(_head, sources))
    strata = [(name, _number(s.labelled[name]), *(_quality(source.quality[name], wide) for source in sources)) for name in SLICES]
    interval = "95 % interval" if wide else "95 % interval, rounded outwards"
    yield f"Quality against people's answers (micro-F1, {interval})", _grid(("stratum", "n", *heads), strata, styles)
    states = [(str(state), *(_number(source.job.rows[state]) for source in models)) for state in State]
    states.insert(0, ("rows in", *(_number(source.job.rows["in"]) for source in models)))
    states.append(("rows/s", *(_number(source.job.rows_per_s, 1) for source in models)))
    yield "Rows by state", _grid(("", *map(_head, models)), states, styles)
    latency = [
        (path, _number(found.requests), *(_number(value, 1) for value in (found.p50, found.p95, found.p99)))
        for path, found in ((path, s.latency[path]) for path in (*PATHS, "all"))
    ]
    yield "Latency in ms, by who answered", _grid(("", "requests", "p50", "p95", "p99"), latency)
    cost: list[tuple[str, ...]] = []
    for words, name in (("USD per million queries", "usd_per_million"), ("without the engine's start", "usd_per_million_running")):
        teacher, *_ = prices = [getattr(source.job, name) for source in (s.teacher, *sources)]
        cost.append((words, *(_number(price, 2) for price in prices[1:])))
        cost.append(("teacher's cost over the source's", *(_over(teacher, price) for price in prices[1:])))
    yield "Cost in batch", _grid(("", *heads), cost, styles)


def _head(source: SourceSummary) -> str:
    """An answer source as the head of a column."""
    return source.source.short


def _closing(s: Summary) -> Iterator[str]:
    teacher = s.teacher.job.model or ""
    if teacher.startswith(("example:", "distill/")):
        trained = ", trained here on the human labels' training split," if teacher.startswith("distill/") else ""
        what = "is a placeholder for a strong LLM: these figures show that the pipeline works, not what an LLM reaches."
        yield f"The teacher ({teacher}){trained} {what}"
    for student in s.students:
        if student.gate.passed is not None:
            passed = [criterion.passed for criterion in student.gate.criteria]
            verdict = "passed" if student.gate.passed else "REJECTED"
            yield f"Gate: the {student.label} {verdict}, {sum(passed)} of {len(passed)} criteria passed."
    if s.student_served is False and s.students[0].job.model:
        yield "The release serves no student: a miss ends in the fallback."
    if s.not_run:
        yield f"Not run: {', '.join(s.not_run)}."


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[str, str] | None = None) -> Table:
    made = Table(box=None, header_style="none", pad_edge=False, padding=(0, 2, 0, 0))
    for number, head in enumerate(heads):
        made.add_column(head, justify="left" if number == 0 else "right", style=(styles or {}).get(head, ""), no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def _quality(score: QualityFigure, wide: bool) -> str:
    value, low, high = score.value, score.low, score.high
    if value is None or low is None or high is None:
        return NONE
    return f"{value:.3f} [{low:.3f}, {high:.3f}]" if wide else f"{value:.3f} {_end(low, math.floor)}-{_end(high, math.ceil)}"


def _end(value: float, rounded: Callable[[float], int]) -> str:
    """An end of an interval within 0..1 in three characters: .07, 1.0."""
    hundredths = rounded(round(100 * value, 6))
    return "1.0" if hundredths >= 100 else f".{max(hundredths, 0):02d}"


def _over(above: float | None, below: float | None) -> str:
    return f"{above / below:.1f}" if above and below else NONE


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, digits: int = 0) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"
