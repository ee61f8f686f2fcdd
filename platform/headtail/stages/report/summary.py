"""The summary: every figure of a report as a typed tree: what was found overall, then by answer source, by path, by stage.

In: receipts by stage, the quality table. Out: a Summary, with null for what was not run. `flat_summary` makes one plain name of each
figure (docs/report.md). Another answer source is a name in MODELS. Reads no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import Field

from headtail import __version__
from headtail.core.config import Config
from headtail.core.evidence import Criterion
from headtail.core.paths import StoreId, StoreIdOrEmpty, StorePath
from headtail.core.receipt import Receipt, StageResult
from headtail.core.rows import SLICES, Source, State
from headtail.stages.calibrate.result import Result as CalibrateResult
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.gate.result import Result as GateResult
from headtail.stages.precompute.result import Result as PrecomputeResult
from headtail.stages.publish import Result as PublishResult
from headtail.stages.publish.result import WithheldAnswer

R = TypeVar("R", bound=StageResult)
RESULTS: dict[str, type[StageResult]] = {
    "precompute": PrecomputeResult,
    "distill": DistillResult,
    "gate": GateResult,
    "calibrate": CalibrateResult,
    "publish": PublishResult,
}
REPORTED_STAGES = (
    "ingest",
    "plan",
    "precompute_teacher",
    "publish_head",
    "evaluate_teacher",
    "curate",
    "distill_batch",
    "precompute_batch",
    "distill_realtime",
    "precompute_realtime",
    "evaluate",
    "gate_batch",
    "gate_realtime",
    "calibrate",
    "publish",
    "replay",
)
REALTIME = ("distill_realtime", "precompute_realtime", "gate_realtime")  # there only where a second student answers live
TEACHER = str(Source.TEACHER)
MODELS = (TEACHER, str(Source.BATCH_STUDENT), str(Source.REALTIME_STUDENT))
SOURCES = (*MODELS, str(Source.FALLBACK))
PATHS = ("cache", "realtime", "fallback")
JOB_ROWS = ("in", *(str(s) for s in State), "duplicates", "reused", "recomputed", "resumed")

# name in the summary: (stage, part of its receipt, name there). The first stage that has it wins.
FIGURES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "log_events": (("ingest", "rows", "events"),),
    "log_queries": (("ingest", "rows", "queries"),),
    "holdout_events": (("ingest", "rows", "holdout_events"),),
    "unseen_share_holdout_events": (("ingest", "metrics", "unseen_share_holdout_events"),),
    "labelled_rows": (("plan", "rows", "human_labels"), ("ingest", "rows", "human_labels")),
    "head_rows": (("plan", "metrics", "head_rows"), ("plan", "rows", "head")),
    "head_coverage_forecast": (("plan", "metrics", "head_coverage_forecast"),),
    "head_coverage_forecast_low": (("plan", "metrics", "head_coverage_forecast_low"),),
    "head_coverage_forecast_high": (("plan", "metrics", "head_coverage_forecast_high"),),
    "forecast_horizon_days": (("plan", "metrics", "forecast_horizon_days"),),
    "head_coverage": (("plan", "metrics", "head_coverage"),),
    "head_coverage_holdout": (("plan", "metrics", "head_coverage_holdout"),),
    "seen_coverage_holdout": (("plan", "metrics", "seen_coverage_holdout"),),
    "zipf_exponent": (("plan", "metrics", "zipf_exponent"),),
    "training_rows": (("curate", "rows", "training_set"),),
    "training_dropped": (("curate", "rows", "dropped"),),
    "published_rows": (("publish", "rows", "published"), ("publish_head", "rows", "published")),
    "answers_withheld": (("publish", "metrics", "withheld"), ("publish_head", "metrics", "withheld")),
    "coverage_log": (("publish", "metrics", "coverage"), ("publish_head", "metrics", "coverage")),
    "coverage_log_head": (("publish_head", "metrics", "coverage"),),
    "coverage_holdout_traffic": (("replay", "metrics", "cache_hit_share"),),
    "cache_hit_share": (("replay", "metrics", "cache_hit_share"),),
    "realtime_share": (("replay", "metrics", "realtime_share"),),
    "fallback_share": (("replay", "metrics", "fallback_share"),),
    "degraded_share": (("replay", "metrics", "degraded_share"),),
    "requests": (("replay", "metrics", "requests"), ("replay", "rows", "requests")),
    "request_errors": (("replay", "metrics", "errors"), ("replay", "rows", "errors")),
    "requests_per_s": (("replay", "metrics", "requests_per_s"),),
    "replay_quality": (("replay", "metrics", "quality"),),
}
_EVALUATIONS = ("evaluate", "evaluate_teacher")


class QualityFigure(Config):
    """Micro-F1 on some labelled rows, or a difference of two; null without rows."""

    value: float | None = Field(None, description="the estimate")
    low: float | None = Field(None, description="lower end of its interval")
    high: float | None = Field(None, description="upper end")
    method: str | None = Field(None, description="how the interval was made")


class BatchFigures(Config):
    """How an answer source answered in batch: its precompute. All null when none ran."""

    model: str | None = Field(None, description="the model that answered")
    rows: dict[str, int | None] = Field(dict.fromkeys(JOB_ROWS), description="rows by state, and how they were made")
    rows_per_s: float | None = Field(None, description="rows generated per second")
    tokens_in: float | None = Field(None, description="prompt tokens")
    tokens_out: float | None = Field(None, description="answer tokens")
    tokens_in_per_row: float | None = Field(None, description="prompt tokens per row")
    tokens_out_per_row: float | None = Field(None, description="answer tokens per row")
    engine_start_s: float | None = Field(None, description="seconds until the engine was ready")
    generate_s: float | None = Field(None, description="seconds of generation")
    answered_share: float | None = Field(None, description="answered rows over rows in")
    usd: float | None = Field(None, description="USD that it cost")
    usd_per_hour: float | None = Field(None, description="assumed price of one worker's machine, USD per hour")
    usd_per_million: float | None = Field(None, description="USD per million queries")
    usd_per_million_running: float | None = Field(None, description="the same without the engine's start")


class TrainingFigures(Config):
    """How a student was made. All null for a source that was not trained here."""

    train_examples: int | None = Field(None, description="training examples")
    train_loss: float | None = Field(None, description="last training loss")
    eval_loss: float | None = Field(None, description="loss on held-out rows")
    train_seconds: float | None = Field(None, description="seconds of training")
    params: float | None = Field(None, description="parameters")
    trainable_params: float | None = Field(None, description="parameters that were trained")
    kind: str | None = Field(None, description="decoder, encoder or seq2seq")
    prompt: str | None = Field(None, description="full or query_only")
    output: str | None = Field(None, description="json, compact or labels")


class GateSummary(Config):
    """The gate's verdict on a student; null when it was not gated."""

    passed: bool | None = Field(None, description="whether nothing is missing")
    delta: float | None = Field(None, description="chance that it passes although a criterion is not true of it")
    criteria: tuple[Criterion, ...] = Field((), description="every criterion")
    missing: tuple[str, ...] = Field((), description="what is missing, in words")


