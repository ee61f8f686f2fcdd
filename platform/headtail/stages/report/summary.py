"""The summary: every figure of a report in its place in the tree (tree.py), read from the stages' results.

In: receipts by stage, the quality table. Out: a Summary, with null for what was not run. `flat_summary` makes one plain name of each
figure (docs/report.md). Another answer source is a row of core.answer_source.SOURCES. Reads no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from headtail.core.answer_source import SOURCES, AnswerSource
from headtail.core.evidence import Figures
from headtail.core.receipt import Receipt, StageResult
from headtail.core.rows import SLICES
from headtail.stages.calibrate.result import Result as CalibrateResult
from headtail.stages.curate import Result as CurateResult
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.evaluate.result import Result as EvaluateResult
from headtail.stages.evaluate.result import SourceFigures
from headtail.stages.gate.result import Result as GateResult
from headtail.stages.ingest.result import Result as IngestResult
from headtail.stages.plan.result import Result as PlanResult
from headtail.stages.precompute.result import Result as PrecomputeResult
from headtail.stages.publish import Result as PublishResult
from headtail.stages.replay import Result as ReplayResult
from headtail.stages.report.tree import (
    PATHS,
    REPORTED_STAGES,
    BatchFigures,
    GateSummary,
    LatencySummary,
    LineageStep,
    PipelineFigures,
    QualityFigure,
    SourceSummary,
    Summary,
    TrainingFigures,
    stages_of,
)

R = TypeVar("R", bound=StageResult)
RESULTS: dict[str, type[StageResult]] = {
    "ingest": IngestResult,
    "plan": PlanResult,
    "precompute": PrecomputeResult,
    "evaluate": EvaluateResult,
    "curate": CurateResult,
    "distill": DistillResult,
    "gate": GateResult,
    "calibrate": CalibrateResult,
    "publish": PublishResult,
    "replay": ReplayResult,
}


def summarise(
    receipts: Mapping[str, Receipt],
    quality: Iterable[Mapping[str, Any]],
    title: str,
    reused: Sequence[str] = (),
    paths: Mapping[str, Any] | None = None,
    sources: Sequence[AnswerSource] = SOURCES,
) -> Summary:
    """Every figure in its place. `quality`: rows of evaluate's quality table."""
    table = {(line["source"], line["stratum"]): line for line in quality}
    counts = {name: [line["n"] for (_, stratum), line in table.items() if stratum == name] for name in SLICES}
    teacher = next(_job(receipts, source) for source in sources if source.role == "teacher")
    found = {source.name: _source(receipts, source, table, teacher) for source in sources}
    shown = [source for source in sources if not source.optional or found[source.name].job.model]
    published, served = (result_of(receipts, PublishResult, *names) for names in (("publish", "publish_head"), ("publish",)))
    steps, stages = stage_order(receipts, stages_of(sources)), stages_of(sources)
    return Summary(
        title=title,
        task=_task(receipts),
        figures=_figures(receipts),
        labelled={name: max(rows) if rows else None for name, rows in counts.items()},
        sources=found,
        shown=tuple(source.name for source in shown),
        latency={path: _latency(receipts, path) for path in ("all", *PATHS)},
        release=published.release if published else None,
        snapshot=published.snapshot if published else None,
        student_served=bool(served.student) if served else None,
        withheld=published.withheld if published else (),
        promise=result_of(receipts, CalibrateResult, "calibrate"),
        seconds={name: receipts[name].seconds if name in receipts else None for name in stages},
        not_run=tuple(name for name in stages_of(shown) if name not in receipts),
        lineage=tuple(_step(name, receipts[name], name in reused) for name in steps),
        remarks=tuple(f"{name}: {text}" for name in steps for text in (*receipts[name].notes, *_former(receipts[name]))),
        paths=dict(paths or {}),
    )


def _former(receipt: Receipt) -> Iterator[str]:
    """A note where an earlier version made a run whose figures the report shows: they are not in its result."""
    figures = {"ingest": "totals", "curate": "training_rows", "distill": "training", "publish": "published"}
    kind, name = RESULTS.get(receipt.stage), figures.get(receipt.stage, "figures")
    if kind is not None and isinstance(receipt.result, kind) and getattr(receipt.result, name, receipt) is None:
        yield f"an earlier version of headtail made this run: no figures; remove {receipt.path}/receipt.json to make it again"


