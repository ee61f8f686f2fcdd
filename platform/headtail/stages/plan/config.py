"""What to plan: where the head ends, how far ahead is looked, what answers cost."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from headtail.core.config import Config as BaseConfig
from headtail.core.config import StageConfig


class Head(BaseConfig):
    """Limits of the head; the one that gives the smallest head rules."""

    coverage: float | None = Field(
        0.5,
        gt=0,
        le=1,
        description="share of events up to the cut that the head covers; null for no such limit, as with budget_usd",
    )
    rows: int | None = Field(None, ge=1, description="queries the teacher may answer ahead of time; null for no such limit")
    min_count: int = Field(2, ge=1, description="events from which a query may be in the head")
    break_even: bool = Field(True, description="end the head where a further query costs more than it saves, when prices are known")
    order: Literal["auto", "count", "value"] = Field(
        "auto",
        description="which queries come first. count: events up to the cut. value: events expected on the days to come, per USD. "
        "auto: value where that covered more of the log's later days, else count",
    )


class Price(BaseConfig):
    """What a million answers cost: a figure, or a precompute receipt that has one."""

    usd_per_million: float | None = Field(None, ge=0, description="USD per million queries; null: not known")
    receipt: str = Field(
        "",
        description="precompute receipt of this answer source whose price counts where no figure is set; latest: its last run; empty: none",
    )


class Prices(BaseConfig):
    """What answers cost, and what a hit is worth."""

    teacher: Price = Field(Price(), description="the teacher, ahead of time")
    batch_student: Price = Field(Price(), description="the batch student, ahead of time")
    realtime_student: Price = Field(Price(), description="the realtime student, which answers each miss: USD per million requests")
    teacher_usd_per_million_chars: float = Field(
        0.0, ge=0, description="what the teacher costs further per million characters of a query and its side inputs, in USD"
    )
    hit_value_usd_per_million: float = Field(
        0.0, ge=0, description="what a million hits are worth in USD beyond the realtime student's answers that they save"
    )
    training_usd: float | None = Field(None, ge=0, description="what training the batch student costs once, in USD; null: not known")


class Config(StageConfig):
    """What to plan."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped one: its side inputs and strata")
    log: str = Field("latest", description="ingest receipt: latest, a fingerprint or its folder")
    head: Head = Field(Head(), description="where the head ends")
    horizon_days: int = Field(7, ge=1, le=28, description="days to come that the plan is made for; an answer must pay for itself in them")
    budget_usd: float | None = Field(
        None, gt=0, description="most that the teacher may cost in USD, for head, sample and human labels; null: no budget"
    )
    prices: Prices = Field(Prices(), description="what answers cost")
    replan_loss: float = Field(
        0.02, gt=0, lt=1, description="share of events that a head may lose by its age before a plan is due that is made anew"
    )
    rebuild: bool = Field(
        False, description="choose the head again on all days, holdout traffic included, once it was measured on holdout traffic"
    )
    teacher_sample_rows: int = Field(
        2000, ge=0, description="queries outside the head that the teacher also answers, half torso, half tail"
    )
    max_student_rows: int | None = Field(
        None, ge=1, description="maximum of queries that the batch student answers, most frequent first; null for all"
    )
    seed: int = Field(0, ge=0, description="seed of the teacher's sample")

    @model_validator(mode="before")
    @classmethod
    def _budget_rules(cls, data: Any) -> Any:
        """A budget is spent: the default of head.coverage does not end the head before it."""
        if isinstance(data, dict) and data.get("budget_usd") is not None:
            head = data.get("head", {})
            if isinstance(head, dict) and "coverage" not in head:
                return {**data, "head": {**head, "coverage": None}}
        return data
