"""A Preview for people: tables for a terminal.

In: a Preview, or its result. Out: rich renderables. Knows no figures of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from headtail.batch.limits import UNPRICED
from headtail.stages.precompute.dry_run.estimate import ASSUMED, Bounds, Estimate, Probe
from headtail.stages.precompute.dry_run.preview import Preview
from headtail.stages.precompute.result import PlannedActual

_MEANS = {
    "reused": "an earlier job's answer has the same key",
    "resumed": "finished in this job already",
    "retried": "an earlier answer has the same key, but a state to be retried, or lacks top_logprobs",
    "changed": "asked before under another key",
    "new": "never asked by an earlier job of this task and source",
}


def preview_tables(preview: Preview) -> RenderableType:
    """A dry run: rows by what becomes of them, what changed, what the rest will take."""
    parts: list[RenderableType] = [_rows(preview)]
    if preview.changes:
        parts.append(_changes_table(preview))
    if preview.ask == preview.probed == 0:
        parts.append(Text("nothing to do: no row is to be asked", style="bold"))
    if preview.probe is not None:
        parts.append(_probe_text(preview.probe))
    if preview.estimate is not None:
        parts.append(_estimate(preview.estimate, preview.workers))
    elif preview.ask:
        parts.append(Text(f"{_rows_text(preview.ask)} to ask; no estimate without a probe (--probe 1000)"))
    parts += [Text(f"note: {note}", style="dim") for note in preview.notes]
    if preview.beyond:
        parts.append(Text(f"over budget: {preview.beyond}", style="bold red"))
    return Stack(*parts)


def _rows(preview: Preview) -> Table:
    table = Table(title=f"dry run of {preview.path}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name, side in (("", "left"), ("rows", "right"), ("of traffic", "right"), ("such as", "left"), ("", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    total, seen = preview.traffic, set()
    for group in preview.groups:
        name = f"{group.kind}: {' + '.join(group.parts)}" if group.parts else group.kind
        share = f"{group.traffic / total:.1%}" if total else "-"
        means = "" if group.kind in seen else _MEANS[group.kind]
        seen.add(group.kind)
        table.add_row(name, f"{group.rows:,}", share, _some(group.examples), Text(means, style="dim"))
    table.add_row(
        Text("in all", style="bold"), f"{preview.rows:,}", "", "", Text(f"{preview.duplicates:,} duplicates left out", style="dim")
    )
    return table


def _some(examples: tuple[str, ...]) -> str:
    return ", ".join(text if len(text) <= 24 else text[:23] + "…" for text in examples)


def _changes_table(preview: Preview) -> Table:
    title = f"changed since {preview.against[0]}"
    table = Table("part", "was", "now", title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for change in preview.changes:
        table.add_row(change.part, Text(change.was), Text(change.now))
    return table


def _probe_text(probe: Probe) -> Text:
    states = ", ".join(f"{count:,} {state}" for state, count in probe.states.items() if count)
    return Text(
        f"probe: {probe.rows:,} rows at random ({states}), {probe.seconds:.1f} s of engine time + {probe.start_s:.1f} s start, "
        f"{'price unknown' if probe.usd is None else f'USD {probe.usd:.4g}'}; the job takes their answers over"
    )


def _estimate(estimate: Estimate, workers: int) -> RenderableType:
    if estimate.exact:
        return Text("nothing is left to ask: the probe was all there was (exact)", style="bold")
    most = "at most" if estimate.at_most else "bounds"
    means = f"(tokens: 95 % by the probe's draw; times and money: by its pace too,\n{ASSUMED})"
    title = f"what is left, {_rows_text(estimate.rows)}, will take {means}"
    table = Table("", "estimate", most, title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name, span, form in _spans(estimate, workers):
        bounds = f"{form(span.high)}" if estimate.at_most and name[0] not in "tp" else f"{form(span.low)} to {form(span.high)}"
        table.add_row(name, form(span.value), bounds)
    if estimate.usd is None:
        table.add_row("money", Text("unknown", style="bold"), UNPRICED)
    return table


def _spans(estimate: Estimate, workers: int) -> Iterator[tuple[str, Bounds, Any]]:
    yield "prompt tokens", estimate.tokens_in, _count
    yield "tokens of answers", estimate.tokens_out, _count
    yield "engine time", estimate.engine_s, duration
    yield f"wall time, {workers} worker{'s' if workers > 1 else ''}", estimate.wall_s, duration
    if estimate.usd is not None:
        yield "money", estimate.usd, _usd


def _rows_text(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _usd(value: float) -> str:
    return f"USD {value:,.2f}" if value >= 1 else f"USD {value:.2g}"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def outcome_table(planned: Mapping[str, PlannedActual]) -> Table:
    """The plan beside its result: `dry_run` of a receipt's result."""
    table = Table("", "planned", "bounds", "actual", title="planned and actual", title_justify="left", box=None, pad_edge=False)
    for name, item in planned.items():
        form = duration if name.endswith("_s") else _count
        bounds = f"{form(item.low)} to {form(item.high)}" if item.low is not None and item.high is not None else "-"
        planned_text = form(item.planned) if item.planned is not None else "-"
        table.add_row(_NAMES.get(name, name), planned_text, bounds, form(item.actual))
    return table


_NAMES = {
    "rows": "rows asked",
    "tokens_in": "prompt tokens",
    "tokens_out": "tokens of answers",
    "engine_s": "engine time",
    "wall_s": "wall time",
}
