"""Calibrate: how sure a student's confidence may make us, from people's labels that it did not learn from.

    evaluate's scored rows of a student -> two halves by key -> map of its confidence, threshold with a promise, cost and gain of escalation

A threshold that is not shown is not there: the verdict says why, and how many labels it would take. Each calibration is a look at the
labelled rows, and is judged at that look's part of delta. Publish takes the result into a release; the front uses it. Knows nothing of
serving.

    assessment.py  rows -> map, threshold, figures (pure)      figure.py  the picture      words.py  the result in sentences
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.calibration import StudentCalibration
from headtail.core.config import StageConfig
from headtail.core.errors import ConfigError, InputError
from headtail.core.keys import fingerprint
from headtail.core.near_duplicates import duplicate_clusters
from headtail.core.receipt import Receipt
from headtail.core.rows import SCORED, STRATA, conform, uniform_draw
from headtail.core.task import Task, load_task
from headtail.releases.claim import source_part
from headtail.releases.look import answers_digest, record_look
from headtail.stages.base import Stage, run_once
from headtail.stages.calibrate.assessment import ConfidenceRows, PromisePolicy, assess_confidence, calibration_figures
from headtail.stages.calibrate.figure import promise_figure
from headtail.stages.calibrate.result import Result
from headtail.stages.calibrate.words import labelled_rows, promise_words
from headtail.stages.evaluate.result import Result as EvaluateResult
from headtail.stages.precompute.result import Result as PrecomputeResult

VERSION = 3


class Config(StageConfig):
    """Whose confidence, on which rows, and what is to be promised."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    evaluation: str = Field("evaluate", description="evaluate receipt ref whose scored rows are read")
    source: str = Field("realtime_student", description="the answer source of that evaluation that answers misses")
    strata: tuple[str, ...] = Field(
        ("torso", "tail", "unseen"),
        description="strata whose queries are misses: only their labelled rows count; unseen alone where the cache has a batch student's",
    )
    target: float = Field(0.95, gt=0, lt=1, description="share of right answers to promise, among those at or above the threshold")
    delta: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="chance (0..0.5) that a promise on the same labelled rows is ever false, however often one looks: each look at them "
        "spends its part, as the task's policy says",
    )
    first_share: float = Field(
        0.5, gt=0, lt=1, description="share of the labelled rows that makes the map and the thresholds to try; the rest tests them"
    )
    bigger: str = Field(
        "teacher", description="answer source of the evaluation that stands for the bigger model; empty: what it gains is not known"
    )
    usd_per_million: float | None = Field(
        None, ge=0, description="USD that a million escalations cost; null: what the precompute of `bigger` cost per million"
    )
    max_usd_per_million: float | None = Field(
        None,
        ge=0,
        description="USD that escalations may cost per million misses; a threshold that costs more is not promised; null: no limit",
    )
    power: float = Field(0.8, gt=0.5, lt=1, description="chance of a promise for which the needed labels are computed")
    seed: int = Field(0, ge=0, description="which labelled rows are in which half")

    @field_validator("strata")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or set(value) - set(STRATA):
            raise ValueError(f"name one or more of {', '.join(STRATA)}")
        return value


def run(config: Config, task: Task | None = None) -> Receipt[Result]:
    """Calibrate one student. That nothing can be promised is a result too. `task`: what `config.task` names, where it is loaded."""
    task, store = task or load_task(config.task, config.allow_task_code), open_storage(config.root)
    evaluation = load_receipt(store, "evaluate", config.evaluation, EvaluateResult)
    if evaluation.task != task.name:
        value = f"{task.name}; {evaluation.path} is of {evaluation.task}"
        raise ConfigError("the evaluation is of another task", where="task", value=value)
    named = evaluation.result.answers
    if config.source not in named:
        raise ConfigError(
            "the evaluation has no answers of this source", where="source", value=config.source, fix=f"one of: {', '.join(named)}"
        )
    model = load_receipt(store, "precompute", named[config.source], PrecomputeResult).result.model
    bigger = config.bigger if config.bigger in named else ""
    price = config.usd_per_million
    if price is None and bigger:
        price = evaluation.result.figures[bigger].usd_per_million_own

    table = conform(output_table(store, evaluation, "rows"), SCORED, evaluation.output("rows").path)
    look = _record_look(store, config, task, table)
    spent = task.file.gate.model_copy(update={"delta": config.delta})
    level, after = spent.level(look), spent.level(look + 1)

    def work(stage: Stage) -> Result:
        rows = confidence_rows(table, config.source, bigger, config.strata, config.first_share, config.seed)
        scored = _part(table, config.source, config.strata).num_rows
        policy = PromisePolicy(config.target, level, after, price, config.max_usd_per_million, config.power)
        found = assess_confidence(rows, policy)
        kept = StudentCalibration(receipt=stage.path, map=found.map, target=config.target, delta=config.delta, threshold=found.threshold)
        result = Result(
            calibration=kept,
            verdict=found.verdict,
            source=config.source,
            student=model.name,
            digest=model.digest,
            own=calibration_figures(found.own),
            mapped=calibration_figures(found.mapped),
            figures=found.figures,
            look=look,
            level=level,
        )
        _record(stage, result)
        stage.figure("calibration", promise_figure(found, rows.half(False), config.source, config.target))
        for text in (*_remarks(config, result, bigger, task.file.gate.looks, scored), *promise_words(result)):
            stage.note(text)
        return result

    replaces = {"task": task.name, "evaluation": evaluation.path, "bigger": bigger, "usd_per_million": price, "look": look}
    receipt = run_once("calibrate", Result, config, work, inputs={"evaluation": evaluation}, task=task, version=VERSION, replaces=replaces)
    for line in promise_words(receipt.result):
        say(f"{'calibrate':<12} {line}")
    return receipt