class SourceSummary(Config):
    """One answer source."""

    name: str = Field(description="its name, such as batch_student")
    quality: dict[str, QualityFigure] = Field(description="against people's answers, by slice of the labelled rows")
    exact: float | None = Field(None, description="share of labelled rows answered wholly right")
    ece: float | None = Field(None, description="expected calibration error")
    ece_noise_floor: float | None = Field(None, description="what perfectly calibrated confidences would show on so many rows, by luck")
    auroc: float | None = Field(None, description="chance that a right answer has a higher confidence than a wrong one")
    agreement: float | None = Field(None, description="micro-F1 against the teacher")
    minus_teacher: QualityFigure = Field(QualityFigure(), description="difference in micro-F1 on the same rows")
    times_faster: float | None = Field(None, description="the teacher's seconds per row over its own")
    times_fewer_tokens: float | None = Field(None, description="the teacher's tokens per row over its own")
    job: BatchFigures = Field(BatchFigures(), description="how it answered in batch")
    training: TrainingFigures = Field(TrainingFigures(), description="how it was trained")
    gate: GateSummary = Field(GateSummary(), description="its gate")
    cost_ratio: float | None = Field(None, description="the teacher's cost per million over its own")
    cost_ratio_running: float | None = Field(None, description="the same without the engines' start")

    @property
    def words(self) -> str:
        """Its name for people."""
        return self.name.replace("_", " ")

    @property
    def student(self) -> bool:
        """Whether it is a model that learns from the teacher."""
        return self.name in MODELS[1:]


class LatencySummary(Config):
    """Replayed requests that took one path, in ms."""

    requests: int | float | None = Field(None, description="requests")
    p50: float | None = Field(None, description="half were answered within")
    p95: float | None = Field(None, description="95 of 100 within")
    p99: float | None = Field(None, description="99 of 100 within")


class LineageStep(Config):
    """One stage's receipt."""

    stage: str = Field(description="name of the stage in the pipeline")
    path: StorePath = Field(description="its folder")
    fingerprint: StoreId = Field(description="its fingerprint")
    inputs: dict[str, str] = Field(description="what it was made from")
    started: str = Field(description="UTC, ISO 8601")
    seconds: float = Field(description="wall-clock seconds")
    reused: bool = Field(description="whether the pipeline found it done")
    run_id: StoreIdOrEmpty = Field(description="MLflow run")