def _figures(receipts: Mapping[str, Receipt]) -> PipelineFigures:
    log, planned = result_of(receipts, IngestResult, "ingest"), result_of(receipts, PlanResult, "plan")
    curated, replayed = result_of(receipts, CurateResult, "curate"), result_of(receipts, ReplayResult, "replay")
    published, head = (result_of(receipts, PublishResult, *names) for names in (("publish", "publish_head"), ("publish_head",)))
    totals, plan = log.totals if log else None, planned.figures if planned else None
    forecast = planned.forecasts[-1] if planned and planned.forecasts else None
    replay = replayed.figures if replayed else None
    return PipelineFigures(
        log_events=totals.events if totals else None,
        log_queries=totals.queries if totals else None,
        holdout_events=totals.holdout_events if totals else None,
        unseen_share_holdout_events=totals.unseen_share_holdout_events if totals else None,
        labelled_rows=plan.human_labels if plan else totals.human_labels if totals else None,
        head_rows=plan.head_rows if plan else None,
        head_coverage_forecast=forecast.value if forecast else None,
        head_coverage_forecast_low=forecast.low if forecast else None,
        head_coverage_forecast_high=forecast.high if forecast else None,
        forecast_horizon_days=forecast.horizon_days if forecast else None,
        head_coverage=plan.head_coverage if plan else None,
        head_coverage_holdout=plan.head_coverage_holdout if plan else None,
        seen_coverage_holdout=plan.seen_coverage_holdout if plan else None,
        zipf_exponent=plan.zipf_exponent if plan else None,
        training_rows=curated.training_rows if curated else None,
        training_dropped=curated.dropped_rows if curated else None,
        published_rows=published.published if published else None,
        answers_withheld=published.withheld_answers if published else None,
        coverage_log=published.coverage if published else None,
        coverage_log_head=head.coverage if head else None,
        coverage_holdout_traffic=replay.cache_hit_share if replay else None,
        cache_hit_share=replay.cache_hit_share if replay else None,
        realtime_share=replay.realtime_share if replay else None,
        fallback_share=replay.fallback_share if replay else None,
        degraded_share=replay.degraded_share if replay else None,
        requests=replay.requests if replay else None,
        request_errors=replay.errors if replay else None,
        requests_per_s=replay.requests_per_s if replay else None,
        replay_quality=replay.quality if replay else None,
    )


def _source(
    receipts: Mapping[str, Receipt],
    source: AnswerSource,
    table: Mapping[tuple[str, str], Mapping[str, Any]],
    teacher: BatchFigures,
) -> SourceSummary:
    evaluated = result_of(receipts, EvaluateResult, "evaluate", "evaluate_teacher")
    known = evaluated.sources.get(source.name, SourceFigures()) if evaluated else SourceFigures()
    beside = evaluated.figures.get(source.name, Figures()) if evaluated else Figures()
    lines = {stratum: table.get((source.name, stratum), {}) for stratum in SLICES}
    job, gap = _job(receipts, source), known.minus_teacher
    return SourceSummary(
        source=source,
        quality={at: _quality(line) for at, line in lines.items()},
        exact=lines["all"].get("exact"),
        ece=known.ece,
        ece_noise_floor=known.ece_noise_floor,
        auroc=known.auroc,
        agreement=known.agreement,
        minus_teacher=QualityFigure(value=gap.value, low=gap.low, high=gap.high) if gap else QualityFigure(),
        times_faster=beside.times_faster_than_teacher,
        times_fewer_tokens=beside.times_fewer_tokens_than_teacher,
        job=job,
        training=_training(receipts, source.stage("distill")),
        gate=_verdict(receipts, source.stage("gate")),
        cost_ratio=_ratio(teacher.usd_per_million, job.usd_per_million),
        cost_ratio_running=_ratio(teacher.usd_per_million_running, job.usd_per_million_running),
    )


