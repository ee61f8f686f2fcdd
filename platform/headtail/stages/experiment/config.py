"""What an experiment is: its tables and their columns, its arms, and when a figure is given. Knows no rows."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from headtail.adapters.storage.day_files import REQUESTS
from headtail.core.config import Config as PlainConfig
from headtail.core.config import StageConfig
from headtail.core.record import Day


class ExperimentColumns(PlainConfig):
    """Names of columns. A column may be in the log or in the table of outcomes. The defaults are the request log's."""

    unit: str = Field("query", description="what was assigned to an arm: a user, a session; for a canary the query", min_length=1)
    arm: str = Field("release", description="the arm; for a canary the release that answered", min_length=1)
    outcome: str = Field("degraded", description="the outcome of a request: a number, or true and false", min_length=1)
    key: str = Field("request_id", description="column that log and outcomes share", min_length=1)
    time: str = Field("time", description="time or day of a request; read where start or end is given")
    query: str = Field("query", description="the query; read where strata or changed answers are looked up")
    stratum: str = Field("", description="the stratum of a request; empty: looked up in `plan`")
    changed: str = Field("", description="true where both arms' answers differ, whichever was given; with trigger=column")
    covariate: str = Field(
        "", description="a number known before the experiment (CUPED); empty: the outcome before `start`, if there is one"
    )


class Config(StageConfig):
    """Which requests, which arms, how sure."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example: where torso ends and tail begins")
    mode: Literal["analysis", "power"] = Field(
        "analysis",
        description="analysis: compare the arms; power: before the start, which effect an experiment as long as the log can show",
    )
    log: str = Field(
        REQUESTS, description="`requests`: the store's request log; else a CSV, JSON Lines or Parquet file, a row per request or per unit"
    )
    assignments: str = Field("", description="CSV, JSON Lines or Parquet file of unit and arm; empty: the log has the arm")
    outcomes: str = Field("", description="CSV, JSON Lines or Parquet file of outcomes by columns.key; empty: the log has the outcome")
    columns: ExperimentColumns = Field(ExperimentColumns(), description="names of columns")
    control: str = Field("", description="the control arm: for a canary the id of the current release")
    treatment: str = Field("", description="the treatment arm: for a canary the id of the new release")
    share: float = Field(0.5, gt=0, lt=1, description="planned share of units (0..1) in the treatment arm")
    start: Day = Field("", description="first day (UTC), as 2031-01-31; earlier rows are what was known before; empty: all rows count")
    end: Day = Field("", description="first day (UTC) that no longer counts; empty: none")
    missing: float | None = Field(0.0, description="outcome of a request without a row in `outcomes`; null: the request is set aside")
    trigger: Literal["all", "snapshots", "column"] = Field(
        "all", description="whose answers changed: all; those that differ between the arms' releases' snapshots; columns.changed says it"
    )
    plan: str = Field("", description="plan receipt ref whose strata hold; empty: columns.stratum, or no strata")
    traffic: dict[str, float] = Field({}, description="share of all traffic (0..1) by stratum; empty: that of the log's requests")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of every interval (0..1)")
    tight_units: int = Field(10_000, ge=1, description="units at which the always-valid interval is narrowest; set before the start")
    min_units: int = Field(200, ge=2, description="units with changed answers that each arm of a stratum needs for a figure on all traffic")
    min_effective: float = Field(30.0, ge=1, description="the same, counted by how many units the variance rests on")
    least_traffic: float = Field(0.01, ge=0, lt=1, description="share of traffic (0..1) below which a stratum may be left out")
    ratio_level: float = Field(0.001, gt=0, lt=1, description="chance of a false alarm of the sample-ratio check")
    power: float = Field(0.8, gt=0.5, lt=1, description="chance that the smallest detectable effect is detected")
    effect: float | None = Field(
        None, gt=0, description="mode=power: difference of the outcome per request that is to be detected; null: none"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.trigger == "column" and not self.columns.changed:
            raise ValueError("trigger=column needs columns.changed")
        if self.traffic and (min(self.traffic.values()) < 0 or abs(sum(self.traffic.values()) - 1) > 0.01):
            raise ValueError(f"the shares of traffic must add up to 1: they add up to {sum(self.traffic.values()):.4g}")
        return self