class Summary(Config):
    """Everything that a report shows."""

    title: str = Field(description="heading of the page")
    headtail: str = Field(__version__, description="version of headtail")
    task: str | None = Field(description="name of the task")
    figures: dict[str, int | float | None] = Field(description="figures of log, plan, cache and replay, by the names of docs/report.md")
    labelled: dict[str, int | None] = Field(description="labelled rows by slice")
    sources: dict[str, SourceSummary] = Field(description="every answer source that there can be")
    shown: tuple[str, ...] = Field(description="answer sources that the report shows")
    latency: dict[str, LatencySummary] = Field(description="replayed requests by path, and all")
    release: StoreId | None = Field(description="id of the release")
    snapshot: StoreId | None = Field(description="id of its cache snapshot")
    student_served: bool | None = Field(description="whether the release has a student; null when there is no release")
    withheld: tuple[WithheldAnswer, ...] = Field(
        (), description="answers that guardrails kept out of the snapshot, by reason the most frequent"
    )
    promise: CalibrateResult | None = Field(None, description="from where the student that answers misses is sure; null: not calibrated")
    seconds: dict[str, float | None] = Field(description="seconds by stage")
    not_run: tuple[str, ...] = Field(description="stages that were not run")
    lineage: tuple[LineageStep, ...] = Field(description="receipts, in the order of the data's way")
    remarks: tuple[str, ...] = Field(description="notes of the stages")
    paths: dict[str, Any] = Field({}, description="where in the store what was made is")

    @property
    def teacher(self) -> SourceSummary:
        return self.sources[TEACHER]

    @property
    def students(self) -> list[SourceSummary]:
        """The students, the batch student first."""
        return [self.sources[name] for name in MODELS[1:]]

    @property
    def scored(self) -> list[SourceSummary]:
        """Answer sources with a quality figure."""
        return [source for source in self.sources.values() if source.quality["all"].value is not None]


def summarise(
    receipts: Mapping[str, Receipt],
    quality: Iterable[Mapping[str, Any]],
    title: str,
    reused: Sequence[str] = (),
    paths: Mapping[str, Any] | None = None,
) -> Summary:
    """Every figure in its place. `quality`: rows of evaluate's quality table."""
    table = {(line["source"], line["stratum"]): line for line in quality}
    counts = {name: [line["n"] for (_, stratum), line in table.items() if stratum == name] for name in SLICES}
    teacher = _job(receipts, TEACHER)
    sources = {name: _source(receipts, name, table, teacher) for name in SOURCES}
    shown = tuple(name for name in SOURCES if name != MODELS[-1] or sources[name].job.model)
    published, served = (result_of(receipts, PublishResult, *names) for names in (("publish", "publish_head"), ("publish",)))
    steps = stage_order(receipts)
    return Summary(
        title=title,
        task=_task(receipts),
        figures={name: _first(receipts, places) for name, places in FIGURES.items()},
        labelled={name: max(found) if found else None for name, found in counts.items()},
        sources=sources,
        shown=shown,
        latency={path: _latency(receipts, path) for path in ("all", *PATHS)},
        release=published.release if published else None,
        snapshot=published.snapshot if published else None,
        student_served=bool(served.student) if served else None,
        withheld=published.withheld if published else (),
        promise=result_of(receipts, CalibrateResult, "calibrate"),
        seconds={name: receipts[name].seconds if name in receipts else None for name in REPORTED_STAGES},
        not_run=tuple(name for name in REPORTED_STAGES if name not in receipts and (MODELS[-1] in shown or name not in REALTIME)),
        lineage=tuple(_step(name, receipts[name], name in reused) for name in steps),
        remarks=tuple(f"{name}: {text}" for name in steps for text in receipts[name].notes),
        paths=dict(paths or {}),
    )


def stage_name(stage: str, source: str) -> str:
    """The name of a stage for an answer source: precompute_teacher, distill_batch, gate_realtime."""
    return f"{stage}_{source.removesuffix('_student')}"


