"""Evaluate answers against human labels: quality by answer source and stratum, with intervals, and the calibration of confidences.

    human labels + answers of each source -> rows (one per labelled row and source) -> quality (source x stratum), calibration, report

A labelled row without a valid answer counts as missed. The fallback is computed from the task. A comparison of a student
with its teacher is called agreement and is not a quality figure. Knows nothing of how answers were made.

    scoring.py  rows, quality, calibration, differences      document.py  all of it as one HELM-like JSON
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from headtail.adapters import charts
from headtail.adapters.storage import open_storage
from headtail.adapters.storage.receipts import load_receipt, load_ref, output_table
from headtail.batch import read_answers
from headtail.core.config import StageConfig
from headtail.core.errors import InputError
from headtail.core.evidence import Figures, figure_metrics, three_figures
from headtail.core.intervals import BOOTSTRAP
from headtail.core.receipt import Receipt
from headtail.core.rows import ALL, HUMAN_LABELS, SMALL, TRAFFIC, Source, conform
from headtail.core.task import Task, load_task
from headtail.stages.base import Stage, run_once
from headtail.stages.evaluate.document import document
from headtail.stages.evaluate.result import Result
from headtail.stages.evaluate.scoring import (
    ABSENT,
    COLUMNS,
    Calibration,
    Sureness,
    agreement,
    by_source,
    calibration_of,
    find_answers,
    quality_rows,
    score_rows,
    source_differences,
)
from headtail.stages.precompute.result import Result as PrecomputeResult


class Config(StageConfig):
    """What is compared with what."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    labels: str = Field(
        "plan:human_labels", description="table ref of the labelled rows, such as plan:human_labels or plan/ab12:human_labels"
    )
    answers: dict[str, str] = Field({"teacher": "precompute"}, description="precompute receipt ref of each answer source, by its name")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="chance with which an interval covers the truth")
    resamples: int = Field(2000, ge=200, le=100_000, description="bootstrap resamples")
    seed: int = Field(0, ge=0, description="seed of the bootstrap")

    @field_validator("answers")
    @classmethod
    def _sources(cls, value: dict[str, str]) -> dict[str, str]:
        if Source.FALLBACK in value:
            raise ValueError("the fallback is computed from the task; leave it out")
        if not value:
            raise ValueError("name at least one answer source, such as teacher: precompute")
        return value

    @property
    def sure(self) -> Sureness:
        """How intervals are made."""
        return Sureness(self.confidence, self.resamples, self.seed)


def run(config: Config) -> Receipt[Result]:
    """Score the answers of every source to the labelled rows."""
    task, store = load_task(config.task, config.allow_task_code), open_storage(config.root)
    human_labels, name = load_ref(store, config.labels)
    receipts = {source: load_receipt(store, "precompute", ref, PrecomputeResult) for source, ref in config.answers.items()}

    def work(stage: Stage) -> Result:
        wanted = conform(output_table(store, human_labels, name), HUMAN_LABELS, human_labels.output(name).path)
        if not wanted.num_rows:
            fix = "name a labels column or file when you run ingest"
            raise InputError("no labelled rows to evaluate on", where=human_labels.output(name).path, fix=fix)
        keys = wanted["query_key"].combine_chunks()
        given = {
            source: find_answers(task, read_answers(store, receipt, COLUMNS), keys, receipt.path) for source, receipt in receipts.items()
        }
        for source, answers in given.items():
            if not answers:
                fix = f"add {config.labels} to precompute's inputs"
                raise InputError(
                    f"no labelled query is among the answers of {source}", where=receipts[source].path, value=config.labels, fix=fix
                )
        figures = _write(stage, config, task, receipts, score_rows(task, wanted, given))
        return Result(labels=labels, answers=answered_by, figures=figures)

    labels, answered_by = f"{human_labels.path}:{name}", {source: receipt.path for source, receipt in receipts.items()}
    replaces = {"task": task.name, "labels": labels, "answers": answered_by}
    return run_once("evaluate", Result, config, work, inputs={"labels": human_labels, **receipts}, task=task, replaces=replaces)


