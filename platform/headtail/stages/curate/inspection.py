"""Analyse the text of the candidates: evidence against each answer, its topic, and how many rows are worth learning from.

In: a Scan, the task, other answerers' answers. Out: an Inspection, one entry per row of the scan. Takes seconds for 20 thousand rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from headtail.core.config import Config as Fields
from headtail.core.rows import Source
from headtail.core.task import Task
from headtail.stages.curate import chances, curve, neighbours, signals, suspects
from headtail.stages.curate.chances import SuspectScores
from headtail.stages.curate.curve import Curve
from headtail.stages.curate.reviewed import Reviewed
from headtail.stages.curate.scan import Scan
from headtail.stages.curate.signals import ENOUGH, StudentSignals, View


class Suspicion(Fields):
    """How wrong answers are looked for."""

    rows: int = Field(2_000, ge=0, description="maximum of rows in the review queue, highest expected gain first")
    random_share: float = Field(
        0.1, ge=0, lt=1, description="share of them that is drawn at random, so that people's verdicts say how reliable the scores are"
    )
    drop_above: float = Field(
        1.0,
        gt=0,
        le=1,
        description="answers with at least this score are not learnt from unless a person accepts them; 1 keeps all: "
        "what looks wrong is often only hard (docs/curate.md)",
    )
    folds: int = Field(4, ge=2, le=20, description="parts of the cross-validation of small students")
    neighbours: int = Field(10, ge=1, le=100, description="how many similar queries an answer is compared with")
    other_answers: dict[str, str] = Field(
        {},
        description="precompute receipt ref of another answer source by its name, such as student: precompute/ab12; "
        "disagreement is a signal",
    )


class Inspection(NamedTuple):
    """One entry per row of the scan; the queue; the learning curve when there are rows enough for one."""

    score: npt.NDArray[np.float64]  # 0..1: how likely the answer is wrong; 1 without an answer
    kind: npt.NDArray[np.object_]
    cluster: npt.NDArray[np.int64]
    queue: pa.Table
    curve: Curve | None
    wrong_share: float  # of answers, as small models count it; NaN when none could be trained
    signals: dict[str, float]  # mean absolute weighted evidence by signal: what the score rests on
    scores: SuspectScores  # whether scores are fitted to people's verdicts, and how reliable they are
    notes: list[str]


def inspect_text(
    scan: Scan,
    task: Task,
    other_answers: Mapping[str, Sequence[Any]],
    reviewed: Reviewed,
    suspicion: Suspicion,
    clusters: int,
    min_gain: float,
    seed: int,
) -> Inspection:
    """Everything that is learnt from the rows' text. `reviewed`: what people found out about earlier suspects."""
    answered = np.asarray([answer is not None for answer in scan.answer], dtype=bool)
    seen = signals.view(scan, task)
    places = neighbours.embed(scan.query, seed)
    sets = signals.problems(scan, seen)
    learnt = signals.student_signals(scan, seen, sets, task, suspicion.folds, seed)
    fallback = {str(Source.FALLBACK): [task.fallback(query) for query in scan.query]}
    collected = [learnt.signal] if learnt else []
    collected += [s for s in (signals.neighbour_signal(scan, seen, places, suspicion.neighbours),) if s]
    collected += [
        *signals.doubt_signals(scan),
        *signals.rule_signals(scan, seen),
        *signals.disagreement_signals(scan, task, {**other_answers, **fallback}),
    ]
    share = learnt.wrong_share if learnt else suspects.UNKNOWN_SHARE
    total = suspects.sum_evidence(collected, len(scan))
    unfitted = suspects.score_curve(total[answered], share)
    scores = chances.describe_scores(reviewed, unfitted, seed)
    score = chances.fit_chances(reviewed, unfitted).apply(total) if scores.fitted else unfitted(total)
    score[~answered] = 1.0

    def candidates(row: int) -> Iterator[Any]:
        return _instead(scan, seen, learnt, other_answers, row)

    made = suspects.suspect_queue(scan, task, collected, total, score, suspicion.rows, suspicion.random_share, seed, candidates)
    points = curve.measure(sets, scan.lot, seed) if min_gain > 0 else []
    notes = (
        [] if learnt else [f"fewer than {ENOUGH} answers, or answers that are no labels: no small students were trained to find suspects"]
    )
    rests = {signal.name: float(np.abs(signal.weight * signal.evidence).mean()) for signal in collected}
    return Inspection(
        score,
        np.asarray(seen.kinds, dtype=object),
        neighbours.clusters(places, clusters, seed),
        made,
        curve.fit(points, min_gain),
        learnt.wrong_share if learnt else float("nan"),
        rests,
        scores,
        [*notes, *_score_notes(scores)],
    )


def _score_notes(scores: SuspectScores) -> list[str]:
    if not scores.fitted:
        return [f"suspects' scores are not fitted to people's verdicts, and are no chances: {scores.why}"]
    said = f"suspects' scores are chances, fitted to {scores.verdicts:,} verdicts ({scores.at_random:,} on rows drawn at random)"
    if scores.random_rows is None:
        return [f"{said}; none of the rows was drawn at random, so nobody knows how far they hold beyond the reviewed ones"]
    kind = scores.random_rows
    return [f"{said}; on the latter mean squared error {kind.brier:.3f}, unfitted {kind.brier_unfitted:.3f}"]


def _instead(scan: Scan, view: View, learnt: StudentSignals | None, other_answers: Mapping[str, Sequence[Any]], row: int) -> Iterator[Any]:
    """Other answers to a row: its samples', the small students', the other answerers'."""
    yield from map(json.loads, suspects.sample_answers(scan.table["samples"][row].as_py()))
    if learnt is not None and scan.answer[row] is not None and (answer := learnt.instead(row)) is not None:
        yield answer
    yield from (answers[row] for answers in other_answers.values() if answers[row] is not None)