def _source(
    receipts: Mapping[str, Receipt], name: str, table: Mapping[tuple[str, str], Mapping[str, Any]], teacher: BatchFigures
) -> SourceSummary:
    def evaluated(metric: str) -> Any:
        return _first(receipts, [(stage, "metrics", metric) for stage in _EVALUATIONS])

    lines = {stratum: table.get((name, stratum), {}) for stratum in SLICES}
    job = _job(receipts, name)
    return SourceSummary(
        name=name,
        quality={at: _quality(line) for at, line in lines.items()},
        exact=lines["all"].get("exact"),
        ece=evaluated(f"ece/{name}"),
        ece_noise_floor=evaluated(f"ece_noise_floor/{name}"),
        auroc=evaluated(f"auroc/{name}"),
        agreement=evaluated(f"agreement/{name}"),
        minus_teacher=QualityFigure(**{end: evaluated(f"difference/{name}/{end}") for end in ("value", "low", "high")}),
        times_faster=evaluated(f"figures/{name}/times_faster_than_teacher"),
        times_fewer_tokens=evaluated(f"figures/{name}/times_fewer_tokens_than_teacher"),
        job=job,
        training=_training(receipts, stage_name("distill", name)),
        gate=_verdict(receipts, stage_name("gate", name)),
        cost_ratio=_ratio(teacher.usd_per_million, job.usd_per_million),
        cost_ratio_running=_ratio(teacher.usd_per_million_running, job.usd_per_million_running),
    )


def _quality(line: Mapping[str, Any]) -> QualityFigure:
    return QualityFigure(value=line.get("quality"), low=line.get("low"), high=line.get("high"), method=line.get("method"))


def _job(receipts: Mapping[str, Receipt], source: str) -> BatchFigures:
    stage = stage_name("precompute", source)
    answered = result_of(receipts, PrecomputeResult, stage)
    if answered is None:
        return BatchFigures(usd_per_million=0.0) if source == Source.FALLBACK else BatchFigures()
    receipt = receipts[stage]
    known = {name: receipt.metrics.get(name) for name in BatchFigures.model_fields if name in receipt.metrics}
    job = BatchFigures.model_validate({"usd_per_hour": answered.usd_per_hour} | known)
    usd, start, work = job.usd_per_million, job.engine_start_s, job.generate_s
    # the engine's start is spread over more rows in a longer run: the price falls towards this
    running = usd * work / (work + start) if usd is not None and work and start is not None else None
    rows = {name: receipt.rows.get(name) for name in JOB_ROWS}
    return job.model_copy(update={"model": answered.model.name, "rows": rows, "usd_per_million_running": running})


def _training(receipts: Mapping[str, Receipt], stage: str) -> TrainingFigures:
    result = result_of(receipts, DistillResult, stage)
    if result is None:
        return TrainingFigures()
    receipt, encoder = receipts[stage], result.student == "encoder"
    return TrainingFigures(
        train_examples=receipt.rows.get("training_set"),
        **{name: receipt.metrics.get(name) for name in ("train_loss", "eval_loss", "train_seconds", "params", "trainable_params")},
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
    if path == "all":
        requests, end = _first(receipts, FIGURES["requests"]), ""
    else:
        requests, end = _first(receipts, [("replay", "rows", path)]), f"/{path}"
    return LatencySummary(
        requests=requests, **{p: _first(receipts, [("replay", "metrics", f"{p}_ms{end}")]) for p in ("p50", "p95", "p99")}
    )


def result_of(receipts: Mapping[str, Receipt], kind: type[R], *names: str) -> R | None:
    """The result of the first of these stages that was run."""
    results = (receipts[name].result for name in names if name in receipts)
    return next((result for result in results if isinstance(result, kind)), None)


def _first(receipts: Mapping[str, Receipt], places: Iterable[tuple[str, str, str]]) -> Any:
    """The first figure of `places` (stage, part of its receipt, name there) that there is."""
    found = (getattr(receipts[stage], part).get(name) for stage, part, name in places if stage in receipts)
    return next((value for value in found if value is not None), None)


def _task(receipts: Mapping[str, Receipt]) -> str | None:
    """A task that decided a stage's outputs; a log and its plan may have been made for another that reads the same columns."""
    tasks = sorted((not receipt.task_fingerprint, receipt.task) for receipt in receipts.values() if receipt.task)
    return tasks[0][1] if tasks else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def stage_order(receipts: Mapping[str, Receipt]) -> list[str]:
    """Stages in the order of the data's way; those of other names (a trained teacher, say) by when they ran."""
    known = [name for name in REPORTED_STAGES if name in receipts]
    for name in sorted((n for n in receipts if n not in REPORTED_STAGES), key=lambda n: (receipts[n].started, n)):
        place = next((i for i, k in enumerate(known) if receipts[k].started > receipts[name].started), len(known))
        known.insert(place, name)
    return known


def _step(name: str, receipt: Receipt, reused: bool) -> LineageStep:
    kept = {field: getattr(receipt, field) for field in ("path", "fingerprint", "inputs", "started", "seconds", "run_id")}
    return LineageStep(stage=name, reused=reused, **kept)
