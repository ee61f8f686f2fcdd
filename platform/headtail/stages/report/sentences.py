"""What a summary says in words: the sentences at the top of the report, the notes below it, numbers for people. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headtail.core.rows import SLICES, SMALL
from headtail.stages.calibrate.result import VERDICTS
from headtail.stages.calibrate.result import Result as CalibrateResult
from headtail.stages.report.tree import SourceSummary, Summary


def report_notes(s: Summary) -> list[str]:
    """What a reader should know: the report's own remarks first, then each stage's. Each once."""
    return list(dict.fromkeys([*_own_notes(s), *s.remarks]))


def _own_notes(s: Summary) -> Iterator[str]:
    teacher = s.teacher.job.model or ""
    if teacher.startswith("example:"):
        yield (
            f"The teacher ({teacher}) is the small placeholder that ships with headtail, not a strong LLM: quality and cost ratios here "
            "show that the pipeline works, and not what a real teacher and student reach."
        )
    elif teacher.startswith("distill/"):
        yield (
            f"The teacher ({teacher}) was trained here on the training split of people's answers, because no model was named: it is a "
            "placeholder for a strong LLM."
        )
    batch = s.students[0]
    if batch.agreement is not None:
        yield (
            f"Agreement compares the {batch.label} with its own teacher; "
            "it does not say whether either is right, and is not a quality figure."
        )
    small = [f"{name} ({s.labelled[name]})" for name in SLICES[:4] if (s.labelled[name] or 0) < SMALL]
    if small and s.labelled["all"] is not None:
        yield f"Few labelled rows in {', '.join(small)}: read the intervals, not the dots."
    if s.student_served is False and batch.job.model:
        yield "The release serves no student: it did not pass the gate or was not named, so a miss ends in the fallback."
    if requests := s.figures.requests:
        yield f"Latency is what the replaying client saw over {int(requests):,} requests; client and server may share a machine."
    if s.teacher.job.usd_per_million is not None:
        yield "Cost is the machine's price times the seconds it was busy, engine start included; the price is an assumption (docs/cost.md)."


def headline(s: Summary) -> Iterator[str]:
    """What was found, in sentences for somebody who reads nothing else."""
    figures = s.figures
    if figures.coverage_holdout_traffic is not None:
        shares = [f"{percent(figures.cache_hit_share)} was answered from the cache"]
        shares += [f"{percent(figures.realtime_share)} by the realtime student"] if figures.realtime_share else []
        shares += [f"{percent(figures.fallback_share)} by the fallback"] if figures.fallback_share else []
        yield f"Of the holdout traffic, {_list(shares)}."
    elif figures.head_coverage_holdout is not None:
        planned = percent(figures.head_coverage_holdout)
        yield f"The head of {figures.head_rows:,.0f} queries covers {planned} of holdout traffic (planned, not replayed)."
    if figures.head_coverage_forecast is not None:
        ends = (figures.head_coverage_forecast_low, figures.head_coverage_forecast_high)
        band = "the log is too short for a band" if None in ends else f"90 % band {percent(ends[0])} to {percent(ends[1])}"
        days = f"{figures.forecast_horizon_days:,.0f} days"
        yield f"The head is expected to cover {percent(figures.head_coverage_forecast)} of the events of {days} to come ({band})."
    if scores := [f"the {source.label} scores {_score_words(source)}" for source in s.with_quality]:
        yield f"On {s.labelled['all']:,} queries answered by people, {_list(scores)} out of 1 (micro-F1, 95 % interval)."
    if withheld := figures.answers_withheld:
        yield f"Guardrails withheld {withheld:,.0f} answers from the cache: wrong text, or personal data that the query does not have."
    batch, *others = s.students
    yield from _gap(batch)
    yield from _gates(batch, others)
    if s.promise is not None:
        yield from _promise(s.promise)
    latency = s.latency["all"]
    if latency.p50 is not None:
        yield f"Half of the requests were answered within {ms(latency.p50)}, 99 of 100 within {ms(latency.p99)}."
    yield from _cost(s.teacher, batch, others)


def _promise(found: CalibrateResult) -> Iterator[str]:
    kept, figures, name = found.calibration, found.figures, found.source.replace("_", " ")
    if kept.threshold is None:
        yield f"Nothing is promised of the {name}'s answers to misses: {VERDICTS[found.verdict]}."
        return
    yield (
        f"Of the {name}'s answers with a confidence of at least {kept.threshold:.3f}, {percent(kept.target, 0)} are right, with at least "
        f"{percent(1 - kept.delta, 0)} confidence; {percent(figures.escalated.value)} of the misses are below it."
    )


def _gap(batch: SourceSummary) -> Iterator[str]:
    gap, low, high = batch.minus_teacher.value, batch.minus_teacher.low, batch.minus_teacher.high
    if gap is None or low is None or high is None:
        return
    if low <= 0 <= high:
        yield f"On the same queries no difference of {batch.label} and teacher is shown: difference {gap:+.2f} ({low:+.2f} to {high:+.2f})."
    else:
        side = "below" if gap < 0 else "above"
        yield f"On the same queries the {batch.label} is {abs(gap):.2f} {side} the teacher (difference {low:+.2f} to {high:+.2f})."


def _gates(batch: SourceSummary, others: Sequence[SourceSummary]) -> Iterator[str]:
    for source in (batch, *others):
        gate = source.gate
        if gate.passed is False:
            yield f"The gate rejected the {source.label}; what is missing: {'; '.join(gate.missing)}."
        elif gate.passed and source is not batch:
            yield f"The gate let the {source.label} pass too: it answers queries that are not in the cache."
        elif gate.passed and gate.delta is not None:
            sure = percent(1 - gate.delta, 0)
            yield f"The gate let the {source.label} pass: all {len(gate.criteria)} criteria, with at least {sure} confidence."


def _cost(teacher: SourceSummary, batch: SourceSummary, others: Sequence[SourceSummary]) -> Iterator[str]:
    ratio, own = batch.cost_ratio, usd(teacher.job.usd_per_million)
    if ratio is not None:
        less = f"{ratio:.1f} times less" if ratio >= 1 else f"{1 / ratio:.1f} times more"
        yield f"A million queries cost {own} with the teacher and {usd(batch.job.usd_per_million)} with the {batch.label}: {less}."
        running = [f"the {one.label} {one.cost_ratio_running:.1f}" for one in (batch, *others) if one.cost_ratio_running]
        if len(running) > 1:
            yield f"Without the engines' start, which matters little in a long run, {_list(running)} times less than the teacher."
    elif teacher.job.usd_per_million is not None:
        yield f"A million queries cost {own} with the teacher."


def percent(value: float | None, digits: int = 1) -> str:
    """A share for people, a dash when unknown."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def ms(value: float | None) -> str:
    """Milliseconds for people."""
    if value is None:
        return "–"
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.1f} ms"


def usd(value: float | None) -> str:
    """Money for people."""
    if value is None:
        return "–"
    return f"USD {value:,.0f}" if value >= 1000 else f"USD {value:,.2f}"


def _score_words(source: SourceSummary) -> str:
    score = source.quality["all"]
    return f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f})"


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