def _quality(line: Mapping[str, Any]) -> QualityFigure:
    return QualityFigure(value=line.get("quality"), low=line.get("low"), high=line.get("high"), method=line.get("method"))


def _job(receipts: Mapping[str, Receipt], source: AnswerSource) -> BatchFigures:
    if not source.model:
        return BatchFigures(usd_per_million=0.0)
    answered = result_of(receipts, PrecomputeResult, source.stage("precompute"))
    if answered is None:
        return BatchFigures()
    if answered.figures is None or answered.rows is None:
        return BatchFigures(model=answered.model.name)
    figures, usd = answered.figures, answered.figures.usd_per_million
    # the engine's start is spread over more rows in a longer run: the price falls towards this
    work, start = figures.generate_s, figures.engine_start_s
    return BatchFigures(
        model=answered.model.name,
        rows={**answered.rows.plain()},
        rows_per_s=figures.rows_per_s,
        tokens_in=figures.tokens_in,
        tokens_out=figures.tokens_out,
        tokens_in_per_row=figures.tokens_in_per_row,
        tokens_out_per_row=figures.tokens_out_per_row,
        engine_start_s=start,
        generate_s=work,
        answered_share=figures.answered_share,
        usd=figures.usd,
        usd_per_hour=answered.usd_per_hour,
        usd_per_million=usd,
        usd_per_million_running=usd * work / (work + start) if usd is not None and work else None,
    )


def _training(receipts: Mapping[str, Receipt], stage: str) -> TrainingFigures:
    result = result_of(receipts, DistillResult, stage)
    if result is None:
        return TrainingFigures()
    training, encoder = result.training, result.student == "encoder"
    return TrainingFigures(
        train_examples=training.examples if training else None,
        train_loss=training.train_loss if training else None,
        eval_loss=training.eval_loss if training else None,
        train_seconds=training.train_seconds if training else None,
        params=training.params if training else None,
        trainable_params=training.trained_params if training else None,
        kind=result.student,
        prompt="query_only" if encoder else result.io_format.prompt,
        output="labels" if encoder else result.io_format.output,
    )


def _verdict(receipts: Mapping[str, Receipt], stage: str) -> GateSummary:
    gated = result_of(receipts, GateResult, stage)
    if gated is None:
        return GateSummary()
    missing = tuple(gated.evidence.missing())
    return GateSummary(passed=not missing, delta=gated.evidence.delta, criteria=gated.evidence.criteria, missing=missing)


def _latency(receipts: Mapping[str, Receipt], path: str) -> LatencySummary:
    replayed = result_of(receipts, ReplayResult, "replay")
    if replayed is None or replayed.figures is None:
        return LatencySummary()
    found = replayed.figures.answered if path == "all" else replayed.figures.paths[path]
    return LatencySummary(requests=found.requests, p50=found.p50_ms, p95=found.p95_ms, p99=found.p99_ms)


def result_of(receipts: Mapping[str, Receipt], kind: type[R], *names: str) -> R | None:
    """The result of the first of these stages that was run."""
    results = (receipts[name].result for name in names if name in receipts)
    return next((result for result in results if isinstance(result, kind)), None)


def _task(receipts: Mapping[str, Receipt]) -> str | None:
    """A task that decided a stage's outputs; a log and its plan may have been made for another that reads the same columns."""
    tasks = sorted((not receipt.task_fingerprint, receipt.task) for receipt in receipts.values() if receipt.task)
    return tasks[0][1] if tasks else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def stage_order(receipts: Mapping[str, Receipt], stages: Sequence[str] = REPORTED_STAGES) -> list[str]:
    """Stages in the order of the data's way; those of other names (a trained teacher, say) by when they ran."""
    known = [name for name in stages if name in receipts]
    for name in sorted((n for n in receipts if n not in stages), key=lambda n: (receipts[n].started, n)):
        place = next((i for i, k in enumerate(known) if receipts[k].started > receipts[name].started), len(known))
        known.insert(place, name)
    return known


def _step(name: str, receipt: Receipt, reused: bool) -> LineageStep:
    kept = {field: getattr(receipt, field) for field in ("path", "fingerprint", "inputs", "started", "seconds", "run_id")}
    return LineageStep(stage=name, reused=reused, **kept)