def _write(
    stage: Stage, config: Config, task: Task, receipts: Mapping[str, Receipt[PrecomputeResult]], rows: pa.Table
) -> dict[str, Figures]:
    scored, quality = by_source(rows), quality_rows(rows, config.sure)
    calibrated = {s.source: calibration_of(s, config.sure) for s in scored if s.source != Source.FALLBACK}
    gaps = list(source_differences(scored, config.sure))
    for line in quality.to_pylist():
        if line["n"]:
            where = f"{line['source']}/{line['stratum']}"
            stage.metrics |= {f"quality/{where}": line["quality"], f"low/{where}": line["low"], f"high/{where}": line["high"]}
            if line["stratum"] == ALL:
                stage.metrics[f"exact/{line['source']}/{ALL}"] = line["exact"]
    for source, found in calibrated.items():
        stage.metrics |= {k: v for k, v in ((f"ece/{source}", found.ece), (f"auroc/{source}", found.auroc)) if v == v}
    for gap in gaps:
        if gap["split"] == ALL and gap["source"] != Source.FALLBACK and gap["value"] is not None:
            stage.metrics |= {f"difference/{gap['source']}/{end}": gap[end] for end in ("value", "low", "high")}
    teacher = next((s for s in scored if s.source == Source.TEACHER), None)
    for student in scored:
        if teacher and student.source not in (Source.TEACHER, Source.FALLBACK):
            name = f"agreement/{student.source}"
            stage.metrics[name], both = agreement(task, teacher, student)
            stage.note(
                f"{name} compares {student.source} with teacher on the {both:,} labelled rows both answered: this is not a quality figure"
            )
    figures = dict(_figures(stage.metrics, receipts))
    for source, known in figures.items():
        stage.metrics |= figure_metrics(known, source)
    stage.rows |= {"human_labels": len(scored[0].tp), **{f"answered.{s.source}": int(s.answered.sum()) for s in scored}}
    for text in remarks(quality, rows, task, receipts):
        stage.note(text)
    stage.table("rows", rows)
    stage.table("quality", quality)
    stage.figure("quality", _quality_figure(quality, config))
    stage.figure("calibration", _calibration_figure(calibrated))
    stage.json("report", document(config.sure, task, config.labels, receipts, scored, quality, calibrated, gaps, stage.notes))
    return figures


def _figures(metrics: Mapping[str, float], receipts: Mapping[str, Receipt]) -> Iterator[tuple[str, Figures]]:
    """Each answer source against people, against the teacher, and what a million rows cost beside the teacher's."""
    for source, receipt in receipts.items():
        teacher = receipts[Source.TEACHER].metrics if Source.TEACHER in receipts and source != Source.TEACHER else {}
        yield source, three_figures(metrics.get(f"quality/{source}/{ALL}"), metrics.get(f"agreement/{source}"), receipt.metrics, teacher)


def remarks(quality: pa.Table, rows: pa.Table, task: Task, receipts: Mapping[str, Receipt]) -> Iterator[str]:
    """What a reader should know before trusting the figures."""
    lines = quality.to_pylist()
    first = [line for line in lines if line["source"] == lines[0]["source"]]
    for line in first:
        if line["stratum"] in (ALL, TRAFFIC):
            continue
        if not line["n"]:
            yield f"{line['stratum']}: no labelled rows, so its quality is not known"
        elif line["n"] < SMALL:
            yield f"{line['stratum']}: only {line['n']} labelled rows; its intervals are wide and exact (Clopper-Pearson), not bootstrap"
    exact = list(dict.fromkeys(line["stratum"] for line in lines if line["n"] >= SMALL and line["method"] != BOOTSTRAP))
    if exact:
        why = "too few effective rows, or rows of one kind, for a bootstrap"
        yield f"{', '.join(exact)}: {why}; some intervals are Clopper-Pearson at the effective number of rows"
    for line in first:
        if line["stratum"] == TRAFFIC and line["n"] and line["effective"] < line["n"] / 4:
            yield f"traffic: {line['n']:,} labelled rows weighted by their events carry as much as {line['effective']:.0f} equal rows"
    for source, receipt in receipts.items():
        mine = rows.filter(pc.equal(rows["source"], source))
        absent = int(pc.sum(pc.equal(mine["state"], ABSENT)).as_py())
        if absent:
            yield f"{source}: {absent:,} of {mine.num_rows:,} labelled queries were never asked; they count as missed"
        made_under = receipt.task_fingerprint
        if made_under and made_under != task.fingerprint:
            yield f"{source}: made under another prompt or schema of this task (fingerprint {made_under[:8]}, now {task.fingerprint[:8]})"


def _quality_figure(quality: pa.Table, config: Config) -> Any:
    lines = [line for line in quality.to_pylist() if line["n"]]
    points = [charts.QualityPoint(q["source"], q["stratum"], q["quality"], q["low"], q["high"], q["n"]) for q in lines]
    return charts.quality_chart(points, confidence=config.confidence)


def _calibration_figure(calibrated: Mapping[str, Calibration]) -> Any:
    labels = {source: f"{source}: ECE {c.ece:.3f}, AUROC {c.auroc:.3f}" for source, c in calibrated.items()}
    return charts.calibration_chart({source: [charts.ReliabilityBin(*b) for b in c.bins] for source, c in calibrated.items()}, labels)
