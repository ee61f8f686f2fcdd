"""The tree of a report: what was found overall, then by answer source, by path, by stage. Null for what was not run, or cannot be known.

In: nothing. Out: Summary and its parts; `summarise` fills them (summary.py). Knows no receipts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from headtail import __version__
from headtail.core.answer_source import SOURCES, AnswerSource
from headtail.core.config import Config
from headtail.core.evidence import Criterion
from headtail.core.paths import StoreId, StoreIdOrEmpty, StorePath
from headtail.core.rows import State
from headtail.stages.calibrate.result import Result as CalibrateResult
from headtail.stages.publish.result import WithheldAnswer

PATHS = ("cache", "realtime", "fallback")
JOB_ROWS = ("in", *(str(s) for s in State), "duplicates", "reused", "recomputed", "resumed")


def stages_of(sources: Sequence[AnswerSource]) -> tuple[str, ...]:
    """The stages of a pipeline with these answer sources, in the order of the data's way."""
    teachers, students = ([source for source in sources if source.role == role] for role in ("teacher", "student"))
    answered = [source.stage("precompute") for source in teachers]
    learnt = [source.stage(stage) for source in students for stage in ("distill", "precompute")]
    gates = [source.stage("gate") for source in students]
    head = ("publish_head", "evaluate_teacher", "curate")
    return ("ingest", "plan", *answered, *head, *learnt, "evaluate", *gates, "calibrate", "publish", "replay")


REPORTED_STAGES = stages_of(SOURCES)


class PipelineFigures(Config):
    """Figures of log, plan, cache and replay. Null for what was not run, or cannot be known."""

    log_events: int | None = Field(None, description="events of the log")
    log_queries: int | None = Field(None, description="different queries before the cut")
    holdout_events: int | None = Field(None, description="events of holdout traffic")
    unseen_share_holdout_events: float | None = Field(None, description="share of holdout events whose query did not come before the cut")
    labelled_rows: int | None = Field(None, description="labelled rows to evaluate with")
    head_rows: int | None = Field(None, description="queries of the head")
    head_coverage_forecast: float | None = Field(None, description="share of the events to come that the head is expected to cover")
    head_coverage_forecast_low: float | None = Field(None, description="lower end of its 90 % band")
    head_coverage_forecast_high: float | None = Field(None, description="upper end")
    forecast_horizon_days: int | None = Field(None, description="days to come that it is about")
    head_coverage: float | None = Field(None, description="share of the events before the cut that the head covers")
    head_coverage_holdout: float | None = Field(None, description="the same of holdout events")
    seen_coverage_holdout: float | None = Field(None, description="share of holdout events whose query came before the cut")
    zipf_exponent: float | None = Field(None, description="slope of the log's frequencies by rank")
    training_rows: int | None = Field(None, description="rows of the training set")
    training_dropped: int | None = Field(None, description="answers that curation left out")
    published_rows: int | None = Field(None, description="answers in the snapshot")
    answers_withheld: int | None = Field(None, description="answers that guardrails kept out of it")
    coverage_log: float | None = Field(None, description="share of the events before the cut that the snapshot answers")
    coverage_log_head: float | None = Field(None, description="the same of the head's answers alone")
    coverage_holdout_traffic: float | None = Field(None, description="share of replayed requests answered from the snapshot")
    cache_hit_share: float | None = Field(None, description="the same")
    realtime_share: float | None = Field(None, description="share answered by the realtime student")
    fallback_share: float | None = Field(None, description="share answered by the fallback")
    degraded_share: float | None = Field(None, description="share that the fallback answered since the realtime student could not")
    requests: int | None = Field(None, description="requests that were replayed")
    request_errors: int | None = Field(None, description="requests without an answer")
    requests_per_s: float | None = Field(None, description="requests per second")
    replay_quality: float | None = Field(None, description="micro-F1 on replayed requests whose query has human labels")


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
    params: int | None = Field(None, description="parameters")
    trainable_params: int | None = Field(None, description="parameters that were trained")
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

    source: AnswerSource = Field(description="its name, role and colours")
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
    def name(self) -> str:
        """Its name in tables."""
        return self.source.name

    @property
    def label(self) -> str:
        """Its name for people."""
        return self.source.label


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
    figures: PipelineFigures = Field(description="figures of log, plan, cache and replay")
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
        return self._of("teacher")[0]

    @property
    def students(self) -> list[SourceSummary]:
        """The students, the batch student first."""
        return self._of("student")

    @property
    def models(self) -> list[SourceSummary]:
        """Answer sources in which a model answers, the teacher first."""
        return [source for source in self.sources.values() if source.source.model]

    @property
    def columns(self) -> list[SourceSummary]:
        """Answer sources that the report shows."""
        return [self.sources[name] for name in self.shown]

    @property
    def with_quality(self) -> list[SourceSummary]:
        """Answer sources with a quality figure."""
        return [source for source in self.sources.values() if source.quality["all"].value is not None]

    def _of(self, role: str) -> list[SourceSummary]:
        return [source for source in self.sources.values() if source.source.role == role]
