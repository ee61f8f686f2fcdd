"""The settings of a simulation: which requests, which designs, how long parts work, what they cost, what is to be met."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from headtail.core.config import Config as Fields
from headtail.core.config import StageConfig
from headtail.core.receipt import LATEST
from headtail.core.rows import Source
from headtail.stages.simulate.design import CACHED, ServiceTimes, ServingDesign
from headtail.stages.simulate.traffic import TrafficConfig

# the server as it is; the teacher's answers alone ahead of time; no cache; no student; the heuristic alone
DESIGNS = (
    ServingDesign(name="as_served"),
    ServingDesign(name="head_and_student", cached=(Source.TEACHER, Source.HUMAN_OVERRIDE)),
    ServingDesign(name="student_alone", cached=()),
    ServingDesign(name="no_student", students=0),
    ServingDesign(name="heuristic_alone", cached=(), students=0),
)


class SimulatedPrices(Fields):
    """USD. Null: not known, and then no total is."""

    front_usd_per_hour: float | None = Field(None, ge=0, description="USD per hour of one front process")
    student_usd_per_hour: float | None = Field(None, ge=0, description="USD per hour of one student engine")
    cached_usd_per_million: dict[str, float] = Field(
        {}, description="USD per million answers made ahead of time, by source; without one: of the snapshot's precompute receipts"
    )
    escalated_usd_per_million: float | None = Field(None, ge=0, description="USD per million answers of the bigger model")
    kept_days: float = Field(30, gt=0, description="days that answers made ahead of time are served before they are made anew")

    @field_validator("cached_usd_per_million")
    @classmethod
    def _sources(cls, value: dict[str, float]) -> dict[str, float]:
        if unknown := set(value) - set(CACHED):
            raise ValueError(f"a snapshot has no answers of {min(unknown)}; name some of {', '.join(CACHED)}")
        return value


class Target(Fields):
    """What a design must meet; the machines for it are searched."""

    p99_ms: float = Field(200, gt=0, description="milliseconds within which 99 % of the requests are answered")
    late_share: float = Field(
        0.001, ge=0, le=1, description="share of requests that may get the fallback since the student is late or overloaded"
    )
    front_busy: float = Field(0.7, gt=0, lt=1, description="share of the time that a front process may work")
    most_students: int = Field(64, ge=1, description="student engines that are tried at most")


class Config(StageConfig):
    """Which requests meet which designs."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    log: str = Field(LATEST, description="ingest receipt: holdout traffic, and how often queries came")
    plan: str = Field(LATEST, description="plan receipt: the strata")
    evaluation: str = Field(LATEST, description="evaluate receipt: the quality of each answer source by stratum; empty: none is shown")
    snapshot: str = Field("current", description="whose answers caches hold: `current` for the release's, or a snapshot id")
    traffic: TrafficConfig = Field(TrafficConfig(), description="the requests")
    designs: tuple[ServingDesign, ...] = Field(DESIGNS, min_length=1, description="what is compared")
    times: ServiceTimes = Field(ServiceTimes(), description="how long the parts work")
    times_url: str = Field(
        "", description="a running server whose parts are measured instead of `times`: idle, no API keys or HEADTAIL_API_KEY"
    )
    metrics_url: str = Field(
        "", description="its /metrics, which have the processor time of its front processes; empty: on the port after that of times_url"
    )
    probes: int = Field(300, ge=50, description="hits, and as many misses, that it is asked for that")
    cores: int = Field(0, ge=0, description="cores that fronts and students share; 0: each process has one of its own")
    prices: SimulatedPrices = Field(SimulatedPrices(), description="what machines and answers cost")
    target: Target = Field(Target(), description="what is to be met")
    realtime: str = Field(
        "", description="answer source of the evaluation that stands for the realtime student; empty: realtime_student, else batch_student"
    )
    bigger: str = Field(Source.TEACHER, description="answer source of the evaluation that stands for the bigger model")
    quality_margin: float = Field(0.02, ge=0, le=1, description="micro-F1 below the best design that is as good as it")
    seed: int = Field(0, ge=0, description="seed of arrivals and service times")

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [design.name for design in self.designs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"designs: {min(twice)} is there twice; name each design once")
        return self
