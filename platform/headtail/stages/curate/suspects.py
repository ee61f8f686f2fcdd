"""Suspects: one score per answer for how likely it is wrong, and the queue in order of expected gain.

In: signals with their evidence. Out: a score per row, and rows.SUSPECT by falling gain (score times events) with rows drawn at random among
them, each with reasons and other answers to choose from. Scores add up to the number of wrong answers that the small models count; they are
chances only where `chances.py` fits them to people's verdicts. Knows nothing of how signals are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.special import expit

from headtail.core.rows import SUSPECT, conform, uniform_draw, with_side_inputs
from headtail.core.task import Task
from headtail.stages.curate.scan import Scan, redact_values
from headtail.stages.curate.signals import Signal

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
AT_RANDOM = "drawn at random, to check the scores"
UNKNOWN_SHARE = 0.05  # of wrong answers, where no small model could be trained to count them
_SHARES = (0.005, 0.1)  # what is believed of a count: small models that know little count too many
_MATTERS = 0.4  # evidence from which a signal is named
_NAMED, _ALTERNATIVES = 4, 4


def sum_evidence(signals: Sequence[Signal], rows: int) -> Floats:
    """Log odds against each row's answer, up to a number that is the same for all: the sum of the weighted evidence."""
    return sum((signal.weight * signal.evidence for signal in signals), np.zeros(rows))


@dataclass(frozen=True)
class ScoreCurve:
    """The score of an answer by the evidence against it, where no person's verdict says more."""

    shift: float

    def __call__(self, evidence: Floats) -> Floats:
        """0..1 per row."""
        return np.asarray(expit(evidence + self.shift), dtype=np.float64)


def score_curve(total: Floats, wrong_share: float) -> ScoreCurve:
    """The logistic of the evidence, moved so that the mean over these rows is the share of answers taken to be wrong."""
    wanted = float(np.clip(wrong_share, *_SHARES))
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(np.mean(expit(total + middle))) < wanted:
            low = middle
        else:
            high = middle
    return ScoreCurve((low + high) / 2)


class QueueOrder(NamedTuple):
    """Rows of a queue as people see them, and which of them were drawn at random from `frame` rows."""

    rows: npt.NDArray[np.int64]
    at_random: npt.NDArray[np.bool_]
    frame: int


def queue_order(gain: Floats, may_be_drawn: Bools, open_rows: npt.NDArray[np.int64], rows: int, share: float, lot: Floats) -> QueueOrder:
    """At most `rows` of `open_rows`: a share of them drawn at random by `lot` from those that may be drawn, evenly spread among the others,
    which come by falling gain. So the random rows of any first part of the queue are a random draw too."""
    rows = min(rows, len(open_rows))
    frame = open_rows[may_be_drawn[open_rows]]
    drawn = frame[np.argsort(lot[frame], kind="stable")][: round(rows * share)]
    others = np.setdiff1d(open_rows, drawn, assume_unique=True)
    chosen = others[np.argsort(-gain[others], kind="stable")][: rows - len(drawn)]
    at = np.concatenate([(np.arange(len(part)) + 1) / max(len(part), 1) for part in (chosen, drawn)])
    mixed = np.argsort(at, kind="stable")
    return QueueOrder(np.concatenate([chosen, drawn])[mixed], (np.arange(len(at)) >= len(chosen))[mixed], len(frame))


def suspect_queue(
    scan: Scan,
    task: Task,
    signals: Sequence[Signal],
    total: Floats,
    scores: Floats,
    rows: int,
    random_share: float,
    seed: int,
    candidates: Callable[[int], Iterator[Any]],
) -> pa.Table:
    """At most `rows` suspects by falling gain, a share of them drawn at random. Rows a person answered are not among them; a row without an
    answer scores 1 and is not drawn.

    `total`: evidence against each row; `candidates`: other answers to a row, the best first; those that the schema refuses or that are the
    row's own are left out.
    """
    events = scan.table["count"].cast("float64").fill_null(0.0).to_numpy()
    gain = scores * np.maximum(events, 1.0)
    answered = np.asarray([answer is not None for answer in scan.answer], dtype=bool)
    lot = uniform_draw(scan.table["query_key"], "review", seed)
    order, at_random, frame = queue_order(gain, answered, np.flatnonzero(~scan.human), rows, random_share, lot)
    weighted = np.column_stack([s.weight * s.evidence for s in signals]) if signals else np.zeros((len(scan), 0))
    table = scan.table.take(pa.array(order))
    reasons = [
        [AT_RANDOM] * drawn + (_reasons(signals, weighted[row], row) if answered[row] else [_unanswered(scan, row)])
        for row, drawn in zip(order.tolist(), at_random.tolist(), strict=True)
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
        "place": pa.array(np.arange(len(order)), pa.int64()),
        "evidence": pa.array(total[order], pa.float64(), mask=~answered[order]),
        "drawn_from": pa.array(np.full(len(order), frame), pa.int64(), mask=~at_random),
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
