"""Curate a teacher's answers into the training set that students learn from, and find those that a person should look at.

    answers -> columns.py   narrow columns; personal data out; LeakError for a human label that is not marked `eval_only`
            -> decisions.py people's decisions override the teacher
            -> verdicts.py  one verdict per answer: training_set, or the one reason why not
                 scan.py    ... for which the text of the candidates is read and looked at (inspection.py):
                              tags.py signals.py crossval.py neighbours.py suspects.py   which answers may be wrong
                              reviewed.py chances.py                                    ... with what chance, by people's verdicts
                              curve.py draw.py                                          how many rows, and which
            -> tables.py    training_set, dropped; suspects: the review queue

Training and dropped rows are the answers that came in, counted. Memory grows with rows by about 100 bytes each, and by the text of
`scan_rows` of them. Knows nothing of how answers were made or of training.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow.compute as pc
from pydantic import Field, field_validator

from headtail import review
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import load_receipt, load_ref, output_table
from headtail.batch import read_answers
from headtail.batch.answer_sources import source_ref
from headtail.core import leaks
from headtail.core.config import Config as Fields
from headtail.core.config import StageConfig
from headtail.core.errors import InputError, LedgerError
from headtail.core.receipt import Receipt, StageResult
from headtail.core.rows import DROPPED, Source, State, Stratum
from headtail.core.task import Task, load_task
from headtail.stages.base import Stage, run_once
from headtail.stages.curate import columns, curve, decisions, scan, tables, verdicts
from headtail.stages.curate.chances import SuspectScores
from headtail.stages.curate.columns import NARROW, AnswerColumns
from headtail.stages.curate.inspection import Inspection, Suspicion, inspect_text
from headtail.stages.curate.reviewed import NO_VERDICTS, read_reviewed
from headtail.stages.curate.scan import Reader
from headtail.stages.curate.verdicts import KEPT, InspectedRows, VerdictRules, Verdicts, give_verdicts
from headtail.stages.precompute.result import Result as PrecomputeResult

__all__ = ["Config", "Suspicion", "run"]
VERSION = 5


class Config(StageConfig):
    """Which answers a student may learn from."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    answers: str = Field("precompute", description="precompute receipt ref of the teacher's answers; precompute: its latest run")
    labels: str = Field("plan:human_labels", description="table ref of the labelled rows, which are never trained on")
    other_labels: tuple[str, ...] = Field((), description="table refs of further evaluation sets to keep out")
    near_labels: float | None = Field(
        leaks.NEAR,
        gt=0,
        le=1,
        description="trigram similarity from which a query counts as a labelled query; null: only the same text counts",
    )
    reviews: bool = Field(True, description="prefer people's decisions in review to the teacher's answers")
    human_weight: float = Field(4.0, gt=0, description="weight of a row that a person answered or accepted, relative to a teacher's row")
    min_confidence: float = Field(0.5, ge=0, le=1, description="answers with a lower confidence are dropped; 0 keeps all")
    suspicion: Suspicion = Field(Suspicion(), description="how wrong answers are looked for")
    max_rows: int = Field(20_000, ge=1, description="maximum of rows in the training set")
    min_rows: int = Field(2_000, ge=1, description="minimum of rows, whatever the learning curve says")
    min_gain: float = Field(
        0.0002,
        ge=0,
        lt=1,
        description="least fall of a small student's error (0..1) for which the rows are doubled; 0: only max_rows decides",
    )
    clusters: int = Field(32, ge=1, le=1000, description="clusters of similar queries over which rows are spread")
    strata_shares: dict[str, float] = Field(
        {"head": 0.2, "torso": 0.2, "tail": 0.2},
        description="share of the training set reserved for each stratum when more rows qualify than are taken; the "
        "rest is spread over cells",
    )
    scan_rows: int = Field(
        400_000,
        ge=1,
        description="candidates whose text is analysed: half the most frequent, half drawn at random; the others are over quota",
    )
    seed: int = Field(0, ge=0, description="seed of draws, folds and models")

    @field_validator("strata_shares")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(value) - {str(s) for s in Stratum})
        if unknown:
            raise ValueError(f"unknown stratum {unknown[0]}; known: {', '.join(Stratum)}")
        if any(not 0 <= share <= 1 for share in value.values()) or sum(value.values()) > 1 + 1e-9:
            raise ValueError("shares are between 0 and 1 and add up to at most 1")
        return value

    @property
    def rules(self) -> VerdictRules:
        """What the verdicts go by."""
        drop, shares = self.suspicion.drop_above, self.strata_shares
        return VerdictRules(self.min_confidence, drop, self.max_rows, self.min_rows, self.scan_rows, self.human_weight, shares)


