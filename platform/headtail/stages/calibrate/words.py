"""A calibration's result in sentences, for the terminal, the receipt's notes and the report. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from headtail.stages.calibrate.result import VERDICTS, Result


def promise_words(result: Result) -> Iterator[str]:
    """What was found, in sentences."""
    kept, figures = result.calibration, result.figures
    if result.own.ece is not None and result.mapped.ece is not None and result.mapped.floor is not None:
        yield (
            f"confidence of {result.student}: ECE {result.own.ece:.3f}, calibrated {result.mapped.ece:.3f}; "
            f"{result.mapped.floor:.3f} would be luck alone ({figures.rows:,} labelled rows)"
        )
    if figures.threshold is None:
        needed = (
            ""
            if figures.labels_needed is None
            else f"; about {figures.labels_needed:,} labelled rows would do, there are {labelled_rows(result):,}"
        )
        yield f"nothing is promised: {VERDICTS[result.verdict]} ({kept.target:.0%} right){needed}"
        return
    escalated = 1000 * (figures.escalated.value or 0.0)
    cost = "" if figures.usd_per_million is None else f", USD {figures.usd_per_million:,.2f} per million misses"
    at = "" if result.level is None else f"; look {result.look}, at level {result.level:.2g}"
    error = f"(chance of error {kept.delta:g}{at})"
    sure = f"of answers with a confidence of at least {figures.threshold:.4f}, {kept.target:.0%} are right {error}"
    yield f"{'promised' if result.verdict == 'promised' else 'NOT promised: ' + VERDICTS[result.verdict]}: {sure}"
    yield f"{escalated:.0f} of 1,000 misses are below it{cost}"
    before, after, gain = figures.before, figures.after, figures.gain
    if after.value is not None and before.value is not None and gain.low is not None:
        yield (
            f"right of all misses: {before.value:.1%} without, {after.value:.1%} with escalation "
            f"({100 * (gain.value or 0):+.1f} points, {100 * gain.low:+.1f} to {100 * (gain.high or 0):+.1f})"
        )


def labelled_rows(result: Result) -> int:
    """Labelled rows in both halves."""
    return result.figures.rows_first + result.figures.rows
