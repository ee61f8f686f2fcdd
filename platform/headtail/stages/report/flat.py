"""The summary as summary.json has it: one plain name for each figure, null for what was not run (docs/report.md). Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headtail.core.evidence import Criterion
from headtail.stages.calibrate.result import Result as CalibrateResult
from headtail.stages.report.sentences import headline, report_notes
from headtail.stages.report.tree import BatchFigures, SourceSummary, Summary, TrainingFigures

_CRITERION = ("kind", "stratum", "n", "value", "lower_bound", "threshold", "passed")
_ESTIMATES = {  # name: part of a calibration's figures
    "promise_precision": "precision",
    "escalated_share": "escalated",
    "right_without_escalation": "before",
    "right_with_escalation": "after",
    "escalation_gain": "gain",
}
_NOT_FIGURES = {"model", "rows"}  # of a BatchFigures


def flat_summary(s: Summary) -> dict[str, Any]:
    """Every figure under its plain name."""
    flat: dict[str, Any] = {"title": s.title, "headtail": s.headtail, "task": s.task, **s.figures.model_dump()}
    flat |= {f"labelled_rows_{name}": count for name, count in s.labelled.items()}
    for source in s.sources.values():
        flat |= dict(_flat_source(source))
    flat["sources"] = list(s.shown)
    for path, latency in s.latency.items():
        flat |= {f"latency_{path}_{p}_ms": getattr(latency, p) for p in ("p50", "p95", "p99")} | {f"requests_{path}": latency.requests}
    flat |= dict(_flat_promise(s.promise))
    flat |= {"release": s.release, "snapshot": s.snapshot, "student_served": s.student_served}
    flat |= {f"seconds_{name}": seconds for name, seconds in s.seconds.items()}
    flat |= {"not_run": list(s.not_run), "lineage": [step.model_dump() for step in s.lineage]}
    return flat | {"notes": report_notes(s), "headline": list(headline(s)), "paths": s.paths}


def _flat_source(source: SourceSummary) -> Iterator[tuple[str, Any]]:
    name = source.name
    for at, score in source.quality.items():
        yield f"quality_{name}_{at}", score.value
        yield from ((f"quality_{part}_{name}_{at}", getattr(score, part)) for part in ("low", "high", "method"))
    yield f"exact_{name}", source.exact
    yield f"usd_per_million_{name}", source.job.usd_per_million
    if source.source.model:
        yield from _flat_model(source)
    if source.source.role == "student":
        yield from _flat_student(source)


def _flat_model(source: SourceSummary) -> Iterator[tuple[str, Any]]:
    name, job = source.name, source.job
    yield from ((f"{part}_{name}", getattr(source, part)) for part in ("ece", "ece_noise_floor", "auroc"))
    yield f"model_{name}", job.model
    yield from ((f"rows_{name}_{row}", count) for row, count in job.rows.items())
    yield from ((f"{part}_{name}", getattr(job, part)) for part in BatchFigures.model_fields if part not in _NOT_FIGURES)


def _flat_student(source: SourceSummary) -> Iterator[tuple[str, Any]]:
    name, gate = source.name, source.source.stage("gate")
    yield from ((f"{part}_{name}", getattr(source, part)) for part in ("agreement", "times_faster", "times_fewer_tokens"))
    for part in ("value", "low", "high"):
        yield f"{name}_minus_teacher{'' if part == 'value' else f'_{part}'}", getattr(source.minus_teacher, part)
    for part in TrainingFigures.model_fields:
        yield f"{part}_{name}" if part.startswith(("train_", "eval_")) else f"{name}_{part}", getattr(source.training, part)
    yield f"cost_ratio_teacher_to_{name}", source.cost_ratio
    yield f"cost_ratio_running_{name}", source.cost_ratio_running
    yield f"{gate}_passed", source.gate.passed
    yield f"{gate}_delta", source.gate.delta
    yield f"{gate}_criteria", list(map(_flat_criterion, source.gate.criteria))
    yield f"{gate}_missing", list(source.gate.missing)


def _flat_promise(found: CalibrateResult | None) -> Iterator[tuple[str, Any]]:
    yield "promise_verdict", found.verdict if found else None
    yield "promise_source", found.source if found else None
    kept, figures = (found.calibration, found.figures) if found else (None, None)
    for part in ("target", "delta", "threshold"):
        yield f"promise_{part}", getattr(kept, part, None)
    yield "calibration_ece_own", found.own.ece if found else None
    for name, part in (("ece", "ece"), ("noise_floor", "floor"), ("noise_floor_high", "floor_high")):
        yield f"calibration_{name}", getattr(found.mapped, part) if found else None
    for name, part in _ESTIMATES.items():
        estimate = getattr(figures, part, None)
        yield name, getattr(estimate, "value", None)
        yield from ((f"{name}_{end}", getattr(estimate, end, None)) for end in ("low", "high"))
    for name, part in (
        ("escalation_usd_per_million", "usd_per_million"),
        ("promise_labels_needed", "labels_needed"),
        ("promise_rows", "rows"),
    ):
        yield name, getattr(figures, part, None)


def _flat_criterion(criterion: Criterion) -> dict[str, Any]:
    return {name: getattr(criterion, name) for name in _CRITERION} | {"words": criterion.words()}