class LearningCurve(Fields):
    """error = a * rows ** -b + c, through measured points."""

    points: dict[int, float] = Field(description="rows of the training set -> error (0..1) of a small student")
    a: float = Field(description="see above")
    b: float = Field(description="see above")
    c: float = Field(description="error that no number of rows takes away: the noise of the teacher's answers is in it")
    enough: int | None = Field(None, description="rows from which doubling gains less than min_gain")
    enough_low: int | None = Field(None, description="lower end of its 80 % interval")
    enough_high: int | None = Field(None, description="upper end; 2**53: the interval has no upper end")


class Result(StageResult):
    """Evidence against answers, and the gain of further rows."""

    signals: dict[str, float] = Field(description="mean absolute weighted evidence by signal: what the suspects' scores rest on")
    scores: SuspectScores | None = Field(
        None, description="whether these scores are fitted to people's verdicts, and how reliable they are"
    )
    curve: LearningCurve | None = Field(None, description="the learning curve; null: too few rows to measure it")
    training_rows: int | None = Field(None, ge=0, description="rows of the training set; null: a run of an earlier version")
    dropped_rows: int | None = Field(None, ge=0, description="answers that are not in it; null: a run of an earlier version")


def run(config: Config, task: Task | None = None) -> Receipt[Result]:
    """Choose the rows, check that nothing leaked or was lost, write training_set, dropped and suspects.

    `task`: what `config.task` names, where it is loaded already.
    """
    task, store = task or load_task(config.task, config.allow_task_code), open_storage(config.root)
    answers = source_ref(store, task, config.answers, Source.TEACHER)
    receipt = load_receipt(store, "precompute", answers, PrecomputeResult)
    labels = {f"labels{i or ''}": load_ref(store, ref) for i, ref in enumerate((config.labels, *config.other_labels))}
    others = {name: load_receipt(store, "precompute", ref) for name, ref in sorted(config.suspicion.other_answers.items())}
    made_under = receipt.task_fingerprint
    if made_under and made_under != task.fingerprint:
        raise InputError(
            f"these answers were made under another task, prompt or schema than {task.name} has now",
            where=receipt.path,
            value=f"{made_under[:16]}, now {task.fingerprint[:16]}",
            fix="run precompute again, or name the task the answers were made with",
        )
    reviewed = review.decisions(store, task.name)
    reviewed = reviewed if config.reviews else reviewed.slice(0, 0)
    verdicts_on = read_reviewed(store, task, receipt.result.model.digest) if config.reviews else NO_VERDICTS

    def read(names: list[str]) -> Any:
        return read_answers(store, receipt, names)

    def work(stage: Stage) -> Result:
        queries = (query for found, name in labels.values() for query in output_table(store, found, name, ["query"])["query"].to_pylist())
        rows = columns.read_columns(read(NARROW), leaks.LabelledQueries(queries, config.near_labels), config.seed)
        _account(rows, receipt)
        seen: list[Inspection] = []

        def at(places: verdicts.Places, people: columns.Objects) -> InspectedRows:
            looked_at = scan.scan(read, task, places, people, config.seed)
            answers = {name: _answers_of(store, other, looked_at, task) for name, other in others.items()}
            found = inspect_text(looked_at, task, answers, verdicts_on, config.suspicion, config.clusters, config.min_gain, config.seed)
            seen.append(found)
            return InspectedRows(looked_at.place, found.score, found.kind, found.cluster, found.curve.enough if found.curve else None)

        judged = give_verdicts(rows, config.rules, decisions.read_decisions(reviewed, task), at)
        _write(stage, task, judged, read, receipt.result.top_logprobs)
        _tell(stage, config, judged, seen[0])
        return _result(stage, seen[0])

    inputs: dict[str, Any] = {"answers": receipt, **{name: found for name, (found, _) in labels.items()}}
    inputs |= {
        "reviews": review.digest(reviewed),
        "verdicts": verdicts_on.digest,
        **{f"other.{name}": other for name, other in others.items()},
    }
    refs = [f"{found.path}:{name}" for found, name in labels.values()]
    replaces: dict[str, Any] = {"task": task.name, "answers": receipt.path, "labels": refs[0], "other_labels": refs[1:]}
    replaces["reviews"] = inputs["reviews"]  # with nothing decided it makes no difference
    return run_once("curate", Result, config, work, inputs=inputs, task=task, version=VERSION, replaces=replaces)


def _answers_of(store: Storage, receipt: Receipt, looked_at: scan.Scan, task: Task) -> list[Any]:
    """Another answerer's answers to the rows of a scan; None where it has none that is valid."""
    keys = looked_at.table["query_key"].combine_chunks()
    found: dict[bytes, Any] = {}
    for table in read_answers(store, receipt, ["query_key", "state", "answer"]):
        mine = table.filter(pc.and_(pc.is_in(table["query_key"], value_set=keys), pc.equal(table["state"], str(State.ANSWERED))))
        for key, text in zip(mine["query_key"].to_pylist(), mine["answer"].to_pylist(), strict=True):
            answer, problem = task.parse(text)
            if not problem:
                found[key] = scan.redact_values(answer)
    return [found.get(key) for key in keys.to_pylist()]


