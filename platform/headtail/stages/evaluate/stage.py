"""Evaluate answers against people's gold: quality by tier and stratum, with intervals, and how far confidences hold.

    gold + answers of each tier -> rows (one per gold row and tier) -> quality (tier x stratum), calibration, report

A gold row without a valid answer counts as missed. The fallback tier is computed from the task. What compares a student
with its teacher is called agreement and is no quality figure. Knows nothing of how answers were made.

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
from headtail.batch import answers as read_answers
from headtail.core.config import StageConfig
from headtail.core.errors import InputError
from headtail.core.evidence import figure_metrics, three_figures
from headtail.core.intervals import BOOTSTRAP
from headtail.core.receipt import Receipt
from headtail.core.rows import ALL, GOLD, SMALL, TRAFFIC, Source, conform
from headtail.core.task import Task, load_task
from headtail.stages.base import Station, run_once
from headtail.stages.evaluate.document import document
from headtail.stages.evaluate.scoring import (
    ABSENT,
    COLUMNS,
    Calibration,
    Sureness,
    agreement,
    by_tier,
    calibration_of,
    differences,
    lookup,
    quality_rows,
    score_rows,
)


class Config(StageConfig):
    """What is compared with what."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    gold: str = Field("plan:gold", description="table ref of the gold rows, such as plan:gold or plan/ab12:gold")
    answers: dict[str, str] = Field({"teacher": "precompute"}, description="precompute receipt ref of each tier, by the tier's name")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="chance with which an interval covers the truth")
    resamples: int = Field(2000, ge=200, le=100_000, description="bootstrap resamples")
    seed: int = Field(0, ge=0, description="seed of the bootstrap")

    @field_validator("answers")
    @classmethod
    def _tiers(cls, value: dict[str, str]) -> dict[str, str]:
        if Source.FALLBACK in value:
            raise ValueError("the fallback tier is computed from the task; leave it out")
        if not value:
            raise ValueError("name at least one tier, such as teacher: precompute")
        return value

    @property
    def sure(self) -> Sureness:
        """How intervals are made."""
        return Sureness(self.confidence, self.resamples, self.seed)


def run(config: Config) -> Receipt:
    """Score every tier's answers to the gold rows."""
    task, store = load_task(config.task, config.allow_task_code), open_storage(config.root)
    gold, name = load_ref(store, config.gold)
    found = {tier: load_receipt(store, "precompute", ref) for tier, ref in config.answers.items()}

    def work(station: Station) -> None:
        wanted = conform(output_table(store, gold, name), GOLD, gold.output(name).path)
        if not wanted.num_rows:
            fix = "name a gold column or file when you run ingest"
            raise InputError("no gold rows to evaluate on", where=gold.output(name).path, fix=fix)
        keys = wanted["query_key"].combine_chunks()
        given = {tier: lookup(task, read_answers(store, receipt, COLUMNS), keys, receipt.path) for tier, receipt in found.items()}
        for tier, answers in given.items():
            if not answers:
                fix = f"add {config.gold} to precompute's inputs"
                raise InputError(f"no gold query is among the answers of {tier}", where=found[tier].path, value=config.gold, fix=fix)
        _write(station, config, task, found, score_rows(task, wanted, given))

    replaces = {"task": task.name, "gold": f"{gold.path}:{name}", "answers": {tier: receipt.path for tier, receipt in found.items()}}
    return run_once("evaluate", config, work, inputs={"gold": gold, **found}, task=task, replaces=replaces)


