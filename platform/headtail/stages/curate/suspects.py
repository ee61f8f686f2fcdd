"""Suspects: one score per answer for how likely it is wrong, and the queue in order of expected gain.

In: signals with their evidence. Out: a score per row, and rows.SUSPECT by falling gain (score times events), with reasons
and other answers to choose from. Scores add up to the number of wrong answers that the small models count; they are not
calibrated probabilities. Knows nothing of how signals are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.special import expit

from headtail.core.rows import SUSPECT, conform, with_side_inputs
from headtail.core.task import Task
from headtail.stages.curate.scan import Scan, redact_values
from headtail.stages.curate.signals import Signal

Floats = npt.NDArray[np.float64]
UNKNOWN_SHARE = 0.05  # of wrong answers, where no small model could be trained to count them
_SHARES = (0.005, 0.1)  # what is believed of a count: small models that know little count too many
_MATTERS = 0.4  # evidence from which a signal is named
_NAMED, _ALTERNATIVES = 4, 4


def suspect_scores(signals: Sequence[Signal], rows: int, wrong_share: float) -> Floats:
    """0..1 per row: the logistic of the weighted evidence, moved so that the mean is the share of answers taken to be wrong."""
    total = sum((signal.weight * signal.evidence for signal in signals), np.zeros(rows))
    wanted = float(np.clip(wrong_share, *_SHARES))
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(np.mean(expit(total + middle))) < wanted:
            low = middle
        else:
            high = middle
    return np.asarray(expit(total + (low + high) / 2), dtype=np.float64)


def suspect_queue(
    scan: Scan, task: Task, signals: Sequence[Signal], scores: Floats, rows: int, candidates: Callable[[int], Iterator[Any]]
) -> pa.Table:
    """At most `rows` suspects by falling gain. Rows a person answered are not among them; a row without an answer scores 1.

    `candidates`: other answers to a row, the best first; those that the schema refuses or that are the row's own are left out.
    """
    events = scan.table["count"].cast("float64").fill_null(0.0).to_numpy()
    gain = scores * np.maximum(events, 1.0)
    open_rows = np.flatnonzero(~scan.human)
    order = open_rows[np.argsort(-gain[open_rows], kind="stable")][:rows]
    weighted = np.column_stack([s.weight * s.evidence for s in signals]) if signals else np.zeros((len(scan), 0))
    table = scan.table.take(pa.array(order))
    reasons = [
        _reasons(signals, weighted[row], row) if scan.answer[row] is not None else [_unanswered(scan, row)] for row in order.tolist()
    ]
    own = [None if scan.answer[row] is None else task.dump(scan.answer[row]) for row in order.tolist()]
    columns = {
        "answer": pa.array(own, pa.string()),
        "score": pa.array(scores[order], pa.float32()),
        "gain": pa.array(gain[order], pa.float64()),
        "reasons": pa.array(reasons, pa.list_(pa.string())),
        "alternatives": pa.array(
            [_alternatives(task, row, text, candidates) for row, text in zip(order.tolist(), own, strict=True)], pa.list_(pa.string())
        ),
    }
    for name, column in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, column) if at >= 0 else table.append_column(name, column)
    return conform(table, with_side_inputs(SUSPECT, task.side_inputs), "suspects")


def _unanswered(scan: Scan, row: int) -> str:
    return f"{scan.table['state'][row].as_py()}: there is no answer"


def _reasons(signals: Sequence[Signal], weighted: Floats, row: int) -> list[str]:
    order = np.argsort(-weighted, kind="stable")
    return [signals[at].say(row) for at in order[:_NAMED].tolist() if weighted[at] >= _MATTERS]


def _alternatives(task: Task, row: int, own: str | None, candidates: Callable[[int], Iterator[Any]]) -> list[str]:
    found: list[str] = []
    for answer in candidates(row):
        text = task.dump(redact_values(answer))
        if text != own and text not in found and not task.parse(text)[1]:
            found.append(text)
    return found[:_ALTERNATIVES]


def sample_answers(samples: Sequence[dict[str, Any]] | None) -> list[str]:
    """The answers of a row's samples, the most frequent first."""
    counts = Counter(sample["answer"] for sample in samples or () if sample["answer"] is not None)
    return [answer for answer, _ in counts.most_common()]
