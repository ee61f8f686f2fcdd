"""An evaluation in sentences: each answer source's quality with its interval, by stratum, and the watch list. Pure.

In: a receipt of evaluate. Out: lines for a terminal. Computes nothing that the receipt does not hold; its other notes are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from headtail.core.receipt import Receipt
from headtail.core.rows import ALL, STRATA, TRAFFIC, Source
from headtail.stages.evaluate.result import Result
from headtail.stages.evaluate.watch_list import WATCH_LIST


def evaluation_lines(receipt: Receipt[Result], confidence: float) -> Iterator[str]:
    """Per answer source its headline with whose answers they are, and its strata; then the watch list's sentence of each.

    `confidence`: chance with which an interval covers the truth, 0 to 1.
    """
    metrics, n = receipt.metrics, receipt.rows["human_labels"]
    for source in (*receipt.result.answers, str(Source.FALLBACK)):
        right, answers = metrics[f"exact/{source}/{ALL}"], receipt.result.answers.get(source, "")
        whole = f"F1 {_quality(metrics, source, ALL)} at {confidence:.0%}, {right:.3f} of rows wholly right, n = {n:,}"
        yield f"{source} {whole}{answers and f'  {answers}'}"
        known = [f"{name} {_quality(metrics, source, name)}" for name in (*STRATA, TRAFFIC) if f"quality/{source}/{name}" in metrics]
        yield f"  {', '.join(known)}"
    yield from (note for note in receipt.notes if note.startswith(WATCH_LIST))


def _quality(metrics: Mapping[str, float], source: str, name: str) -> str:
    value, low, high = (metrics[f"{figure}/{source}/{name}"] for figure in ("quality", "low", "high"))
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