def _write(station: Station, config: Config, task: Task, receipts: Mapping[str, Receipt], rows: pa.Table) -> None:
    scored, quality = by_tier(rows), quality_rows(rows, config.sure)
    calibrated = {s.tier: calibration_of(s, config.sure) for s in scored if s.tier != Source.FALLBACK}
    gaps = list(differences(scored, config.sure))
    for line in quality.to_pylist():
        if line["n"]:
            where = f"{line['tier']}/{line['stratum']}"
            station.metrics |= {f"quality/{where}": line["quality"], f"low/{where}": line["low"], f"high/{where}": line["high"]}
            if line["stratum"] == ALL:
                station.metrics[f"exact/{line['tier']}/{ALL}"] = line["exact"]
    for tier, found in calibrated.items():
        station.metrics |= {k: v for k, v in ((f"ece/{tier}", found.ece), (f"auroc/{tier}", found.auroc)) if v == v}
    for gap in gaps:
        if gap["split"] == ALL and gap["tier"] != Source.FALLBACK and gap["value"] is not None:
            station.metrics |= {f"difference/{gap['tier']}/{end}": gap[end] for end in ("value", "low", "high")}
    teacher = next((s for s in scored if s.tier == Source.TEACHER), None)
    for student in scored:
        if teacher and student.tier not in (Source.TEACHER, Source.FALLBACK):
            name = f"agreement/{student.tier}"
            station.metrics[name], both = agreement(task, teacher, student)
            station.note(f"{name} compares {student.tier} with teacher on the {both:,} gold rows both answered: it is no quality figure")
    station.facts["figures"] = figures = dict(_figures(station.metrics, receipts))
    for tier, known in figures.items():
        station.metrics |= figure_metrics(known, tier)
    station.rows |= {"gold": len(scored[0].tp), **{f"answered.{s.tier}": int(s.answered.sum()) for s in scored}}
    for text in remarks(quality, rows, task, receipts):
        station.note(text)
    station.table("rows", rows)
    station.table("quality", quality)
    station.figure("quality", _quality_figure(quality, config))
    station.figure("calibration", _calibration_figure(calibrated))
    station.json("report", document(config.sure, task, config.gold, receipts, scored, quality, calibrated, gaps, station.notes))


def _figures(metrics: Mapping[str, float], receipts: Mapping[str, Receipt]) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Each answering tier against people, against the teacher, and what a million rows cost beside the teacher's."""
    for tier, receipt in receipts.items():
        teacher = receipts[Source.TEACHER].metrics if Source.TEACHER in receipts and tier != Source.TEACHER else {}
        yield tier, three_figures(metrics.get(f"quality/{tier}/{ALL}"), metrics.get(f"agreement/{tier}"), receipt.metrics, teacher)


def remarks(quality: pa.Table, rows: pa.Table, task: Task, receipts: Mapping[str, Receipt]) -> Iterator[str]:
    """What a reader should know before trusting the figures."""
    lines = quality.to_pylist()
    first = [line for line in lines if line["tier"] == lines[0]["tier"]]
    for line in first:
        if line["stratum"] in (ALL, TRAFFIC):
            continue
        if not line["n"]:
            yield f"{line['stratum']}: no gold rows, so nothing is known of it"
        elif line["n"] < SMALL:
            yield f"{line['stratum']}: only {line['n']} gold rows; its intervals are wide and exact (Clopper-Pearson), not bootstrap"
    exact = list(dict.fromkeys(line["stratum"] for line in lines if line["n"] >= SMALL and line["method"] != BOOTSTRAP))
    if exact:
        why = "too few effective rows, or rows of one kind, for a bootstrap"
        yield f"{', '.join(exact)}: {why}; some intervals are Clopper-Pearson at the effective number of rows"
    for line in first:
        if line["stratum"] == TRAFFIC and line["n"] and line["effective"] < line["n"] / 4:
            yield f"traffic: {line['n']:,} gold rows weighted by their events carry as much as {line['effective']:.0f} equal rows"
    for tier, receipt in receipts.items():
        mine = rows.filter(pc.equal(rows["tier"], tier))
        absent = int(pc.sum(pc.equal(mine["state"], ABSENT)).as_py())
        if absent:
            yield f"{tier}: {absent:,} of {mine.num_rows:,} gold queries were never asked; they count as missed"
        made_under = receipt.task_fingerprint
        if made_under and made_under != task.fingerprint:
            yield f"{tier}: made under another prompt or schema of this task (fingerprint {made_under[:8]}, now {task.fingerprint[:8]})"


def _quality_figure(quality: pa.Table, config: Config) -> Any:
    lines = [line for line in quality.to_pylist() if line["n"]]
    points = [charts.Point(q["tier"], q["stratum"], q["quality"], q["low"], q["high"], q["n"]) for q in lines]
    return charts.quality(points, confidence=config.confidence)


def _calibration_figure(calibrated: Mapping[str, Calibration]) -> Any:
    labels = {tier: f"{tier}: ECE {c.ece:.3f}, AUROC {c.auroc:.3f}" for tier, c in calibrated.items()}
    return charts.calibration({tier: [charts.Reliable(*b) for b in c.bins] for tier, c in calibrated.items()}, labels)
