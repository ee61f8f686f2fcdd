"""What a simulation says of each design, as one tree per design."""

from __future__ import annotations

from pydantic import Field

from headtail.core.config import Config
from headtail.core.receipt import StageResult


class LatencyFigures(Config):
    """Milliseconds from a request to its answer, for a caller."""

    p50_ms: float = Field(description="half of the requests are answered within")
    p95_ms: float = Field(description="95 %")
    p99_ms: float = Field(description="99 %")


class WayFigures(Config):
    """Requests that took one way: cache, dynamic, realtime, escalated or fallback."""

    requests: int = Field(ge=0, description="how many")
    share: float = Field(ge=0, le=1, description="of all")
    latency: LatencyFigures | None = Field(None, description="how long they took; null without any")


class QueueFigures(Config):
    """One kind of process: front, student, or escalation (the bigger model)."""

    processes: int = Field(ge=0, description="how many there are; of the bigger model its slots")
    busy: float = Field(ge=0, description="share of the time that one of them works")
    longest: int = Field(ge=0, description="most requests that waited before one of them")
    wait_p50_ms: float = Field(ge=0, description="milliseconds that requests waited: half of those that came to it, at most")
    wait_p99_ms: float = Field(ge=0, description="99 %, at most")


class StratumFigures(Config):
    """Requests of one stratum."""

    share: float = Field(ge=0, le=1, description="of all requests")
    quality: float | None = Field(None, description="micro-F1; null: a source was not evaluated there, or too few labelled rows")
    low: float | None = Field(None, description="lower end of its 95 % interval")
    high: float | None = Field(None, description="upper end")
    rows: int = Field(0, ge=0, description="labelled rows that it rests on")


class QualityFigures(Config):
    """Micro-F1 of all requests, each stratum weighted by its requests; null where a source of the design was not evaluated."""

    value: float | None = Field(None, description="the estimate")
    low: float | None = Field(None, description="lower end of its 95 % interval")
    high: float | None = Field(None, description="upper end")
    against_best: float | None = Field(None, description="minus the design with the highest value, on the same labelled rows")
    against_best_low: float | None = Field(None, description="lower end of that difference's 95 % interval")
    strata: dict[str, StratumFigures] = Field({}, description="by stratum")
    unknown: str = Field("", description="why it is not known; empty: it is")


class CostFigures(Config):
    """USD per million requests; null where a price is not known."""

    machines: float | None = Field(None, description="front processes and students, for the whole day")
    ahead: float | None = Field(None, description="answers made ahead of time, spread over the days that they are served")
    escalation: float | None = Field(None, description="the bigger model")
    total: float | None = Field(None, description="their sum")


class NeededMachines(Config):
    """The fewest processes with which the target is met at this load."""

    fronts: int = Field(ge=1, description="front processes")
    students: int | None = Field(description="student engines; null: not even the most that were tried meet it")
    p99_ms: float = Field(description="99 % of the requests are answered within, with so many")
    late_share: float = Field(description="share of requests that got the fallback since the student was late or overloaded")
    usd_per_million: float | None = Field(None, description="USD per million requests with so many; null: a price is not known")


class DesignFigures(Config):
    """One design."""

    name: str = Field(description="its name")
    students: int = Field(ge=0, description="student engines; 0: misses get the fallback")
    requests: int = Field(ge=0, description="requests that were simulated")
    latency: LatencyFigures = Field(description="of all requests")
    ways: dict[str, WayFigures] = Field(description="by way; their requests add up to all")
    reasons: dict[str, int] = Field(description="requests by reason why they got the fallback, or an answer that is unsure")
    late_share: float = Field(
        0.0, ge=0, le=1, description="share of requests that got the fallback since the student was late or overloaded"
    )
    queues: dict[str, QueueFigures] = Field(description="by kind of process")
    batch_rows: float = Field(description="mean rows of a student's batch; 0 without students")
    quality: QualityFigures = Field(description="against people")
    cost: CostFigures = Field(description="of the design as it is")
    needed: NeededMachines = Field(description="what the target takes")


class Result(StageResult):
    """The designs side by side."""

    designs: tuple[DesignFigures, ...] = Field(description="in the order of the config")
    best: str | None = Field(None, description="the design with the highest quality; null: one is not known, or overloaded")
    enough: tuple[str, ...] = Field(
        (), description="designs without students whose quality is shown to be within quality_margin of the best, and that meet the target"
    )
    decision: tuple[str, ...] = Field((), description="what this says, in sentences")