def _record_look(store: Storage, config: Config, task: Task, table: pa.Table) -> int:
    """The number of this look in the ledger. It shares rows with every look at this evaluation's labels, whatever the strata; whose answers
    are tested, how sure they were, and what is promised of whom make it another one. Price and power change no promise."""
    mine = source_part(table, config.source)
    asked = {name: getattr(config, name) for name in ("target", "delta", "first_share", "seed")} | {"strata": sorted(set(config.strata))}
    known = {"policy": task.policy_digest, "confidence": answers_digest(mine, ["query_key", "confidence"]), **asked}
    return record_look(store, "calibrate", task.name, fingerprint(known, "calibrate"), {config.source: mine})[config.source]


def confidence_rows(table: pa.Table, source: str, bigger: str, strata: tuple[str, ...], first_share: float, seed: int) -> ConfidenceRows:
    """The rows of a student in `strata`, in an order drawn from their keys: of queries that nearly repeat each other the first alone, since
    each row counts as a chance of its own. InputError when a query is scored twice."""

    def part(name: str) -> pa.Table:
        mine = _part(table, name, strata)
        return mine.take(pa.array(np.argsort(uniform_draw(mine["query_key"], "calibrate order", seed), kind="stable")))

    own = part(source)
    if len(own["query_key"].unique()) < own.num_rows:
        raise InputError("a query is scored more than once; rows must be independent", where=f"rows of {source}", fix="run evaluate again")
    other = part(bigger) if bigger else None
    if other is not None and other["query_key"].to_pylist() != own["query_key"].to_pylist():
        raise InputError("the answer sources were not scored on the same rows", where=f"{source}, {bigger}", fix="run evaluate again")
    _, places = np.unique(duplicate_clusters(own["query"].to_pylist()), return_index=True)
    own, other = own.take(np.sort(places)), None if other is None else other.take(np.sort(places))
    return ConfidenceRows(
        confidence=own["confidence"].cast(pa.float64()).fill_null(float("nan")).to_numpy(),
        right=own["exact"].to_numpy(),
        bigger=None if other is None else other["exact"].to_numpy(),
        first=uniform_draw(own["query_key"], "calibrate", seed) < first_share,
    )


def _part(table: pa.Table, source: str, strata: tuple[str, ...]) -> pa.Table:
    return table.filter(pc.and_(pc.equal(table["source"], source), pc.is_in(table["stratum"], value_set=pa.array(strata))))


def _remarks(config: Config, result: Result, bigger: str, planned: int | None, scored: int) -> Iterator[str]:
    yield f"labelled rows of {', '.join(config.strata)} alone: {labelled_rows(result):,}; the student did not learn from them"
    if scored > labelled_rows(result):
        yield f"{scored - labelled_rows(result):,} more nearly repeat one of these, and are left out: they would count twice"
    if config.bigger and not bigger:
        yield f"the evaluation has no answers of {config.bigger}: what escalation gains is not known"
    if result.level:
        yield (
            f"look {result.look} at these labelled rows in this store, judged at level {result.level:.2g}: of all promises on them, ever, "
            f"one is false with chance {config.delta:g} at most; fresh human labels start anew"
        )
    else:
        yield f"look {result.look} at these labelled rows: the policy plans {planned}, and they are spent; draw fresh human labels"
    if bigger and result.figures.usd_per_million is None:
        yield "what an escalation costs is not known: set usd_per_million"


def _record(stage: Stage, result: Result) -> None:
    figures = result.figures
    stage.rows = {"human_labels": labelled_rows(result), "human_labels.first": figures.rows_first, "human_labels.second": figures.rows}
    known = {
        "ece/own": result.own.ece,
        "ece/calibrated": result.mapped.ece,
        "ece/noise_floor": result.mapped.floor,
        "threshold": figures.threshold,
        "precision": figures.precision.value,
        "escalated_share": figures.escalated.value,
        "escalation_usd_per_million": figures.usd_per_million,
        "right/before": figures.before.value,
        "right/after": figures.after.value,
        "right/gain": figures.gain.value,
    }
    stage.metrics |= {name: value for name, value in known.items() if value is not None}
    stage.metrics["promised"] = float(result.verdict == "promised")
