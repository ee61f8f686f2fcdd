"""What a plan found that other stages read by name. Knows no rows."""

from __future__ import annotations

from pydantic import Field

from headtail.core.config import Config
from headtail.core.receipt import StageResult


class HeadForecast(Config):
    """Share of the events of the next days that the head covers."""

    horizon_days: int = Field(ge=1, description="days to come")
    value: float = Field(ge=0, le=1, description="the estimate")
    low: float | None = Field(None, description="lower end of the 90 % band; null: the log is too short for a band")
    high: float | None = Field(None, description="its upper end")
    independent: int = Field(0, description="earlier misses of which no two share a day; the band rests on them")


class PlanFigures(Config):
    """The head, and what it covers."""

    head_rows: int = Field(ge=0, description="queries of the head")
    human_labels: int = Field(ge=0, description="labelled rows to evaluate with")
    head_coverage: float = Field(ge=0, le=1, description="share of the events before the cut that the head covers")
    head_coverage_holdout: float = Field(ge=0, le=1, description="the same of holdout events; 0 without any")
    seen_coverage_holdout: float = Field(ge=0, le=1, description="share of holdout events whose query came before the cut; 0 without any")
    zipf_exponent: float = Field(description="slope of the log's frequencies by rank")


class Result(StageResult):
    """Where the head ends, why, and what is expected of it."""

    head_limit: str = Field(description="the limit that ended the head: rows, min_count, coverage, budget or break_even")
    head_last_count: int = Field(ge=0, description="events of the head's least frequent query")
    head_order: str = Field("count", description="which queries came first: count or value")
    rebuilt: bool = Field(False, description="the head was chosen on all days: holdout traffic cannot measure it")
    figures: PlanFigures | None = Field(None, description="the head, and what it covers; null: a run of an earlier version")
    forecasts: tuple[HeadForecast, ...] = Field((), description="by horizon; the last one is for horizon_days")
    replan_days: int | None = Field(None, description="days after which a head has lost more than replan_loss; null: not seen in the log")
    pays: bool | None = Field(None, description="whether answering ahead of time pays; null: not known")
    decision: tuple[str, ...] = Field((), description="what was decided, and why, in sentences")
    headline: tuple[str, ...] = Field((), description="those of them that the command prints")