def _account(rows: AnswerColumns, receipt: Receipt) -> None:
    states = [receipt.rows[state] for state in State if state in receipt.rows]
    if len(states) == len(State) and sum(states) != len(rows.state):
        raise LedgerError(
            "precompute's receipt and its answers do not add up", where=receipt.path, value=f"{sum(states)} rows, {len(rows.state)} read"
        )


def _write(stage: Stage, task: Task, judged: Verdicts, read: Reader, top: int) -> None:
    training = judged.reason == KEPT
    reasons = Counter(judged.reason[~training].tolist())
    if not training.any():
        told = ", ".join(f"{count:,} {why}" for why, count in reasons.most_common())
        raise InputError(
            "no answer can be trained on",
            where="answers",
            value=told,
            fix="lower min_confidence, or see the reasons in the teacher's receipt",
        )
    training_set = stage.table("training_set", tables.training_rows(read, task, judged, top), tables.training_schema(task, top))
    dropped = stage.table("dropped", tables.dropped_rows(read, judged), DROPPED)
    stage.rows |= {"in": len(judged.reason), "training_set": int(training_set.rows or 0), "dropped": int(dropped.rows or 0)}
    stage.rows |= {f"dropped.{why}": count for why, count in sorted(reasons.items())}
    stage.rows |= {f"training_set.{name or 'none'}": count for name, count in sorted(Counter(judged.stratum[training].tolist()).items())}
    if stage.rows["training_set"] + stage.rows["dropped"] != len(judged.reason) or stage.rows["training_set"] != int(training.sum()):
        raise LedgerError("training and dropped rows are not the answers that came in", where=stage.path, value=dict(stage.rows))
    human = int(sum(answer is not None for answer in judged.answer[training]))
    if human:
        stage.rows["training_set.human"] = human
    weights, confidence = judged.weight[training], judged.confidence[training]
    stage.metrics |= {
        "training_set_share": float(training.mean()),
        "weight_max": float(weights.max()),
        "effective_rows": float(weights.sum() ** 2 / (weights**2).sum()),
    }
    if not np.isnan(confidence).all():
        stage.metrics["confidence_mean"] = float(np.nanmean(confidence))
    for text in judged.notes:
        stage.note(text)
    if human < int(training.sum()):
        stage.note(f"{int(training.sum()) - human:,} training answers are the teacher's, unreviewed: a student learns its mistakes too")


def _result(stage: Stage, inspection: Inspection) -> Result:
    curve, law = None, inspection.curve
    if law is not None:
        points = {point.rows: point.error for point in law.points}
        ends = {"enough": law.enough, "enough_low": law.enough_low, "enough_high": law.enough_high}
        curve = LearningCurve(points=points, a=law.a, b=law.b, c=law.c, **ends)
    rows, dropped = stage.rows["training_set"], stage.rows["dropped"]
    return Result(signals=inspection.signals, scores=inspection.scores, curve=curve, training_rows=rows, dropped_rows=dropped)


def _tell(stage: Stage, config: Config, judged: Verdicts, inspection: Inspection) -> None:
    """The queue and the learning curve, and what they rest on."""
    stage.table("suspects", inspection.queue)
    stage.rows["suspects"] = inspection.queue.num_rows
    if inspection.wrong_share == inspection.wrong_share:
        stage.metrics["wrong_share_estimated"] = inspection.wrong_share
    stage.metrics |= {"suspects_fitted": float(inspection.scores.fitted), "suspects_verdicts": float(inspection.scores.verdicts)}
    if kind := inspection.scores.random_rows:
        stage.metrics |= {"suspects_brier": kind.brier, "suspects_ece": kind.ece, "suspects_ece_floor": kind.ece_floor}
    for text in inspection.notes:
        stage.note(text)
    if inspection.curve is None:
        return
    size = int((judged.reason == KEPT).sum())
    law = inspection.curve
    stage.metrics |= {
        "curve_enough": float(law.enough),
        "curve_enough_low": float(law.enough_low),
        "curve_enough_high": float(law.enough_high),
        "curve_error": law.error(size),
        "curve_next_doubling": law.gain(size),
    }
    stage.figure("curve", curve.curve_figure(law, size))
    limit = "the learning curve" if law.enough <= size else "max_rows" if size >= config.max_rows else "min_rows or the rows that qualify"
    stage.note(
        f"{size:,} training rows, bound by {limit}: by a small student's error, which is measured against the teacher's answers, "
        f"doubling them would gain {law.gain(size):.4f} (bound {config.min_gain:g}); enough by the curve: {law.enough:,} rows, "
        f"80 % interval from {law.enough_low:,} {f'to {law.enough_high:,}' if law.enough_high < 2**53 else 'without an upper end'}"
    )
