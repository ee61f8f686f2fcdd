"""What ingest found: the files that were read, those that were not, and the days that the log covers. Knows no rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from headtail.core.config import Config
from headtail.core.receipt import StageResult

RuleName = Literal["blanks", "case", "characters", "personal_data"]


class SourceFile(Config):
    """A file that was read: its place and digest."""

    file: str = Field(description="where it is")
    kind: str = Field(description="delimited, lines or parquet")
    bytes: int = Field(ge=0, description="size")
    sha256: str = Field(description="hex digest of the bytes")


class FileSetAside(Config):
    """A file that was not read."""

    name: str = Field(description="its name below the place that was named")
    reason: str = Field(description="why")


class RuleCoverage(Config):
    """What one rule of the normal form brings."""

    rule: RuleName = Field(description="characters: what NFKC, signs of a keyboard and unseen characters change")
    changed_events: float = Field(ge=0, le=1, description="share of all events whose text the rule changed")
    merged_events: float = Field(ge=0, le=1, description="share of all events that it changed and whose query also came without the rule")
    merged_queries: int = Field(ge=0, description="queries that came both with and without the rule")


class LogTotals(Config):
    """What the log comes to."""

    events: int = Field(ge=0, description="events of the log: those that were used, those held out and those set aside")
    queries: int = Field(ge=0, description="different queries before the cut")
    holdout_events: int = Field(ge=0, description="events of holdout traffic")
    human_labels: int = Field(ge=0, description="labelled rows to evaluate with")
    unseen_share_holdout_events: float = Field(ge=0, le=1, description="share of holdout events whose query did not come before the cut")


class Result(StageResult):
    """What the log was made of. Days are UTC, ISO 8601; null without times."""

    log: tuple[SourceFile, ...] = Field((), description="files of the log")
    labels: tuple[SourceFile, ...] = Field((), description="files of human labels")
    files_set_aside: tuple[FileSetAside, ...] = Field((), description="files that were not read")
    side_inputs: tuple[str, ...] = Field((), description="the task's side inputs, which are columns of `queries`")
    rules: tuple[RuleCoverage, ...] = Field(
        (), description="what each rule of the normal form brings, in the order in which they are applied"
    )
    first_day: str | None = Field(None, description="first day of the log")
    last_day: str | None = Field(None, description="last day of the log")
    totals: LogTotals | None = Field(None, description="what the log comes to; null: a run of an earlier version")
    holdout_from: str | None = Field(None, description="first day of holdout traffic")
